# SPDX-License-Identifier: GPL-2.0-or-later
# shellcheck shell=bash disable=SC1003,SC2016,SC2034
cd /etc/systemd/system || exit
while IFS= read -r name; do
    place=/srv/odd/$name
    mkdir -p "$place/lower" "$place/upper" "$place/mount" "$place/service"
    echo "$name" >"$place/lower/file"
    escaped=$(printf %s "$place/lower" | sed 's/[\\:]/\\&/g')
    unionfs unit "$escaped" "$place/upper" "$place/service" --service --output . >>/tmp/units
    # mount(8) or systemd have no way to write these in names of layers.
    case $name in *[\"\\]* | *'${'*)
        ! unionfs unit "$escaped" "$place/upper" "$place/mount" --output . || exit
        # In that of the mount point only the last.
        case $name in *'${'*) continue ;; esac
        plain=$(mktemp -d /srv/plain-XXXXXX)
        mkdir "$plain/upper"
        cp -r "$place/lower" "$plain/lower"
        unionfs unit "$plain/lower" "$plain/upper" "$place/mount" --output . >>/tmp/units
        ;;
    *) unionfs unit "$escaped" "$place/upper" "$place/mount" --output . >>/tmp/units ;;
    esac
    [ -e "$(systemd-escape --path --suffix=mount "$place/mount")" ]
done <<'END'
with blanks
50% $HOME %i %%
${x}
colon:comma,equals=
back\slash\x20\\
it's "quoted"
é 日本 ☃
-dash;and&amp#
END
systemctl daemon-reload
mapfile -t units < <(sed 's,^./,,' /tmp/units)
# It takes a colon for the start of an alias.
mapfile -t plain < <(printf '%s\n' "${units[@]}" | grep -v :)
systemd-analyze verify --man=no "${plain[@]}"
mapfile -t mounts < <(printf '%s\n' "${units[@]}" | grep '[.]mount$')
mapfile -t services < <(printf '%s\n' "${units[@]}" | grep '[.]service$')
# One after the other, as the two of a name share an upper.
for kind in mount service; do
    declare -n list=${kind}s
    systemctl start "${list[@]}"
    for place in /srv/odd/*; do
        [ "$kind" = service ] || mountpoint "$place/mount" || continue
        [ "$(cat "$place/$kind/file")" = "${place##*/}" ]
        echo "$kind" >"$place/$kind/new-$kind"
    done
    systemctl stop "${list[@]}"
    for place in /srv/odd/*; do
        [ "$kind" = mount ] || grep "$kind" "$place/upper/new-$kind"
    done
done
grep -l mount /srv/odd/*/upper/new-mount | wc -l | grep 5
grep -l mount /srv/plain-*/upper/new-mount | wc -l | grep 2
# A backslash at the end of a line would join it with the next.
mkdir '/srv/end\' /srv/end-lower /srv/end-upper
for kind in mount service; do
    word=()
    [ "$kind" = mount ] || word=(--service)
    unionfs unit /srv/end-lower /srv/end-upper '/srv/end\' "${word[@]}" --output . >/tmp/unit
    unit=$(sed 's,^./,,' /tmp/unit)
    systemctl daemon-reload
    systemctl start "$unit"
    mountpoint '/srv/end\'
    [ "$kind" = mount ] || systemctl show -P StatusText "$unit" | grep -F '/srv/end\'
    systemctl stop "$unit"
    ! mountpoint '/srv/end\' || exit
done

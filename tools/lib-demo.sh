# SPDX-License-Identifier: GPL-2.0-or-later
# shellcheck shell=bash
#
# The steps of tools/demo. Expects tools/lib.sh, and $lower and $keep from its caller.

if is_root; then
    PLACE=${UNIONFS_DEMO:-/var/lib/unionfs-demo}
else
    PLACE=${XDG_CACHE_HOME:-$HOME/.cache}/unionfs-demo
fi
MNT=$PLACE/mnt
UNIONFS=$VENV/bin/unionfs
ROOT_ENV=(HOME=/root LANG=C.UTF-8 DEBIAN_FRONTEND=noninteractive
    PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin)
counter=0

step() {
    counter=$((counter + 1))
    printf '\n== %d. %s\n' "$counter" "$*"
}

# show COMMAND...: says what it does and does it, in $PLACE.
show() {
    local words="${*//"$PLACE/"/}"
    printf '   $ %s\n' "${words/#"$UNIONFS"/unionfs}"
    "$@" 2>&1 | sed 's/^/     /'
}

# inside COMMAND...: runs it as root with the union as its /, in mount and process namespaces of
# its own: the binds are seen by nobody else, and whatever the command started ends with it.
inside() {
    printf '   union# %s\n' "$*"
    # shellcheck disable=SC2016
    unshare --mount --propagation private --pid --fork --kill-child bash -euc '
        mnt=$1
        shift
        mount -t proc proc "$mnt/proc"
        mount --rbind /dev "$mnt/dev"
        mount -t tmpfs tmpfs "$mnt/tmp"
        mount -t tmpfs tmpfs "$mnt/run"
        # Where the name points to within the tree; under /run it does not exist yet.
        resolv=$(chroot "$mnt" readlink -m /etc/resolv.conf)
        [ -e "$mnt$resolv" ] || { mkdir -p "$mnt${resolv%/*}" && : >"$mnt$resolv"; }
        [ ! -e /etc/resolv.conf ] || mount --bind /etc/resolv.conf "$mnt$resolv"
        chroot "$mnt" env "$@" || exit' inside "$MNT" "${ROOT_ENV[@]}" "$@" 2>&1 </dev/null |
        sed 's/^/     /'
}

# way: how this user can go about it.
way() {
    if is_root; then
        echo system
        return
    fi
    [ -w /dev/fuse ] || die "/dev/fuse is not for users on this machine; as root: chmod 666 /dev/fuse"
    if command -v newuidmap >/dev/null && command -v mmdebstrap >/dev/null && [ -n "$(debian_sources)" ] &&
        unshare --user --map-root-user --map-auto true 2>/dev/null; then
        echo namespace
    else
        echo plain
    fi
}

# The trees a manifest covers: all of the lower, but of a running machine only what nothing else
# writes while we look.
covered() {
    if [ "$lower" = / ]; then
        (cd / && ls -d usr etc opt srv boot var/lib/dpkg 2>/dev/null) || true
    else
        echo .
    fi
}

# manifest FILE: one line for each file of the lower: name, kind, mode, owner, size, times, inode.
manifest() {
    local -a trees
    mapfile -t trees < <(covered)
    {
        # What a user may not read cannot be compared by that user.
        cd "$lower" || exit
        find "${trees[@]}" -xdev -printf '%p %y %m %U:%G %s %T@ %C@ %i %n %l\n' 2>/dev/null || true
    } | LC_ALL=C sort >"$1"
    printf '   %d entries, sha256 of all names, modes, owners, sizes, times and inode numbers:\n     %s\n' \
        "$(wc -l <"$1")" "$(sha256sum <"$1" | cut -d' ' -f1)"
}

mount_union() {
    show "$UNIONFS" mount "$lower" "$UPPER" "$MNT" "$@"
    mountpoint -q "$MNT" || die "$MNT is not mounted"
}

unmount() {
    mountpoint -q "$MNT" || return 0
    "$UNIONFS" umount "$MNT" || umount --lazy "$MNT" || fusermount3 -u -z "$MNT"
}

# what_landed: the upper's files as its owner sees them.
what_landed() {
    local kind
    printf '   %s holds %s:' "$UPPER" "$(du -sh --exclude=.unionfs "$UPPER" | cut -f1)"
    for kind in f:files d:directories l:symlinks c:whiteouts; do
        printf ' %d %s' "$(in_upper -type "${kind%%:*}" -print | wc -l)" "${kind##*:}"
    done
    printf '\n   directories with the most:\n'
    in_upper -type f -printf '%P\n' | awk -F/ '{ print $1 "/" $2 "/" $3 }' | sort | uniq -c |
        sort -rn | head -n 8 | sed 's/^/     /' || true
    printf '   whiteouts (what was deleted or renamed away):\n'
    in_upper -type c -printf '     %P\n' | sort | head -n 8 || true
}
in_upper() { find "$UPPER" -mindepth 1 -name .unionfs -prune -o "$@"; }

check_lower() {
    manifest "$PLACE/after"
    if ! diff "$PLACE/before" "$PLACE/after" >"$PLACE/diff"; then
        head -n 20 "$PLACE/diff" >&2
        die "the lower changed (above)"
    fi
    printf '   the lower is as it was\n'
}

# debian_tar: the lower for a user namespace, which cannot be made as a directory from outside.
debian_tar() { debian_tree "$PLACE/lower.tar" python3-venv; }

prepare_lower() {
    cd "$PLACE" || exit
    printf '   $ cd %s\n' "$PLACE"
    if [ "$lower" = / ]; then
        local dir
        for dir in /usr /etc /var /opt; do
            ! mountpoint -q "$dir" ||
                die "$dir is a file system of its own and would be missing; leave out --lower /"
        done
        # Outside of the lower, and gone with the demo.
        mkdir "$PLACE/memory"
        show mount -t tmpfs -o mode=700 tmpfs "$PLACE/memory"
        UPPER=$PLACE/memory/upper
    elif [ -z "$lower" ]; then
        lower=$PLACE/lower
        if [ -e "$PLACE/lower.tar" ]; then
            mkdir "$lower"
            show tar -C "$lower" --exclude='./dev/*' -xf "$PLACE/lower.tar"
        else
            printf '   making a small Debian at %s (mmdebstrap, about half a minute)\n' "$lower"
            debian_tree "$lower" python3-venv
        fi
    fi
    mkdir "$UPPER"
}

# first_absent PACKAGE...: the first that the tree does not have yet.
first_absent() {
    local name
    for name in "$@"; do
        [ -e "$lower/var/lib/dpkg/info/$name.list" ] || break
    done
    echo "$name"
}

UPPER=$PLACE/upper

system_demo() {
    local program
    step "the lower: a real Debian tree"
    prepare_lower
    manifest "$PLACE/before"
    program=$(first_absent figlet hello tree)

    step "the union of $lower and an empty upper"
    mount_union

    step "the package manager, in the union"
    inside apt-get -qq update
    inside apt-get -qq -y -o Dpkg::Use-Pty=0 install --no-install-recommends "$program"
    inside python3 -m venv /opt/app
    inside /opt/app/bin/pip install --quiet cowsay
    inside useradd --create-home alice
    inside mv /usr/share/doc/apt /usr/share/doc/apt-renamed
    inside rm -r /usr/share/doc/tar
    inside chmod o-rwx /usr/bin/dpkg

    step "what is mounted, and what landed in the upper"
    show "$UNIONFS" status "$MNT"
    what_landed

    step "unmounted and mounted again: still there"
    show "$UNIONFS" umount "$MNT"
    mount_union
    case $program in
    figlet) inside figlet unionfs ;;
    tree) inside tree -L 2 /opt ;;
    *) inside "$program" ;;
    esac
    inside /opt/app/bin/cowsay -t "installed by pip, in the union"
    inside su alice -c 'id; ls -lad ~'
    inside dpkg --verify "$program"
    inside ls -d /usr/share/doc/apt-renamed

    step "the lower did not change"
    check_lower
}

user_demo() {
    local owner
    lower=${lower:-/usr}
    owner=squash_to_uid=$(id -u),squash_to_gid=$(id -g)
    step "the lower: $lower"
    cd "$PLACE" || exit
    printf '   $ cd %s\n' "$PLACE"
    manifest "$PLACE/before"
    mkdir "$UPPER"

    step "the union of $lower and an empty upper, all of it shown as yours"
    mount_union -o "$owner"

    step "changes that you may not make to $lower itself"
    show "$VENV/bin/pip" install --quiet --target "$MNT/lib/demo" cowsay
    show sed -i 's/^PRETTY_NAME=.*/PRETTY_NAME="a union"/' "$MNT/lib/os-release"
    show mv "$MNT/share/common-licenses" "$MNT/share/licenses"
    show rm -r "$MNT/share/doc/tar"
    show chmod 700 "$MNT/bin/dpkg"

    step "what is mounted, and what landed in the upper"
    show "$UNIONFS" status "$MNT"
    what_landed

    step "unmounted and mounted again: still there"
    show "$UNIONFS" umount "$MNT"
    mount_union -o "$owner"
    show env PYTHONPATH="$MNT/lib/demo" python3 -m cowsay -t "installed by pip, in the union"
    show grep PRETTY_NAME "$MNT/lib/os-release"
    show ls "$MNT/share/licenses"

    step "the lower did not change"
    check_lower
}

# sweep: unmounts and removes whatever a demo left.
sweep() {
    cd /
    [ -e "$PLACE" ] || return 0
    unmount
    ! mountpoint -q "$PLACE/memory" || umount "$PLACE/memory"
    # Never into anything that is still mounted, and, for a user, also what subordinate ids own.
    if ! rm -rf --one-file-system "$PLACE" 2>/dev/null; then
        is_root || unshare --user --map-root-user --map-auto rm -rf --one-file-system "$PLACE"
    fi
    [ ! -e "$PLACE" ] || die "could not remove $PLACE"
}

# finish: at the end of a demo, however it came about.
finish() {
    local status=$?
    trap - EXIT
    trap '' INT TERM HUP
    if [ -n "$keep" ] && [ "$status" = 0 ]; then
        say "left for you: $PLACE (mounted: $(mountpoint -q "$MNT" && echo "$MNT" || echo no)); tools/demo --clean removes it"
    else
        sweep
        say "cleaned up: nothing is mounted, $PLACE is gone"
    fi
    exit "$status"
}

# SPDX-License-Identifier: GPL-2.0-or-later
# shellcheck shell=bash disable=SC2016,SC2034
daemon() {
    unionfs status --json "$1" | python3 -c 'import json, sys; print(json.load(sys.stdin)[0]["pid"])'
}
main() { systemctl show -P MainPID "$1"; }
kill -9 "$(daemon /srv/tree)"
await '! ls /srv/tree 2>/dev/null'
systemctl restart srv-tree.mount
grep hello /srv/tree/file
# A daemon of a profile: the service starts all of it anew.
kill -9 "$(daemon /srv/system/var)"
await '[ "$(systemctl show -P NRestarts unionfs@system)" = 1 ]'
await 'systemctl is-active unionfs@system'
grep z /srv/system/etc/kept
ls /srv/system/var
# Who watches them.
kill -9 "$(main unionfs@system)"
await '[ "$(systemctl show -P NRestarts unionfs@system)" = 2 ]'
await 'systemctl is-active unionfs@system'
grep z /srv/system/etc/kept

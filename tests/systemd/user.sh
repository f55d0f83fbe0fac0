# SPDX-License-Identifier: GPL-2.0-or-later
# shellcheck shell=bash
systemctl start user@1234.service || { journalctl -b -q -n 40; exit 1; }
as() { runuser -u stranger -- env XDG_RUNTIME_DIR=/run/user/1234 "$@"; }
as systemctl --user start unionfs@mine
as grep hello /home/stranger/view/file
as sh -c 'echo u >/home/stranger/view/new'
as systemctl --user restart unionfs@mine
as grep u /home/stranger/view/new
as systemctl --user show -P StatusText unionfs@mine | grep '1 mount$'

# Two services, one image: the program goes over from the one that has started it.
as systemctl --user start unionfs@app@one unionfs@app@two || { journalctl -b -q -n 60; exit 1; }
serving() { pgrep -x -u stranger fuse2fs; }
before=$(serving)
as sh -c 'echo 1 >/home/stranger/one/new && echo 2 >/home/stranger/two/new'
starter=$(grep -o 'unionfs@app@[a-z]*' "/proc/$before/cgroup" | head -n 1)
cat "/proc/$before/cgroup"
case $starter in
*one) other=two ;;
*two) other=one ;;
esac
as systemctl --user stop "$starter"
cat "/proc/$before/cgroup"
[ "$(serving)" = "$before" ]
as sh -c "echo more >/home/stranger/$other/more"
as systemctl --user start "$starter"
# Killed, it is mounted anew, and its end is not that of the program either.
daemon=$(as unionfs status --json "/home/stranger/$other" | grep -Po '"pid": \K[0-9]+' | head -n 1)
kill -9 "$daemon"
await "as systemctl --user show -P NRestarts unionfs@app@$other | grep '[1-9]'"
await "as systemctl --user is-active unionfs@app@$other"
cat "/proc/$before/cgroup"
as grep more "/home/stranger/$other/more"
as grep . /home/stranger/one/new /home/stranger/two/new
as systemctl --user stop unionfs@app@one unionfs@app@two
[ -z "$(serving)" ]
e2fsck -fn /home/stranger/store.img

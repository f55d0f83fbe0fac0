# SPDX-License-Identifier: GPL-2.0-or-later
# shellcheck shell=bash
systemctl start user@1234.service || { journalctl -b -q -n 40; exit 1; }
as() { runuser -u stranger -- env XDG_RUNTIME_DIR=/run/user/1234 "$@"; }
as systemctl --user start unionfs@mine
as grep hello /home/stranger/view/file
as sh -c 'echo u >/home/stranger/view/new'
as systemctl --user restart unionfs@mine
as grep u /home/stranger/view/new
as systemctl --user show -P StatusText unionfs@mine | grep '1 mounts'

# SPDX-License-Identifier: GPL-2.0-or-later
# shellcheck shell=bash
systemctl is-active unionfs@degraded
grep memory /run/unionfs/degraded/degraded
systemctl show -P StatusText unionfs@degraded | grep degraded
journalctl -b -q -u unionfs@degraded -p warning | grep 'runs without its store'
touch /srv/degraded/etc/new

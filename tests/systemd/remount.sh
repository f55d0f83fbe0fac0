# SPDX-License-Identifier: GPL-2.0-or-later
# shellcheck shell=bash
mount -o remount /srv/tree
mount -o remount,rw /srv/tree
mount -o remount,ro /srv/tree >/tmp/said 2>&1 || [ $? = 32 ]
grep 'cannot be remounted with ro' /tmp/said
systemctl reload srv-tree.mount
systemctl is-active srv-tree.mount
echo y >/srv/tree/still-writable

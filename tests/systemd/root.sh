# SPDX-License-Identifier: GPL-2.0-or-later
# shellcheck shell=bash
test "$(findmnt -n -o FSTYPE /)" = fuse.unionfs
test ! -e /etc/initrd-release
touch /etc/by-the-system
unionfs status /
grep 'with changes in /out/changes' /run/unionfs/root/boot
test ! -e /run/unionfs/root/degraded
set -- /run/sendsigs.omit.d/unionfs-*
test "$(head -c 1 "/proc/${1##*-}/cmdline")" = @
! systemctl is-failed unionfs-boot.service

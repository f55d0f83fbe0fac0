# SPDX-License-Identifier: GPL-2.0-or-later
# shellcheck shell=bash
# In a container /proc/cmdline is the machine's.
mount --bind /srv/cmdline /proc/cmdline
! systemctl is-active unionfs-boot.service
systemctl start initrd-root-fs.target
systemctl is-active unionfs-boot.service sysroot.mount
test "$(findmnt -n -o FSTYPE /sysroot | tail -n 1)" = fuse.unionfs
grep lower /sysroot/etc/name
echo changed >/sysroot/etc/name
grep 'with changes in /srv/store.img:/here' /run/unionfs/root/boot

# Its daemon is spared at the switch to the system, and by whoever stops the service.
pid=$(unionfs status --json /sysroot | sed -n 's/.*"pid": \([0-9]*\).*/\1/p')
test "$(head -c 1 "/proc/$pid/cmdline")" = @
test -e "/run/sendsigs.omit.d/unionfs-$pid"
systemctl stop unionfs-boot.service
grep changed /sysroot/etc/name
umount /sysroot
await "! test -e /proc/$pid"

# Without its store it is a union all the same, and the boot goes on.
echo unionfs.store=/srv/nothing.img >/srv/cmdline
systemctl start unionfs-boot.service
systemctl show -P ExecMainStatus unionfs-boot.service | grep -x 64
grep nothing.img /run/unionfs/root/degraded
grep lower /sysroot/etc/name
echo forgotten >/sysroot/etc/name
umount /sysroot
systemctl stop unionfs-boot.service

# Nothing is done where no root is mounted.
systemctl stop sysroot.mount
rm /etc/systemd/system/sysroot.mount
systemctl daemon-reload
rm -r /run/unionfs/root
systemctl start unionfs-boot.service
test ! -e /run/unionfs/root

# SPDX-License-Identifier: GPL-2.0-or-later
# shellcheck shell=bash
systemctl is-active unionfs@degraded
grep memory /run/unionfs/degraded/degraded
systemctl show -P StatusText unionfs@degraded | grep degraded
journalctl -b -q -u unionfs@degraded -p warning | grep 'runs without its store'
touch /srv/degraded/etc/new

# A unit that fails says so, and nothing else fails with it.
await 'systemctl is-failed unionfs-degraded@degraded'
systemctl list-units --failed --plain | grep unionfs-degraded@degraded.service
journalctl -b -q -u unionfs-degraded@degraded | grep 'runs without its store'

# The same for a line of fstab.
systemctl is-active srv-lost.mount
await 'systemctl is-failed unionfs-degraded@srv-lost'
journalctl -b -q -u unionfs-degraded@srv-lost | grep 'runs without its store.*/data/later'
systemctl show -P Result unionfs-degraded@srv-lost | grep exit-code
test "$(systemctl show -P ActiveEnterTimestampMonotonic local-fs.target)" -gt 0

# Once the store is there it is taken back.
mkdir /data/later
systemctl restart srv-lost.mount
await '! systemctl is-failed unionfs-degraded@srv-lost'
touch /srv/lost/kept
test -e /data/later/kept
systemctl is-failed unionfs-degraded@degraded

# What the initramfs has had to do without is told by the generator.
mkdir -p /run/unionfs/root
echo 'no device has LABEL=persist' >/run/unionfs/root/degraded
systemctl daemon-reload
systemctl show -P Wants local-fs.target | grep -w unionfs-degraded@root.service
! systemctl start unionfs-degraded@root
systemctl is-failed unionfs-degraded@root
journalctl -b -q -u unionfs-degraded@root | grep LABEL=persist
rm -r /run/unionfs/root
systemctl start unionfs-degraded@root

# SPDX-License-Identifier: GPL-2.0-or-later
# shellcheck shell=bash
# A profile of the boot whose store is broken, with no word of a fallback: the system is up without it.
test "$(systemctl show -P ActiveEnterTimestampMonotonic local-fs.target)" -gt 0
! mountpoint /srv/other/etc
await 'systemctl is-failed unionfs-degraded@broken'
grep 'broken is not up: /etc' /run/unionfs/broken/degraded
journalctl -b -q -u unionfs@broken | grep '/data/broken.img'

# Once the store is there it is taken back.
mkdir /srv/disk/mended
echo 'store = "/srv/disk/mended"' >/etc/unionfs/broken.toml.d/mended.toml
systemctl reset-failed unionfs@broken
systemctl restart unionfs@broken
await '! systemctl is-failed unionfs-degraded@broken'
mountpoint /srv/other/etc
test ! -e /run/unionfs/broken/degraded

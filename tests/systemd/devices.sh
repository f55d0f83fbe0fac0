# SPDX-License-Identifier: GPL-2.0-or-later
# shellcheck shell=bash
# The boot has waited for the device, which udev was told of late.
systemctl is-active local-fs.target unionfs@labelled.service
ls -l "/dev/disk/by-label/my\x20store"
mountpoint /srv/system/etc
unit='dev-disk-by\x2dlabel-my\x5cx20store.device'
grep -F "Wants=$unit" /run/systemd/generator/unionfs@labelled.service.d/50-profile.conf
[ "$(systemctl show -P DropInPaths unionfs@labelled | wc -w)" = 1 ]
echo kept >/srv/system/etc/kept
# One that is not there is waited for as long as was said, and the boot goes on without it.
systemctl is-active unionfs@missing
grep LABEL=not-there /run/unionfs/missing/degraded
journalctl -b -q | grep -F 'Timed out waiting for device dev-disk-by\x2dlabel-not\x2dthere.device'
# A unit of a mount waits in the same way.
cd /etc/systemd/system || exit
unionfs unit /srv/base 'LABEL=my store:/two' /srv/tree --output .
systemd-analyze verify --man=no srv-tree.mount
systemctl daemon-reload
systemctl start srv-tree.mount
grep hello /srv/tree/file
echo new >/srv/tree/new
systemctl is-active srv-line.mount
echo new >/srv/line/new

# SPDX-License-Identifier: GPL-2.0-or-later
# shellcheck shell=bash
mountpoint /srv/system/etc
mountpoint /srv/system/var/cache
echo z >/srv/system/etc/kept
[ "$(systemctl show -P Description unionfs@system)" = 'What stays' ]
systemctl show -P StatusText unionfs@system | grep '4 mounts'
systemctl show -P Before unionfs@system | grep -w local-fs.target
systemctl reload unionfs@system
systemctl restart unionfs@system
grep z /srv/system/etc/kept
systemctl stop unionfs@system
! mountpoint /srv/system/etc || exit
! pgrep -f unionfs@system || exit
systemctl start unionfs@system
grep z /srv/system/etc/kept
journalctl -b -k -q | grep 'unionfs-generator: profile wrong' ||
    journalctl -b -q | grep 'unionfs-generator: profile wrong' || true
systemctl show -P LoadState unionfs@wrong

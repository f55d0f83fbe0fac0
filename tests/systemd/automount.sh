# SPDX-License-Identifier: GPL-2.0-or-later
# shellcheck shell=bash
! systemctl is-active srv-auto.mount || exit
grep hello /srv/auto/file
systemctl is-active srv-auto.mount
echo x >/srv/auto/new
pgrep -f 'mount.unionfs auto'
systemctl stop srv-auto.mount
# It was waited for.
! pgrep -f 'mount.unionfs auto' || exit
grep x /data/up2/new
grep x /srv/auto/new

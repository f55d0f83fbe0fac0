# SPDX-License-Identifier: GPL-2.0-or-later
# shellcheck shell=bash
systemctl is-active local-fs.target srv-tree.mount srv-auto.automount unionfs@system.service
grep hello /srv/tree/file
systemctl show -P Result srv-gone.mount | grep exit-code
! mountpoint /srv/gone || exit
systemctl show -P Before srv-tree.mount | grep -w local-fs.target
systemctl show -P RequiresMountsFor srv-tree.mount | grep -w /data
systemd-analyze verify --man=no unionfs@system.service

# SPDX-License-Identifier: GPL-2.0-or-later
# shellcheck shell=bash
# It does not say that it wants to be started at boot; the kernel's command line does.
systemctl is-active unionfs@asked.service
mountpoint /srv/asked/etc
systemctl show -P Wants local-fs.target | grep -w unionfs@asked.service
systemctl is-system-running | grep -E 'starting|running|degraded'

# SPDX-License-Identifier: GPL-2.0-or-later
# shellcheck shell=bash disable=SC2016,SC2034
mkdir -p /srv/svc /srv/svc-up
cd /etc/systemd/system || exit
unionfs unit /srv/base /srv/svc-up /srv/svc --service --output .
mkdir unionfs-srv-svc.service.d
printf '[Service]\nWatchdogSec=1s\nTimeoutAbortSec=100ms\nRestartSec=0\n' >unionfs-srv-svc.service.d/quick.conf
systemd-analyze verify --man=no unionfs-srv-svc.service
systemctl daemon-reload
systemctl start unionfs-srv-svc
grep hello /srv/svc/file
systemctl show -P StatusText unionfs-srv-svc | grep 'mounted on /srv/svc'
journalctl -b -q -u unionfs-srv-svc -o cat PRIORITY=6 | grep 'mounted on /srv/svc'
kill -9 "$(systemctl show -P MainPID unionfs-srv-svc)"
await '[ "$(systemctl show -P NRestarts unionfs-srv-svc)" = 1 ]'
await 'systemctl is-active unionfs-srv-svc'
grep hello /srv/svc/file
# It hangs: no sign of life, and it is started anew.
kill -STOP "$(systemctl show -P MainPID unionfs-srv-svc)"
await '[ "$(systemctl show -P NRestarts unionfs-srv-svc)" = 2 ]'
await 'systemctl is-active unionfs-srv-svc'
grep hello /srv/svc/file
# It is well, and stays: several times as long as it may be silent.
started=$(systemctl show -P ExecMainStartTimestampMonotonic unionfs-srv-svc)
sleep 2
[ "$started" = "$(systemctl show -P ExecMainStartTimestampMonotonic unionfs-srv-svc)" ]
systemctl stop unionfs-srv-svc
! mountpoint /srv/svc || exit
[ "$(systemctl show -P Result unionfs-srv-svc)" = success ]

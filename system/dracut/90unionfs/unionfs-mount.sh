#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
#
# Makes the root a union, if the kernel's command line asks for one. Read by dracut's init.

# shellcheck source=/dev/null
command -v die >/dev/null || . /lib/dracut-lib.sh

modprobe -q fuse
modprobe -q loop
status=0
PYTHONUTF8=1 unionfs boot --root "${NEWROOT:-/sysroot}" || status=$?
case $status in
0 | 64) ;;
32) die "The union of the root cannot be mounted." ;;
*) warn "unionfs boot has failed ($status): the root is as it was" ;;
esac

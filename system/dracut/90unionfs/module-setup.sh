#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# Copies `unionfs boot` and what it needs into an initramfs: a directory 90unionfs in
# /usr/lib/dracut/modules.d.

check() {
    require_binaries "${UNIONFS:-unionfs}" || return 1
}

depends() {
    echo base
}

installkernel() {
    instmods fuse loop ext4 xfs btrfs squashfs erofs dm_crypt
}

install() {
    local unionfs list
    local -a files
    unionfs=$(command -v "${UNIONFS:-unionfs}") && list=$("$unionfs" boot --files) || return
    mapfile -t files <<<"$list"
    # dracut looks for the libraries of executable files only, which Python's modules are not.
    mapfile -t -O "${#files[@]}" files < <(
        printf '%s\n' "${files[@]}" | grep '\.so$' | xargs -d '\n' ldd |
            sed -n 's/.*=> \(\/.*\) (0x.*/\1/p' | sort -u
    )
    inst_multiple "${files[@]}" || return
    # shellcheck disable=SC2154  # dracut's own
    [ -e "$initdir/usr/bin/unionfs" ] ||
        ln -s "$(grep -m 1 '/bin/unionfs$' <<<"$list")" "$initdir/usr/bin/unionfs"
    # shellcheck disable=SC2154
    local units=$systemdsystemunitdir
    if [ -e "$initdir$units/initrd-root-fs.target" ] && inst_simple "$units/unionfs-boot.service"; then
        mkdir -p "$initdir$units/initrd-root-fs.target.requires"
        ln -sfn ../unionfs-boot.service "$initdir$units/initrd-root-fs.target.requires/"
    else
        # shellcheck disable=SC2154
        inst_hook pre-pivot 10 "$moddir/unionfs-mount.sh"
    fi
}

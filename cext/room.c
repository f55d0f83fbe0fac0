/* SPDX-License-Identifier: GPL-2.0-or-later */
#include <sys/stat.h>
#include <sys/statvfs.h>

#include "room.h"

enum { ASK_BYTES = 1 << 20, RESERVE_BYTES = 4 << 20 };

uint64_t room_missing(int image, uint64_t free_bytes)
{
    struct statvfs disk;
    struct stat st;
    uint64_t left, wanted;

    if (image < 0 || fstat(image, &st) < 0 || fstatvfs(image, &disk) < 0)
        return 0;
    wanted = st.st_size > st.st_blocks * 512 ? (uint64_t)(st.st_size - st.st_blocks * 512) : 0;
    if (wanted > free_bytes)
        wanted = free_bytes;
    left = disk.f_bavail * disk.f_frsize;
    return wanted > left ? wanted - left : 0;
}

errint_t check_room(int src, int dst, int image, uint64_t size)
{
    struct stat from, to;
    struct statvfs space;
    uint64_t free_bytes, reserve, needed;

    if (size < ASK_BYTES)
        return 0;
    if (fstat(src, &from) < 0 || fstat(dst, &to) < 0 || fstatvfs(dst, &space) < 0)
        return errno_or_eio();
    if (from.st_dev == to.st_dev) /* they may be shared */
        return 0;
    free_bytes = (geteuid() == 0 ? space.f_bfree : space.f_bavail) * space.f_frsize;
    free_bytes -= room_missing(image, free_bytes);
    reserve = space.f_blocks * space.f_frsize / 100;
    if (reserve > RESERVE_BYTES)
        reserve = RESERVE_BYTES;
    needed = (uint64_t)from.st_blocks * 512;
    if (needed > size)
        needed = size;
    return needed + reserve > free_bytes ? -ENOSPC : 0;
}

/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Stores through a mapping, which leave a file its set-ID bits and capability. */
#ifndef UNIONFS_MAPPED_H
#define UNIONFS_MAPPED_H

#include <stddef.h>
#include <sys/types.h>

/* Put into the file what was stored through a mapping of it, if write(2) would cost the file its
 * set-ID bits or its capability. Returns how many bytes are there now, from the first on; the rest,
 * or all, is for write(2): what lies behind the end, a file that cannot be mapped or read, a full
 * disk (which write(2) then tells). */
size_t mapped_store(int fd, const char *buf, size_t size, off_t offset);

#endif

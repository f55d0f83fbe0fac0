/* SPDX-License-Identifier: GPL-2.0-or-later */
/* How much still fits into a file system, if it lies in an image that has yet to get its space. */
#ifndef UNIONFS_ROOM_H
#define UNIONFS_ROOM_H

#include "util.h"

/* Of so many free bytes of the file system in an image those that the image's own disk cannot give:
 * a sparse one gets them when they are written, and a program's data would be lost then. 0 with
 * image -1 (there is none), or where it cannot be asked. */
uint64_t room_missing(int image, uint64_t free_bytes);

/* -ENOSPC if so many bytes of src will not fit beside dst, and leave a little free, so that names
 * can still be removed, which takes whiteouts. Not asked for what is small: that is known at once.
 */
errint_t check_room(int src, int dst, int image, uint64_t size);

#endif

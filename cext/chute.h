/* SPDX-License-Identifier: GPL-2.0-or-later */
/* A large answer to READ goes from the file to the device by a pipe: one copy of it less. */
#ifndef UNIONFS_CHUTE_H
#define UNIONFS_CHUTE_H

#include <stdbool.h>
#include <stddef.h>
#include <sys/types.h>

#include "tree.h"
#include "wire.h"

/* One for each thread that reads the device.  All zero: not made yet. */
struct chute {
    int from, to; /* the pipe */
    size_t room;
};
void chute_close(struct chute *c);

/* Whether a READ of this length is worth it, and fits. */
bool chute_takes(struct chute *c, const struct file *f, size_t size);

/* Answers a READ.  CHUTE_SENT: that is done.  Else `data`, which lies behind `head`, has as many
 * bytes to be answered plainly as are returned, or it is -errno. */
enum { CHUTE_SENT = -0x20000 };
ssize_t chute_read(struct chute *c, int device, const struct file *f, struct fuse_out_header *head,
                   char *data, size_t size, off_t offset);

#endif

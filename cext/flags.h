/* SPDX-License-Identifier: GPL-2.0-or-later */
/* File flags (ioctl_iflags(2), chattr(1)): asked for, carried over by a copy-up, and heeded where
 * the upper's file system does not know of them, since the file lies in a lower. */
#ifndef UNIONFS_FLAGS_H
#define UNIONFS_FLAGS_H

#include <linux/fs.h>

#include "tree.h"

/* FS_IOC_GETFLAGS, FS_IOC_FSGETXATTR or FS_IOC_GETVERSION of a node: what it gives, `size` bytes.
 * Of a metadata-only copy its own; of a lower file whose file system has no flags none are set, if
 * the upper's has them. */
errint_t node_flags(struct tree *t, struct node *n, unsigned long cmd, void *value, size_t size);

/* Gives a copy the flags that it may have before it is published, as far as its file system takes
 * them. In *ret_late those (immutable, append-only) that would hinder that. Descriptors may be
 * O_PATH, here and below. */
void copy_flags(int src, int dst, uint32_t *ret_late);
errint_t add_flags(int fd, uint32_t flags);
/* Takes away what forbids to change what lies in a directory; in *ret_lifted what that was, for
 * add_flags to give back. */
errint_t lift_flags(int fd, uint32_t *ret_lifted);

/* Immutable or append-only. A descriptor, perhaps O_PATH. */
bool is_protected(int fd);
/* Whether a copy has to be given flags, or its origin must not be changed; not O_PATH. */
bool has_flags_to_heed(int fd);

/* Whether flags of the real file forbid to change it (-EPERM): immutable, and append-only unless
 * `append` says that the change is one that it allows. What lies in the upper is left to its file
 * system, which will be asked to make the change, unless `upper`. */
errint_t tree_changeable(struct tree *t, uint64_t ino, bool append, bool upper);

#endif

/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Moving the bytes of a copy-up: data with their holes, extended attributes. */
#ifndef UNIONFS_COPY_H
#define UNIONFS_COPY_H

#include <sys/stat.h>
#include <sys/types.h>

#include "util.h"

/* Copies `size` bytes from the start of src, which is `from`, to dst, an empty file, whose size is
 * `size` then. By reflink, else within the kernel, else through a buffer; what is small through a
 * buffer at once; holes stay holes. A source that ends early is -EIO: never a short copy. -EINTR:
 * who asked for it has been killed.
 *
 * `in_order`: keeps_order(dst). Then what is small is shared too where it can be, and settled is
 * told: whatever is done to dst from now on, its name for one, is not on disk without its data. */
errint_t copy_data(int src, int dst, const struct stat *from, uint64_t size, bool in_order,
                   bool *ret_settled);

/* Gives a file of ours (a path; links are followed) owner and group. What we may not give stays
 * ours, and `mode` then loses set-user-ID and set-group-ID, as with cp(1). */
errint_t give_owner(const char *path, uid_t uid, gid_t gid, mode_t *mode);

/* Copies every extended attribute but the union's own marks (those beginning with `prefix`), and
 * `override` (an attribute to leave out as well, or NULL). Paths, as xattr calls know them; links
 * are followed. Attributes that the target cannot hold for want of privilege or support are left
 * out (EPERM on trusted.* and security.*, EOPNOTSUPP). */
errint_t copy_xattrs(const char *src, const char *dst, const char *prefix, const char *override);

#endif

/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Extended attributes as the union shows them: the union's own marks are not seen, a nested
 * overlay's are escaped (PREFIXoverlay.NAME, as kernel overlayfs does), and with
 * xattr_permissions=2 security.* is kept as user.containers.override_security.* (as
 * fuse-overlayfs does). */
#ifndef UNIONFS_XATTRS_H
#define UNIONFS_XATTRS_H

#include "tree.h"

enum { XATTR_STORED_BYTES = 512 };

/* The name under which an attribute is stored. -EPERM for what nobody may set or see. */
errint_t xattr_stored_name(const struct tree *t, const char *name,
                           char stored[static XATTR_STORED_BYTES]);
errint_t xattr_get(struct tree *t, uint64_t ino, const char *name, char **ret_value,
                   size_t *ret_len);
/* NUL-separated names; those of trusted.* only to who could read them, as every file system does.
 */
errint_t xattr_list(struct tree *t, uint64_t ino, bool trusted, char **ret_list, size_t *ret_len);

#endif

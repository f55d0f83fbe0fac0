/* SPDX-License-Identifier: GPL-2.0-or-later */
/* An access ACL after chmod(2): file systems of the kernel change it with the mode, fuse2fs leaves
 * it as it was, and then the ACL says who may do what, and the mode nothing (as
 * __posix_acl_chmod_masq of fs/posix_acl.c). */
#include "acl.h"

#include <endian.h>
#include <string.h>
#include <sys/xattr.h>

static const char ACCESS_ACL[] = "system.posix_acl_access";

/* linux/posix_acl_xattr.h: little endian, after a version. */
struct entry {
    uint16_t tag, perm;
    uint32_t id;
};
enum { VERSION_BYTES = 4, USER_OBJ = 0x01, GROUP_OBJ = 0x04, MASK = 0x10, OTHER = 0x20 };

errint_t acl_follow_mode(const char *path, mode_t mode)
{
    cleanup_free char *acl = NULL;
    struct entry e;
    size_t len;
    bool masked = false, changed = false;

    if (read_xattr(path, false, ACCESS_ACL, &acl, &len) < 0)
        return 0; /* there is none, or there are none here */
    if (len < VERSION_BYTES || (len - VERSION_BYTES) % sizeof e != 0)
        return 0;
    for (size_t at = VERSION_BYTES; at < len; at += sizeof e) {
        memcpy(&e, acl + at, sizeof e);
        masked = masked || le16toh(e.tag) == MASK;
    }
    for (size_t at = VERSION_BYTES; at < len; at += sizeof e) {
        memcpy(&e, acl + at, sizeof e);
        uint16_t tag = le16toh(e.tag), perm = le16toh(e.perm);

        if (tag == USER_OBJ)
            perm = mode >> 6 & 7;
        else if (tag == (masked ? MASK : GROUP_OBJ))
            perm = mode >> 3 & 7;
        else if (tag == OTHER)
            perm = mode & 7;
        changed = changed || perm != le16toh(e.perm);
        e.perm = htole16(perm);
        memcpy(acl + at, &e, sizeof e);
    }
    if (!masked) /* the mode says it all */
        return removexattr(path, ACCESS_ACL) < 0 ? errno_or_eio() : 0;
    return changed && setxattr(path, ACCESS_ACL, acl, len, 0) < 0 ? errno_or_eio() : 0;
}

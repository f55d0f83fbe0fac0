/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "whiteout.h"

#include <fcntl.h>
#include <stdio.h>

static const char SHARED[] = "../whiteout"; /* from the work directory */

static errint_t make_one(int dirfd, const char *name)
{
    return mknodat(dirfd, name, S_IFCHR, 0) < 0 ? errno_or_eio() : 0;
}

static errint_t link_shared(const struct tree *t, int dirfd, const char *name)
{
    return linkat(t->work_fd, SHARED, dirfd, name, 0) < 0 ? errno_or_eio() : 0;
}

static errint_t renew(struct tree *t)
{
    char temp[TEMP_BYTES];
    errint_t err;

    temp_name(t, temp);
    err = make_one(t->work_fd, temp);
    if (err == 0 && renameat(t->work_fd, temp, t->work_fd, SHARED) < 0) {
        err = errno_or_eio();
        (void)unlinkat(t->work_fd, temp, 0);
    }
    return err;
}

errint_t make_whiteout(struct tree *t, int dirfd, const char *name)
{
    errint_t err;

    if (t->upper_in_fuse) /* attributes after link(2): see ask_anew() */
        return make_one(dirfd, name);
    err = link_shared(t, dirfd, name);
    if (err == -EMLINK && renew(t) == 0)
        err = link_shared(t, dirfd, name);
    switch (err) {
    case -ENOENT: /* none could be made */
    case -EMLINK:
    case -EPERM: /* no links there, or not of devices */
    case -EACCES:
    case -EXDEV: /* a quota of its own (projects) */
    case -EOPNOTSUPP:
    case -ENOSYS:
        return make_one(dirfd, name);
    default:
        return err;
    }
}

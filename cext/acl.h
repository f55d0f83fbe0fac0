/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef UNIONFS_ACL_H
#define UNIONFS_ACL_H

#include "sys.h"

/* Has the access ACL of what is at `path`, if it has one, say what its new mode says. */
errint_t acl_follow_mode(const char *path, mode_t mode);

#endif

/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef UNIONFS_TESTS_BARE_H
#define UNIONFS_TESTS_BARE_H

#include "../tree.h"

/* Options of a union without anything that can be left out. */
static const struct tree_options BARE = {.squash_uid = -1,
                                         .squash_gid = -1,
                                         .max_open_dirs = 3, /* so that they come and go */
                                         .index_fd = -1,
                                         .numbers_fd = -1,
                                         .image_fd = -1};

#endif

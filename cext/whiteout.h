/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Whiteouts that are devices are names of one inode, as kernel overlayfs makes them (ovl_whiteout
 * of fs/overlayfs/dir.c): where no inode is left, what lies in a lower can be removed still. It
 * stands beside the work directory (work.py makes it) and has all the names that it may have; then
 * another takes its place. */
#ifndef UNIONFS_WHITEOUT_H
#define UNIONFS_WHITEOUT_H

#include "tree.h"

/* Where nothing is yet. Atomic. */
errint_t make_whiteout(struct tree *t, int dirfd, const char *name);

#endif

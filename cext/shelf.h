/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Descriptors of lower files that were read and that nobody has open any more. What is read once is
 * read again, as headers and modules are: to open it by name, to see that it is what the kernel
 * knows by that number, and to close it would be three system calls each time.
 *
 * Bounded, and given back where descriptors are short. Nothing is kept of lower layers that change
 * underneath (lower=live). All of it with the tree's lock held. */
#ifndef UNIONFS_SHELF_H
#define UNIONFS_SHELF_H

#include "tree.h"

/* Once, after spare_init. */
void shelf_init(struct tree *t);
/* Whether the descriptor of a file that is closed now was put there. */
bool shelf_put_locked(struct tree *t, const struct file *f);
/* That of a node, for a file that is opened with these flags; or -1. */
int shelf_take_locked(struct tree *t, struct node *n, int flags);
/* Is closed: of a node, and of all. Whether there was any. */
bool shelf_drop_locked(struct tree *t, struct node *n);
bool shelf_clear_locked(struct tree *t);
void shelf_free(struct tree *t);

#endif

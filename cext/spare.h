/* SPDX-License-Identifier: GPL-2.0-or-later */
/* A process may have so many descriptors and no more. What is open for long (files, listings, what
 * has lost its name) leaves some of them to requests that need one for a moment: who has many files
 * open keeps nobody else from looking. Told by the number, which is the lowest that is free. */
#ifndef UNIONFS_SPARE_H
#define UNIONFS_SPARE_H

#include "tree.h"

/* Once, for t->most_open and t->most_pinned. */
void spare_init(struct tree *t);

/* Whether an open file or a listing may keep its descriptor; directories make way for it, and it
 * may get another number. Else -ENFILE. */
errint_t spare_keep(struct tree *t, int *fd);
/* The same of what holds a file that is about to lose its name: one more can be removed still when
 * no more can be opened. */
errint_t spare_keep_pin(struct tree *t, int *fd);
/* Of an open file that cannot be refused any more: a duplicate to be kept instead, or -1 where it
 * may be kept itself, or must. */
int spare_duplicate(struct tree *t, int fd);
/* Whether a file that is about to be made could keep a descriptor. */
errint_t spare_ask(struct tree *t);

#endif

/* SPDX-License-Identifier: GPL-2.0-or-later */
/* A program that has closed and removed a file may use its space at once. But the kernel tells of
 * the closing, and that nobody knows the file any more, without waiting for us, and another thread
 * may be at it still while the program's next request is answered. So what fails for want of space
 * is tried again once something has been freed. */
#ifndef UNIONFS_FREED_H
#define UNIONFS_FREED_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

struct request;

enum { FREED_MOST = 5 }; /* attempts: its closing, its forgetting, and others' */

struct freed {
    _Atomic int freeing; /* requests by which files are closed or forgotten */
    _Atomic uint64_t count;
    _Atomic int64_t removed_at; /* CLOCK_MONOTONIC, ns: the last name */
};

bool removes_something(const struct request *r);
bool frees_something(const struct request *r);
/* Before and after a request that frees something. */
void freed_begin(struct freed *f);
void freed_end(struct freed *f);
/* After a request that removes something: it will be freed. */
void freed_soon(struct freed *f);

uint64_t freed_count(const struct freed *f);
/* Whether something has been freed since `before`, which then is now; what is being freed is waited
 * for, and for a moment what may be about to, where something was removed just now. */
bool freed_since(struct freed *f, uint64_t *before);

#endif

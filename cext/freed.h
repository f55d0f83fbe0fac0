/* SPDX-License-Identifier: GPL-2.0-or-later */
/* A program that has closed and removed a file may use its space at once. But the kernel tells of
 * the closing, and that nobody knows the file any more, without waiting for us, and another thread
 * may be at it still while the program's next request is answered. So what fails for want of space
 * is tried again once something has been freed. What is not asked of us (the room that there is, a
 * write that passes us by) waits beforehand for what has lost its last name to leave. */
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
    _Atomic uint64_t stays;     /* without a name, and waited for in vain: somebody has it open */
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
/* What of `leaving` (struct tree) may be about to. */
uint64_t freed_due(struct freed *f, const _Atomic uint64_t *leaving);
/* Waits a moment for it. */
void freed_await(struct freed *f, const _Atomic uint64_t *leaving);

#endif

/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Whether a thread that is at a request is held up by it, by a disk, a lock or much work, or gets
 * on as soon as it has a processor. Only in the first case does one more thread help. */
#ifndef UNIONFS_HELD_UP_H
#define UNIONFS_HELD_UP_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

struct held_up {
    int stat_fd; /* of the thread, as proc(5) tells it; -1: it does not */
    /* Of who asks: */
    uint64_t turn;  /* when last asked, */
    int64_t worked; /* what the thread had worked when that turn was first seen, ns */
};

/* By the thread itself. */
void held_up_init(struct held_up *h);
void held_up_free(struct held_up *h);
/* `turn` is the thread's request: each has a number of its own. */
bool held_up_by(struct held_up *h, pthread_t thread, uint64_t turn);

#endif

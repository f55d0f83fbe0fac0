/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Who changes the union is held up for a while, so that its upper can be read as it is at one
 * moment (unionfs/stores/holding.py); who reads it goes on. Asked for by an ioctl of the union's
 * root, by the daemon's user or root. It ends by itself: whoever asked may be gone.
 *
 * What passes through to the kernel (backing.c) is written without us, and is not held up. */
#ifndef UNIONFS_HOLD_H
#define UNIONFS_HOLD_H

#include <linux/ioctl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>

#include "util.h"

struct request;

struct hold_wish {
    uint32_t seconds; /* from now on; 0: no longer */
    uint32_t ticket;  /* chosen by who asks: a number that nobody else has */
    uint32_t begins;  /* 1: the first time; 0: it goes on */
};

#define UNIONFS_IOC_HOLD _IOW('U', 0x48, struct hold_wish)

struct hold {
    pthread_mutex_t lock;
    pthread_cond_t turned; /* it is over, or nothing is being changed any more */
    _Atomic int changing;  /* requests */
    _Atomic bool held;     /* set under the lock */
    uint32_t ticket;       /* the last one; protected by lock, as the next ones */
    int64_t until;         /* CLOCK_MONOTONIC, ns */
    int waiting;           /* requests */
};

void hold_init(struct hold *h);
/* Begins once no change is under way. -EBUSY: somebody else holds it; -EAGAIN: what is under way
 * takes longer; -ETIME: the ticket's time is over; -ESTALE: it is not the last one. */
errint_t hold_ask(struct hold *h, const struct hold_wish *wish);
void hold_end(struct hold *h);

/* What the kernel writes of pages that were stored to is let pass: it keeps reads waiting while too
 * much of that is under way. */
bool changes_something(const struct request *r);
/* Before and after a request that does. */
void hold_pass(struct hold *h);
void hold_passed(struct hold *h);

#endif

/* SPDX-License-Identifier: GPL-2.0-or-later */
/* A program and the engine take turns: one sleeps while the other works. On one processor that is a
 * change of context; on two each turn wakes an idle one, which in a virtual machine takes ten times
 * as long. The scheduler leaves them together where the other processor is not idle. So where there
 * are two, and one program asks for one thing after another, the engine goes to that program's
 * processor, and a *decoy*, a thread of the lowest priority, takes the other. What else wants to
 * run there does (docs/adr/0027).
 *
 * Called by the engine's watch. */
#ifndef UNIONFS_DECOY_H
#define UNIONFS_DECOY_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

enum { ANY_PROCESSOR = -1 };

struct decoy {
    pthread_mutex_t lock;
    pthread_cond_t wake;
    pthread_t thread;
    bool wanted, ending;    /* protected by lock */
    _Atomic int64_t stands; /* until then (CLOCK_MONOTONIC, ns): the watch may be held up */
    _Atomic int processor;  /* where */
    int pair[2];            /* the processors, or ANY_PROCESSOR: there are not two */
    /* The watch's: */
    bool started, failed;
    int quiet;    /* looks since one program was seen to ask */
    unsigned out; /* looks since it was sent out, or 0 */
};

void decoy_init(struct decoy *d);
/* Each millisecond: how many requests there were since, how often another program asked than
 * before, and which (a thread's number) was the last; 0: not known, or not alone with one thread of
 * the engine. Gives the processor that the engine is to be on. */
int decoy_tell(struct decoy *d, uint64_t asked, uint64_t turns, uint32_t asker);
/* At the end, when the watch has ended. */
void decoy_free(struct decoy *d);

#endif

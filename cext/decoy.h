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

#include "engine.h"

enum { ANY_PROCESSOR = -1 };

struct decoy {
    pthread_mutex_t lock;
    pthread_cond_t wake;
    pthread_t thread;
    bool wanted, ending;    /* protected by lock */
    _Atomic int64_t stands; /* until then (CLOCK_MONOTONIC, ns): the watch may be held up */
    _Atomic int processor;  /* where */
    int pair[2];            /* the processors, or ANY_PROCESSOR: there are not two; immutable */
    _Atomic uint64_t brief; /* requests that move little */
    _Atomic uint64_t turns; /* how often another thread asked than before */
    _Atomic uint32_t asker; /* the last one; 0: none that we can see */
    /* The watch's: */
    bool started, retired;
    int quiet;             /* looks since one program was seen to ask */
    unsigned looks;        /* since it began to */
    uint64_t seen, turned; /* brief and turns, at the last look */
};

void decoy_init(struct decoy *d);
/* A request has come. */
void decoy_note(struct decoy *d, const struct request *r);
/* Each millisecond. `held_up`: a thread of the engine is at work for longer, and needs the other
 * processor itself. Gives the processor that those are to be on who answer at once. */
int decoy_look(struct decoy *d, bool held_up);
/* No processor is given from now on. For the watch. */
void decoy_retire(struct decoy *d);
/* At the end, when the watch has ended. */
void decoy_free(struct decoy *d);

#endif

/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Locks by number: who holds some numbers keeps out whoever wants one of them. Held over system
 * calls that may take long; a waiter sleeps. */
#ifndef UNIONFS_KEYLOCK_H
#define UNIONFS_KEYLOCK_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

enum { KEYS_MOST = 2 }; /* a rename has two ends */

struct keylocks {
    pthread_mutex_t mutex;
    pthread_cond_t freed;
    struct keyhold *held; /* protected by mutex; seldom more than a few */
};

struct keyhold {
    struct keyhold *next;
    uint64_t keys[KEYS_MOST]; /* 0: not used */
};

void keylocks_init(struct keylocks *l);
void keylocks_destroy(struct keylocks *l);
/* Waits until nobody holds one of h->keys, and takes all of them at once. */
void keys_take(struct keylocks *l, struct keyhold *h);
/* The same, or false where that would mean to wait. */
bool keys_try(struct keylocks *l, struct keyhold *h);
void keys_give(struct keylocks *l, struct keyhold *h);

#endif

/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "keylock.h"

void keylocks_init(struct keylocks *l)
{
    pthread_mutex_init(&l->mutex, NULL);
    pthread_cond_init(&l->freed, NULL);
    l->held = NULL;
}

void keylocks_destroy(struct keylocks *l)
{
    pthread_cond_destroy(&l->freed);
    pthread_mutex_destroy(&l->mutex);
}

static bool clash(const struct keyhold *a, const struct keyhold *b)
{
    for (int i = 0; i < KEYS_MOST; i++)
        for (int j = 0; j < KEYS_MOST; j++)
            if (a->keys[i] && a->keys[i] == b->keys[j])
                return true;
    return false;
}

static bool is_free_locked(const struct keylocks *l, const struct keyhold *wanted)
{
    for (const struct keyhold *h = l->held; h; h = h->next)
        if (clash(h, wanted))
            return false;
    return true;
}

static void hold_locked(struct keylocks *l, struct keyhold *h)
{
    h->next = l->held;
    l->held = h;
}

void keys_take(struct keylocks *l, struct keyhold *h)
{
    pthread_mutex_lock(&l->mutex);
    while (!is_free_locked(l, h))
        pthread_cond_wait(&l->freed, &l->mutex);
    hold_locked(l, h);
    pthread_mutex_unlock(&l->mutex);
}

bool keys_try(struct keylocks *l, struct keyhold *h)
{
    bool free;

    pthread_mutex_lock(&l->mutex);
    free = is_free_locked(l, h);
    if (free)
        hold_locked(l, h);
    pthread_mutex_unlock(&l->mutex);
    return free;
}

void keys_give(struct keylocks *l, struct keyhold *h)
{
    struct keyhold **link = &l->held;

    pthread_mutex_lock(&l->mutex);
    while (*link != h)
        link = &(*link)->next;
    *link = h->next;
    pthread_cond_broadcast(&l->freed);
    pthread_mutex_unlock(&l->mutex);
}

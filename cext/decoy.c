/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The thread that keeps a processor from being idle, and where it is; see decoy.h. */
#include "decoy.h"

#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <unistd.h>

enum {
    LITTLE = 16 * 1024,  /* bytes: more is moved by engine and asker at once, on two processors */
    ASKED_MANY = 4,      /* requests between two looks: somebody waits for each */
    TURNS = 4,           /* of so many requests one from another program: still one that asks */
    QUIET_MOST = 5,      /* looks */
    STANDS_NS = 5000000, /* unless the watch says so again */
    PAUSES = 20,         /* a microsecond or two */
    PLACE_EVERY = 8,     /* looks, after which it is looked again where the asker is */
    LOWEST = 19,
    STAT_PROCESSOR = 39 - 2, /* proc_pid_stat(5): the field, counted behind the name */
};

static void pause_shortly(void)
{
#if defined __x86_64__ || defined __i386__
    __builtin_ia32_pause();
#elif defined __aarch64__
    __asm__ volatile("yield");
#endif
}

static void go_to(int processor)
{
    cpu_set_t set;

    CPU_ZERO(&set);
    CPU_SET(processor, &set);
    (void)sched_setaffinity(0, sizeof set, &set);
}

static void stand(const struct decoy *d)
{
    int at = ANY_PROCESSOR;

    while (now_ns() < atomic_load(&d->stands)) {
        int wanted = atomic_load(&d->processor);

        if (wanted != at && wanted != ANY_PROCESSOR)
            go_to(wanted);
        at = wanted;
        for (int i = 0; i < PAUSES; i++)
            pause_shortly();
        (void)sched_yield(); /* of the lowest priority, but with a share of time once it runs */
    }
}

static void *wait_and_stand(void *arg)
{
    struct decoy *d = arg;

    (void)prctl(PR_SET_NAME, "unionfs-decoy");
    (void)setpriority(PRIO_PROCESS, 0, LOWEST); /* of this thread */
    pthread_mutex_lock(&d->lock);
    while (!d->ending) {
        if (!d->wanted) {
            pthread_cond_wait(&d->wake, &d->lock);
            continue;
        }
        pthread_mutex_unlock(&d->lock);
        stand(d);
        pthread_mutex_lock(&d->lock);
        d->wanted = false;
    }
    pthread_mutex_unlock(&d->lock);
    return NULL;
}

void decoy_init(struct decoy *d)
{
    cpu_set_t set;
    int found = 0;

    pthread_mutex_init(&d->lock, NULL);
    pthread_cond_init(&d->wake, NULL);
    d->quiet = QUIET_MOST;
    d->pair[0] = d->pair[1] = ANY_PROCESSOR;
    if (sched_getaffinity(0, sizeof set, &set) < 0 || CPU_COUNT(&set) != 2)
        return;
    for (int i = 0; i < CPU_SETSIZE && found < 2; i++)
        if (CPU_ISSET(i, &set))
            d->pair[found++] = i;
}

/* Where a thread was last, or ANY_PROCESSOR. */
static int processor_of(uint32_t thread)
{
    char path[32], text[1024], *word;
    ssize_t n = -1;
    int fd, i = 0;

    (void)snprintf(path, sizeof path, "/proc/%u/stat", thread);
    fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd >= 0) {
        n = read(fd, text, sizeof text - 1);
        (void)close(fd);
    }
    if (n <= 0)
        return ANY_PROCESSOR;
    text[n] = '\0';
    word = strrchr(text, ')');
    while (word && i++ < STAT_PROCESSOR) {
        word = strchr(word, ' ');
        word = word ? word + 1 : NULL;
    }
    return word ? (int)strtol(word, NULL, 10) : ANY_PROCESSOR;
}

static void send_out(struct decoy *d)
{
    atomic_store(&d->stands, now_ns() + STANDS_NS);
    if (!d->started) {
        d->started = pthread_create(&d->thread, NULL, wait_and_stand, d) == 0;
        d->retired = !d->started;
    }
    pthread_mutex_lock(&d->lock);
    if (!d->wanted)
        pthread_cond_signal(&d->wake);
    d->wanted = true;
    pthread_mutex_unlock(&d->lock);
}

static bool is_brief(const struct request *r)
{
    if (r->head->opcode == FUSE_READ && r->len >= sizeof(struct fuse_read_in))
        return ((const struct fuse_read_in *)(const void *)r->body)->size <= LITTLE;
    return r->head->len <= LITTLE;
}

void decoy_note(struct decoy *d, const struct request *r)
{
    uint32_t asker = r->head->pid;

    if (d->pair[0] == ANY_PROCESSOR)
        return;
    if (is_brief(r))
        atomic_fetch_add_explicit(&d->brief, 1, memory_order_relaxed);
    /* 0: the kernel by itself (a release, a forget), or a process that we cannot see. */
    if (asker && atomic_exchange_explicit(&d->asker, asker, memory_order_relaxed) != asker)
        atomic_fetch_add_explicit(&d->turns, 1, memory_order_relaxed);
}

/* Whether one program asks for one thing after another. */
static bool one_asks(struct decoy *d)
{
    uint64_t brief = atomic_load(&d->brief), turns = atomic_load(&d->turns);
    uint64_t asked = brief - d->seen, others = turns - d->turned;

    d->seen = brief;
    d->turned = turns;
    if (others * TURNS > asked)
        d->quiet = QUIET_MOST; /* several need the processors */
    else if (asked < ASKED_MANY)
        d->quiet += d->quiet < QUIET_MOST;
    else
        d->quiet = 0;
    return d->quiet < QUIET_MOST;
}

void decoy_retire(struct decoy *d)
{
    atomic_store(&d->stands, 0);
    d->retired = true;
}

static int other_of(const struct decoy *d, int processor)
{
    for (int i = 0; i < 2; i++)
        if (d->pair[i] == processor)
            return d->pair[1 - i];
    return ANY_PROCESSOR;
}

int decoy_look(struct decoy *d, bool held_up)
{
    uint32_t asker = atomic_load(&d->asker);
    int at = atomic_load(&d->processor);

    if (d->pair[0] == ANY_PROCESSOR || d->retired)
        return ANY_PROCESSOR;
    if (!one_asks(d) || !asker) {
        atomic_store(&d->stands, 0);
        d->looks = 0;
        return ANY_PROCESSOR;
    }
    if (d->looks++ % PLACE_EVERY == 0) {
        at = other_of(d, processor_of(asker));
        atomic_store(&d->processor, at);
    }
    /* ANY_PROCESSOR: the asker may use others than we, or we cannot see where it is. */
    if (held_up || at == ANY_PROCESSOR)
        atomic_store(&d->stands, 0);
    else
        send_out(d);
    return other_of(d, at);
}

void decoy_free(struct decoy *d)
{
    atomic_store(&d->stands, 0);
    pthread_mutex_lock(&d->lock);
    d->ending = true;
    pthread_cond_signal(&d->wake);
    pthread_mutex_unlock(&d->lock);
    if (d->started)
        pthread_join(d->thread, NULL);
    pthread_cond_destroy(&d->wake);
    pthread_mutex_destroy(&d->lock);
}

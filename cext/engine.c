/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The engine's threads.
 *
 * One thread waits in read(2) of the device; a second would be woken in vain by every request. So
 * long as each request is answered at once, that one thread answers them all. A *watch* looks every
 * millisecond, while there is work, whether requests wait and nobody does: then whoever has one in
 * hand is held up, or there are more than one thread can answer, and another thread is let to the
 * device. A thread that comes back and finds another waiting there rests.
 *
 * To be woken on another processor takes longer than most answers. So while requests follow one
 * another closely, the thread looks for the next one for a moment before it sleeps (docs/adr/0010).
 *
 * Locking: `lock` protects the fields so marked; it is never held over a request. */
#include "engine.h"
#include "face.h"

#include <malloc.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <time.h>

enum {
    MAX_THREADS = 400,
    WATCH_NS = 1000000,
    QUIET_TICKS = 50,    /* of nothing, after which the watch sleeps */
    RESTING_KEPT = 2,    /* threads that rest rather than end */
    NUDGE_NS = 10000000, /* while stopping: between signals */
    CLOSE_NS = 50000,    /* requests that follow one another closely */
    EAGER_MOST = 4,
};

struct engine {
    struct server server;
    int ended_fd;
    _Atomic int waiting;       /* threads in read(2) */
    _Atomic uint64_t answered; /* requests, for the watch */
    _Atomic bool watch_sleeps;
    _Atomic bool stopping; /* no more requests are to be read */
    _Atomic uint64_t counts[WIRE_OPCODES];
    pthread_t watch;
    bool watching;      /* `watch` was started */
    bool one_processor; /* looking would keep the asker from asking */

    pthread_mutex_t lock;
    pthread_cond_t rest;    /* a resting thread is wanted */
    pthread_cond_t wake;    /* the watch is wanted */
    int threads, resting;   /* protected by lock */
    int wanted;             /* resting threads that are to go on; protected by lock */
    struct worker *workers; /* protected by lock */
};

struct worker {
    struct worker *next;
    struct engine *e;
    pthread_t thread;
    char *in, *out;
    int64_t answered_at; /* CLOCK_MONOTONIC */
    int eager;           /* how many of the last requests came soon, at most EAGER_MOST */
};

static void *buffer_new(void)
{
    /* Its pages come into being as they are used. */
    return malloc(WIRE_HEADER + WIRE_DATA);
}

static void worker_free(struct worker *w)
{
    free(w->in);
    free(w->out);
    free(w);
}

/* Wakes the watch if it sleeps: from now on there is work. */
static void note_work(struct engine *e)
{
    atomic_fetch_add(&e->answered, 1);
    if (atomic_load(&e->watch_sleeps)) {
        pthread_mutex_lock(&e->lock);
        atomic_store(&e->watch_sleeps, false);
        pthread_cond_signal(&e->wake);
        pthread_mutex_unlock(&e->lock);
    }
}

/* True: go to the device. False: end. */
static bool may_read(struct engine *e)
{
    bool go = true;

    if (atomic_load(&e->waiting) == 0 || atomic_load(&e->stopping))
        return !atomic_load(&e->stopping);
    pthread_mutex_lock(&e->lock);
    if (e->resting >= RESTING_KEPT) {
        go = false;
    } else {
        e->resting++;
        while (e->wanted == 0 && !atomic_load(&e->stopping))
            pthread_cond_wait(&e->rest, &e->lock);
        e->resting--;
        if (e->wanted > 0)
            e->wanted--;
    }
    pthread_mutex_unlock(&e->lock);
    return go && !atomic_load(&e->stopping);
}

static void stop_all(struct engine *e)
{
    pthread_mutex_lock(&e->lock);
    atomic_store(&e->stopping, true);
    atomic_store(&e->watch_sleeps, false);
    pthread_cond_broadcast(&e->rest);
    pthread_cond_broadcast(&e->wake);
    pthread_mutex_unlock(&e->lock);
}

static void answer(struct worker *w, size_t n)
{
    struct engine *e = w->e;
    const struct fuse_in_header *head = (const void *)w->in;
    struct request r = {.head = head, .body = w->in + sizeof *head, .len = n - sizeof *head};
    size_t len;

    if (n < sizeof *head || head->len != n)
        return; /* not the kernel's */
    atomic_fetch_add_explicit(&e->counts[head->opcode % WIRE_OPCODES], 1, memory_order_relaxed);
    len = serve(&e->server, &r, w->out);
    /* ENOENT: nobody waits for the answer any more. Other errors read(2) will tell too. */
    if (len > 0 && write(e->server.options.device, w->out, len) < 0 && errno == ENOENT)
        serve_undo(&e->server, &r, w->out);
}

static int64_t now_ns(void)
{
    struct timespec t;

    (void)clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static bool requests_wait(const struct engine *e)
{
    struct pollfd p = {.fd = e->server.options.device, .events = POLLIN};

    return poll(&p, 1, 0) > 0 && (p.revents & POLLIN);
}

/* The next request; looked for before it is waited for, if the last ones came soon. */
static ssize_t next_request(struct worker *w)
{
    const struct engine *e = w->e;
    ssize_t n;

    while (w->eager > 0 && !requests_wait(e) && now_ns() - w->answered_at < CLOSE_NS)
        (void)sched_yield(); /* whoever else wants this processor comes first */
    n = read(e->server.options.device, w->in, WIRE_HEADER + WIRE_DATA);
    if (e->one_processor || now_ns() - w->answered_at >= CLOSE_NS)
        w->eager = w->eager > 1 ? w->eager - 2 : 0;
    else if (w->eager < EAGER_MOST)
        w->eager++;
    return n;
}

static void *work(void *arg)
{
    struct worker *w = arg;
    struct engine *e = w->e;
    uint64_t one = 1;

    (void)prctl(PR_SET_NAME, "unionfs-engine");
    while (may_read(e)) {
        ssize_t n;

        atomic_fetch_add(&e->waiting, 1);
        n = next_request(w);
        atomic_fetch_sub(&e->waiting, 1);
        if (n >= 0) {
            note_work(e);
            answer(w, (size_t)n);
            w->answered_at = now_ns();
        } else if (errno != EINTR && errno != EAGAIN && errno != ENOENT) {
            stop_all(e); /* ENODEV: unmounted */
        }
    }
    if (e->server.options.leave)
        e->server.options.leave(e->server.options.arg);
    pthread_mutex_lock(&e->lock);
    struct worker **link = &e->workers;
    while (*link != w)
        link = &(*link)->next;
    *link = w->next;
    worker_free(w);
    bool last = --e->threads == 0;
    if (last) /* under the lock: engine_free may follow at once */
        (void)!write(e->ended_fd, &one, sizeof one);
    pthread_mutex_unlock(&e->lock);
    return NULL;
}

static bool start_worker_locked(struct engine *e)
{
    struct worker *w;
    pthread_attr_t attr;
    bool started;

    if (e->threads >= MAX_THREADS)
        return false;
    w = calloc(1, sizeof *w);
    if (!w)
        return false;
    w->e = e;
    w->in = buffer_new();
    w->out = buffer_new();
    pthread_attr_init(&attr);
    pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
    started = w->in && w->out && pthread_create(&w->thread, &attr, work, w) == 0;
    pthread_attr_destroy(&attr);
    if (!started) {
        worker_free(w);
        return false;
    }
    e->threads++;
    w->next = e->workers;
    e->workers = w;
    return true;
}

static void nap(long ns)
{
    struct timespec t = {.tv_nsec = ns};

    (void)nanosleep(&t, NULL);
}

static void let_one_more_read(struct engine *e)
{
    pthread_mutex_lock(&e->lock);
    if (e->resting > e->wanted) {
        e->wanted++;
        pthread_cond_signal(&e->rest);
    } else {
        (void)start_worker_locked(e);
    }
    pthread_mutex_unlock(&e->lock);
}

static void sleep_until_work(struct engine *e, uint64_t seen)
{
    pthread_mutex_lock(&e->lock);
    atomic_store(&e->watch_sleeps, true);
    /* A request that came before this flag was seen is in `answered`. */
    while (atomic_load(&e->watch_sleeps) && !atomic_load(&e->stopping) &&
           atomic_load(&e->answered) == seen)
        pthread_cond_wait(&e->wake, &e->lock);
    atomic_store(&e->watch_sleeps, false);
    pthread_mutex_unlock(&e->lock);
}

/* Signals whoever may wait in read(2), until nobody is left: one sent just before would be lost. */
static void nudge_until_ended(struct engine *e)
{
    bool left = true;

    while (left) {
        pthread_mutex_lock(&e->lock);
        for (struct worker *w = e->workers; w; w = w->next)
            (void)pthread_kill(w->thread, SIGURG);
        left = e->threads > 0;
        pthread_mutex_unlock(&e->lock);
        if (left)
            nap(NUDGE_NS);
    }
}

static void *watch(void *arg)
{
    struct engine *e = arg;
    uint64_t seen = 0;
    int quiet = 0;

    (void)prctl(PR_SET_NAME, "unionfs-watch");
    while (!atomic_load(&e->stopping)) {
        uint64_t now = atomic_load(&e->answered);

        if (atomic_load(&e->waiting) == 0) {
            quiet = 0;
            if (requests_wait(e))
                let_one_more_read(e);
        } else if (now != seen) {
            quiet = 0;
        } else if (++quiet > QUIET_TICKS) {
            sleep_until_work(e, now);
            quiet = 0;
        }
        seen = now;
        nap(WATCH_NS);
    }
    nudge_until_ended(e);
    return NULL;
}

static bool only_one_processor(void)
{
    cpu_set_t set;

    return sched_getaffinity(0, sizeof set, &set) == 0 && CPU_COUNT(&set) == 1;
}

errint_t engine_start(struct tree *t, const struct engine_options *options, struct engine **ret_e)
{
    struct engine *e = calloc(1, sizeof *e);
    sigset_t all, old;
    bool started;

    if (!e)
        return -ENOMEM;
    /* One heap for all threads: the table is one, and what one thread frees another shall use. */
    (void)mallopt(M_ARENA_MAX, 1);
    e->server.tree = t;
    e->server.options = *options;
    pthread_mutex_init(&e->lock, NULL);
    pthread_cond_init(&e->rest, NULL);
    pthread_cond_init(&e->wake, NULL);
    e->ended_fd = eventfd(0, EFD_CLOEXEC);
    if (e->ended_fd < 0) {
        free(e);
        return errno_or_eio();
    }
    face_start(t, options->device, options->passthrough);
    e->one_processor = only_one_processor();
    /* Signals are for the thread that started us. */
    sigfillset(&all);
    sigdelset(&all, SIGURG);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    e->watching = pthread_create(&e->watch, NULL, watch, e) == 0;
    pthread_mutex_lock(&e->lock);
    started = e->watching && start_worker_locked(e);
    pthread_mutex_unlock(&e->lock);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (!started) {
        engine_free(e);
        return -EAGAIN;
    }
    *ret_e = e;
    return 0;
}

int engine_ended_fd(const struct engine *e)
{
    return e->ended_fd;
}

void engine_stop(struct engine *e)
{
    stop_all(e);
}

void engine_free(struct engine *e)
{
    stop_all(e);
    if (e->watching)
        pthread_join(e->watch, NULL);
    /* The last worker may still hold the lock. */
    pthread_mutex_lock(&e->lock);
    pthread_mutex_unlock(&e->lock);
    pthread_cond_destroy(&e->rest);
    pthread_cond_destroy(&e->wake);
    pthread_mutex_destroy(&e->lock);
    close_keep_errno(e->ended_fd);
    free(e);
}

void engine_counts(const struct engine *e, uint64_t all[static WIRE_OPCODES],
                   uint64_t called[static WIRE_OPCODES])
{
    for (int i = 0; i < WIRE_OPCODES; i++) {
        all[i] = atomic_load_explicit(&e->counts[i], memory_order_relaxed);
        called[i] = atomic_load_explicit(&e->server.called[i], memory_order_relaxed);
    }
}

/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The engine's threads.
 *
 * One thread waits in read(2) of the device; a second would be woken in vain by every request. So
 * long as each request is answered at once, that one thread answers them all. A *watch* looks every
 * millisecond, while there is work, whether requests wait and nobody does: then whoever has one in
 * hand is held up (held_up.h), or there are more than one thread can answer, and another thread is
 * let to the device, unless as many as there are pairs of processors get on with them: the askers
 * need processors too. A thread that comes back and finds another waiting there rests.
 *
 * To be woken on another processor takes longer than most answers. So while requests follow one
 * another closely, the thread looks for the next one for a moment before it sleeps (docs/adr/0010);
 * where there are two processors only, it is kept on the asker's (decoy.h).
 *
 * Where the kernel gives requests over io_uring, two threads for each processor wait there
 * (uring.c), and by the device comes what is left: forgets and interrupts. To a queue whose threads
 * are all held up, the watch adds one.
 *
 * Locking: `lock` protects the fields so marked; it is never held over a request. */
#include "chute.h"
#include "decoy.h"
#include "face.h"
#include "held_up.h"
#include "uring.h"

#include <malloc.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>

enum {
    MAX_THREADS = 400,
    WATCH_NS = 1000000,
    QUIET_TICKS = 50,    /* of nothing, after which the watch sleeps */
    NODES_MANY = 20000,  /* some megabytes */
    RESTING_KEPT = 2,    /* threads that rest rather than end */
    NUDGE_NS = 10000000, /* while stopping: between signals */
    CLOSE_NS = 50000,    /* requests that follow one another closely */
    EAGER_MOST = 4,
    LOST_NS = 10000, /* a sched_yield(2) that took longer: somebody else needed the processor */
    UNEAGER_NS = 5000000,     /* how long nothing is looked for then, at first, */
    UNEAGER_MOST = 640000000, /* and at most */
};

struct engine {
    struct server server;
    int ended_fd;
    _Atomic int waiting;       /* threads in read(2) */
    _Atomic uint64_t answered; /* requests, for the watch */
    struct decoy decoy;
    _Atomic bool watch_sleeps;
    _Atomic bool stopping; /* no more requests are to be read */
    _Atomic uint64_t counts[WIRE_OPCODES];
    pthread_t watch;
    bool watching; /* `watch` was started */
    cpu_set_t all;
    int processors; /* of `all`: with one, looking would keep the asker from asking; two: decoy.h */

    pthread_mutex_t lock;
    pthread_cond_t rest;    /* a resting thread is wanted */
    pthread_cond_t wake;    /* the watch is wanted */
    int threads, resting;   /* protected by lock */
    int wanted;             /* resting threads that are to go on; protected by lock */
    struct worker *workers; /* protected by lock */

    unsigned queues;           /* of io_uring; 0: there are none; protected by lock */
    bool *helped;              /* queues with a thread that goes on; protected by lock */
    _Atomic bool rings_over;   /* nothing more comes by io_uring */
    _Atomic errint_t ring_err; /* the kernel's, when it refused them */
};

struct worker {
    struct worker *next;
    struct engine *e;
    pthread_t thread;
    struct ring_worker *ring; /* NULL: it reads the device, */
    char *in, *out;           /* with these */
    struct chute chute;
    int64_t answered_at;    /* CLOCK_MONOTONIC */
    int eager;              /* how many of the last requests came soon, at most EAGER_MOST */
    int64_t looks_from;     /* not before */
    int64_t uneager;        /* how long it was not looked for the last time */
    _Atomic uint64_t turns; /* odd: it is at a request */
    _Atomic bool leaves;    /* it comes to no request any more */
    /* The watch's, protected by lock: */
    struct held_up held_up;
    uint64_t seen; /* turns */
    bool stuck;
    int placed; /* the processor that it is kept on, or ANY_PROCESSOR */
};

static struct worker *worker_new(struct engine *e)
{
    struct worker *w = calloc(1, sizeof *w);

    if (w) {
        w->e = e;
        w->placed = ANY_PROCESSOR;
        w->held_up.stat_fd = -1;
    }
    return w;
}

static void *buffer_new(void)
{
    /* Its pages come into being as they are used. */
    return malloc(WIRE_HEADER + WIRE_DATA);
}

static void worker_free(struct worker *w)
{
    ring_worker_free(w->ring);
    held_up_free(&w->held_up);
    chute_close(&w->chute);
    free(w->in);
    free(w->out);
    free(w);
}

struct server *engine_server(struct engine *e)
{
    return &e->server;
}

bool engine_is_stopping(const struct engine *e)
{
    return atomic_load(&e->stopping);
}

/* Counts it, and wakes the watch if that sleeps: from now on there is work. */
void engine_note(struct engine *e, const struct request *r)
{
    uint32_t opcode = r->head->opcode % WIRE_OPCODES;

    atomic_fetch_add_explicit(&e->counts[opcode], 1, memory_order_relaxed);
    decoy_note(&e->decoy, r);
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
    hold_end(&e->server.hold);
}

static void answer(struct worker *w, size_t n)
{
    struct engine *e = w->e;
    const struct fuse_in_header *head = (const void *)w->in;
    struct request r = {
        .head = head, .body = w->in + sizeof *head, .len = n - sizeof *head, .chute = &w->chute};
    size_t len;

    if (n < sizeof *head || head->len != n)
        return; /* not the kernel's */
    engine_note(e, &r);
    len = serve(&e->server, &r, w->out);
    /* ENOENT: nobody waits for the answer any more. Other errors read(2) will tell too. */
    if (len > 0 && write(e->server.options.device, w->out, len) < 0 && errno == ENOENT)
        serve_undo(&e->server, &r, w->out);
}

static bool requests_wait(const struct engine *e)
{
    struct pollfd p = {.fd = e->server.options.device, .events = POLLIN};

    return poll(&p, 1, 0) > 0 && (p.revents & POLLIN);
}

/* Whoever else wants this processor comes first. He may keep it for long, and have been the asker:
 * so where there is somebody it is not looked at all, for a while that doubles each time. */
static bool yields_in_vain(struct worker *w, int64_t before)
{
    int64_t now;

    (void)sched_yield();
    now = now_ns();
    if (now - before < LOST_NS)
        return false;
    w->uneager = now - w->looks_from > 4 * w->uneager ? UNEAGER_NS : 2 * w->uneager;
    if (w->uneager > UNEAGER_MOST)
        w->uneager = UNEAGER_MOST;
    w->looks_from = now + w->uneager;
    return true;
}

/* For as long as the next request may come soon. */
static void look_for_request(struct worker *w)
{
    int64_t now = w->answered_at;

    if (w->eager == 0 || now < w->looks_from)
        return;
    while (!requests_wait(w->e) && now - w->answered_at < CLOSE_NS) {
        now = now_ns();
        if (yields_in_vain(w, now))
            return;
    }
}

/* The next request; looked for before it is waited for, if the last ones came soon. */
static ssize_t next_request(struct worker *w)
{
    const struct engine *e = w->e;
    ssize_t n;

    look_for_request(w);
    n = read(e->server.options.device, w->in, WIRE_HEADER + WIRE_DATA);
    if (e->processors <= 2 || now_ns() - w->answered_at >= CLOSE_NS)
        w->eager = w->eager > 1 ? w->eager - 2 : 0;
    else if (w->eager < EAGER_MOST)
        w->eager++;
    return n;
}

static void serve_device(struct worker *w)
{
    struct engine *e = w->e;

    held_up_init(&w->held_up);
    while (may_read(e)) {
        ssize_t n;

        atomic_fetch_add(&e->waiting, 1);
        n = next_request(w);
        atomic_fetch_sub(&e->waiting, 1);
        if (n >= 0) {
            atomic_fetch_add(&w->turns, 1);
            answer(w, (size_t)n);
            atomic_fetch_add(&w->turns, 1);
            w->answered_at = now_ns();
        } else if (errno != EINTR && errno != EAGAIN && errno != ENOENT) {
            stop_all(e); /* ENODEV: unmounted */
        }
    }
}

static void *work(void *arg)
{
    struct worker *w = arg;
    struct engine *e = w->e;
    uint64_t one = 1;

    (void)prctl(PR_SET_NAME, w->ring ? "unionfs-ring" : "unionfs-engine");
    if (w->ring)
        ring_worker_run(w->ring);
    else
        serve_device(w);
    atomic_store(&w->leaves, true);
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

/* Frees the worker if it fails. */
static bool launch_locked(struct engine *e, struct worker *w)
{
    pthread_attr_t attr;
    bool started;

    pthread_attr_init(&attr);
    pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
    started = pthread_create(&w->thread, &attr, work, w) == 0;
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

static bool start_worker_locked(struct engine *e)
{
    struct worker *w = e->threads < MAX_THREADS ? worker_new(e) : NULL;

    if (!w)
        return false;
    w->in = buffer_new();
    w->out = buffer_new();
    if (!w->in || !w->out) {
        worker_free(w);
        return false;
    }
    return launch_locked(e, w);
}

/* With `given`, or a ring of its own. */
static bool start_ring_worker_locked(struct engine *e, unsigned queue, struct ring *given)
{
    struct worker *w = worker_new(e);

    if (!w)
        return false;
    if (ring_worker_new(e, queue, given, &w->ring) < 0) {
        worker_free(w);
        return false;
    }
    return launch_locked(e, w);
}

static void nap(long ns)
{
    struct timespec t = {.tv_nsec = ns};

    (void)nanosleep(&t, NULL);
}

static bool is_held_up(struct worker *w)
{
    uint64_t turn = atomic_load(&w->turns);

    return turn % 2 && held_up_by(&w->held_up, w->thread, turn);
}

/* How many get on, or will when they have a processor. */
static int running_locked(struct engine *e)
{
    int n = e->wanted - e->resting;

    for (struct worker *w = e->workers; w; w = w->next)
        if (!w->ring && !atomic_load(&w->leaves) && !is_held_up(w))
            n++;
    return n;
}

/* Those who get on leave some processors to the askers; one of them is enough where there are but
 * two. */
static void let_one_more_read(struct engine *e)
{
    int running;

    pthread_mutex_lock(&e->lock);
    running = running_locked(e);
    if (running > 0 && 2 * (running + 1) > e->processors) {
        ; /* enough */
    } else if (e->resting > e->wanted) {
        e->wanted++;
        pthread_cond_signal(&e->rest);
    } else {
        (void)start_worker_locked(e);
    }
    pthread_mutex_unlock(&e->lock);
}

/* Adds a thread to each queue whose threads have all been held up for a while. Whether a request
 * is in hand. */
static bool help_queues(struct engine *e)
{
    bool busy = false;

    if (!e->server.options.rings || atomic_load(&e->rings_over))
        return false;
    pthread_mutex_lock(&e->lock);
    for (unsigned i = 0; i < e->queues; i++)
        e->helped[i] = false;
    for (struct worker *w = e->workers; w; w = w->next) {
        if (!w->ring)
            continue;
        busy = busy || ring_worker_is_busy(w->ring);
        if (!ring_worker_is_stuck(w->ring))
            e->helped[ring_worker_queue(w->ring)] = true;
    }
    for (unsigned i = 0; i < e->queues; i++)
        if (!e->helped[i] && e->threads < MAX_THREADS + 2 * (int)e->queues)
            (void)start_ring_worker_locked(e, i, NULL);
    pthread_mutex_unlock(&e->lock);
    return busy;
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

/* Memory of nodes that are gone goes back to the system, once there were many. `most`: at once,
 * since it was done last. */
static void give_back(const struct engine *e, uint64_t *most)
{
    uint64_t now = tree_nodes(e->server.tree);

    if (*most < now + NODES_MANY)
        return;
    (void)malloc_trim(0);
    *most = now;
}

/* Whether it is at the request that it was at when last asked. */
static bool is_stuck(struct worker *w)
{
    uint64_t now = atomic_load(&w->turns);
    bool stuck = now % 2 && now == w->seen;

    w->seen = now;
    return stuck;
}

static cpu_set_t set_of(const struct engine *e, int processor)
{
    cpu_set_t set = e->all;

    if (processor != ANY_PROCESSOR) {
        CPU_ZERO(&set);
        CPU_SET(processor, &set);
    }
    return set;
}

/* False: somebody else has said where the thread is to be, by taskset(1) or a cpuset, or the
 * processor is gone. */
static bool is_where_we_put_it(const struct engine *e, pthread_t thread, int processor)
{
    cpu_set_t set = set_of(e, processor), now;

    return pthread_getaffinity_np(thread, sizeof now, &now) == 0 && CPU_EQUAL(&now, &set);
}

static void place(struct engine *e, struct worker *w, int processor)
{
    cpu_set_t set = set_of(e, processor);

    if (w->placed == processor)
        return;
    if (is_where_we_put_it(e, w->thread, w->placed)) {
        w->placed = processor;
        (void)pthread_setaffinity_np(w->thread, sizeof set, &set);
    } else {
        w->placed = ANY_PROCESSOR;
        decoy_retire(&e->decoy);
    }
}

/* Who answers at once is near who asks, and who is held up in nobody's way. */
static void place_all(struct engine *e)
{
    bool held_up = false;
    int near;

    pthread_mutex_lock(&e->lock);
    for (struct worker *w = e->workers; w; w = w->next) {
        w->stuck = !w->ring && is_stuck(w);
        held_up = held_up || w->stuck;
    }
    pthread_mutex_unlock(&e->lock);
    if (!is_where_we_put_it(e, pthread_self(), ANY_PROCESSOR))
        decoy_retire(&e->decoy);
    near = decoy_look(&e->decoy, held_up);
    pthread_mutex_lock(&e->lock);
    for (struct worker *w = e->workers; w; w = w->next)
        if (!w->ring)
            place(e, w, w->stuck ? ANY_PROCESSOR : near);
    pthread_mutex_unlock(&e->lock);
}

static void *watch(void *arg)
{
    struct engine *e = arg;
    uint64_t seen = 0, most = 0;
    int quiet = 0;

    (void)prctl(PR_SET_NAME, "unionfs-watch");
    while (!atomic_load(&e->stopping)) {
        uint64_t now = atomic_load(&e->answered);
        bool busy = help_queues(e);

        if (atomic_load(&e->waiting) == 0) {
            quiet = 0;
            if (requests_wait(e))
                let_one_more_read(e);
        } else if (busy || now != seen) {
            quiet = 0;
        } else if (++quiet > QUIET_TICKS) {
            give_back(e, &most);
            sleep_until_work(e, now);
            quiet = 0;
        }
        uint64_t nodes = tree_nodes(e->server.tree);
        most = nodes > most ? nodes : most;
        place_all(e);
        seen = now;
        nap(WATCH_NS);
    }
    nudge_until_ended(e);
    return NULL;
}

void engine_ring_refused(struct engine *e, errint_t err)
{
    if (err < 0)
        atomic_store(&e->ring_err, err);
    atomic_store(&e->rings_over, true);
}

errint_t engine_ring_error(const struct engine *e)
{
    return atomic_load(&e->ring_err);
}

static bool start_rings_locked(struct engine *e, struct rings *rings)
{
    bool started = true;

    if (!rings)
        return true;
    e->helped = calloc(rings->n, sizeof *e->helped);
    if (!e->helped)
        return false;
    e->queues = rings->n;
    for (unsigned i = 0; i < rings->n && started; i++) {
        started = start_ring_worker_locked(e, i, &rings->ring[i]);
        /* A second one, for what comes while the first is held up. */
        if (started)
            (void)start_ring_worker_locked(e, i, NULL);
    }
    return started;
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
    hold_init(&e->server.hold);
    pthread_mutex_init(&e->lock, NULL);
    pthread_cond_init(&e->rest, NULL);
    pthread_cond_init(&e->wake, NULL);
    e->ended_fd = eventfd(0, EFD_CLOEXEC);
    if (e->ended_fd < 0) {
        free(e);
        return errno_or_eio();
    }
    face_start(t, options->device, options->passthrough);
    if (sched_getaffinity(0, sizeof e->all, &e->all) < 0)
        CPU_SET(0, &e->all);
    e->processors = CPU_COUNT(&e->all);
    decoy_init(&e->decoy);
    /* Signals are for the thread that started us. */
    sigfillset(&all);
    sigdelset(&all, SIGURG);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    e->watching = pthread_create(&e->watch, NULL, watch, e) == 0;
    pthread_mutex_lock(&e->lock);
    started = e->watching && start_worker_locked(e) && start_rings_locked(e, options->rings);
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
    decoy_free(&e->decoy);
    /* The last worker may still hold the lock. */
    pthread_mutex_lock(&e->lock);
    pthread_mutex_unlock(&e->lock);
    pthread_cond_destroy(&e->rest);
    pthread_cond_destroy(&e->wake);
    pthread_mutex_destroy(&e->lock);
    free(e->helped);
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

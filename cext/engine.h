/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The engine: threads that read /dev/fuse (engine.c) and answer (serve.c). What changes the union
 * is asked of `call`, on the thread that has read the request.
 *
 * Callable from any thread; needs no interpreter, but for what `call` may need. */
#ifndef UNIONFS_ENGINE_H
#define UNIONFS_ENGINE_H

#include <stdatomic.h>

#include "freed.h"
#include "hold.h"
#include "tree.h"
#include "wire.h"

struct request {
    const struct fuse_in_header *head;
    const char *body;
    size_t len; /* of the body */
    /* By which a large answer may go to the device; NULL: there is no other way than `out`. */
    struct chute *chute;
};

struct rings; /* of a union to be, a ring for each processor; opened before INIT is answered */

struct engine_options {
    int device;       /* of the mount, INIT answered; stays the caller's */
    int statfs_fd;    /* whose file system's space is shown */
    int64_t valid_ns; /* how long the kernel may keep names and attributes */
    bool keep_cache;  /* pages and listings stay in the kernel when a file is closed */
    int64_t only_uid; /* allow_root: others but root are refused; -1: nobody is */
    bool flush;       /* close(2) can fail below: FLUSH is answered, and is not waved away */
    enum passthrough passthrough; /* of what the INIT has agreed */
    bool no_open;        /* nothing can be written, nothing passes through: no OPEN is needed */
    struct rings *rings; /* the kernel was told to use them; taken out by engine_start; or NULL */
    /* Answers into `out` (of `cap` bytes): its length, or -errno. */
    ssize_t (*call)(void *arg, const struct request *r, char *out, size_t cap);
    /* Told before a thread that has called ends. */
    void (*leave)(void *arg);
    void *arg;
};

struct engine;

/* One for each of the kernel's queues. -EPERM: the administrator allows no io_uring. */
errint_t rings_open(unsigned queues, struct rings **ret_rings);
/* What engine_start has not taken out is closed. */
void rings_free(struct rings *rings);
errint_t engine_start(struct tree *t, const struct engine_options *options, struct engine **ret_e);
/* Readable when the last thread has ended: unmounted, or stopped. */
int engine_ended_fd(const struct engine *e);
/* Asks the threads to end after the requests that they are at; does not wait. */
void engine_stop(struct engine *e);
/* Stops, waits and frees. */
void engine_free(struct engine *e);
/* Requests by number (FUSE_*), and how many of them `call` answered. */
void engine_counts(const struct engine *e, uint64_t all[static WIRE_OPCODES],
                   uint64_t called[static WIRE_OPCODES]);

/* Why the kernel did not take the rings: all requests come by the device. 0: it did. */
errint_t engine_ring_error(const struct engine *e);

/* serve.c. Answers one request into `out`, a struct fuse_out_header and what follows it: its
 * length, 0 where no answer is due. */
struct server {
    struct tree *tree;
    struct engine_options options;
    _Atomic uint64_t called[WIRE_OPCODES];
    struct hold hold;
    struct freed freed;
};
size_t serve(struct server *s, const struct request *r, char *out);
/* The answer found nobody: what it gave to the kernel is taken back. */
void serve_undo(struct server *s, const struct request *r, const char *out);

#endif

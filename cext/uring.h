/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Requests over io_uring (docs/adr/0012). The kernel keeps a queue for each processor, and gives
 * what is asked there to whoever has registered buffers with it. Each of our threads has one pair
 * of buffers and a ring of its own: while it is at a request, the next one goes to another thread
 * of the queue, or waits until one of them has answered.
 *
 * The threads' lives are engine.c's. */
#ifndef UNIONFS_URING_H
#define UNIONFS_URING_H

#include "engine.h"
#include "ring.h"

/* What a ring's thread reads and writes, shared with the kernel. */
struct ring_buffers {
    struct fuse_uring_req_header *header;
    char *payload; /* of payload_size bytes; there is room for the request's own header before it */
    size_t payload_size;
    char *out; /* an answer while the payload is still the request's */
};

errint_t ring_buffers_new(struct ring_buffers *b);
void ring_buffers_free(struct ring_buffers *b);
/* Answers the request that lies in the buffers, in place. */
void ring_buffers_serve(struct server *s, struct ring_buffers *b);

struct rings {
    unsigned n;
    struct ring ring[];
};

struct ring_worker;

/* Takes over `given`, a ring that is open; opens one itself if there is none. One that comes to
 * the help of a queue whose threads are all held up begins with what waits there. */
errint_t ring_worker_new(struct engine *e, unsigned queue, struct ring *given,
                         struct ring_worker **ret_worker);
void ring_worker_free(struct ring_worker *w);
/* Serves until the engine stops or the connection ends. */
void ring_worker_run(struct ring_worker *w);
unsigned ring_worker_queue(const struct ring_worker *w);
/* Whether it is at the request that it was at when last asked. For one asker. Then it may go on
 * on any processor, so that it is in nobody's way on its own. */
bool ring_worker_is_stuck(struct ring_worker *w);
bool ring_worker_is_busy(const struct ring_worker *w);

/* engine.c, for the threads of the rings. */
struct server *engine_server(struct engine *e);
bool engine_is_stopping(const struct engine *e);
/* A request has come. */
void engine_note(struct engine *e, const struct request *r);
/* The kernel has refused a queue's first buffers: all requests will come by the device. */
void engine_ring_refused(struct engine *e, errint_t err);

#endif

/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "uring.h"
#include "serve.h"

#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/uio.h>

enum {
    HEADER_BYTES = 4096, /* a page, so that the payload begins with one */
    /* Of a payload, by a thread that rests. What give_ahead puts there no answer tells of. */
    KEPT_BYTES = AHEAD_AT + AHEAD_MOST,
    REST_MS = 1000,
    CALLS = 8,
};

struct ring_worker {
    struct engine *e;
    unsigned queue;
    bool helps; /* did not come with the first ones */
    struct ring ring;
    struct ring_buffers buffers;
    size_t touched; /* bytes of the payload that may be in memory */
    bool registered;
    _Atomic uint64_t turns; /* odd: at a request */
    uint64_t seen;          /* of turns, by ring_worker_is_stuck */
    pthread_t thread;       /* once there have been turns */
    _Atomic bool strays;    /* it may be on any processor */
};

static _Atomic uint64_t notices;

/* ---- one request ---- */

static size_t payload_bytes(void)
{
    /* As the kernel reckons it: the larger of max_write and of max_pages pages. */
    size_t pages = 256 * (size_t)sysconf(_SC_PAGESIZE);

    return pages > WIRE_DATA ? pages : WIRE_DATA;
}

errint_t ring_buffers_new(struct ring_buffers *b)
{
    size_t size = payload_bytes();
    /* Its pages come into being as they are used. */
    void *map =
        mmap(NULL, HEADER_BYTES + size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    if (map == MAP_FAILED)
        return errno_or_eio();
    *b = (struct ring_buffers){.header = map,
                               .payload = (char *)map + HEADER_BYTES,
                               .payload_size = size,
                               .out = malloc(sizeof(struct fuse_out_header) + WIRE_DATA)};
    if (!b->out) {
        ring_buffers_free(b);
        return -ENOMEM;
    }
    return 0;
}

void ring_buffers_free(struct ring_buffers *b)
{
    free(b->out);
    if (b->header)
        (void)munmap(b->header, HEADER_BYTES + b->payload_size);
    *b = (struct ring_buffers){0};
}

void ring_buffers_serve(struct server *s, struct ring_buffers *b)
{
    struct fuse_uring_req_header *h = b->header;
    struct fuse_in_header head;
    struct fuse_out_header *answer = (void *)h->in_out;
    size_t payload = h->ring_ent_in_out.payload_sz, len, own;
    struct request r = {.head = &head};
    char *out;

    memcpy(&head, h->in_out, sizeof head);
    *answer = (struct fuse_out_header){.len = sizeof *answer, .unique = head.unique};
    h->ring_ent_in_out.payload_sz = 0;
    /* The request's own header, of up to 128 bytes, lies apart from what follows it. */
    r.len = head.len - sizeof head;
    own = r.len - payload;
    if (head.len < sizeof head || r.len < payload || own > sizeof h->op_in || own % 8 != 0 ||
        payload > b->payload_size) {
        answer->error = -EIO; /* not the kernel's */
        return;
    }
    if (head.opcode == FUSE_NOTIFY_REPLY)
        return; /* to what call_for_requests asked */
    if (payload == 0) {
        r.body = h->op_in;
        out = b->payload - sizeof *answer;
    } else {
        memcpy(b->payload - own, h->op_in, own);
        r.body = b->payload - own;
        out = b->out;
    }
    len = serve(s, &r, out);
    if (len == 0)
        return;
    memcpy(answer, out, sizeof *answer);
    h->ring_ent_in_out.payload_sz = (uint32_t)(len - sizeof *answer);
    if (out == b->out)
        memcpy(b->payload, out + sizeof *answer, len - sizeof *answer);
}

/* ---- commands ---- */

static void put_command(struct ring_worker *w, uint32_t what, uint64_t commit_id,
                        const struct iovec *buffers)
{
    struct io_uring_sqe *sqe = ring_command(&w->ring);
    struct fuse_uring_cmd_req in = {.commit_id = commit_id, .qid = (uint16_t)w->queue};

    sqe->opcode = IORING_OP_URING_CMD;
    sqe->fd = engine_server(w->e)->options.device;
    sqe->cmd_op = what;
    sqe->addr = (uint64_t)(uintptr_t)buffers;
    sqe->len = buffers ? 2 : 0;
    memcpy(sqe->cmd, &in, sizeof in);
}

static errint_t register_buffers(struct ring_worker *w)
{
    const struct iovec both[2] = {
        {.iov_base = w->buffers.header, .iov_len = sizeof *w->buffers.header},
        {.iov_base = w->buffers.payload, .iov_len = w->buffers.payload_size},
    };

    w->registered = false;
    put_command(w, FUSE_IO_URING_CMD_REGISTER, 0, both);
    return ring_enter(&w->ring, false, 0);
}

/* What has waited in the queue is handed out when a request there has been answered, and not when
 * buffers are registered. So we have the kernel send us one: asked for the pages of a file, of
 * which we want none, it answers by a request to the queue of the processor that we are on. A file
 * that it has forgotten meanwhile is answered ENOENT, a directory EINVAL. */
static void call_for_requests(const struct ring_worker *w)
{
    struct {
        struct fuse_out_header head;
        struct fuse_notify_retrieve_out what;
    } notice = {.head = {.len = sizeof notice, .error = FUSE_NOTIFY_RETRIEVE}};
    const struct server *s = engine_server(w->e);
    uint64_t at = atomic_fetch_add(&notices, 1);

    /* No number that the kernel will ever come to; even, as its own are. */
    notice.what.notify_unique = (1ULL << 62) + 2 * at;
    for (int i = 0; i < CALLS; i++) {
        notice.what.nodeid = some_known_file(s->tree, (at * CALLS + (uint64_t)i) * 61);
        if (notice.what.nodeid && write(s->options.device, &notice, sizeof notice) >= 0)
            return;
    }
}

/* A thread that had much to carry gives the memory back when there is nothing more. */
static errint_t wait_for_request(struct ring_worker *w)
{
    errint_t err = ring_enter(&w->ring, true, w->touched > KEPT_BYTES ? REST_MS : 0);

    if (err == -ETIME) {
        /* Nothing is put into the payload but in ring_enter. */
        (void)madvise(w->buffers.payload + KEPT_BYTES, w->buffers.payload_size - KEPT_BYTES,
                      MADV_DONTNEED);
        w->touched = KEPT_BYTES;
    }
    return err == -EINTR || err == -ETIME ? 0 : err;
}

static void note_touched(struct ring_worker *w)
{
    size_t size = w->buffers.header->ring_ent_in_out.payload_sz;

    if (size > w->touched)
        w->touched = size;
}

static void keep_on_processor(pthread_t thread, unsigned number)
{
    cpu_set_t set;

    CPU_ZERO(&set);
    CPU_SET(number, &set);
    (void)pthread_setaffinity_np(thread, sizeof set, &set);
}

static void answer(struct ring_worker *w)
{
    const struct fuse_uring_req_header *h = w->buffers.header;
    const struct fuse_in_header *head = (const void *)h->in_out;
    uint64_t commit_id = h->ring_ent_in_out.commit_id;

    w->registered = true;
    atomic_fetch_add(&w->turns, 1);
    engine_note(w->e, &(struct request){.head = head, .body = h->op_in, .len = sizeof h->op_in});
    note_touched(w);
    ring_buffers_serve(engine_server(w->e), &w->buffers);
    note_touched(w);
    atomic_fetch_add(&w->turns, 1);
    if (atomic_load(&w->strays)) {
        atomic_store(&w->strays, false);
        keep_on_processor(w->thread, w->queue);
    }
    put_command(w, FUSE_IO_URING_CMD_COMMIT_AND_FETCH, commit_id, NULL);
}

static errint_t begin(struct ring_worker *w)
{
    errint_t err = ring_enable(&w->ring);

    w->thread = pthread_self();
    keep_on_processor(w->thread, w->queue);
    if (err == 0)
        err = register_buffers(w);
    if (err == 0 && w->helps)
        call_for_requests(w);
    return err;
}

static bool is_over(errint_t err)
{
    return err == -ENOTCONN || err == -ECONNABORTED || err == -ENODEV;
}

void ring_worker_run(struct ring_worker *w)
{
    errint_t err = begin(w);

    while (err == 0 && !engine_is_stopping(w->e)) {
        struct io_uring_cqe result;

        if (!ring_result(&w->ring, &result))
            err = wait_for_request(w);
        else if (result.res >= 0)
            answer(w);
        else if (w->registered)
            err = register_buffers(w); /* fails too, if the connection has ended */
        else
            err = result.res;
    }
    if (err == 0)
        (void)ring_enter(&w->ring, false, 0); /* the last answer */
    else if (is_over(err) || !w->helps)
        engine_ring_refused(w->e, is_over(err) ? 0 : err);
}

/* ---- life ---- */

void rings_free(struct rings *rings)
{
    for (unsigned i = 0; rings && i < rings->n; i++)
        ring_close(&rings->ring[i]);
    free(rings);
}

errint_t rings_open(unsigned queues, struct rings **ret_rings)
{
    struct rings *rings = calloc(1, sizeof *rings + queues * sizeof rings->ring[0]);

    if (!rings)
        return -ENOMEM;
    while (rings->n < queues) {
        errint_t err = ring_open(&rings->ring[rings->n]);

        if (err < 0) {
            rings_free(rings);
            return err;
        }
        rings->n++;
    }
    *ret_rings = rings;
    return 0;
}

errint_t ring_worker_new(struct engine *e, unsigned queue, struct ring *given,
                         struct ring_worker **ret_worker)
{
    struct ring_worker *w = calloc(1, sizeof *w);
    errint_t err;

    if (!w)
        return -ENOMEM;
    w->e = e;
    w->queue = queue;
    w->helps = !given;
    w->ring.fd = -1;
    err = ring_buffers_new(&w->buffers);
    if (err == 0 && !given)
        err = ring_open(&w->ring);
    if (err < 0) {
        ring_worker_free(w);
        return err;
    }
    if (given) {
        w->ring = *given;
        *given = (struct ring){.fd = -1};
    }
    *ret_worker = w;
    return 0;
}

void ring_worker_free(struct ring_worker *w)
{
    if (!w)
        return;
    ring_close(&w->ring);
    ring_buffers_free(&w->buffers);
    free(w);
}

unsigned ring_worker_queue(const struct ring_worker *w)
{
    return w->queue;
}

bool ring_worker_is_stuck(struct ring_worker *w)
{
    uint64_t turns = atomic_load(&w->turns), before = w->seen;

    w->seen = turns;
    if (turns % 2 == 0 || turns != before)
        return false;
    if (!atomic_load(&w->strays)) {
        cpu_set_t all;

        memset(&all, 0xff, sizeof all);
        atomic_store(&w->strays, true);
        (void)pthread_setaffinity_np(w->thread, sizeof all, &all);
        /* It has gone on meanwhile, and may have been back on its processor before we let it go. */
        if (atomic_load(&w->turns) != turns)
            keep_on_processor(w->thread, w->queue);
    }
    return true;
}

bool ring_worker_is_busy(const struct ring_worker *w)
{
    return atomic_load(&w->turns) % 2 == 1;
}

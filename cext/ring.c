/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "ring.h"

#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { COMMAND_BYTES = 128 };

static void *map_at(int fd, size_t size, off_t what)
{
    return mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, what);
}

static void take_offsets(struct ring *r, const struct io_uring_params *p)
{
    char *map = r->map;
    uint32_t *order = (void *)(map + p->sq_off.array);

    r->sq_head = (void *)(map + p->sq_off.head);
    r->sq_tail = (void *)(map + p->sq_off.tail);
    r->sq_mask = *(uint32_t *)(void *)(map + p->sq_off.ring_mask);
    r->cq_head = (void *)(map + p->cq_off.head);
    r->cq_tail = (void *)(map + p->cq_off.tail);
    r->cq_mask = *(uint32_t *)(void *)(map + p->cq_off.ring_mask);
    r->results = (void *)(map + p->cq_off.cqes);
    for (uint32_t i = 0; i < p->sq_entries; i++)
        order[i] = i;
}

errint_t ring_open(struct ring *r)
{
    /* What arrives is put into our buffers when we ask for it, by ourselves: no signal. */
    struct io_uring_params p = {.flags = IORING_SETUP_SQE128 | IORING_SETUP_R_DISABLED |
                                         IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN};
    size_t submissions, results;
    errint_t err;

    *r = (struct ring){.fd = (int)syscall(SYS_io_uring_setup, 1, &p)};
    if (r->fd < 0)
        return errno_or_eio();
    submissions = p.sq_off.array + p.sq_entries * sizeof(uint32_t);
    results = p.cq_off.cqes + p.cq_entries * sizeof(struct io_uring_cqe);
    r->map_size = submissions > results ? submissions : results;
    r->commands_size = (size_t)p.sq_entries * COMMAND_BYTES;
    r->map = map_at(r->fd, r->map_size, IORING_OFF_SQ_RING);
    r->commands = map_at(r->fd, r->commands_size, IORING_OFF_SQES);
    if (r->map == MAP_FAILED || r->commands == MAP_FAILED) {
        err = errno_or_eio();
        ring_close(r);
        return err;
    }
    take_offsets(r, &p);
    return 0;
}

void ring_close(struct ring *r)
{
    if (r->map && r->map != MAP_FAILED)
        (void)munmap(r->map, r->map_size);
    if (r->commands && r->commands != MAP_FAILED)
        (void)munmap(r->commands, r->commands_size);
    close_keep_errno(r->fd);
    *r = (struct ring){.fd = -1};
}

errint_t ring_enable(struct ring *r)
{
    if (syscall(SYS_io_uring_register, r->fd, IORING_REGISTER_ENABLE_RINGS, NULL, 0) < 0)
        return errno_or_eio();
    return 0;
}

struct io_uring_sqe *ring_command(struct ring *r)
{
    uint32_t tail = atomic_load_explicit(r->sq_tail, memory_order_relaxed);
    struct io_uring_sqe *command =
        (void *)((char *)r->commands + (size_t)(tail & r->sq_mask) * COMMAND_BYTES);

    memset(command, 0, COMMAND_BYTES);
    atomic_store_explicit(r->sq_tail, tail + 1, memory_order_release);
    return command;
}

errint_t ring_enter(struct ring *r, bool wait, long timeout_ms)
{
    uint32_t due = atomic_load_explicit(r->sq_tail, memory_order_relaxed) -
                   atomic_load_explicit(r->sq_head, memory_order_acquire);
    struct __kernel_timespec time = {.tv_sec = timeout_ms / 1000,
                                     .tv_nsec = timeout_ms % 1000 * 1000000};
    struct io_uring_getevents_arg arg = {.sigmask_sz = _NSIG / 8, .ts = (uint64_t)(uintptr_t)&time};
    unsigned flags = wait ? IORING_ENTER_GETEVENTS : 0;
    long n;

    if (!due && !wait)
        return 0;
    if (wait && timeout_ms > 0)
        n = syscall(SYS_io_uring_enter, r->fd, due, 1, flags | IORING_ENTER_EXT_ARG, &arg,
                    sizeof arg);
    else
        n = syscall(SYS_io_uring_enter, r->fd, due, wait ? 1 : 0, flags, NULL, 0);
    return n < 0 ? errno_or_eio() : 0;
}

bool ring_result(struct ring *r, struct io_uring_cqe *ret_result)
{
    uint32_t head = atomic_load_explicit(r->cq_head, memory_order_relaxed);

    if (head == atomic_load_explicit(r->cq_tail, memory_order_acquire))
        return false;
    *ret_result = r->results[head & r->cq_mask];
    atomic_store_explicit(r->cq_head, head + 1, memory_order_release);
    return true;
}

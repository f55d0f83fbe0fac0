/* SPDX-License-Identifier: GPL-2.0-or-later */
/* One io_uring by its system calls (docs/adr/0012): a single command at a time, of one thread, the
 * one that has enabled the ring. */
#ifndef UNIONFS_RING_H
#define UNIONFS_RING_H

#include <linux/io_uring.h>
#include <stdatomic.h>

#include "util.h"

struct ring {
    int fd;
    void *map, *commands; /* what the kernel shares with us */
    size_t map_size, commands_size;
    _Atomic uint32_t *sq_head, *sq_tail, *cq_head, *cq_tail;
    uint32_t sq_mask, cq_mask;
    const struct io_uring_cqe *results;
};

/* Opens it, for the thread that will enable it. -EPERM: the administrator allows no io_uring. */
errint_t ring_open(struct ring *r);
errint_t ring_enable(struct ring *r);
/* Also of one that was never opened, if it is all zero but for fd -1. */
void ring_close(struct ring *r);
/* The room of the next command, cleared; it goes to the kernel with the next ring_enter. */
struct io_uring_sqe *ring_command(struct ring *r);
/* Hands over the command that is due; waits for a result, at most `timeout_ms` (0: for ever).
 * -EINTR, -ETIME. */
errint_t ring_enter(struct ring *r, bool wait, long timeout_ms);
bool ring_result(struct ring *r, struct io_uring_cqe *ret_result);

#endif

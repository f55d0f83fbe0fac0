/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "hold.h"

#include <fcntl.h>
#include <linux/fs.h>
#include <time.h>

#include "engine.h"

/* As each keeps a thread: when there are more, it is over. */
enum { MOST_WAITING = 300 };

static const int64_t SECOND_NS = 1000000000;

void hold_init(struct hold *h)
{
    pthread_condattr_t attr;

    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_mutex_init(&h->lock, NULL);
    pthread_cond_init(&h->turned, &attr);
    pthread_condattr_destroy(&attr);
}

static void end_locked(struct hold *h)
{
    atomic_store(&h->held, false);
    pthread_cond_broadcast(&h->turned);
}

/* Ends what is over. */
static bool is_held_locked(struct hold *h)
{
    if (atomic_load(&h->held) && now_ns() >= h->until)
        end_locked(h);
    return atomic_load(&h->held);
}

static void wait_locked(struct hold *h)
{
    struct timespec until = {.tv_sec = h->until / SECOND_NS, .tv_nsec = h->until % SECOND_NS};

    (void)pthread_cond_timedwait(&h->turned, &h->lock, &until);
}

static errint_t begin_locked(struct hold *h, const struct hold_wish *wish)
{
    if (is_held_locked(h))
        return -EBUSY;
    h->ticket = wish->ticket;
    h->until = now_ns() + wish->seconds * SECOND_NS;
    atomic_store(&h->held, true);
    while (atomic_load(&h->changing) > 0) {
        if (!is_held_locked(h) || h->ticket != wish->ticket)
            return -EAGAIN;
        wait_locked(h);
    }
    h->until = now_ns() + wish->seconds * SECOND_NS;
    return 0;
}

errint_t hold_ask(struct hold *h, const struct hold_wish *wish)
{
    errint_t err = 0;

    pthread_mutex_lock(&h->lock);
    if (wish->begins)
        err = begin_locked(h, wish);
    else if (wish->ticket != h->ticket)
        err = -ESTALE;
    else if (!is_held_locked(h))
        err = -ETIME;
    else if (wish->seconds)
        h->until = now_ns() + wish->seconds * SECOND_NS;
    else
        end_locked(h);
    pthread_mutex_unlock(&h->lock);
    return err;
}

void hold_end(struct hold *h)
{
    pthread_mutex_lock(&h->lock);
    end_locked(h);
    pthread_mutex_unlock(&h->lock);
}

void hold_pass(struct hold *h)
{
    for (;;) {
        atomic_fetch_add(&h->changing, 1);
        if (!atomic_load(&h->held))
            return;
        hold_passed(h);
        pthread_mutex_lock(&h->lock);
        if (++h->waiting > MOST_WAITING)
            end_locked(h);
        while (is_held_locked(h))
            wait_locked(h);
        h->waiting--;
        pthread_mutex_unlock(&h->lock);
    }
}

void hold_passed(struct hold *h)
{
    if (atomic_fetch_sub(&h->changing, 1) > 1 || !atomic_load(&h->held))
        return;
    pthread_mutex_lock(&h->lock);
    pthread_cond_broadcast(&h->turned);
    pthread_mutex_unlock(&h->lock);
}

bool changes_something(const struct request *r)
{
    const void *body = r->body;
    uint32_t flags, cmd;

    switch (r->head->opcode) {
    case FUSE_SETATTR:
    case FUSE_SYMLINK:
    case FUSE_MKNOD:
    case FUSE_MKDIR:
    case FUSE_UNLINK:
    case FUSE_RMDIR:
    case FUSE_RENAME:
    case FUSE_RENAME2:
    case FUSE_LINK:
    case FUSE_SETXATTR:
    case FUSE_REMOVEXATTR:
    case FUSE_CREATE:
    case FUSE_TMPFILE:
    case FUSE_FALLOCATE:
    case FUSE_COPY_FILE_RANGE:
    case WIRE_COPY_FILE_RANGE_64:
        return true;
    case FUSE_WRITE:
        flags = ((const struct fuse_write_in *)body)->write_flags;
        return !(flags & FUSE_WRITE_CACHE);
    case FUSE_OPEN:
        flags = ((const struct fuse_open_in *)body)->flags;
        return (flags & O_ACCMODE) != O_RDONLY || flags & O_TRUNC;
    case FUSE_IOCTL:
        cmd = ((const struct fuse_ioctl_in *)body)->cmd;
        return cmd == FS_IOC_SETFLAGS || cmd == FS_IOC_FSSETXATTR;
    default:
        return false;
    }
}

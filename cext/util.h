/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Small things every part of the C core uses: the error convention, owners of descriptors and
 * memory that clean up after themselves, the clock. */
#ifndef UNIONFS_UTIL_H
#define UNIONFS_UTIL_H

#include <errno.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

/* Zero or -errno. Functions that set errno return a plain int. Outputs are named ret_*, and are
 * written on success only. */
typedef int errint_t;

static inline void close_keep_errno(int fd)
{
    if (fd >= 0) {
        int saved = errno;
        (void)close(fd);
        errno = saved;
    }
}

static inline void cleanup_fd_fn(int *fd)
{
    close_keep_errno(*fd);
    *fd = -1;
}

static inline void cleanup_free_fn(void *p)
{
    void **pp = p;
    int saved = errno;
    free(*pp);
    *pp = NULL;
    errno = saved;
}

#define cleanup_fd __attribute__((cleanup(cleanup_fd_fn)))
#define cleanup_free __attribute__((cleanup(cleanup_free_fn)))

static inline int steal_fd(int *fd)
{
    int taken = *fd;
    *fd = -1;
    return taken;
}

static inline void *steal_pointer(void *p)
{
    void **pp = p;
    void *taken = *pp;
    *pp = NULL;
    return taken;
}

static inline int64_t now_ns(void)
{
    struct timespec t;

    (void)clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* Only after a system call that has just failed. */
static inline errint_t errno_or_eio(void)
{
    return errno > 0 ? -errno : -EIO;
}

#endif

/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "spare.h"

#include <fcntl.h>
#include <limits.h>
#include <sys/resource.h>

enum { SPARE_MOST = 64, SPARE_PART = 8 };

void spare_init(struct tree *t)
{
    struct rlimit limit;
    int all = INT_MAX, spare;

    if (getrlimit(RLIMIT_NOFILE, &limit) == 0 && limit.rlim_cur < INT_MAX)
        all = (int)limit.rlim_cur;
    spare = all / SPARE_PART < SPARE_MOST ? all / SPARE_PART : SPARE_MOST;
    t->most_open = all - spare;
    t->most_pinned = all - spare / 2;
}

/* A duplicate with a number below `most`, or -1. */
static int duplicate_below(struct tree *t, int fd, int most)
{
    (void)rdirs_release(t);
    cleanup_fd int other = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    return other < most ? steal_fd(&other) : -1;
}

static errint_t keep_below(struct tree *t, int *fd, int most)
{
    int other;

    if (*fd < most)
        return 0;
    other = duplicate_below(t, *fd, most);
    if (other < 0)
        return -ENFILE;
    close_keep_errno(*fd);
    *fd = other;
    return 0;
}

errint_t spare_keep(struct tree *t, int *fd)
{
    return keep_below(t, fd, t->most_open);
}

errint_t spare_keep_pin(struct tree *t, int *fd)
{
    return keep_below(t, fd, t->most_pinned);
}

int spare_duplicate(struct tree *t, int fd)
{
    return fd < t->most_open ? -1 : duplicate_below(t, fd, t->most_open);
}

errint_t spare_ask(struct tree *t)
{
    if (atomic_load(&t->last_open) < t->most_open / 2)
        return 0; /* far from it: two system calls less for each new file */
    cleanup_fd int fd = fcntl(t->layers[0].fd, F_DUPFD_CLOEXEC, 0);

    return fd < 0 ? -ENFILE : spare_keep(t, &fd);
}

/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "held_up.h"

#include <fcntl.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "util.h"

enum {
    MUCH_NS = 1000000, /* of a processor's time for one request */
    STAT_BYTES = 128,  /* the state comes after a number and a name of 16 bytes at most */
    RUNNING = 'R',     /* or waiting for a processor */
    UNKNOWN = '?',
};

void held_up_init(struct held_up *h)
{
    /* Kept open: later the union itself may cover the path. */
    h->stat_fd = open("/proc/thread-self/stat", O_RDONLY | O_CLOEXEC);
}

void held_up_free(struct held_up *h)
{
    if (h->stat_fd >= 0)
        close(h->stat_fd);
}

static char state(const struct held_up *h)
{
    char stat[STAT_BYTES + 1], *name_end;
    ssize_t n = h->stat_fd < 0 ? 0 : pread(h->stat_fd, stat, STAT_BYTES, 0);

    stat[n < 0 ? 0 : n] = '\0';
    name_end = strrchr(stat, ')');
    return name_end && name_end[1] == ' ' ? name_end[2] : UNKNOWN;
}

static int64_t worked_ns(pthread_t thread)
{
    struct timespec t = {0};
    clockid_t clock;

    if (pthread_getcpuclockid(thread, &clock) == 0)
        (void)clock_gettime(clock, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

bool held_up_by(struct held_up *h, pthread_t thread, uint64_t turn)
{
    int64_t worked = worked_ns(thread);
    bool again = turn == h->turn;
    char now;

    if (!again) {
        h->turn = turn;
        h->worked = worked;
    }
    if (worked - h->worked >= MUCH_NS)
        return true;
    now = state(h);
    return now == UNKNOWN ? again : now != RUNNING;
}

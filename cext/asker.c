/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "asker.h"

#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "util.h"

enum { PATH_BYTES = 32, STATUS_BYTES = 4096 };

static _Thread_local uint32_t asker;

void asker_is(uint32_t thread)
{
    asker = thread;
}

/* By what is pending, not by FUSE_INTERRUPT: that is told of the first signal only, be it one that
 * kills or not. Of each that does (but for a core dump) the kernel makes a SIGKILL. */
bool asker_was_killed(void)
{
    char path[PATH_BYTES], status[STATUS_BYTES + 1], *pending;
    ssize_t n;

    if (!asker)
        return false;
    (void)snprintf(path, sizeof path, "/proc/%u/status", asker);
    cleanup_fd int fd = open(path, O_RDONLY | O_CLOEXEC);
    n = fd < 0 ? 0 : read(fd, status, STATUS_BYTES);
    status[n < 0 ? 0 : n] = '\0';
    pending = strstr(status, "\nSigPnd:");
    return pending && strtoull(pending + strlen("\nSigPnd:"), NULL, 16) & 1ULL << (SIGKILL - 1);
}

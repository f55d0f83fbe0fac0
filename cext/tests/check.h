/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef UNIONFS_TESTS_CHECK_H
#define UNIONFS_TESTS_CHECK_H

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

#define CHECK(what)                                                                                \
    do {                                                                                           \
        if (!(what)) {                                                                             \
            (void)fprintf(stderr, "%s:%d: not so: %s (errno %d)\n", __FILE__, __LINE__, #what,     \
                          errno);                                                                  \
            abort();                                                                               \
        }                                                                                          \
    } while (0)

#endif

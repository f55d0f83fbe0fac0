/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Who finds no space is told of what has been freed, and waits for what is being freed. */
#include <pthread.h>
#include <unistd.h>

#include "../freed.h"
#include "check.h"

static struct freed freed;

static void test_nothing_is_freed(void)
{
    uint64_t before = freed_count(&freed);

    CHECK(!freed_since(&freed, &before));
    freed_soon(&freed);
    CHECK(!freed_since(&freed, &before)); /* though it was waited for */
}

static void test_freed_before(void)
{
    uint64_t before = freed_count(&freed);

    freed_begin(&freed);
    freed_end(&freed);
    CHECK(freed_since(&freed, &before));
    CHECK(before == freed_count(&freed));
}

static void *ends(void *arg)
{
    (void)usleep(3000);
    freed_end(&freed);
    return arg;
}

static void test_waited_for(void)
{
    uint64_t before = freed_count(&freed);
    pthread_t thread;

    freed_begin(&freed);
    CHECK(pthread_create(&thread, NULL, ends, NULL) == 0);
    CHECK(freed_since(&freed, &before)); /* only once it has ended */
    CHECK(pthread_join(thread, NULL) == 0);
}

int main(void)
{
    test_nothing_is_freed();
    test_freed_before();
    test_waited_for();
    return 0;
}

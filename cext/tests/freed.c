/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Who finds no space is told of what has been freed, and waits for what is being freed, or has no
 * name any more; but not again for what somebody has open. */
#include <pthread.h>
#include <unistd.h>

#include "../freed.h"
#include "check.h"

static struct freed freed;
static _Atomic uint64_t leaving;

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

static void *leaves(void *arg)
{
    (void)usleep(3000);
    atomic_fetch_sub(&leaving, 5);
    freed_end(&freed);
    return arg;
}

static void test_what_leaves_is_waited_for(void)
{
    pthread_t thread;

    atomic_store(&leaving, 5);
    CHECK(freed_due(&freed, &leaving) == 5);
    freed_begin(&freed);
    CHECK(pthread_create(&thread, NULL, leaves, NULL) == 0);
    freed_await(&freed, &leaving);
    CHECK(atomic_load(&leaving) == 0);
    CHECK(pthread_join(thread, NULL) == 0);
}

static void test_what_stays_is_waited_for_once(void)
{
    pthread_t thread;

    atomic_store(&leaving, 7);
    freed_await(&freed, &leaving);
    CHECK(freed_due(&freed, &leaving) == 0);
    atomic_store(&leaving, 7 + 5);
    CHECK(freed_due(&freed, &leaving) == 5);
    freed_begin(&freed);
    CHECK(pthread_create(&thread, NULL, leaves, NULL) == 0);
    freed_await(&freed, &leaving);
    CHECK(atomic_load(&leaving) == 7);
    CHECK(pthread_join(thread, NULL) == 0);
    atomic_store(&leaving, 0);
    CHECK(freed_due(&freed, &leaving) == 0);
    atomic_store(&leaving, 3);
    CHECK(freed_due(&freed, &leaving) == 3);
}

int main(void)
{
    test_nothing_is_freed();
    test_freed_before();
    test_waited_for();
    test_what_leaves_is_waited_for();
    test_what_stays_is_waited_for_once();
    return 0;
}

/* SPDX-License-Identifier: GPL-2.0-or-later */
/* A thread that sleeps is held up, and one that works for long; one that has just begun is not. */
#include <semaphore.h>
#include <stdatomic.h>

#include "../held_up.h"
#include "../util.h"
#include "check.h"

static struct held_up held_up;
static sem_t there, go_on;
static _Atomic bool over;

static void *sleeper(void *arg)
{
    held_up_init(&held_up);
    CHECK(sem_post(&there) == 0);
    CHECK(sem_wait(&go_on) == 0);
    return arg;
}

static void *spinner(void *arg)
{
    held_up_init(&held_up);
    CHECK(sem_post(&there) == 0);
    while (!atomic_load(&over))
        ;
    return arg;
}

static pthread_t start(void *(*body)(void *))
{
    pthread_t thread;

    held_up = (struct held_up){.stat_fd = -1};
    CHECK(pthread_create(&thread, NULL, body, NULL) == 0);
    CHECK(sem_wait(&there) == 0);
    return thread;
}

static void end(pthread_t thread)
{
    CHECK(pthread_join(thread, NULL) == 0);
    held_up_free(&held_up);
}

static void test_asleep(void)
{
    pthread_t thread = start(sleeper);

    while (!held_up_by(&held_up, thread, 1))
        ; /* it is about to */
    CHECK(sem_post(&go_on) == 0);
    end(thread);
}

static void test_at_work(void)
{
    pthread_t thread = start(spinner);

    CHECK(!held_up_by(&held_up, thread, 1));
    while (!held_up_by(&held_up, thread, 1))
        ; /* until it was much */
    CHECK(!held_up_by(&held_up, thread, 3));
    atomic_store(&over, true);
    end(thread);
}

/* Without proc(5): who is still at what he was at. */
static void test_untold(void)
{
    struct held_up untold = {.stat_fd = -1};

    CHECK(!held_up_by(&untold, pthread_self(), 1));
    CHECK(held_up_by(&untold, pthread_self(), 1));
    CHECK(!held_up_by(&untold, pthread_self(), 3));
}

int main(void)
{
    CHECK(sem_init(&there, 0, 0) == 0 && sem_init(&go_on, 0, 0) == 0);
    test_asleep();
    test_at_work();
    test_untold();
    return 0;
}

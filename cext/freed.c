/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "freed.h"

#include <unistd.h>

#include "engine.h"

enum {
    FREEING_MS = 1000,
    FREEING_NS = FREEING_MS * 1000000,
    SOON_MS = 20,
    DUE_NS = 50000000, /* of a program that waits: it may be other programs' turn first */
    JUST_NOW_NS = 1000000000,
    LOOK_US = 100,
};

bool removes_something(const struct request *r)
{
    uint32_t opcode = r->head->opcode;

    return opcode == FUSE_UNLINK || opcode == FUSE_RENAME || opcode == FUSE_RENAME2;
}

bool frees_something(const struct request *r)
{
    uint32_t opcode = r->head->opcode;

    return opcode == FUSE_RELEASE || opcode == FUSE_FORGET || opcode == FUSE_BATCH_FORGET;
}

void freed_begin(struct freed *f)
{
    atomic_fetch_add(&f->freeing, 1);
}

void freed_end(struct freed *f)
{
    atomic_fetch_add(&f->count, 1);
    atomic_fetch_sub(&f->freeing, 1);
}

void freed_soon(struct freed *f)
{
    atomic_store(&f->removed_at, now_ns());
}

uint64_t freed_count(const struct freed *f)
{
    return atomic_load(&f->count);
}

bool freed_since(struct freed *f, uint64_t *before)
{
    bool soon = now_ns() - atomic_load(&f->removed_at) < JUST_NOW_NS;
    uint64_t last = *before;

    for (int i = 0; i < FREEING_MS; i++) {
        bool freeing = atomic_load(&f->freeing) > 0;

        if (!freeing && (freed_count(f) != last || !soon || i >= SOON_MS))
            break;
        (void)usleep(1000);
    }
    *before = freed_count(f);
    return *before != last;
}

uint64_t freed_due(struct freed *f, const _Atomic uint64_t *leaving)
{
    uint64_t now = atomic_load(leaving), stays = atomic_load(&f->stays);

    if (now < stays)
        atomic_store(&f->stays, now);
    return now > stays ? now - stays : 0;
}

void freed_await(struct freed *f, const _Atomic uint64_t *leaving)
{
    int64_t begun;

    if (!freed_due(f, leaving))
        return;
    begun = now_ns();
    while (freed_due(f, leaving)) {
        int64_t most = atomic_load(&f->freeing) > 0 ? FREEING_NS : DUE_NS;

        if (now_ns() - begun >= most) {
            atomic_store(&f->stays, atomic_load(leaving));
            return;
        }
        (void)usleep(LOOK_US);
    }
}

/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Pages that the kernel gets before it asks for them (FUSE_NOTIFY_STORE), which spares the READ: of
 * a small file all at its first open, of a larger one those around what is read of it at random.
 *
 * What is stored takes the place of what the kernel has, so it must not be older: only pages of a
 * lower file are given, which nobody can write to before it has been copied up, and that waits for
 * the lock held here. And the kernel waits for pages that are being read, which would be waited for
 * by the thread that has to answer them: so they are given before anybody has a handle to read by,
 * or when nobody else seems to have asked. If somebody has, another thread answers him as soon as
 * the watch sees that this one is held up (docs/adr/0022). */
#include <fcntl.h>
#include <poll.h>
#include <sys/uio.h>

#include "chute.h"
#include "serve.h"

/* Whether it is open for the first time, by this handle alone, and lies in a lower. Said once. */
static bool is_first(struct tree *t, struct file *f)
{
    struct node *n = f->node;
    bool first;

    pthread_mutex_lock(&t->lock);
    first = S_ISREG(n->type) && !n->given && !n->upper && f->lower && n->files == f && !f->next;
    if (first)
        n->given = true;
    pthread_mutex_unlock(&t->lock);
    return first;
}

/* Of a lower's metadata-only copy the size is not that of the data. */
static bool is_plain_lower(struct tree *t, const struct node *n)
{
    bool lower;

    pthread_mutex_lock(&t->lock);
    lower = !n->upper && !n->metacopy;
    pthread_mutex_unlock(&t->lock);
    return lower;
}

/* So many bytes, or as many as there are, of what is in memory or as good as that. */
static ssize_t read_near(const struct file *f, char *buf, size_t size, off_t offset)
{
    ssize_t n = file_read(f, buf, size, offset, true);

    return n == -EAGAIN && is_near(f->fd) ? file_read(f, buf, size, offset, false) : n;
}

static void give(const struct answer *a, char *pages, size_t size, off_t offset)
{
    struct {
        struct fuse_out_header head;
        struct fuse_notify_store_out where;
    } notice = {
        .head = {.error = FUSE_NOTIFY_STORE, .len = (uint32_t)(sizeof notice + size)},
        .where = {.nodeid = a->id, .offset = (uint64_t)offset, .size = (uint32_t)size},
    };
    struct iovec parts[] = {{&notice, sizeof notice}, {pages, size}};

    if (size > 0)
        (void)!writev(a->s->options.device, parts, 2); /* what could not be given is asked for */
}

static void give_whole(const struct answer *a, const struct file *f)
{
    char *pages = a->data + AHEAD_AT;
    struct stat st;

    if (fstat(f->fd, &st) < 0 || st.st_size == 0 || st.st_size > AHEAD_MOST)
        return;
    /* Not in memory, or unreadable: whoever reads it waits, or is told. */
    if (read_near(f, pages, (size_t)st.st_size, 0) == st.st_size)
        give(a, pages, (size_t)st.st_size, 0);
}

void give_ahead(struct answer *a)
{
    const struct fuse_open_out *out = REPLY(a, fuse_open_out);
    uint32_t flags = BODY(a, fuse_open_in)->flags;
    struct keyhold hold = {.keys = {a->r->head->nodeid}};
    struct tree *t = a->s->tree;
    struct file *f;

    if ((flags & (O_ACCMODE | O_DIRECT)) != O_RDONLY || !(out->open_flags & FOPEN_KEEP_CACHE))
        return;
    f = file_get(t, out->fh);
    if (!f)
        return;
    if (is_first(t, f) && keys_try(&t->copying, &hold)) {
        if (is_plain_lower(t, f->node))
            give_whole(a, f);
        keys_give(&t->copying, &hold);
    }
    file_put(t, f);
}

/* Whether something near was read before by this handle, and nothing of that was given since. */
static bool was_missed(struct tree *t, struct file *f, off_t offset)
{
    uint64_t piece = (uint64_t)offset / AROUND;
    uint8_t bit = (uint8_t)(1U << piece % 8), *missed = NULL;
    bool was;

    if (piece >= AROUND_PIECES)
        return false;
    if (!f->missed && !(missed = calloc(AROUND_PIECES / 8, 1)))
        return false;
    pthread_mutex_lock(&t->lock);
    if (!f->missed) {
        f->missed = missed;
        missed = NULL;
    }
    was = f->missed[piece / 8] & bit;
    f->missed[piece / 8] ^= bit;
    pthread_mutex_unlock(&t->lock);
    free(missed);
    return was;
}

static bool nobody_waits(const struct answer *a)
{
    struct pollfd p = {.fd = a->s->options.device, .events = POLLIN};

    return poll(&p, 1, 0) == 0;
}

static void send_answer(const struct answer *a, size_t size)
{
    struct fuse_out_header *head = (void *)(a->data - sizeof *head);

    *head = (struct fuse_out_header){.unique = a->r->head->unique,
                                     .len = (uint32_t)(sizeof *head + size)};
    (void)!write(a->s->options.device, head, head->len); /* as of any answer: nobody waits */
}

/* Reads the piece that has what is asked for, answers, and gives the rest of it. */
static ssize_t read_piece(struct answer *a, const struct fuse_read_in *in, const struct file *f)
{
    size_t before = in->offset % AROUND, after = before + in->size;
    off_t start = (off_t)(in->offset - before);
    char *piece = a->data + AROUND_AT;
    ssize_t n = read_near(f, piece, AROUND, start);
    size_t got = n > 0 ? (size_t)n : 0;

    if (got <= before)
        return NOT_AROUND;
    memcpy(a->data, piece + before, (got < after ? got : after) - before);
    send_answer(a, (got < after ? got : after) - before);
    give(a, piece, before, start);
    if (got > after)
        give(a, piece + after, got - after, start + (off_t)after);
    return CHUTE_SENT;
}

ssize_t read_around(struct answer *a, struct file *f)
{
    const struct fuse_read_in *in = BODY(a, fuse_read_in);
    struct keyhold hold = {.keys = {a->r->head->nodeid}};
    struct tree *t = a->s->tree;
    ssize_t n = NOT_AROUND;

    if (!f->lower || f->flags & O_DIRECT || !a->s->options.keep_cache || !a->r->chute)
        return n;
    if (in->size > AROUND / 4 || in->offset % AROUND + in->size > AROUND)
        return n;
    if (!was_missed(t, f, (off_t)in->offset) || !nobody_waits(a) || !keys_try(&t->copying, &hold))
        return n;
    if (is_plain_lower(t, f->node))
        n = read_piece(a, in, f);
    keys_give(&t->copying, &hold);
    return n;
}

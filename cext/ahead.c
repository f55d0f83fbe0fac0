/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Pages that the kernel gets before it asks for them (FUSE_NOTIFY_STORE), which spares READs: at
 * the first open those of a small file, and what lies around a piece that somebody has read out of
 * order (docs/adr/0022).
 *
 * What is stored takes the place of what the kernel has, so it must not be older: only pages of a
 * lower file are given, which nobody can write to before it has been copied up, and that waits for
 * the lock held here. And the kernel waits for pages that are being read, until a READ is answered:
 * at a first open there is nobody who could have asked; later, no more than one thread gives pages
 * at a time, so that there are others for that READ. */
#include <fcntl.h>
#include <sys/uio.h>

#include "face.h"
#include "serve.h"

/* Whether it is open for the first time, by this handle alone, and lies in a lower. Said once. Of a
 * lower's metadata-only copy the size is not that of the data. */
static bool is_first(struct tree *t, struct file *f)
{
    struct node *n = f->node;
    bool first;

    pthread_mutex_lock(&t->lock);
    first = S_ISREG(n->type) && !n->given && !n->upper && !n->metacopy && f->lower &&
            n->files == f && !f->next;
    if (first)
        n->given = true;
    pthread_mutex_unlock(&t->lock);
    return first;
}

static bool is_lower_still(struct tree *t, const struct node *n)
{
    bool lower;

    pthread_mutex_lock(&t->lock);
    lower = !n->upper;
    pthread_mutex_unlock(&t->lock);
    return lower;
}

/* Of the file that the kernel calls `id`, by way of a buffer of AHEAD_MOST bytes. */
static void store(const struct server *s, uint64_t id, const struct file *f, char *buffer,
                  size_t size, off_t from)
{
    struct {
        struct fuse_out_header head;
        struct fuse_notify_store_out where;
    } notice = {
        .head = {.error = FUSE_NOTIFY_STORE, .len = (uint32_t)(sizeof notice + size)},
        .where = {.nodeid = id, .offset = (uint64_t)from, .size = (uint32_t)size},
    };
    struct iovec parts[] = {{&notice, sizeof notice}, {buffer, size}};
    ssize_t n = file_read(f, buffer, size, from, true);

    if (n == -EAGAIN && is_near(f->fd))
        n = file_read(f, buffer, size, from, false);
    if (n != (ssize_t)size)
        return; /* not in memory, or unreadable: whoever reads it waits, or is told */
    (void)!writev(s->options.device, parts, 2); /* it is asked for what could not be given */
}

/* At most AHEAD_MOST bytes, from a multiple of that on. */
static void give(const struct server *s, uint64_t id, const struct file *f, char *buffer,
                 off_t from)
{
    struct keyhold hold = {.keys = {f->node->ino}};
    struct tree *t = s->tree;
    struct stat st;

    if (!keys_try(&t->copying, &hold))
        return;
    if (is_lower_still(t, f->node) && fstat(f->fd, &st) == 0 && st.st_size > from) {
        off_t left = st.st_size - from;

        store(s, id, f, buffer, left < AHEAD_MOST ? (size_t)left : AHEAD_MOST, from);
    }
    keys_give(&t->copying, &hold);
}

void give_ahead(struct answer *a)
{
    const struct fuse_open_out *out = REPLY(a, fuse_open_out);
    uint32_t flags = BODY(a, fuse_open_in)->flags;
    struct tree *t = a->s->tree;
    struct stat st;
    struct file *f;

    if ((flags & (O_ACCMODE | O_DIRECT)) != O_RDONLY || !(out->open_flags & FOPEN_KEEP_CACHE))
        return;
    f = file_get(t, out->fh);
    if (!f)
        return;
    if (is_first(t, f) && fstat(f->fd, &st) == 0 && st.st_size <= AHEAD_MOST)
        give(a->s, a->id, f, a->data + AHEAD_AT, 0);
    file_put(t, f);
}

/* Whether enough of a lower file that the kernel keeps pages of has been read in small pieces for
 * the rest to be wanted too; this piece counts. */
static bool is_scattered(struct tree *t, const struct file *f)
{
    struct node *n = f->node;
    bool scattered = false;
    struct stat st;

    if (fstat(f->fd, &st) < 0)
        return false;
    pthread_mutex_lock(&t->lock);
    if (f->lower && f->how != OPEN_BACKED && !n->upper && !n->metacopy) {
        scattered = n->pieces == UINT16_MAX || n->pieces > st.st_size / AHEAD_MOST;
        if (n->pieces < UINT16_MAX)
            n->pieces++;
    }
    pthread_mutex_unlock(&t->lock);
    return scattered;
}

/* Whether a READ into the pages of the kernel was so small that it reads nothing ahead there, and
 * was answered in full. */
static bool is_small(const struct server *s, const struct request *r, size_t len)
{
    const struct fuse_read_in *in = (const void *)r->body;

    return r->head->opcode == FUSE_READ && r->len >= sizeof *in && in->size < AROUND_LESS &&
           len == sizeof(struct fuse_out_header) + in->size && in->offset > 0 &&
           !(in->flags & O_DIRECT) && s->options.keep_cache;
}

void give_around(struct server *s, const struct request *r, size_t len, char *buffer)
{
    const struct fuse_read_in *in = (const void *)r->body;
    uint64_t id = r->head->nodeid;
    struct file *f;

    if (!is_small(s, r, len) || atomic_exchange(&s->giving, true))
        return;
    if (file_of(s->tree, face_ino(s->tree, id), in->fh, &f) == 0) {
        if (is_scattered(s->tree, f))
            give(s, id, f, buffer, (off_t)(in->offset - in->offset % AHEAD_MOST));
        file_put(s->tree, f);
    }
    atomic_store(&s->giving, false);
}

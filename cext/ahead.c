/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Pages that the kernel gets before it asks for them (FUSE_NOTIFY_STORE), which spares the READ.
 *
 * What is stored takes the place of what the kernel has, so it must not be older: only pages of a
 * lower file are given, which nobody can write to before it has been copied up, and that waits for
 * the lock held here. And the kernel waits for pages that are being read, which would be waited for
 * by the thread that has to answer them: so they are given at the first open alone, before anybody
 * has a handle to read by (docs/adr/0022). */
#include <fcntl.h>
#include <sys/uio.h>

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

static void store(const struct answer *a, const struct file *f)
{
    struct {
        struct fuse_out_header head;
        struct fuse_notify_store_out where;
    } notice = {.head = {.error = FUSE_NOTIFY_STORE}, .where = {.nodeid = a->id}};
    struct iovec parts[] = {{&notice, sizeof notice}, {a->data + AHEAD_AT, 0}};
    struct stat st;
    ssize_t n;

    if (fstat(f->fd, &st) < 0 || st.st_size == 0 || st.st_size > AHEAD_MOST)
        return;
    n = file_read(f, parts[1].iov_base, (size_t)st.st_size, 0, true);
    if (n == -EAGAIN && is_near(f->fd))
        n = file_read(f, parts[1].iov_base, (size_t)st.st_size, 0, false);
    if (n != st.st_size)
        return; /* not in memory, or unreadable: whoever reads it waits, or is told */
    parts[1].iov_len = (size_t)n;
    notice.where.size = (uint32_t)n;
    notice.head.len = (uint32_t)(sizeof notice + (size_t)n);
    (void)!writev(a->s->options.device, parts, 2); /* it is asked for what could not be given */
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
        if (is_lower_still(t, f->node))
            store(a, f);
        keys_give(&t->copying, &hold);
    }
    file_put(t, f);
}

/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "shelf.h"

#include <fcntl.h>

enum { MOST = 4096, PART = 8 };

void shelf_init(struct tree *t)
{
    uint32_t size = t->most_open / PART < MOST ? (uint32_t)(t->most_open / PART) : MOST;

    t->shelf = t->live ? NULL : calloc(size, sizeof *t->shelf);
    t->shelf_size = t->shelf ? size : 0;
    /* The kernel's table of descriptors has its size at once: each time it grows it waits until no
     * thread looks at the old one. */
    close_keep_errno(fcntl(t->layers[0].fd, F_DUPFD_CLOEXEC, t->shelf_size));
}

static bool is_for(int flags)
{
    return !(flags & (O_ACCMODE | O_SYNC | O_DSYNC | O_NOATIME | O_DIRECT));
}

static bool take_off_locked(struct tree *t, struct node *n, int *ret_fd)
{
    struct shelved *place;

    if (!n->shelved)
        return false;
    place = &t->shelf[n->shelved - 1];
    *ret_fd = place->fd;
    *place = (struct shelved){.fd = -1};
    n->shelved = 0;
    return true;
}

bool shelf_drop_locked(struct tree *t, struct node *n)
{
    int fd;

    if (!take_off_locked(t, n, &fd))
        return false;
    closing_add_locked(t, fd);
    return true;
}

bool shelf_put_locked(struct tree *t, const struct file *f)
{
    struct node *n = f->node;
    struct shelved *place;

    if (!t->shelf_size || !f->lower || (n->upper && !n->metacopy) || !is_for(f->flags) ||
        n->shelved || !n->nlookup || f->fd >= t->most_open / 2)
        return false;
    place = &t->shelf[t->shelf_next];
    if (place->node)
        (void)shelf_drop_locked(t, place->node);
    *place = (struct shelved){.node = n, .fd = f->fd};
    n->shelved = t->shelf_next + 1;
    t->shelf_next = (t->shelf_next + 1) % t->shelf_size;
    return true;
}

int shelf_take_locked(struct tree *t, struct node *n, int flags)
{
    int fd;

    return is_for(flags) && take_off_locked(t, n, &fd) ? fd : -1;
}

bool shelf_clear_locked(struct tree *t)
{
    bool some = false;

    for (uint32_t i = 0; i < t->shelf_size; i++)
        if (t->shelf[i].node)
            some = shelf_drop_locked(t, t->shelf[i].node);
    return some;
}

void shelf_free(struct tree *t)
{
    for (uint32_t i = 0; i < t->shelf_size; i++)
        if (t->shelf[i].node)
            (void)close(t->shelf[i].fd);
    free(t->shelf);
}

/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Files that are born without a name (O_TMPFILE), and may get one by linkat(2): nodes as those of
 * what was unlinked and is still open, until they are named. */
#include <fcntl.h>

#include "marks.h"
#include "resolve.h"
#include "spare.h"

static struct node *nameless_node_locked(struct tree *t, const struct stat *st, int pin)
{
    uint64_t ino = union_ino(t->layers[0].fs, st->st_ino);
    struct node *n;

    while (node_find_locked(t, ino))
        ino = other_file_number(ino, st);
    n = node_new_locked(t, ino, S_IFREG);
    if (!n)
        return NULL;
    n->nlookup = 1;
    n->refs = 1;
    n->upper = n->unlinked = true;
    n->dev = st->st_dev;
    n->real_ino = st->st_ino;
    n->pin = pin;
    return n;
}

errint_t tree_made_nameless(struct tree *t, int fd, struct stat *ret_st)
{
    struct node *n;
    struct stat st;
    errint_t err = stat_fd(fd, &st);

    if (err < 0)
        return err;
    cleanup_fd int pin = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (pin < 0)
        return errno_or_eio();
    err = spare_keep(t, &pin);
    if (err < 0)
        return err;
    pthread_mutex_lock(&t->lock);
    n = nameless_node_locked(t, &st, pin);
    pthread_mutex_unlock(&t->lock);
    if (!n)
        return -ENOMEM;
    (void)steal_fd(&pin);
    err = node_attr(t, n, ret_st);
    pthread_mutex_lock(&t->lock);
    if (err < 0)
        n->nlookup = 0;
    node_put_locked(t, n);
    unlock_and_close(t);
    return err;
}

void tree_named(struct tree *t, uint64_t ino)
{
    struct node *n;

    pthread_mutex_lock(&t->lock);
    n = node_find_locked(t, ino);
    if (n) {
        n->unlinked = false;
        n->generation++;
    }
    pthread_mutex_unlock(&t->lock);
}

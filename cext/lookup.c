/* SPDX-License-Identifier: GPL-2.0-or-later */
/* From what a look down the layers found to a node of the table, and its attributes. */
#include <stdio.h>
#include <string.h>

#include "marks.h"
#include "resolve.h"

uint64_t other_file_number(uint64_t ino, const struct stat *st)
{
    uint64_t hash = ino * 0x9e3779b97f4a7c15ULL;

    hash ^= (st->st_ino ^ ((uint64_t)st->st_dev << 40)) * 0xbf58476d1ce4e5b9ULL;
    hash = (hash ^ (hash >> 31)) * 0x94d049bb133111ebULL;
    return (hash >> 2) | (1ULL << 62);
}

uint64_t number_by_name(uint64_t ino, const struct node *parent, const char *name)
{
    uint64_t hash = ino * 0x9e3779b97f4a7c15ULL;

    hash ^= parent->ino * 0xbf58476d1ce4e5b9ULL;
    for (; *name; name++)
        hash = (hash ^ (unsigned char)*name) * 0x100000001b3ULL;
    return (hash >> 2) | (1ULL << 62);
}

/* A number for what cannot have its own, taken by something else: of a directory by its name, since
 * one real directory may be shown twice; of anything else by the real inode, for its links. */
static uint64_t other_number(uint64_t ino, const struct node *parent, const char *name,
                             const struct hit *h)
{
    return S_ISDIR(h->type) ? number_by_name(ino, parent, name) : other_file_number(ino, &h->st);
}

/* Is `n` what was found, or something that merely has its number: a directory shown twice by a
 * damaged upper, what was removed and is still open, a copy whose lower was itself copied since and
 * lies under another number now? */
static bool same_node_locked(struct tree *t, const struct node *n, struct node *parent,
                             const char *name, const struct hit *h)
{
    struct alias *a;

    if (n->type != h->type || n->unlinked)
        return false;
    if (S_ISDIR(n->type) && n->aliases)
        return n->aliases->parent == parent && strcmp(n->aliases->name, name) == 0;
    if (n->dev == h->st.st_dev && n->real_ino == h->st.st_ino)
        return true;
    if (n->index_name && h->index_name && strcmp(n->index_name, h->index_name) == 0)
        return true;
    a = alias_find_locked(t, parent, name);
    return a && a->node == n;
}

/* A link of a lower file that was looked up while another name of it was being copied up: the
 * index knows it by now. */
static bool copied_meanwhile_locked(const struct tree *t, const struct node *n, const struct hit *h)
{
    return t->index && n->index_name && !n->unlinked && h->layer != 0 && !h->index_name &&
           h->st.st_nlink > 1 && n->type == h->type;
}

/* Real directories that the node has already stay: those of its children hang on them. */
static void keep_known_dirs_locked(struct tree *t, const struct node *n, struct hit *h)
{
    for (uint16_t i = 0; i < h->ndirs; i++) {
        struct rdir *known = node_dir_locked(n, h->dirs[i]->layer);

        if (!known || known->ino != h->dirs[i]->ino || known->dev != h->dirs[i]->dev)
            continue;
        known->impure = known->impure || h->dirs[i]->impure;
        known->impure_marked = known->impure_marked || h->dirs[i]->impure_marked;
        known->xwhiteouts = h->dirs[i]->xwhiteouts;
        rdir_ref_locked(known);
        rdir_put_locked(t, h->dirs[i]);
        h->dirs[i] = known;
    }
}

static errint_t fill_node_locked(struct tree *t, struct node *n, struct hit *h)
{
    struct rdir **dirs = NULL;

    if (S_ISDIR(h->type)) {
        dirs = malloc(h->ndirs * sizeof *dirs);
        if (!dirs)
            return -ENOMEM;
        keep_known_dirs_locked(t, n, h);
        memcpy(dirs, h->dirs, h->ndirs * sizeof *dirs);
    }
    for (uint16_t i = 0; i < n->ndirs; i++)
        rdir_put_locked(t, n->dirs[i]);
    free(n->dirs);
    n->dirs = dirs;
    n->ndirs = h->ndirs;
    h->ndirs = 0; /* the references have moved to the node */
    n->layer = h->layer;
    n->upper = t->has_upper && h->layer == 0;
    n->dev = h->st.st_dev;
    n->real_ino = h->st.st_ino;
    n->metacopy = h->metacopy;
    n->indexed = h->indexed;
    n->nlink_diff = h->nlink_diff;
    if (n->data_dir)
        rdir_put_locked(t, n->data_dir);
    n->data_dir = steal_pointer(&h->data_dir);
    n->data_dev = h->data_st.st_dev;
    n->data_ino = h->data_st.st_ino;
    free(n->data_name);
    n->data_name = steal_pointer(&h->data_name);
    free(n->redirect);
    n->redirect = steal_pointer(&h->redirect);
    free(n->index_name);
    n->index_name = steal_pointer(&h->index_name);
    n->generation++;
    return 0;
}

/* Finds or makes the node, knows it by this name too, and takes a reference. */
static errint_t adopt(struct tree *t, struct node *parent, const char *name, struct hit *h,
                      struct node **ret_node, bool may_retry)
{
    struct node *n;
    struct alias *a;
    bool real = h->layer != 0 || !t->has_upper || h->upper == UPPER_ENTRY;
    errint_t err = 0;

    if (!h->ino) /* a mount point in a layer: no number of its own */
        h->ino = other_number(1, parent, name, h);
    pthread_mutex_lock(&t->lock);
    n = node_find_locked(t, h->ino);
    if (n && may_retry && copied_meanwhile_locked(t, n, h)) {
        pthread_mutex_unlock(&t->lock);
        return -EAGAIN;
    }
    while (n && !same_node_locked(t, n, parent, name, h)) {
        h->ino = other_number(h->ino, parent, name, h);
        n = node_find_locked(t, h->ino);
    }
    if (!n) {
        n = node_new_locked(t, h->ino, h->type);
        if (n)
            n->refs++;
        err = n ? fill_node_locked(t, n, h) : -ENOMEM;
    } else {
        n->refs++;
        bool newer_upper = h->layer == 0 && t->has_upper && !n->upper;
        bool changed = n->dev != h->st.st_dev || n->real_ino != h->st.st_ino;
        bool older_lower = n->upper && h->layer != 0;
        bool spare_pin = n->pin >= 0 && !n->unlinked && real;

        /* What the table says of the upper is never older than what a look at the disk found
         * while a copy-up went on. */
        if (!older_lower && (newer_upper || (changed && !n->unlinked) || (t->live && !n->upper)))
            err = fill_node_locked(t, n, h);
        if (spare_pin) { /* it was held for want of a known name */
            closing_add_locked(t, n->pin);
            n->pin = -1;
        }
    }
    if (err == 0) {
        a = alias_find_locked(t, parent, name);
        if (a && a->node != n) {
            alias_drop_locked(t, a);
            a = NULL;
        }
        if (!a)
            err = alias_add_locked(t, parent, name, n, real);
        else
            a->real = real;
    }
    if (err == 0)
        *ret_node = n;
    else if (n)
        node_put_locked(t, n);
    pthread_mutex_unlock(&t->lock);
    return err;
}

/* The attributes of what has just been found, without looking again where the walk has looked. */
static errint_t attr_of_hit(struct tree *t, struct node *n, const struct stat *st,
                            struct stat *ret_st)
{
    bool plain;

    pthread_mutex_lock(&t->lock);
    plain = !t->override_mode && !n->metacopy && n->dev == st->st_dev && n->real_ino == st->st_ino;
    plain = plain && !n->unlinked;
    if (plain) {
        *ret_st = *st;
        ret_st->st_ino = n->ino;
        if (S_ISDIR(n->type) && (n->ndirs > 1 || t->static_nlink)) {
            ret_st->st_nlink = 1;
        } else if (n->indexed) {
            int64_t links = (int64_t)st->st_nlink + n->nlink_diff;

            ret_st->st_nlink = links > 0 ? (nlink_t)links : 1;
        }
    }
    pthread_mutex_unlock(&t->lock);
    if (!plain)
        return node_attr(t, n, ret_st);
    attr_show(t, NULL, false, ret_st);
    return 0;
}

errint_t node_lookup(struct tree *t, struct node *parent, const char *name, struct hit *h,
                     struct node **ret_node)
{
    errint_t err;

    if (!S_ISDIR(parent->type))
        return -ENOTDIR;
    for (int attempt = 0;; attempt++) {
        err = resolve(t, parent, name, h);
        if (err < 0)
            return err;
        if (!h->any)
            err = -ENOENT;
        else
            err = adopt(t, parent, name, h, ret_node, attempt == 0);
        if (err < 0)
            hit_clear(t, h);
        if (err != -EAGAIN)
            return err;
    }
}

/* The kernel is told of what was found: one lookup more. Puts the node back. */
static errint_t tell_of(struct tree *t, struct node *n, const struct stat *st, struct stat *ret_st)
{
    errint_t err = attr_of_hit(t, n, st, ret_st);

    pthread_mutex_lock(&t->lock);
    if (err == 0)
        n->nlookup++;
    node_put_locked(t, n);
    pthread_mutex_unlock(&t->lock);
    return err;
}

uint64_t tree_known(struct tree *t, uint64_t parent_ino, const char *name)
{
    struct node *parent;
    struct alias *a = NULL;
    uint64_t ino;

    pthread_mutex_lock(&t->lock);
    parent = node_find_locked(t, parent_ino);
    if (parent)
        a = alias_find_locked(t, parent, name);
    ino = a && a->node->nlookup > 0 ? a->node->ino : 0;
    pthread_mutex_unlock(&t->lock);
    return ino;
}

errint_t tree_lookup(struct tree *t, uint64_t parent_ino, const char *name, struct stat *ret_st)
{
    struct node *parent = node_get(t, parent_ino), *n = NULL;
    struct hit *h;
    errint_t err;

    if (!parent)
        return -ESTALE;
    h = malloc(sizeof *h);
    if (!h) {
        node_put(t, parent);
        return -ENOMEM;
    }
    err = node_lookup(t, parent, name, h, &n);
    if (err == 0) {
        err = tell_of(t, n, &h->st, ret_st);
        hit_clear(t, h);
    }
    free(h);
    node_put(t, parent);
    return err;
}

errint_t tree_lookup_made(struct tree *t, uint64_t parent_ino, const char *name, int fd,
                          struct stat *ret_st)
{
    struct node *parent = node_get(t, parent_ino), *n = NULL;
    struct hit *h = calloc(1, sizeof *h);
    errint_t err;

    err = !parent ? -ESTALE : !h ? -ENOMEM : stat_fd(fd, &h->st);
    if (err == 0) {
        h->any = true;
        h->upper = UPPER_ENTRY;
        h->type = h->st.st_mode & S_IFMT;
        h->ino = union_ino(t->layers[0].fs, h->st.st_ino);
        err = adopt(t, parent, name, h, &n, false);
    }
    if (err == 0) {
        err = tell_of(t, n, &h->st, ret_st);
    }
    free(h);
    if (parent)
        node_put(t, parent);
    return err;
}

errint_t tree_entry(struct tree *t, uint64_t parent_ino, const char *name, struct entry *ret_entry)
{
    struct node *parent = node_get(t, parent_ino), *n = NULL;
    struct entry e = {0};
    struct hit *h;
    errint_t err;

    if (!parent)
        return -ESTALE;
    h = calloc(1, sizeof *h);
    if (!h) {
        node_put(t, parent);
        return -ENOMEM;
    }
    err = node_lookup(t, parent, name, h, &n);
    if (err == 0 || err == -ENOENT) {
        e.upper = h->upper;
        if (err == 0) {
            e.ino = n->ino;
            e.type = n->type;
            hit_clear(t, h);
            node_put(t, n); /* stays while the kernel knows it; else a later lookup makes it anew */
        }
        err = 0;
    }
    if (err == 0 && t->has_upper) {
        struct walk *w = calloc(1, sizeof *w);

        err = w ? 0 : -ENOMEM;
        if (w) {
            memset(h, 0, sizeof *h);
            w->t = t;
            w->hit = h;
            (void)snprintf(w->path, sizeof w->path, "%s", name);
            err = walk_down(w, parent, 1);
            e.lower = h->any;
            hit_clear(t, h);
            free(w);
        }
    }
    free(h);
    node_put(t, parent);
    if (err == 0)
        *ret_entry = e;
    return err;
}

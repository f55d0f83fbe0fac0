/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Real directories and the bounded cache of their descriptors. */
#include <fcntl.h>
#include <stdio.h>
#include <string.h>

#include "loan.h"
#include "shelf.h"
#include "tree.h"

struct rdir *rdir_new(uint16_t layer, struct rdir *parent, const char *name)
{
    struct rdir *r = calloc(1, sizeof *r);

    if (!r)
        return NULL;
    r->name = strdup(name);
    if (!r->name) {
        free(r);
        return NULL;
    }
    r->refs = 1;
    r->fd = -1;
    r->layer = layer;
    r->parent = parent;
    return r;
}

void rdir_ref_locked(struct rdir *r)
{
    r->refs++;
}

static void lru_remove_locked(struct tree *t, struct rdir *r)
{
    if (!r->newer)
        return;
    r->newer->older = r->older;
    r->older->newer = r->newer;
    r->newer = r->older = NULL;
    t->open_dirs--;
}

static void lru_add_locked(struct tree *t, struct rdir *r)
{
    r->older = t->lru.older; /* the newest so far */
    r->newer = &t->lru;
    r->older->newer = r;
    t->lru.older = r;
    t->open_dirs++;
}

void rdir_put_locked(struct tree *t, struct rdir *r)
{
    while (r && --r->refs == 0) {
        struct rdir *parent = r->parent;

        lru_remove_locked(t, r);
        if (r->fd >= 0 && parent) /* the roots' descriptors belong to the tree's maker */
            (void)close(r->fd);
        free(r->name);
        free(r);
        r = parent;
    }
}

void rdir_put(struct tree *t, struct rdir *r)
{
    pthread_mutex_lock(&t->lock);
    rdir_put_locked(t, r);
    pthread_mutex_unlock(&t->lock);
}

/* Closes the descriptors used longest ago, until no more than `most` are open. */
static void evict_locked(struct tree *t, uint32_t most)
{
    struct rdir *r = t->lru.newer;

    while (t->open_dirs > most && r != &t->lru) {
        struct rdir *next = r->newer;

        if (r->pins == 0) {
            lru_remove_locked(t, r);
            (void)close(r->fd);
            r->fd = -1;
        }
        r = next;
    }
}

bool rdirs_release(struct tree *t)
{
    uint32_t before;
    bool some;

    pthread_mutex_lock(&t->lock);
    some = shelf_clear_locked(t);
    before = t->open_dirs;
    evict_locked(t, 0);
    some = some || t->open_dirs < before;
    unlock_and_close(t);
    return some;
}

void rdirs_close_locked(struct tree *t)
{
    t->max_open_dirs = 0; /* what is pinned still is closed when it is not */
    evict_locked(t, 0);
}

static bool pin_cached_locked(struct tree *t, struct rdir *r)
{
    if (r->fd < 0)
        return false;
    r->pins++;
    if (r->newer && r->newer != &t->lru) {
        lru_remove_locked(t, r);
        lru_add_locked(t, r);
    }
    return true;
}

struct step {
    int parent_fd;
    const char *name;
    bool careful;
};

static errint_t open_step(void *arg)
{
    const struct step *s = arg;

    return open_beneath(s->parent_fd, s->name, O_PATH | O_DIRECTORY, s->careful);
}

/* Who has a directory open goes on in it, though its owner has closed one above it since. */
static int take_step(struct tree *t, const struct rdir *r, struct step *s)
{
    char path[PROC_BYTES];
    int fd = open_step(s);

    if (fd != -EACCES || r->layer != 0 || !t->has_upper)
        return fd;
    proc_path(path, s->parent_fd, NULL);
    return as_owner(path, false, S_IXUSR, open_step, s);
}

/* Opens r by its name in its parent, which is pinned as `parent_fd`. */
static int rdir_open(struct tree *t, struct rdir *r, int parent_fd, const char *name)
{
    struct step step = {parent_fd, name, t->layers[r->layer].careful};
    cleanup_fd int fd = take_step(t, r, &step);
    struct stat st;
    errint_t err;

    if (fd < 0)
        return fd;
    err = stat_fd(fd, &st);
    if (err < 0)
        return err;
    pthread_mutex_lock(&t->lock);
    if (r->ino && (r->ino != st.st_ino || r->dev != st.st_dev)) {
        /* Something else has come to this name: the caller looks again. */
        pthread_mutex_unlock(&t->lock);
        return -ESTALE;
    }
    r->ino = st.st_ino;
    r->dev = st.st_dev;
    if (r->fd < 0) {
        r->fd = steal_fd(&fd);
        lru_add_locked(t, r);
    }
    r->pins++;
    /* None is kept where few are left. */
    evict_locked(t, r->fd < t->most_open ? t->max_open_dirs : 0);
    int out = r->fd;
    pthread_mutex_unlock(&t->lock);
    return out;
}

static bool rdir_is_at(struct tree *t, struct rdir *r, const struct rdir *parent, const char *name)
{
    bool same;

    pthread_mutex_lock(&t->lock);
    same = !r->gone && r->parent == parent && strcmp(r->name, name) == 0;
    pthread_mutex_unlock(&t->lock);
    return same;
}

/* From a directory upwards: those whose descriptors are closed, and above them one that is open,
 * pinned. References are held. A list and no recursion: trees have no limit of depth. */
struct climb {
    struct rdir **closed;
    size_t n, cap;
    struct rdir *open;
    int fd;
};

static errint_t climb(struct tree *t, struct rdir *r, struct climb *c)
{
    errint_t err = 0;

    pthread_mutex_lock(&t->lock);
    while (!pin_cached_locked(t, r)) {
        if (r->gone || r->sealed || !r->parent) {
            err = -ENOENT;
            break;
        }
        if (c->n == c->cap) {
            size_t cap = c->cap ? c->cap * 2 : 16;
            struct rdir **closed = realloc(c->closed, cap * sizeof(struct rdir *));

            if (!closed) {
                err = -ENOMEM;
                break;
            }
            c->closed = closed;
            c->cap = cap;
        }
        rdir_ref_locked(r);
        c->closed[c->n++] = r;
        r = r->parent;
    }
    if (err == 0) {
        rdir_ref_locked(r);
        c->open = r;
        c->fd = r->fd;
    }
    pthread_mutex_unlock(&t->lock);
    return err;
}

/* Opens what climb() found closed; the lowest stays pinned. `ret_again`: a rename has moved one of
 * them meanwhile. */
static int descend(struct tree *t, struct climb *c, bool *ret_again)
{
    struct rdir *above = c->open;
    int fd = c->fd;

    for (size_t i = c->n; i-- > 0;) {
        struct rdir *r = c->closed[i];
        char name[NAME_BYTES];
        int out = -ENOENT;
        bool there;

        pthread_mutex_lock(&t->lock);
        there = r->parent == above;
        (void)snprintf(name, sizeof name, "%s", r->name);
        pthread_mutex_unlock(&t->lock);
        if (there)
            out = rdir_open(t, r, fd, name);
        if (out < 0)
            *ret_again = !there || !rdir_is_at(t, r, above, name);
        rdir_unpin(t, above);
        if (out < 0)
            return out;
        above = r;
        fd = out;
    }
    return fd;
}

int rdir_pin(struct tree *t, struct rdir *r)
{
    for (bool released = false;;) {
        struct climb c = {.fd = -1};
        bool again = false, cached;
        int out;

        pthread_mutex_lock(&t->lock);
        cached = pin_cached_locked(t, r);
        out = r->fd;
        pthread_mutex_unlock(&t->lock);
        if (cached)
            return out;
        out = climb(t, r, &c);

        if (out == 0)
            out = descend(t, &c, &again);
        pthread_mutex_lock(&t->lock);
        for (size_t i = 0; i < c.n; i++)
            rdir_put_locked(t, c.closed[i]);
        if (c.open)
            rdir_put_locked(t, c.open);
        pthread_mutex_unlock(&t->lock);
        free(c.closed);
        if (out == -EMFILE && !released)
            again = released = rdirs_release(t);
        if (!again)
            return out;
    }
}

void rdir_unpin(struct tree *t, struct rdir *r)
{
    pthread_mutex_lock(&t->lock);
    r->pins--;
    evict_locked(t, r->fd < t->most_open ? t->max_open_dirs : 0);
    pthread_mutex_unlock(&t->lock);
}

int upper_pin(struct tree *t, struct node *n, struct rdir **ret_dir)
{
    struct rdir *dir;
    int fd;

    pthread_mutex_lock(&t->lock);
    dir = t->has_upper ? node_dir_locked(n, 0) : NULL;
    if (dir)
        rdir_ref_locked(dir);
    pthread_mutex_unlock(&t->lock);
    if (!dir)
        return -ENOENT;
    fd = rdir_pin(t, dir);
    if (fd < 0)
        rdir_put(t, dir);
    else
        *ret_dir = dir;
    return fd;
}

void upper_unpin(struct tree *t, struct rdir *dir)
{
    rdir_unpin(t, dir);
    rdir_put(t, dir);
}

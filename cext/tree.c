/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The tables: nodes by inode number, aliases by parent and name, and their life. */
#include "face.h"
#include "shelf.h"
#include "spare.h"

#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/random.h>

enum { SOON = 4096 };

static uint64_t hash_ino(uint64_t ino)
{
    ino ^= ino >> 33;
    ino *= 0xff51afd7ed558ccdULL;
    ino ^= ino >> 33;
    return ino;
}

static uint32_t hash_name(const struct node *parent, const char *name)
{
    uint64_t h = hash_ino(parent->ino);

    for (; *name; name++)
        h = (h ^ (unsigned char)*name) * 0x100000001b3ULL;
    return (uint32_t)(h ^ (h >> 32));
}

void tree_warn(struct tree *t, const char *format, ...)
{
    char text[sizeof t->warning];
    va_list args;

    va_start(args, format);
    (void)vsnprintf(text, sizeof text, format, args);
    va_end(args);
    pthread_mutex_lock(&t->lock);
    memcpy(t->warning, text, sizeof text);
    pthread_mutex_unlock(&t->lock);
}

void closing_add_locked(struct tree *t, int fd)
{
    if (fd < 0)
        return;
    if (t->nclosing < sizeof t->closing / sizeof *t->closing)
        t->closing[t->nclosing++] = fd;
    else
        (void)close(fd);
}

void unlock_and_close(struct tree *t)
{
    int fds[sizeof t->closing / sizeof *t->closing];
    uint32_t n = t->nclosing;
    uint64_t leaving = t->leaving_closed;

    memcpy(fds, t->closing, n * sizeof *fds);
    t->nclosing = 0;
    t->leaving_closed = 0;
    pthread_mutex_unlock(&t->lock);
    for (uint32_t i = 0; i < n; i++)
        (void)close(fds[i]);
    atomic_fetch_sub(&t->leaving, leaving);
}

void temp_name(struct tree *t, char name[static TEMP_BYTES])
{
    (void)snprintf(name, TEMP_BYTES, "#%x", (unsigned)atomic_fetch_add(&t->temps, 1));
}

/* ---- nodes ---- */

struct node *node_find_locked(struct tree *t, uint64_t ino)
{
    struct node *n = t->nodes[hash_ino(ino) & t->node_mask];

    while (n && n->ino != ino)
        n = n->hash_next;
    return n;
}

uint64_t tree_nodes(struct tree *t)
{
    uint64_t count;

    pthread_mutex_lock(&t->lock);
    count = t->node_count;
    pthread_mutex_unlock(&t->lock);
    return count;
}

struct node *node_get(struct tree *t, uint64_t ino)
{
    pthread_mutex_lock(&t->lock);
    struct node *n = node_find_locked(t, ino);
    if (n)
        n->refs++;
    pthread_mutex_unlock(&t->lock);
    return n;
}

/* The size of a table of that many: double when it is too full, half when it is far too empty. */
static uint64_t fitting(uint64_t size, uint64_t count)
{
    if (count > size)
        return size * 2;
    return size > 1024 && count < size / 8 ? size / 2 : size;
}

/* It may stay as it is when there is no memory; so may that of the names. */
static void nodes_resize_locked(struct tree *t)
{
    uint64_t size = t->node_mask + 1, want = fitting(size, t->node_count);

    if (want == size)
        return;
    struct node **table = calloc(want, sizeof *table);
    if (!table)
        return;
    for (uint64_t i = 0; i < size; i++) {
        for (struct node *n = t->nodes[i], *next; n; n = next) {
            uint64_t slot = hash_ino(n->ino) & (want - 1);

            next = n->hash_next;
            n->hash_next = table[slot];
            table[slot] = n;
        }
    }
    free(t->nodes);
    t->nodes = table;
    t->node_mask = want - 1;
}

static void names_resize_locked(struct tree *t)
{
    uint64_t size = t->name_mask + 1, want = fitting(size, t->name_count);

    if (want == size)
        return;
    struct alias **table = calloc(want, sizeof *table);
    if (!table)
        return;
    for (uint64_t i = 0; i < size; i++) {
        for (struct alias *a = t->names[i], *next; a; a = next) {
            uint64_t slot = a->hash & (want - 1);

            next = a->hash_next;
            a->hash_next = table[slot];
            table[slot] = a;
        }
    }
    free(t->names);
    t->names = table;
    t->name_mask = want - 1;
}

struct node *node_new_locked(struct tree *t, uint64_t ino, mode_t type)
{
    struct node *n = calloc(1, sizeof *n);

    if (!n)
        return NULL;
    uint64_t slot = hash_ino(ino) & t->node_mask;
    n->ino = ino;
    n->type = type;
    n->pin = -1;
    n->hash_next = t->nodes[slot];
    t->nodes[slot] = n;
    t->node_count++;
    nodes_resize_locked(t);
    return n;
}

static void node_clear_locked(struct tree *t, struct node *n)
{
    for (uint16_t i = 0; i < n->ndirs; i++)
        rdir_put_locked(t, n->dirs[i]);
    if (n->data_dir)
        rdir_put_locked(t, n->data_dir);
    closing_add_locked(t, n->pin);
    (void)shelf_drop_locked(t, n);
    t->leaving_closed += n->leaving;
    faces_drop_locked(t, n);
    free(n->dirs);
    free(n->data_name);
    free(n->index_name);
    free(n->redirect);
    free(n);
}

/* Freeing a node lets go of its parents: a list and no recursion, since a path may be deeper than a
 * thread's stack. */
static void node_free_locked(struct tree *t, struct node *n)
{
    struct node **link = &t->nodes[hash_ino(n->ino) & t->node_mask];
    bool outermost = !t->dying;

    while (*link != n)
        link = &(*link)->hash_next;
    *link = n->hash_next;
    t->node_count--;
    nodes_resize_locked(t);
    if (outermost) {
        t->dying = n;
        n->hash_next = NULL;
    } else { /* after the first, which is being cleared just now */
        n->hash_next = t->dying->hash_next;
        t->dying->hash_next = n;
    }
    while (outermost && (n = t->dying)) {
        while (n->aliases)
            alias_drop_locked(t, n->aliases);
        t->dying = n->hash_next;
        node_clear_locked(t, n);
    }
}

void node_put_locked(struct tree *t, struct node *n)
{
    if (--n->refs == 0 && n->nlookup == 0)
        node_free_locked(t, n);
}

void node_put(struct tree *t, struct node *n)
{
    pthread_mutex_lock(&t->lock);
    node_put_locked(t, n);
    unlock_and_close(t);
}

uint64_t some_known_file(struct tree *t, uint64_t from)
{
    uint64_t found = 0;

    pthread_mutex_lock(&t->lock);
    for (uint64_t i = 0; i < SOON && i <= t->node_mask && !found; i++)
        for (const struct node *n = t->nodes[(from + i) & t->node_mask]; n; n = n->hash_next)
            if (S_ISREG(n->type) && n->nlookup > 0)
                found = n->ino;
    pthread_mutex_unlock(&t->lock);
    return found;
}

void node_forget(struct tree *t, uint64_t ino, uint64_t nlookup)
{
    pthread_mutex_lock(&t->lock);
    struct node *n = node_find_locked(t, ino);
    if (n && n != t->root) {
        n->nlookup = nlookup < n->nlookup ? n->nlookup - nlookup : 0;
        if (n->nlookup == 0 && n->refs == 0)
            node_free_locked(t, n);
    }
    unlock_and_close(t);
}

/* ---- aliases ---- */

struct alias *alias_find_locked(struct tree *t, struct node *parent, const char *name)
{
    uint32_t hash = hash_name(parent, name);
    struct alias *a = t->names[hash & t->name_mask];

    while (a && (a->hash != hash || a->parent != parent || strcmp(a->name, name) != 0))
        a = a->hash_next;
    return a;
}

struct alias *alias_best_locked(const struct node *n)
{
    struct alias *best = n->aliases;

    for (struct alias *a = n->aliases; a; a = a->next)
        if (a->real)
            best = a;
    return best;
}

errint_t alias_add_locked(struct tree *t, struct node *parent, const char *name, struct node *n,
                          bool real)
{
    size_t len = strlen(name) + 1;
    struct alias *a = malloc(sizeof *a + len);

    if (!a)
        return -ENOMEM;
    memcpy(a->name, name, len);
    a->parent = parent;
    a->node = n;
    a->real = real;
    a->hash = hash_name(parent, name);
    a->next = n->aliases;
    n->aliases = a;
    a->hash_next = t->names[a->hash & t->name_mask];
    t->names[a->hash & t->name_mask] = a;
    t->name_count++;
    parent->refs++;
    names_resize_locked(t);
    return 0;
}

void alias_drop_locked(struct tree *t, struct alias *a)
{
    struct alias **link = &a->node->aliases;

    while (*link != a)
        link = &(*link)->next;
    *link = a->next;
    link = &t->names[a->hash & t->name_mask];
    while (*link != a)
        link = &(*link)->hash_next;
    *link = a->hash_next;
    t->name_count--;
    names_resize_locked(t);
    node_put_locked(t, a->parent);
    free(a);
}

struct rdir *node_dir_locked(const struct node *n, uint16_t layer)
{
    for (uint16_t i = 0; i < n->ndirs; i++)
        if (n->dirs[i]->layer == layer)
            return n->dirs[i];
    return NULL;
}

/* ---- the tree itself ---- */

static errint_t tree_init_roots(struct tree *t, const struct tree_options *options)
{
    t->root = node_new_locked(t, ROOT_INO, S_IFDIR);
    if (!t->root)
        return -ENOMEM;
    t->root->nlookup = 1;
    t->root->upper = t->has_upper;
    t->root->dirs = calloc(t->nlayers, sizeof(struct rdir *));
    if (!t->root->dirs)
        return -ENOMEM;
    for (uint16_t i = 0; i < t->nlayers; i++) {
        struct rdir *r = rdir_new(i, NULL, "");
        struct stat st;
        errint_t err;

        if (!r)
            return -ENOMEM;
        r->fd = t->layers[i].fd;
        err = stat_fd(r->fd, &st);
        if (err < 0) {
            free(r->name);
            free(r);
            return err;
        }
        r->dev = st.st_dev;
        r->ino = st.st_ino;
        r->impure = true; /* entries of a root are looked at with their marks in any case */
        t->layers[i].root = r;
        t->root->dirs[t->root->ndirs++] = r;
    }
    t->root->layer = 0;
    if (options->index_fd >= 0) {
        t->index = rdir_new(0, NULL, "");
        if (!t->index)
            return -ENOMEM;
        t->index->fd = options->index_fd;
    }
    return 0;
}

errint_t tree_new(const struct layer *layers, uint16_t nlayers, const struct tree_options *options,
                  struct tree **ret_tree)
{
    struct tree *t = calloc(1, sizeof *t);
    errint_t err = -ENOMEM;

    if (!t)
        return -ENOMEM;
    pthread_mutex_init(&t->lock, NULL);
    pthread_rwlock_init(&t->leasing, NULL);
    t->nlayers = nlayers;
    t->has_upper = options->has_upper;
    t->live = options->live;
    t->static_nlink = options->static_nlink;
    t->noxattrs = options->noxattrs;
    t->noacl = options->noacl;
    t->hide_wh = options->has_upper && layers[0].wh_files;
    t->upper_in_fuse = options->has_upper && is_in_fuse(layers[0].fd);
    t->upper_in_order = options->has_upper && keeps_order(layers[0].fd);
    t->upper_xattrs = options->upper_xattrs;
    t->prefix = options->user_prefix ? "user.overlay." : "trusted.overlay.";
    t->override_mode = options->override_mode;
    t->numbers_fd = options->numbers_fd;
    t->image_fd = options->image_fd;
    t->work_fd = options->work_fd;
    t->plain = options->plain;
    t->all_ids = options->all_ids;
    t->sync_copies = options->sync_copies;
    t->sync_names = options->sync_names;
    t->metacopy_bytes = options->metacopy_bytes;
    t->metacopy_noted = !options->user_prefix;
    t->euid = geteuid();
    t->egid = getegid();
    (void)getrandom(&t->temps, sizeof t->temps, GRND_NONBLOCK);
    keylocks_init(&t->copying);
    keylocks_init(&t->committing);
    keylocks_init(&t->entering);
    t->device = -1;
    t->squash_uid = options->squash_uid;
    t->squash_gid = options->squash_gid;
    t->nuids = options->nuids;
    t->ngids = options->ngids;
    t->max_open_dirs = options->max_open_dirs ? options->max_open_dirs : 256;
    spare_init(t);
    t->node_mask = t->name_mask = 1023;
    t->lru.newer = t->lru.older = &t->lru;
    t->layers = calloc(nlayers, sizeof *t->layers);
    t->nodes = calloc(t->node_mask + 1, sizeof(struct node *));
    t->names = calloc(t->name_mask + 1, sizeof(struct alias *));
    t->uids = calloc(t->nuids + 1, sizeof(struct idrange));
    t->gids = calloc(t->ngids + 1, sizeof(struct idrange));
    if (t->layers && t->nodes && t->names && t->uids && t->gids) {
        memcpy(t->layers, layers, nlayers * sizeof *layers);
        if (t->nuids)
            memcpy(t->uids, options->uids, t->nuids * sizeof(struct idrange));
        if (t->ngids)
            memcpy(t->gids, options->gids, t->ngids * sizeof(struct idrange));
        shelf_init(t);
        err = tree_init_roots(t, options);
    }
    if (err < 0) {
        tree_free(t);
        return err;
    }
    *ret_tree = t;
    return 0;
}

void tree_shut(struct tree *t)
{
    for (uint32_t i = 0; i < t->ndirhandles; i++)
        dir_release(t, i + 1ULL);
    for (uint32_t i = 0; i < t->nfiles; i++)
        file_release(t, i + 1ULL);
    pthread_mutex_lock(&t->lock);
    for (uint64_t i = 0; i <= t->node_mask; i++) {
        for (struct node *n = t->nodes[i]; n; n = n->hash_next) {
            closing_add_locked(t, n->pin);
            n->pin = -1;
        }
    }
    (void)shelf_clear_locked(t);
    t->shelf_size = 0;
    rdirs_close_locked(t);
    for (uint16_t i = 0; i < t->nlayers; i++)
        t->layers[i].fd = t->layers[i].root->fd = -1;
    if (t->index)
        t->index->fd = -1;
    t->device = t->work_fd = t->numbers_fd = t->image_fd = -1;
    unlock_and_close(t);
}

/* Everything goes at once: references no longer count. */
void tree_free(struct tree *t)
{
    dirhandles_free(t);
    shelf_free(t);
    for (uint32_t i = 0; i < t->nfiles; i++) {
        if (t->files[i]) {
            (void)close(t->files[i]->fd);
            free(t->files[i]);
        }
    }
    free(t->files);
    for (uint64_t i = 0; t->names && i <= t->name_mask; i++) {
        for (struct alias *a = t->names[i], *next; a; a = next) {
            next = a->hash_next;
            free(a);
        }
    }
    for (uint64_t i = 0; t->nodes && i <= t->node_mask; i++) {
        for (struct node *n = t->nodes[i], *next; n; n = next) {
            next = n->hash_next;
            for (uint16_t k = 0; k < n->ndirs; k++)
                rdir_put_locked(t, n->dirs[k]);
            if (n->data_dir)
                rdir_put_locked(t, n->data_dir);
            if (n->pin >= 0)
                (void)close(n->pin);
            faces_drop_locked(t, n);
            free(n->dirs);
            free(n->data_name);
            free(n->index_name);
            free(n->redirect);
            free(n);
        }
    }
    if (t->index) {
        free(t->index->name);
        free(t->index);
    }
    free(t->faces);
    free(t->nodes);
    free(t->names);
    free(t->uids);
    free(t->gids);
    free(t->layers);
    keylocks_destroy(&t->committing);
    keylocks_destroy(&t->entering);
    keylocks_destroy(&t->copying);
    pthread_mutex_destroy(&t->lock);
    pthread_rwlock_destroy(&t->leasing);
    free(t);
}

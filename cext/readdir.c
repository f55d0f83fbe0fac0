/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Directories. One that lies in a single layer is streamed, with the layer's own offsets; one that
 * is merged is listed once, when it is read from its start, and its offsets count that list: an
 * entry that is there all the time is returned exactly once, however the directory changes.
 *
 * Only of the first kind may the kernel keep what it has read, since it goes on with the offsets of
 * one handle in another. A handle that is first read in the middle therefore streams what it was
 * opened on, whatever has become of the directory. */
#include <dirent.h>
#include <fcntl.h>
#include <string.h>
#include <sys/sysmacros.h>

#include "loan.h"
#include "spare.h"
#include "tree.h"

enum { BUFFER_BYTES = 64 * 1024 };

struct item {
    uint32_t name; /* offset into names */
    uint32_t hash;
    unsigned char type;
    bool hidden; /* a whiteout: it only keeps lower entries away */
};

struct listing {
    char *names;
    size_t names_len, names_cap;
    struct item *items;
    uint32_t count, cap;
    uint32_t *slots; /* index + 1 of an item, by hash */
    uint32_t nslots;
};

struct dirhandle {
    struct node *node;
    struct rdir *opened;  /* immutable: the one real directory there was when opened, or NULL */
    pthread_mutex_t lock; /* protects all below; taken before the tree's */
    bool ready;
    int fd; /* streaming: the real directory; else -1 */
    struct rdir *real;
    uint64_t at; /* offset of what comes next in the buffer */
    size_t pos, filled;
    char *buffer;
    struct listing list;
};

static uint32_t hash_bytes(const char *s)
{
    uint64_t h = 0xcbf29ce484222325ULL;

    for (; *s; s++)
        h = (h ^ (unsigned char)*s) * 0x100000001b3ULL;
    return (uint32_t)(h ^ (h >> 29));
}

static void listing_clear(struct listing *l)
{
    free(l->names);
    free(l->items);
    free(l->slots);
    *l = (struct listing){0};
}

static errint_t listing_grow(struct listing *l, size_t name_len)
{
    if (l->names_len + name_len > l->names_cap) {
        size_t cap = l->names_cap ? l->names_cap * 2 : 8192;
        char *names = realloc(l->names, cap);

        if (!names)
            return -ENOMEM;
        l->names = names;
        l->names_cap = cap;
    }
    if (l->count == l->cap) {
        uint32_t cap = l->cap ? l->cap * 2 : 256;
        struct item *items = realloc(l->items, cap * sizeof *items);

        if (!items)
            return -ENOMEM;
        l->items = items;
        l->cap = cap;
    }
    if (2 * (l->count + 1) > l->nslots) {
        uint32_t n = l->nslots ? l->nslots * 2 : 1024;
        uint32_t *slots = calloc(n, sizeof *slots);

        if (!slots)
            return -ENOMEM;
        for (uint32_t i = 0; i < l->count; i++) {
            uint32_t slot = l->items[i].hash & (n - 1);

            while (slots[slot])
                slot = (slot + 1) & (n - 1);
            slots[slot] = i + 1;
        }
        free(l->slots);
        l->slots = slots;
        l->nslots = n;
    }
    return 0;
}

/* Adds a name unless a layer above has it. */
static errint_t listing_add(struct listing *l, const char *name, unsigned char type, bool hidden)
{
    size_t len = strlen(name) + 1;
    errint_t err = listing_grow(l, len);
    uint32_t hash, slot;

    if (err < 0)
        return err;
    hash = hash_bytes(name);
    slot = hash & (l->nslots - 1);
    while (l->slots[slot]) {
        const struct item *item = &l->items[l->slots[slot] - 1];

        if (item->hash == hash && strcmp(l->names + item->name, name) == 0)
            return 0;
        slot = (slot + 1) & (l->nslots - 1);
    }
    memcpy(l->names + l->names_len, name, len);
    l->items[l->count] =
        (struct item){.name = (uint32_t)l->names_len, .hash = hash, .type = type, .hidden = hidden};
    l->names_len += len;
    l->slots[slot] = ++l->count;
    return 0;
}

/* What an entry of a layer is to the union. */
enum kind { KIND_SHOWN, KIND_SKIPPED, KIND_WHITEOUT };

static enum kind kind_of(struct tree *t, struct rdir *r, int fd, const char *name,
                         unsigned char *type)
{
    struct stat st;

    if (strcmp(name, ".") == 0 || strcmp(name, "..") == 0)
        return KIND_SHOWN;
    if (r == t->layers[r->layer].root && strcmp(name, ".unionfs") == 0)
        return KIND_SKIPPED;
    if ((t->layers[r->layer].wh_files || t->hide_wh) && strncmp(name, ".wh.", 4) == 0)
        return KIND_SKIPPED;
    if (*type != DT_CHR && *type != DT_UNKNOWN && !(r->xwhiteouts && *type == DT_REG))
        return KIND_SHOWN;
    if (fstatat(fd, name, &st, AT_SYMLINK_NOFOLLOW) < 0) {
        if (errno == EACCES && *type == DT_CHR)
            return KIND_WHITEOUT; /* who may not search it could not make another device either */
        return errno == ENOENT ? KIND_SKIPPED : KIND_SHOWN;
    }
    *type = (unsigned char)IFTODT(st.st_mode);
    return is_whiteout(t, r, fd, name, &st) ? KIND_WHITEOUT : KIND_SHOWN;
}

static errint_t list_wh_files(struct listing *l, char *buffer, ssize_t n)
{
    errint_t err = 0;

    for (ssize_t pos = 0; pos < n && err == 0;) {
        struct dirent64 *d = (struct dirent64 *)(void *)(buffer + pos);

        pos += d->d_reclen;
        if (strncmp(d->d_name, ".wh.", 4) == 0 && strncmp(d->d_name, ".wh..wh.", 8) != 0)
            err = listing_add(l, d->d_name + 4, DT_UNKNOWN, true);
    }
    return err;
}

struct opening {
    int dirfd, fd;
};

static errint_t open_listing(void *arg)
{
    struct opening *o = arg;

    o->fd = reopen_fd(o->dirfd, O_RDONLY | O_DIRECTORY);
    return o->fd < 0 ? o->fd : 0;
}

/* A directory may be removed, and so must be seen to be empty, by one who cannot read it; and be
 * listed by one who cannot search it, so not by its ".". */
static int try_for_listing(const struct tree *t, const struct rdir *r, int dirfd)
{
    struct opening o = {.dirfd = dirfd};
    char path[PROC_BYTES];
    errint_t err;

    if (!t->has_upper || r->layer != 0)
        return reopen_fd(dirfd, O_RDONLY | O_DIRECTORY);
    proc_path(path, dirfd, NULL);
    err = as_owner(path, false, S_IRUSR, open_listing, &o);
    return err < 0 ? err : o.fd;
}

static int open_for_listing(struct tree *t, const struct rdir *r, int dirfd)
{
    int fd = try_for_listing(t, r, dirfd);

    return fd == -EMFILE && rdirs_release(t) ? try_for_listing(t, r, dirfd) : fd;
}

static errint_t list_layer(struct tree *t, struct rdir *r, struct listing *l, char *buffer,
                           bool until_shown, bool *ret_shown)
{
    bool wh_files = t->layers[r->layer].wh_files;
    int dirfd;
    errint_t err = 0;

    if (r->sealed)
        return 0;
    dirfd = rdir_pin(t, r);
    if (dirfd < 0)
        return dirfd == -ENOENT ? 0 : dirfd;
    cleanup_fd int fd = open_for_listing(t, r, dirfd);
    if (fd < 0)
        err = fd;
    rdir_unpin(t, r);
    /* First what the layer has, then what its .wh. files hide below it. */
    for (int round = 0; err == 0 && round < (wh_files ? 2 : 1); round++) {
        ssize_t n;

        if (round > 0 && lseek(fd, 0, SEEK_SET) < 0)
            return errno_or_eio();
        while (err == 0 && (n = getdents64(fd, buffer, BUFFER_BYTES)) > 0) {
            if (round > 0) {
                err = list_wh_files(l, buffer, n);
                continue;
            }
            for (ssize_t pos = 0; pos < n && err == 0;) {
                struct dirent64 *d = (struct dirent64 *)(void *)(buffer + pos);
                unsigned char type = d->d_type;
                enum kind kind = kind_of(t, r, fd, d->d_name, &type);
                uint32_t before = l->count;

                pos += d->d_reclen;
                if (kind != KIND_SKIPPED)
                    err = listing_add(l, d->d_name, type, kind == KIND_WHITEOUT);
                if (err == 0 && kind == KIND_SHOWN && l->count > before &&
                    strcmp(d->d_name, ".") != 0 && strcmp(d->d_name, "..") != 0)
                    *ret_shown = true;
                if (until_shown && *ret_shown)
                    return 0;
            }
        }
        if (err == 0 && n < 0)
            err = errno_or_eio();
    }
    return err;
}

static uint16_t hold_stack(struct tree *t, struct node *n, struct rdir **stack)
{
    uint16_t count;

    pthread_mutex_lock(&t->lock);
    count = n->ndirs;
    for (uint16_t i = 0; i < count; i++) {
        stack[i] = n->dirs[i];
        rdir_ref_locked(stack[i]);
    }
    pthread_mutex_unlock(&t->lock);
    return count;
}

static void drop_stack(struct tree *t, struct rdir **stack, uint16_t n)
{
    pthread_mutex_lock(&t->lock);
    for (uint16_t i = 0; i < n; i++)
        rdir_put_locked(t, stack[i]);
    pthread_mutex_unlock(&t->lock);
}

static errint_t list_node(struct tree *t, struct node *n, struct listing *l, bool until_shown,
                          bool *ret_shown)
{
    struct rdir *stack[MAX_LAYERS];
    uint16_t count = hold_stack(t, n, stack);
    cleanup_free char *buffer = malloc(BUFFER_BYTES);
    errint_t err = buffer ? 0 : -ENOMEM;

    if (err == 0)
        err = listing_add(l, ".", DT_DIR, false);
    if (err == 0)
        err = listing_add(l, "..", DT_DIR, false);
    for (uint16_t i = 0; i < count && err == 0; i++) {
        err = list_layer(t, stack[i], l, buffer, until_shown, ret_shown);
        if (until_shown && *ret_shown)
            break;
    }
    drop_stack(t, stack, count);
    return err;
}

errint_t dir_is_empty(struct tree *t, uint64_t ino, bool *ret_empty)
{
    struct node *n = node_get(t, ino);
    struct listing l = {0};
    bool shown = false;
    errint_t err;

    if (!n)
        return -ESTALE;
    err = list_node(t, n, &l, true, &shown);
    listing_clear(&l);
    node_put(t, n);
    if (err == 0)
        *ret_empty = !shown;
    return err;
}

/* ---- handles ---- */

static struct rdir *single_dir_locked(const struct node *n)
{
    if (n->ndirs != 1 || n->dirs[0]->sealed)
        return NULL;
    rdir_ref_locked(n->dirs[0]);
    return n->dirs[0];
}

errint_t dir_open(struct tree *t, uint64_t ino, uint64_t *ret_dh, bool *ret_keep)
{
    struct node *n = node_get(t, ino);
    struct dirhandle *h;
    uint32_t at;

    if (!n)
        return -ESTALE;
    h = calloc(1, sizeof *h);
    if (!h) {
        node_put(t, n);
        return -ENOMEM;
    }
    h->node = n;
    h->fd = -1;
    pthread_mutex_init(&h->lock, NULL);
    pthread_mutex_lock(&t->lock);
    for (at = 0; at < t->ndirhandles && t->dirhandles[at]; at++)
        ;
    if (at == t->ndirhandles) {
        struct dirhandle **table = realloc(t->dirhandles, (at + 16) * sizeof *table);

        if (!table) {
            pthread_mutex_unlock(&t->lock);
            free(h);
            node_put(t, n);
            return -ENOMEM;
        }
        memset(table + at, 0, 16 * sizeof *table);
        t->dirhandles = table;
        t->ndirhandles = at + 16;
    }
    t->dirhandles[at] = h;
    h->opened = single_dir_locked(n);
    bool keep = h->opened && !n->unsure;
    pthread_mutex_unlock(&t->lock);
    *ret_dh = at + 1ULL;
    *ret_keep = keep;
    return 0;
}

void dir_unsure(struct tree *t, uint64_t ino)
{
    struct node *n = node_get(t, ino);

    if (!n)
        return;
    pthread_mutex_lock(&t->lock);
    n->unsure = true;
    pthread_mutex_unlock(&t->lock);
    node_put(t, n);
}

static struct dirhandle *handle_of(struct tree *t, uint64_t dh)
{
    struct dirhandle *h = NULL;

    pthread_mutex_lock(&t->lock);
    if (dh >= 1 && dh <= t->ndirhandles)
        h = t->dirhandles[dh - 1];
    pthread_mutex_unlock(&t->lock);
    return h;
}

uint64_t dir_ino(struct tree *t, uint64_t dh)
{
    struct dirhandle *h = handle_of(t, dh);

    return h ? h->node->ino : 0;
}

uint64_t dir_parent(struct tree *t, uint64_t dh)
{
    struct dirhandle *h = handle_of(t, dh);
    uint64_t ino = 0;

    if (!h)
        return 0;
    pthread_mutex_lock(&t->lock);
    ino = h->node->aliases ? h->node->aliases->parent->ino : h->node->ino;
    pthread_mutex_unlock(&t->lock);
    return ino;
}

static void handle_clear(struct tree *t, struct dirhandle *h)
{
    listing_clear(&h->list);
    close_keep_errno(h->fd);
    h->fd = -1;
    free(h->buffer);
    h->buffer = NULL;
    if (h->real)
        rdir_put(t, h->real);
    h->real = NULL;
    h->ready = false;
    h->pos = h->filled = 0;
    h->at = 0;
}

/* The kernel releases a handle after its last request. */
void dir_release(struct tree *t, uint64_t dh)
{
    struct dirhandle *h = handle_of(t, dh);

    if (!h)
        return;
    pthread_mutex_lock(&t->lock);
    t->dirhandles[dh - 1] = NULL;
    pthread_mutex_unlock(&t->lock);
    handle_clear(t, h);
    if (h->opened)
        rdir_put(t, h->opened);
    node_put(t, h->node);
    pthread_mutex_destroy(&h->lock);
    free(h);
}

void dirhandles_free(struct tree *t)
{
    for (uint32_t i = 0; i < t->ndirhandles; i++)
        dir_release(t, i + 1ULL);
    free(t->dirhandles);
}

/* Decides between streaming and listing, anew whenever the directory is read from its start. */
static errint_t handle_start(struct tree *t, struct dirhandle *h, bool in_the_middle)
{
    bool shown = false;
    errint_t err = 0;

    handle_clear(t, h);
    pthread_mutex_lock(&t->lock);
    if (in_the_middle && h->opened) {
        h->real = h->opened;
        rdir_ref_locked(h->real);
    } else {
        h->real = single_dir_locked(h->node);
    }
    pthread_mutex_unlock(&t->lock);
    if (!h->real) {
        err = list_node(t, h->node, &h->list, false, &shown);
    } else {
        int dirfd = rdir_pin(t, h->real);

        err = dirfd < 0 ? dirfd : 0;
        if (dirfd >= 0) {
            h->fd = open_for_listing(t, h->real, dirfd);
            if (h->fd < 0)
                err = h->fd;
            else
                (void)spare_keep(t, &h->fd);
            rdir_unpin(t, h->real);
        }
        h->buffer = err == 0 ? malloc(BUFFER_BYTES) : NULL;
        if (err == 0 && !h->buffer)
            err = -ENOMEM;
    }
    if (err < 0)
        handle_clear(t, h);
    else
        h->ready = true;
    return err;
}

static errint_t read_list(struct dirhandle *h, uint64_t offset,
                          int (*fn)(void *arg, const struct dirent_out *entry), void *arg)
{
    for (uint64_t i = offset; i < h->list.count; i++) {
        const struct item *item = &h->list.items[i];

        if (item->hidden)
            continue;
        struct dirent_out out = {
            .name = h->list.names + item->name, .type = item->type, .next = i + 1};
        if (fn(arg, &out))
            break;
    }
    return 0;
}

static errint_t read_stream(struct tree *t, struct dirhandle *h, uint64_t offset,
                            int (*fn)(void *arg, const struct dirent_out *entry), void *arg)
{
    if (offset != h->at || h->pos > h->filled) {
        if (lseek(h->fd, (off_t)offset, SEEK_SET) < 0)
            return errno_or_eio();
        h->pos = h->filled = 0;
        h->at = offset;
    }
    for (;;) {
        if (h->pos >= h->filled) {
            ssize_t n = getdents64(h->fd, h->buffer, BUFFER_BYTES);

            if (n < 0)
                return errno == ENOENT ? 0 : errno_or_eio(); /* removed: it is empty */
            h->pos = 0;
            h->filled = (size_t)n;
            if (n == 0)
                return 0;
        }
        struct dirent64 *d = (struct dirent64 *)(void *)(h->buffer + h->pos);
        unsigned char type = d->d_type;

        if (kind_of(t, h->real, h->fd, d->d_name, &type) == KIND_SHOWN) {
            struct dirent_out out = {.name = d->d_name, .type = type, .next = (uint64_t)d->d_off};

            if (fn(arg, &out))
                return 0; /* did not fit: it comes again, from the buffer */
        }
        h->pos += d->d_reclen;
        h->at = (uint64_t)d->d_off;
    }
}

errint_t dir_read(struct tree *t, uint64_t dh, uint64_t offset,
                  int (*fn)(void *arg, const struct dirent_out *entry), void *arg)
{
    struct dirhandle *h = handle_of(t, dh);
    errint_t err = 0;

    if (!h)
        return -EBADF;
    pthread_mutex_lock(&h->lock);
    if (offset == 0 || !h->ready)
        err = handle_start(t, h, offset != 0);
    if (err == 0)
        err = h->fd >= 0 ? read_stream(t, h, offset, fn, arg) : read_list(h, offset, fn, arg);
    if (h->fd >= t->most_open) /* it goes on in the middle, with another */
        handle_clear(t, h);
    pthread_mutex_unlock(&h->lock);
    return err;
}

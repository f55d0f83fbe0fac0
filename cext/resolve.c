/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What a name means: the only place that knows whiteouts, opaque directories, redirects,
 * metadata-only copies, the hard link index, and which layer wins. The rules are those of the
 * kernel's Documentation/filesystems/overlayfs.rst and fs/overlayfs/namei.c. */
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>

#include "loan.h"
#include "marks.h"
#include "resolve.h"

/* ---- one name in one real directory ---- */

enum found { FOUND_NOTHING, FOUND_WHITEOUT, FOUND_ENTRY, FOUND_MOUNTPOINT };

static errint_t probe_stat(int dirfd, const char *name, bool careful, struct stat *ret_st)
{
    if (!careful)
        return loan_stat(dirfd, name, AT_SYMLINK_NOFOLLOW, ret_st);
    cleanup_fd int fd = open_beneath(dirfd, name, O_PATH, true);
    return fd < 0 ? fd : stat_fd(fd, ret_st);
}

/* The area beside an upper, in the root of it or of a lower that was an upper once. */
static bool hidden_area(const struct tree *t, const struct rdir *dir, const char *name)
{
    return dir == t->layers[dir->layer].root && strcmp(name, ".unionfs") == 0;
}

static errint_t probe(struct tree *t, struct rdir *dir, const char *name, enum found *ret_found,
                      struct stat *ret_st)
{
    const struct layer *layer = &t->layers[dir->layer];
    int dirfd;
    errint_t err;

    *ret_found = FOUND_NOTHING;
    if (dir->sealed || hidden_area(t, dir, name))
        return 0;
    if ((layer->wh_files || t->hide_wh) && strncmp(name, ".wh.", 4) == 0)
        return 0;
    dirfd = rdir_pin(t, dir);
    if (dirfd == -ENOENT && dir->gone)
        return 0;
    if (dirfd < 0)
        return dirfd;
    err = probe_stat(dirfd, name, layer->careful, ret_st);
    if (err == 0) {
        *ret_found = is_whiteout(t, dir, dirfd, name, ret_st) ? FOUND_WHITEOUT : FOUND_ENTRY;
    } else if (err == -EXDEV) {
        *ret_st = (struct stat){.st_mode = S_IFDIR | 0755, .st_nlink = 2, .st_blksize = 4096};
        *ret_found = FOUND_MOUNTPOINT;
        err = 0;
    } else if (err == -ENOENT || err == -ENAMETOOLONG) {
        /* Too long for this layer's file system is not there; for the upper's it is an error. */
        bool too_long = err == -ENAMETOOLONG && dir->layer == 0;

        err = too_long ? -ENAMETOOLONG : 0;
        if (err == 0 && layer->wh_files && strlen(name) + 4 < NAME_BYTES) {
            char wh[NAME_BYTES + 8];

            (void)snprintf(wh, sizeof wh, ".wh.%s", name);
            if (exists_at(dirfd, wh))
                *ret_found = FOUND_WHITEOUT;
        }
    }
    rdir_unpin(t, dir);
    return err;
}

/* ---- the walk down the layers ---- */

void hit_clear(struct tree *t, struct hit *h)
{
    pthread_mutex_lock(&t->lock);
    for (uint16_t i = 0; i < h->ndirs; i++)
        rdir_put_locked(t, h->dirs[i]);
    if (h->data_dir)
        rdir_put_locked(t, h->data_dir);
    pthread_mutex_unlock(&t->lock);
    free(h->data_name);
    free(h->redirect);
    free(h->index_name);
    h->ndirs = 0;
    h->data_dir = NULL;
    h->data_name = h->redirect = h->index_name = NULL;
}

/* A redirect at the component that starts at `prelen` and is followed by `post`: the lower layers
 * are searched at another path from here on (ovl_check_redirect). */
static errint_t apply_redirect(struct walk *w, const char *redirect, size_t prelen,
                               const char *post)
{
    char path[PATH_MAX];
    int n;

    if (!redirect_is_sane(redirect)) {
        tree_warn(w->t, "refused the redirect %.200s of %.200s: it leads out of the layers",
                  redirect, w->path);
        return -EIO;
    }
    if (redirect[0] == '/')
        n = snprintf(path, sizeof path, "%s%s", redirect, post);
    else
        n = snprintf(path, sizeof path, "%.*s%s%s", (int)prelen, w->path, redirect, post);
    if (n < 0 || (size_t)n >= sizeof path)
        return -ENAMETOOLONG;
    memcpy(w->path, path, (size_t)n + 1);
    return 0;
}

/* Where to look in the layers below, of a directory on the way. An absolute redirect leads out of
 * an opaque directory above it (ovl_check_redirect of fs/overlayfs/namei.c). */
static errint_t follow_dir_marks(struct walk *w, const struct marks *m, size_t prelen,
                                 const char *post)
{
    if (m->opaque) {
        w->stop = true;
        return 0;
    }
    if (!m->redirect || (w->stop && m->redirect[0] != '/'))
        return 0;
    w->stop = false;
    return apply_redirect(w, m->redirect, prelen, post);
}

static struct rdir *child_dir(struct walk *w, struct rdir *dir, const char *name,
                              const struct stat *st, bool sealed)
{
    pthread_mutex_lock(&w->t->lock);
    rdir_ref_locked(dir);
    pthread_mutex_unlock(&w->t->lock);
    struct rdir *r = rdir_new(dir->layer, dir, name);
    if (!r) {
        rdir_put(w->t, dir);
        return NULL;
    }
    r->dev = st->st_dev;
    r->ino = st->st_ino;
    r->sealed = sealed;
    return r;
}

/* Opaque, redirect, impure: what a directory of a layer says of itself. */
static errint_t dir_marks(struct walk *w, struct rdir *r, struct marks *ret_marks)
{
    const struct layer *layer = &w->t->layers[r->layer];
    char path[PROC_BYTES];
    struct marks m = {0};
    errint_t err;
    int fd;

    if (r->sealed) {
        *ret_marks = m;
        return 0;
    }
    fd = rdir_pin(w->t, r);
    if (fd < 0)
        return fd;
    proc_path(path, fd, NULL);
    err = marks_read(w->t, path, false, r->layer == 0 && w->t->has_upper, &m);
    if (err == 0) {
        if (layer->wh_files && exists_at(fd, ".wh..wh..opq"))
            m.opaque = true;
        r->impure = r->impure_marked = m.impure;
        r->xwhiteouts = m.xwhiteouts;
        *ret_marks = m;
    }
    rdir_unpin(w->t, r);
    return err;
}

static bool is_bottom(const struct tree *t, const struct rdir *dir)
{
    return dir->layer + 1 == t->nlayers && !(t->has_upper && dir->layer == 0);
}

static void take_number(struct hit *h, const struct layer *layer, const struct stat *st)
{
    if (st->st_ino)
        h->ino = union_ino(layer->fs, st->st_ino);
}

/* For redirects of what lies below, or is renamed: so not one that leads out of the layers, which
 * is refused only where it would be followed. */
static void keep_redirect(struct hit *h, struct marks *m)
{
    if (!redirect_is_sane(m->redirect))
        return;
    free(h->redirect);
    h->redirect = steal_pointer(&m->redirect);
}

/* The last component, found as a directory in `dir`. */
static errint_t found_dir(struct walk *w, struct rdir *dir, const char *name, const struct stat *st,
                          bool sealed, size_t prelen)
{
    struct hit *h = w->hit;
    struct marks m = {0};
    struct rdir *r;
    errint_t err = 0;

    if (h->any && !S_ISDIR(h->type)) { /* below a metadata-only copy must lie a file */
        w->stop = true;
        return 0;
    }
    r = child_dir(w, dir, name, st, sealed);
    if (!r)
        return -ENOMEM;
    if (!h->any) {
        h->any = true;
        h->type = S_IFDIR;
        h->layer = dir->layer;
        h->st = *st;
    }
    if (dir->layer != 0 || !w->t->has_upper) {
        if (!h->have_lower_ino)
            take_number(h, &w->t->layers[dir->layer], st);
        h->have_lower_ino = true;
    } else {
        take_number(h, &w->t->layers[0], st);
    }
    h->dirs[h->ndirs++] = r;
    if (is_bottom(w->t, dir))
        return 0;
    err = dir_marks(w, r, &m);
    if (err == 0)
        err = follow_dir_marks(w, &m, prelen, "");
    if (err == 0 && m.redirect && dir->layer == 0 && w->t->has_upper)
        keep_redirect(h, &m);
    marks_clear(&m);
    return err;
}

/* overlay.nlink: "U+n" relative to the upper inode's link count, "L+n" to the lower's. */
static void take_nlink(struct hit *h, const struct marks *m)
{
    const char *nlink = m->nlink;

    if (!nlink || (nlink[0] != 'U' && nlink[0] != 'L'))
        return;
    h->nlink_diff = strtol(nlink + 1, NULL, 10);
    h->nlink_of_lower = nlink[0] == 'L';
    h->indexed = true;
    if (m->links) { /* cut while it got a name: see ensure_name in copy_up.py */
        h->nlink_diff = (int64_t)m->links - (int64_t)h->st.st_nlink;
        h->nlink_of_lower = false;
    }
}

errint_t upper_file_marks(struct walk *w, struct rdir *dir, const char *name, size_t prelen)
{
    struct hit *h = w->hit;
    struct marks m = {0};
    char path[PROC_BYTES];
    int dirfd = rdir_pin(w->t, dir);
    errint_t err;

    if (dirfd < 0)
        return dirfd;
    proc_path(path, dirfd, name);
    err = marks_read(w->t, path, true, dir->layer == 0 && w->t->has_upper, &m);
    if (err == 0 && !m.ino && dir->layer == 0 && (!S_ISREG(h->type) || !w->t->upper_xattrs))
        m.ino = recorded_number(w->t, dirfd, name, h->st.st_ino);
    rdir_unpin(w->t, dir);
    if (err < 0)
        return err;
    if (m.ino)
        h->ino = m.ino;
    else if (m.origin && origin_number(w->t, m.origin, m.origin_len))
        h->ino = origin_number(w->t, m.origin, m.origin_len);
    if (dir->layer == 0 && w->t->has_upper) /* a former upper's index is not ours */
        take_nlink(h, &m);
    if (h->indexed && m.origin && m.origin_len <= (NAME_BYTES - 1) / 2 && !h->index_name) {
        h->index_name = malloc(2 * m.origin_len + 1);
        if (!h->index_name)
            err = -ENOMEM;
        for (size_t i = 0; h->index_name && i < m.origin_len; i++)
            (void)snprintf(h->index_name + 2 * i, 3, "%02x", (unsigned char)m.origin[i]);
    }
    if (m.metacopy && S_ISREG(h->type)) {
        h->metacopy = true;
        w->stop = false;
        if (m.redirect)
            err = apply_redirect(w, m.redirect, prelen, "");
    }
    /* Not a lower layer's: it counts from there on, and a copy is found by the name of that. */
    if (m.redirect && dir->layer == 0 && w->t->has_upper)
        keep_redirect(h, &m);
    marks_clear(&m);
    return err;
}

/* With xattr_permissions a regular file may stand for a device. */
static errint_t shown_type(struct tree *t, struct rdir *dir, const char *name, mode_t *ret_type)
{
    struct stat st = {.st_mode = S_IFREG};
    char path[PROC_BYTES];
    int dirfd = rdir_pin(t, dir);

    if (dirfd < 0)
        return dirfd;
    proc_path(path, dirfd, name);
    override_stat(t->override_mode, path, true, &st);
    rdir_unpin(t, dir);
    *ret_type = st.st_mode & S_IFMT;
    return 0;
}

/* The last component, found as anything else. */
static errint_t found_file(struct walk *w, struct rdir *dir, const char *name,
                           const struct stat *st, size_t prelen)
{
    struct hit *h = w->hit;

    w->stop = true;
    if (h->any && S_ISDIR(h->type))
        return 0;
    if (h->any) { /* the data of the metadata-only copy above */
        if (!S_ISREG(st->st_mode))
            return 0;
        struct hit below = {.type = S_IFREG};
        if (!is_bottom(w->t, dir) && dir->impure) {
            struct walk deeper = {.t = w->t, .hit = &below, .stop = true};
            errint_t err;

            memcpy(deeper.path, w->path, sizeof deeper.path);
            err = upper_file_marks(&deeper, dir, name, prelen);
            free(below.redirect);
            if (err < 0)
                return err;
            if (below.metacopy) { /* a former upper's copy: go on below it */
                memcpy(w->path, deeper.path, sizeof w->path);
                w->stop = false;
                return 0;
            }
        }
        h->data_name = strdup(name);
        if (!h->data_name)
            return -ENOMEM;
        h->data_dir = dir;
        h->data_st = *st;
        pthread_mutex_lock(&w->t->lock);
        rdir_ref_locked(dir);
        pthread_mutex_unlock(&w->t->lock);
        return 0;
    }
    h->any = true;
    h->type = st->st_mode & S_IFMT;
    h->layer = dir->layer;
    h->st = *st;
    take_number(h, &w->t->layers[dir->layer], st);
    if (w->t->override_mode && S_ISREG(st->st_mode)) {
        errint_t err = shown_type(w->t, dir, name, &h->type);

        if (err < 0)
            return err;
    }
    if ((dir->impure || (dir->layer == 0 && !w->t->upper_xattrs)) && !is_bottom(w->t, dir))
        return upper_file_marks(w, dir, name, prelen);
    return 0;
}

/* w->path in the layer of `base`: NAME in base itself, or an absolute path from the root. */
static errint_t walk_layer(struct walk *w, struct rdir *base)
{
    char full[PATH_MAX];
    const char *rest = full;
    struct rdir *dir;
    errint_t err = 0;

    memcpy(full, w->path, strlen(w->path) + 1);
    dir = full[0] == '/' ? w->t->layers[base->layer].root : base;
    if (full[0] == '/')
        rest++;
    pthread_mutex_lock(&w->t->lock);
    rdir_ref_locked(dir);
    pthread_mutex_unlock(&w->t->lock);
    while (err == 0) {
        const char *end = strchrnul(rest, '/');
        char name[NAME_BYTES];
        enum found found;
        struct stat st;
        bool last = !*end;
        /* From the end, since a redirect met on the way changes what comes before. */
        size_t prelen = strlen(w->path) - strlen(rest);

        if ((size_t)(end - rest) >= sizeof name) {
            err = dir->layer == 0 && w->t->has_upper ? -ENAMETOOLONG : 0;
            break;
        }
        memcpy(name, rest, (size_t)(end - rest));
        name[end - rest] = '\0';
        err = probe(w->t, dir, name, &found, &st);
        if (err < 0 || found == FOUND_NOTHING)
            break;
        if (found == FOUND_WHITEOUT) {
            w->stop = true;
            if (dir->layer == 0 && w->t->has_upper)
                w->hit->upper = UPPER_WHITEOUT;
            break;
        }
        if (dir->layer == 0 && w->t->has_upper)
            w->hit->upper = UPPER_ENTRY;
        if (last) {
            err = S_ISDIR(st.st_mode)
                      ? found_dir(w, dir, name, &st, found == FOUND_MOUNTPOINT, prelen)
                      : found_file(w, dir, name, &st, prelen);
            break;
        }
        if (!S_ISDIR(st.st_mode)) {
            w->stop = true;
            break;
        }
        struct rdir *next = child_dir(w, dir, name, &st, found == FOUND_MOUNTPOINT);
        if (!next) {
            err = -ENOMEM;
            break;
        }
        if (!is_bottom(w->t, dir)) {
            struct marks m = {0};

            err = dir_marks(w, next, &m);
            if (err == 0)
                err = follow_dir_marks(w, &m, prelen, end);
            marks_clear(&m);
        }
        rdir_put(w->t, dir);
        dir = next;
        rest = end + 1;
    }
    rdir_put(w->t, dir);
    return err;
}

/* Real directories to search below `parent`, references owned. */
static uint16_t take_stack(struct tree *t, struct node *parent, struct rdir **stack)
{
    uint16_t n;

    pthread_mutex_lock(&t->lock);
    n = parent->ndirs;
    for (uint16_t i = 0; i < n; i++) {
        stack[i] = parent->dirs[i];
        rdir_ref_locked(stack[i]);
    }
    pthread_mutex_unlock(&t->lock);
    return n;
}

static void drop_stack(struct tree *t, struct rdir **stack, uint16_t n)
{
    pthread_mutex_lock(&t->lock);
    for (uint16_t i = 0; i < n; i++)
        rdir_put_locked(t, stack[i]);
    pthread_mutex_unlock(&t->lock);
}

errint_t walk_down(struct walk *w, struct node *parent, uint16_t first_layer)
{
    struct rdir *stack[MAX_LAYERS];
    uint16_t n = take_stack(w->t, parent, stack);
    bool from_root = parent == w->t->root;
    errint_t err = 0;

    for (uint16_t i = 0; i < n && err == 0 && !w->stop; i++) {
        uint16_t layer = stack[i]->layer;

        if (layer < first_layer)
            continue;
        err = walk_layer(w, stack[i]);
        if (w->path[0] == '/' && !from_root) {
            /* Redirected: every layer below is searched from its root. */
            drop_stack(w->t, stack, n);
            n = take_stack(w->t, w->t->root, stack);
            from_root = true;
            i = 0;
            while (i < n && stack[i]->layer <= layer)
                i++;
            i--; /* the loop adds one */
        }
    }
    drop_stack(w->t, stack, n);
    return err;
}

/* Without an index each name of a lower file is a file of its own, as in kernel overlayfs: which
 * names a copy is to have is not known. */
static void take_own_number(const struct tree *t, const struct node *parent, const char *name,
                            struct hit *h)
{
    if (t->work_fd >= 0 && (!t->index || t->layers[h->layer].passing) && !S_ISDIR(h->type) &&
        h->st.st_nlink > 1)
        h->ino = number_by_name(h->ino, parent, name);
}

errint_t resolve(struct tree *t, struct node *parent, const char *name, struct hit *h)
{
    struct walk *w;
    errint_t err;

    memset(h, 0, offsetof(struct hit, dirs));
    h->metacopy = h->indexed = h->have_lower_ino = h->nlink_of_lower = false;
    h->data_dir = NULL;
    h->data_name = h->redirect = h->index_name = NULL;
    h->nlink_diff = 0;
    if (strlen(name) >= NAME_BYTES)
        return -ENAMETOOLONG;
    w = calloc(1, sizeof *w);
    if (!w)
        return -ENOMEM;
    w->t = t;
    w->hit = h;
    (void)snprintf(w->path, sizeof w->path, "%s", name);
    err = walk_down(w, parent, 0);
    free(w);
    if (err == 0 && h->any && !S_ISDIR(h->type)) {
        if (h->layer != 0 || !t->has_upper) {
            err = index_of_lower(t, parent, name, h);
            take_own_number(t, parent, name, h);
        } else {
            err = index_of_upper(t, parent, name, h);
        }
        if (err == 0 && h->metacopy && !h->data_dir) {
            tree_warn(t, "%.200s is a metadata-only copy, and its data are in no lower layer",
                      name);
            err = -EIO;
        }
    }
    if (err < 0)
        hit_clear(t, h);
    return err;
}

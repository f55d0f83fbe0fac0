/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The table is told of changes that have been committed to disk. Nothing here changes a layer,
 * but for the impure mark and the origin's reading. */
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/xattr.h>

#include "loan.h"
#include "spare.h"
#include "tree.h"

/* ---- copy-up ---- */

static errint_t dir_copied_up(struct tree *t, struct node *n, struct node *parent, const char *name)
{
    struct rdir *parent_dir, *r;
    struct rdir **dirs;
    int fd;

    pthread_mutex_lock(&t->lock);
    parent_dir = node_dir_locked(parent, 0);
    if (parent_dir)
        rdir_ref_locked(parent_dir);
    pthread_mutex_unlock(&t->lock);
    if (!parent_dir)
        return -ENOENT;
    r = rdir_new(0, parent_dir, name);
    if (!r) {
        rdir_put(t, parent_dir);
        return -ENOMEM;
    }
    fd = rdir_pin(t, r); /* learns what is there */
    if (fd < 0) {
        rdir_put(t, r);
        return fd;
    }
    rdir_unpin(t, r);
    pthread_mutex_lock(&t->lock);
    dirs = realloc(n->dirs, (n->ndirs + 1U) * sizeof *dirs);
    if (!dirs) {
        rdir_put_locked(t, r);
        pthread_mutex_unlock(&t->lock);
        return -ENOMEM;
    }
    memmove(dirs + 1, dirs, n->ndirs * sizeof *dirs);
    dirs[0] = r;
    n->dirs = dirs;
    n->ndirs++;
    n->upper = true;
    n->layer = 0;
    n->dev = r->dev;
    n->real_ino = r->ino;
    n->generation++;
    pthread_mutex_unlock(&t->lock);
    return 0;
}

/* What is now at (parent's upper directory, name), or behind the orphan's descriptor. */
static errint_t stat_published(struct tree *t, const struct copied_up *c, struct node *parent,
                               struct stat *ret_st)
{
    struct rdir *dir;
    errint_t err = 0;
    int fd;

    if (!parent)
        return stat_fd(c->orphan_fd, ret_st);
    fd = upper_pin(t, parent, &dir);
    if (fd < 0)
        return fd;
    if (fstatat(fd, c->name, ret_st, AT_SYMLINK_NOFOLLOW) < 0)
        err = errno_or_eio();
    upper_unpin(t, dir);
    return err;
}

/* The lower place becomes the place of the data of a metadata-only copy. */
static errint_t keep_data_place_locked(struct node *n)
{
    if (n->metacopy) /* a lower metadata-only copy: its data stay where they were */
        return 0;
    for (struct alias *a = n->aliases; a; a = a->next) {
        struct rdir *dir = a->real ? node_dir_locked(a->parent, n->layer) : NULL;

        if (!dir)
            continue;
        n->data_name = strdup(a->name);
        if (!n->data_name)
            return -ENOMEM;
        rdir_ref_locked(dir);
        n->data_dir = dir;
        n->data_dev = n->dev;
        n->data_ino = n->real_ino;
        return 0;
    }
    return -ENOENT;
}

static void drop_data_place_locked(struct tree *t, struct node *n)
{
    if (n->data_dir)
        rdir_put_locked(t, n->data_dir);
    n->data_dir = NULL;
    free(n->data_name);
    n->data_name = NULL;
    n->metacopy = false;
}

static errint_t file_copied_up_locked(struct tree *t, struct node *n, const struct copied_up *c,
                                      struct node *parent, const struct stat *st)
{
    char *index_name = NULL;
    int pin = -1;
    errint_t err = 0;

    if (c->index_name && !(index_name = strdup(c->index_name)))
        return -ENOMEM;
    if (!parent && (pin = fcntl(c->orphan_fd, F_DUPFD_CLOEXEC, 0)) < 0)
        err = errno_or_eio();
    if (err == 0 && c->metacopy)
        err = keep_data_place_locked(n);
    if (err < 0) {
        free(index_name);
        close_keep_errno(pin);
        return err;
    }
    if (!c->metacopy)
        drop_data_place_locked(t, n);
    n->metacopy = c->metacopy;
    n->upper = true;
    n->layer = 0;
    n->dev = st->st_dev;
    n->real_ino = st->st_ino;
    n->indexed = index_name != NULL;
    n->nlink_diff = index_name ? c->nlink_diff : 0;
    free(n->index_name);
    n->index_name = index_name;
    if (pin >= 0) {
        closing_add_locked(t, n->pin);
        n->pin = pin;
    }
    for (struct alias *a = n->aliases; a; a = a->next)
        a->real = parent && a->parent == parent && strcmp(a->name, c->name) == 0;
    n->generation++;
    return 0;
}

/* A removed directory that is still open: what is said of it is said of a copy without a name. */
static errint_t orphan_dir_copied_up(struct tree *t, struct node *n, int orphan_fd)
{
    struct stat st;
    errint_t err = stat_fd(orphan_fd, &st);
    int pin = err < 0 ? -1 : fcntl(orphan_fd, F_DUPFD_CLOEXEC, 0);

    if (err < 0 || pin < 0)
        return err < 0 ? err : errno_or_eio();
    pthread_mutex_lock(&t->lock);
    closing_add_locked(t, n->pin);
    n->pin = pin;
    n->upper = true;
    n->dev = st.st_dev;
    n->real_ino = st.st_ino;
    n->generation++;
    unlock_and_close(t);
    return 0;
}

errint_t tree_copied_up(struct tree *t, const struct copied_up *c)
{
    struct node *n = node_get(t, c->ino);
    struct node *parent = c->parent ? node_get(t, c->parent) : NULL;
    struct stat st;
    errint_t err = 0;

    if (!n || (c->parent && !parent)) {
        err = -ESTALE;
    } else if (S_ISDIR(n->type)) {
        err = parent ? dir_copied_up(t, n, parent, c->name)
                     : orphan_dir_copied_up(t, n, c->orphan_fd);
    } else {
        err = stat_published(t, c, parent, &st);
        if (err == 0) {
            pthread_mutex_lock(&t->lock);
            err = file_copied_up_locked(t, n, c, parent, &st);
            unlock_and_close(t);
        }
        if (err == 0 && !c->metacopy)
            err = file_switch_to_upper(t, n);
    }
    if (parent)
        node_put(t, parent);
    if (n)
        node_put(t, n);
    return err;
}

errint_t tree_data_copied(struct tree *t, uint64_t ino)
{
    struct node *n = node_get(t, ino);
    errint_t err;

    if (!n)
        return -ESTALE;
    pthread_mutex_lock(&t->lock);
    drop_data_place_locked(t, n);
    n->generation++;
    pthread_mutex_unlock(&t->lock);
    err = file_switch_to_upper(t, n);
    node_put(t, n);
    return err;
}

/* ---- names ---- */

static struct alias *name_find_locked(struct tree *t, uint64_t parent_ino, const char *name)
{
    struct node *parent = node_find_locked(t, parent_ino);

    return parent ? alias_find_locked(t, parent, name) : NULL;
}

struct node *node_of_name(struct tree *t, uint64_t parent_ino, const char *name)
{
    struct node *n = NULL;
    struct alias *a;

    pthread_mutex_lock(&t->lock);
    a = name_find_locked(t, parent_ino, name);
    if (a) {
        n = a->node;
        n->refs++;
    }
    pthread_mutex_unlock(&t->lock);
    return n;
}

errint_t tree_prepare_unlink(struct tree *t, uint64_t parent, const char *name)
{
    struct node *n = node_of_name(t, parent, name);
    errint_t err = 0;

    if (!n)
        return 0;
    pthread_mutex_lock(&t->lock);
    bool hold = n->pin < 0 && n->nlookup > 0;
    pthread_mutex_unlock(&t->lock);
    if (hold) {
        cleanup_fd int fd = node_open(t, n, O_PATH | O_NOFOLLOW, false);

        err = fd < 0 ? fd : spare_keep_pin(t, &fd);
        if (err == 0) {
            pthread_mutex_lock(&t->lock);
            if (n->pin < 0)
                n->pin = steal_fd(&fd);
            pthread_mutex_unlock(&t->lock);
        } else if (err == -ENOENT || err == -EXDEV) {
            err = 0;
        }
    }
    node_put(t, n);
    return err;
}

/* Lets go of a pin that a name makes needless. */
static void spare_pin_locked(struct tree *t, struct node *n)
{
    bool named = false;

    for (struct alias *a = n->aliases; a; a = a->next)
        named = named || a->real;
    if (named && !n->unlinked && n->pin >= 0) {
        closing_add_locked(t, n->pin);
        n->pin = -1;
    }
}

void tree_abandon_unlink(struct tree *t, uint64_t parent, const char *name)
{
    struct node *n = node_of_name(t, parent, name);

    if (!n)
        return;
    pthread_mutex_lock(&t->lock);
    spare_pin_locked(t, n);
    unlock_and_close(t);
    node_put(t, n);
}

static void dir_gone_locked(struct tree *t, struct node *n)
{
    n->unlinked = true;
    for (uint16_t i = 0; i < n->ndirs; i++) {
        if (n->dirs[i]->layer == 0 && t->has_upper)
            n->dirs[i]->gone = true;
        rdir_put_locked(t, n->dirs[i]);
    }
    n->ndirs = 0;
}

/* Its space is not free before the kernel has forgotten it. */
static void leaves_locked(struct tree *t, struct node *n, const struct stat *st)
{
    uint64_t space = 1 + (uint64_t)st->st_blocks * 512 / LEAVING_BYTES;

    if (n->leaving)
        return;
    n->leaving = space < UINT32_MAX ? (uint32_t)space : UINT32_MAX;
    atomic_fetch_add(&t->leaving, n->leaving);
}

/* After a name has gone from disk. `a` is dropped; the node's last link may have been it. */
static void name_gone_locked(struct tree *t, struct alias *a)
{
    struct node *n = a->node;
    struct stat st;

    n->refs++;
    n->generation++;
    alias_drop_locked(t, a);
    if (S_ISDIR(n->type)) {
        dir_gone_locked(t, n);
    } else if (n->aliases) {
        spare_pin_locked(t, n);
    } else if (!n->upper) {
        n->unlinked = true;
    } else if (n->pin >= 0 && fstat(n->pin, &st) == 0) {
        int64_t links = (int64_t)st.st_nlink + (n->indexed ? n->nlink_diff : 0);

        n->unlinked = links <= 0;
        if (n->unlinked)
            leaves_locked(t, n, &st);
    }
    node_put_locked(t, n);
}

errint_t tree_unlinked(struct tree *t, uint64_t parent_ino, const char *name)
{
    struct alias *a;

    pthread_mutex_lock(&t->lock);
    a = name_find_locked(t, parent_ino, name);
    if (a)
        name_gone_locked(t, a);
    unlock_and_close(t);
    return 0;
}

/* Moves a name, and with a directory its real directory of the upper. */
static errint_t move_locked(struct tree *t, struct alias *a, struct node *parent, const char *name)
{
    struct node *n = a->node;
    struct rdir *r = S_ISDIR(n->type) ? node_dir_locked(n, 0) : NULL;
    errint_t err = 0;

    n->refs++;
    if (r && t->has_upper) {
        struct rdir *parent_dir = node_dir_locked(parent, 0);
        char *copy = parent_dir ? strdup(name) : NULL;

        err = copy ? 0 : -ENOMEM;
        if (err == 0) {
            rdir_ref_locked(parent_dir);
            rdir_put_locked(t, r->parent);
            r->parent = parent_dir;
            free(r->name);
            r->name = copy;
        }
    }
    if (err == 0) {
        alias_drop_locked(t, a);
        err = alias_add_locked(t, parent, name, n, true);
    }
    n->generation++;
    node_put_locked(t, n);
    return err;
}

static errint_t exchange_locked(struct tree *t, struct alias *a, struct alias *b,
                                struct node *a_parent, const char *a_name, struct node *b_parent,
                                const char *b_name)
{
    struct node *n = b ? b->node : NULL;
    errint_t err = 0;

    if (n) {
        n->refs++;
        alias_drop_locked(t, b);
    }
    if (a)
        err = move_locked(t, a, b_parent, b_name);
    if (n) {
        /* As a move whose old name is gone already. */
        errint_t second = alias_add_locked(t, a_parent, a_name, n, true);
        struct alias *moved = second == 0 ? alias_find_locked(t, a_parent, a_name) : NULL;

        if (moved)
            second = move_locked(t, moved, a_parent, a_name);
        node_put_locked(t, n);
        err = err < 0 ? err : second;
    }
    return err;
}

errint_t tree_renamed(struct tree *t, uint64_t parent_ino, const char *name,
                      uint64_t new_parent_ino, const char *new_name, bool exchange)
{
    struct node *parent, *new_parent;
    errint_t err = 0;

    pthread_mutex_lock(&t->lock);
    parent = node_find_locked(t, parent_ino);
    new_parent = node_find_locked(t, new_parent_ino);
    if (parent && new_parent) {
        struct alias *a = alias_find_locked(t, parent, name);
        struct alias *b = alias_find_locked(t, new_parent, new_name);

        /* Dropping aliases lets go of parents: hold them. */
        parent->refs++;
        new_parent->refs++;
        if (exchange) {
            err = exchange_locked(t, a, b, parent, name, new_parent, new_name);
        } else {
            if (b && a != b)
                name_gone_locked(t, b);
            if (a)
                err = move_locked(t, a, new_parent, new_name);
        }
        node_put_locked(t, parent);
        node_put_locked(t, new_parent);
    }
    unlock_and_close(t);
    return err;
}

errint_t tree_made_opaque(struct tree *t, uint64_t ino)
{
    struct node *n;

    pthread_mutex_lock(&t->lock);
    n = node_find_locked(t, ino);
    if (n && S_ISDIR(n->type) && n->ndirs > 1) {
        while (n->ndirs > 1)
            rdir_put_locked(t, n->dirs[--n->ndirs]);
        n->generation++;
    }
    pthread_mutex_unlock(&t->lock);
    return 0;
}

errint_t tree_alias_made_real(struct tree *t, uint64_t parent_ino, const char *name)
{
    struct alias *a;

    pthread_mutex_lock(&t->lock);
    a = name_find_locked(t, parent_ino, name);
    if (a)
        a->real = true;
    pthread_mutex_unlock(&t->lock);
    return a ? 0 : -ENOENT;
}

void tree_set_nlink_diff(struct tree *t, uint64_t ino, int64_t diff)
{
    struct node *n;

    pthread_mutex_lock(&t->lock);
    n = node_find_locked(t, ino);
    if (n)
        n->nlink_diff = diff;
    pthread_mutex_unlock(&t->lock);
}

errint_t tree_set_redirect(struct tree *t, uint64_t ino, const char *redirect)
{
    char *copy = strdup(redirect);
    struct node *n;

    if (!copy)
        return -ENOMEM;
    pthread_mutex_lock(&t->lock);
    n = node_find_locked(t, ino);
    if (n) {
        free(n->redirect);
        n->redirect = steal_pointer(&copy);
    }
    pthread_mutex_unlock(&t->lock);
    free(copy);
    return n ? 0 : -ESTALE;
}

/* Where the lower layers have it: the names upward, an own redirect in place of a name, up to the
 * root or to an absolute redirect (ovl_get_redirect of fs/overlayfs/dir.c). */
errint_t tree_redirect_path(struct tree *t, uint64_t ino, char **ret_path)
{
    char buf[REDIRECT_BYTES];
    char *at = buf + sizeof buf - 1;
    errint_t err = 0;

    *at = '\0';
    pthread_mutex_lock(&t->lock);
    struct node *n = node_find_locked(t, ino);
    if (!n)
        err = -ESTALE;
    while (err == 0 && n != t->root) {
        const char *part = n->redirect;
        bool absolute = part && part[0] == '/';
        struct alias *a = n->aliases;

        if (!a) {
            err = -ENOENT;
            break;
        }
        if (!part)
            part = a->name;
        size_t len = strlen(part), need = len + (absolute ? 0 : 1);
        if (need > (size_t)(at - buf)) {
            err = -ENAMETOOLONG;
            break;
        }
        at -= len;
        memcpy(at, part, len);
        if (absolute)
            break;
        *--at = '/';
        n = a->parent;
    }
    pthread_mutex_unlock(&t->lock);
    if (err < 0)
        return err;
    *ret_path = strdup(at);
    return *ret_path ? 0 : -ENOMEM;
}

static errint_t set_impure(void *arg)
{
    char **args = arg;

    return setxattr(args[0], args[1], "y", 1, 0) < 0 ? errno_or_eio() : 0;
}

errint_t tree_make_impure(struct tree *t, uint64_t ino)
{
    struct node *n = node_get(t, ino);
    struct rdir *dir;
    char path[PROC_BYTES], attr[64];
    errint_t err = 0;
    int fd;

    if (!n)
        return -ESTALE;
    fd = upper_pin(t, n, &dir);
    node_put(t, n);
    if (fd < 0)
        return fd == -ENOENT ? 0 : fd;
    if (!dir->impure_marked) {
        proc_path(path, fd, NULL);
        (void)snprintf(attr, sizeof attr, "%simpure", t->prefix);
        char *args[] = {path, attr};
        if (t->upper_xattrs)
            err = as_owner(path, false, S_IWUSR, set_impure, args);
        if (err == 0) {
            pthread_mutex_lock(&t->lock);
            dir->impure = dir->impure_marked = true;
            pthread_mutex_unlock(&t->lock);
        }
    }
    upper_unpin(t, dir);
    return err;
}

/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "plain.h"

#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/xattr.h>

#include "flags.h"
#include "resolve.h"
#include "spare.h"
#include "whiteout.h"

enum { MODE_BITS = 07777, SYNC_FLAGS = O_SYNC | O_DSYNC };

/* The area beside the upper has its name in the union's root. */
static bool is_reserved(uint64_t parent, const char *name)
{
    return parent == ROOT_INO && strcmp(name, ".unionfs") == 0;
}

/* ---- making ---- */

static bool has_default_acl(int dirfd)
{
    char path[PROC_BYTES];

    proc_path(path, dirfd, NULL);
    return getxattr(path, "system.posix_acl_default", NULL, 0) >= 0;
}

/* Whether what we make in this directory is the caller's without further ado. */
static bool is_natural(const struct tree *t, int dirfd, const struct new_file *wanted)
{
    struct stat st;

    if (wanted->uid != t->euid)
        return false;
    return wanted->gid == t->egid || (stat_fd(dirfd, &st) == 0 && st.st_mode & S_ISGID);
}

void ask_anew(const struct tree *t, int dirfd, const char *name)
{
    struct statx stx;

    if (t->upper_in_fuse)
        (void)statx(dirfd, name, AT_SYMLINK_NOFOLLOW | AT_STATX_FORCE_SYNC, STATX_BASIC_STATS,
                    &stx);
}

/* The daemon's own umask is 0. */
static int make_at(const struct tree *t, int dirfd, const char *name, const struct new_file *wanted,
                   mode_t mode)
{
    int flags = (wanted->flags & (O_ACCMODE | SYNC_FLAGS)) | O_NONBLOCK;

    switch (mode & S_IFMT) {
    case S_IFREG:
        flags |= O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW;
        return openat(dirfd, name, flags, mode & MODE_BITS);
    case S_IFDIR:
        if (mkdirat(dirfd, name, mode & MODE_BITS) < 0)
            return -1;
        ask_anew(t, dirfd, name);
        return 0;
    case S_IFLNK:
        return symlinkat(wanted->target, dirfd, name);
    default:
        return mknodat(dirfd, name, mode, wanted->rdev);
    }
}

errint_t plain_make(struct tree *t, uint64_t parent_ino, const char *name,
                    const struct new_file *wanted, int *ret_fd)
{
    struct node *parent;
    struct rdir *dir;
    mode_t mode = wanted->mode;
    errint_t err = S_ISREG(mode) ? spare_ask(t) : 0;
    int dirfd = -1;

    if (err < 0)
        return err;
    if (!t->plain || is_reserved(parent_ino, name))
        return NOT_PLAIN;
    if (S_ISCHR(mode) && wanted->rdev == 0) /* would be a whiteout */
        return NOT_PLAIN;
    parent = node_get(t, parent_ino);
    if (!parent)
        return -ESTALE;
    err = plain_copy_up(t, parent_ino, false);
    if (err == 0 && (dirfd = upper_pin(t, parent, &dir)) >= 0) {
        err = NOT_PLAIN;
        if (is_natural(t, dirfd, wanted)) {
            if (!S_ISLNK(mode) && !has_default_acl(dirfd))
                mode &= ~wanted->umask;
            struct keyhold entering = {.keys = {parent_ino}};

            keys_take(&t->entering, &entering);
            /* A name that is free in the upper and not known to the kernel has nothing below it
             * either, where whiteouts are devices. Another answer is for those who look. */
            int fd = make_at(t, dirfd, name, wanted, mode);
            keys_give(&t->entering, &entering);

            if (fd >= 0) {
                *ret_fd = S_ISREG(mode) ? fd : -1;
                err = 0;
            }
        }
        upper_unpin(t, dir);
    }
    node_put(t, parent);
    return dirfd < 0 && err == 0 ? NOT_PLAIN : err;
}

errint_t plain_link(struct tree *t, uint64_t ino, uint64_t parent_ino, const char *name)
{
    struct node *n, *parent;
    struct rdir *dir;
    char path[PROC_BYTES];
    errint_t err;
    int dirfd;

    if (!t->plain || is_reserved(parent_ino, name))
        return NOT_PLAIN;
    n = node_get(t, ino);
    parent = node_get(t, parent_ino);
    err = n && parent ? plain_copy_up(t, ino, false) : -ESTALE;
    if (err == 0)
        err = plain_copy_up(t, parent_ino, false);
    if (err == 0) {
        pthread_mutex_lock(&t->lock);
        bool plain = n->upper && !n->metacopy && !n->indexed && !n->unlinked;
        bool foreign = n->ino != n->real_ino;
        pthread_mutex_unlock(&t->lock);
        err = !plain ? NOT_PLAIN : foreign ? tree_make_impure(t, parent_ino) : 0;
    }
    cleanup_fd int fd = err == 0 ? node_open(t, n, O_PATH | O_NOFOLLOW, false) : -1;
    if (err == 0 && fd < 0)
        err = fd;
    if (err == 0 && (dirfd = upper_pin(t, parent, &dir)) >= 0) {
        struct keyhold entering = {.keys = {parent_ino}};

        proc_path(path, fd, NULL);
        keys_take(&t->entering, &entering);
        /* Another answer is for those who look what is there: a whiteout, say. */
        if (linkat(AT_FDCWD, path, dirfd, name, AT_SYMLINK_FOLLOW) < 0)
            err = NOT_PLAIN;
        else
            ask_anew(t, dirfd, name);
        keys_give(&t->entering, &entering);
        upper_unpin(t, dir);
    } else if (err == 0) {
        err = NOT_PLAIN;
    }
    if (parent)
        node_put(t, parent);
    if (n)
        node_put(t, n);
    return err;
}

/* ---- names ---- */

/* A name that the table knows, and what it means now that nobody else changes it. */
struct known {
    struct node *parent, *node;
    const char *name;
    struct hit *hit;
};

static void known_done(struct tree *t, struct known *k)
{
    if (k->hit)
        hit_clear(t, k->hit);
    free(k->hit);
    if (k->node)
        node_put(t, k->node);
    if (k->parent)
        node_put(t, k->parent);
    *k = (struct known){0};
}

/* Its node is NULL where the table has none. */
static errint_t known_get(struct tree *t, uint64_t parent, const char *name, struct known *ret_k)
{
    struct known k = {.parent = node_get(t, parent), .name = name};

    if (!k.parent)
        return -ESTALE;
    k.node = node_of_name(t, parent, name);
    *ret_k = k;
    return 0;
}

/* Precondition: committing(k->node). */
static errint_t known_resolve(struct tree *t, struct known *k)
{
    struct node *found = NULL;
    errint_t err;

    k->hit = calloc(1, sizeof *k->hit);
    if (!k->hit)
        return -ENOMEM;
    err = node_lookup(t, k->parent, k->name, k->hit, &found);
    if (err == -ENOENT && !k->node)
        return 0;
    if (found)
        node_put(t, found);
    /* It was something else, or known by another name: once more, from the beginning. */
    return err == 0 && found == k->node ? 0 : NOT_PLAIN;
}

/* Would a lower layer show something here, were the upper's entry away? */
static errint_t lower_shows(struct tree *t, const struct known *k, bool *ret_shows)
{
    struct hit *below;
    struct walk *w;
    errint_t err = 0;

    if (k->hit->any && k->hit->upper != UPPER_ENTRY) {
        *ret_shows = true;
        return 0;
    }
    pthread_mutex_lock(&t->lock);
    bool only_upper = k->parent->ndirs == 1;
    pthread_mutex_unlock(&t->lock);
    *ret_shows = false;
    if (only_upper)
        return 0;
    below = calloc(1, sizeof *below);
    w = calloc(1, sizeof *w);
    if (below && w) {
        w->t = t;
        w->hit = below;
        (void)snprintf(w->path, sizeof w->path, "%s", k->name);
        err = walk_down(w, k->parent, 1);
        *ret_shows = below->any;
        hit_clear(t, below);
    } else {
        err = -ENOMEM;
    }
    free(below);
    free(w);
    return err;
}

/* Whether only one system call is due when this name of the node goes: nothing counts its links,
 * nothing records its number. Precondition: known_resolve. */
static bool goes_plainly(struct tree *t, const struct known *k)
{
    const struct hit *h = k->hit;
    bool plain;

    if (S_ISDIR(h->type))
        return false;
    pthread_mutex_lock(&t->lock);
    plain = !k->node->indexed;
    pthread_mutex_unlock(&t->lock);
    if (!plain || (h->upper != UPPER_ENTRY && goes_to_index(t, h->layer, h->st.st_nlink)))
        return false;
    return t->numbers_fd < 0 || S_ISREG(h->type) || h->upper != UPPER_ENTRY ||
           k->node->ino == h->st.st_ino;
}

/* Of a lower file we must refuse what flags forbid: the upper's file system is not asked. */
static bool is_forbidden(struct tree *t, const struct known *k, int dirfd)
{
    if (!k->hit->any || k->hit->upper == UPPER_ENTRY)
        return false;
    cleanup_fd int fd = node_open(t, k->node, O_PATH | O_NOFOLLOW, false);
    return fd < 0 || is_protected(fd) || is_protected(dirfd);
}

static errint_t whiteout_over(struct tree *t, int dirfd, const char *name)
{
    char temp[TEMP_BYTES];
    errint_t err;

    temp_name(t, temp);
    err = make_whiteout(t, t->work_fd, temp);
    if (err < 0)
        return err;
    if (renameat(t->work_fd, temp, dirfd, name) == 0)
        return 0;
    err = errno_or_eio();
    (void)unlinkat(t->work_fd, temp, 0);
    return err;
}

/* What is known of a name is to go; NOT_PLAIN before anything has been done. */
static errint_t check_removal(struct tree *t, const struct known *k, int dirfd, bool lower)
{
    const struct hit *h = k->hit;

    if (S_ISDIR(h->type)) /* of the upper alone */
        return h->upper == UPPER_ENTRY && h->ndirs == 1 && !lower ? 0 : NOT_PLAIN;
    return goes_plainly(t, k) && !is_forbidden(t, k, dirfd) ? 0 : NOT_PLAIN;
}

static errint_t remove_at(struct tree *t, int dirfd, const struct known *k, bool lower)
{
    if (S_ISDIR(k->hit->type)) /* whiteouts may be in it, or what the union shows */
        return unlinkat(dirfd, k->name, AT_REMOVEDIR) < 0 ? NOT_PLAIN : 0;
    if (k->hit->upper != UPPER_ENTRY)
        return make_whiteout(t, dirfd, k->name);
    if (lower)
        return whiteout_over(t, dirfd, k->name);
    return unlinkat(dirfd, k->name, 0) < 0 ? errno_or_eio() : 0;
}

/* Precondition: committing(k->node). */
static errint_t remove_known(struct tree *t, struct known *k)
{
    uint64_t parent = k->parent->ino;
    struct rdir *dir;
    bool lower;
    errint_t err = known_resolve(t, k);
    int dirfd;

    if (err == 0)
        err = lower_shows(t, k, &lower);
    if (err != 0)
        return err;
    dirfd = upper_pin(t, k->parent, &dir);
    if (dirfd < 0)
        return NOT_PLAIN;
    err = check_removal(t, k, dirfd, lower);
    if (err == 0)
        err = tree_prepare_unlink(t, parent, k->name);
    if (err == 0) {
        struct keyhold entering = {.keys = {parent}};

        keys_take(&t->entering, &entering);
        err = remove_at(t, dirfd, k, lower);
        keys_give(&t->entering, &entering);
        if (err != 0)
            tree_abandon_unlink(t, parent, k->name);
        else
            err = tree_unlinked(t, parent, k->name);
    }
    upper_unpin(t, dir);
    return err;
}

static errint_t remove_name(struct tree *t, uint64_t parent, const char *name, bool dir)
{
    struct known k;
    errint_t err;

    if (!t->plain)
        return NOT_PLAIN;
    err = known_get(t, parent, name, &k);
    if (err < 0)
        return err;
    if (k.node && S_ISDIR(k.node->type) == dir)
        err = plain_copy_up(t, parent, false);
    else
        err = NOT_PLAIN;
    if (err == 0) {
        struct keyhold hold = {.keys = {k.node->ino}};

        keys_take(&t->committing, &hold);
        err = remove_known(t, &k);
        keys_give(&t->committing, &hold);
    }
    known_done(t, &k);
    return err;
}

errint_t plain_unlink(struct tree *t, uint64_t parent, const char *name)
{
    return remove_name(t, parent, name, false);
}

errint_t plain_rmdir(struct tree *t, uint64_t parent, const char *name)
{
    return remove_name(t, parent, name, true);
}

/* What may be said of the source and the target of a plain rename. */
static bool moves_plainly(struct tree *t, const struct known *old, const struct known *new)
{
    bool plain;

    if (S_ISDIR(old->hit->type) || old->hit->upper != UPPER_ENTRY)
        return false;
    pthread_mutex_lock(&t->lock);
    plain = !old->node->indexed && !old->node->metacopy;
    pthread_mutex_unlock(&t->lock);
    return plain && (!new->node || goes_plainly(t, new));
}

static errint_t move_at(struct tree *t, const struct known *old, const struct known *new,
                        unsigned flags)
{
    struct keyhold entering = {.keys = {old->parent->ino, new->parent->ino}};
    struct rdir *old_dir, *new_dir;
    int old_fd = upper_pin(t, old->parent, &old_dir), new_fd;
    errint_t err = NOT_PLAIN;

    if (old_fd < 0)
        return NOT_PLAIN;
    new_fd = upper_pin(t, new->parent, &new_dir);
    if (new_fd >= 0) {
        if (!new->node || !is_forbidden(t, new, new_fd))
            err = 0;
        keys_take(&t->entering, &entering);
        if (err == 0 && syscall(SYS_renameat2, old_fd, old->name, new_fd, new->name, flags) < 0)
            err = errno_or_eio();
        keys_give(&t->entering, &entering);
        upper_unpin(t, new_dir);
    }
    upper_unpin(t, old_dir);
    return err;
}

static errint_t rename_known(struct tree *t, struct known *old, struct known *new)
{
    uint64_t from = old->parent->ino, to = new->parent->ino;
    bool lower;
    errint_t err = known_resolve(t, old);

    if (err == 0)
        err = known_resolve(t, new);
    if (err != 0)
        return err;
    if (!moves_plainly(t, old, new))
        return NOT_PLAIN;
    err = lower_shows(t, old, &lower);
    if (err == 0 && old->node->ino != old->hit->st.st_ino)
        err = tree_make_impure(t, to);
    if (err == 0 && new->node)
        err = tree_prepare_unlink(t, to, new->name);
    if (err < 0)
        return err;
    err = move_at(t, old, new, lower ? RENAME_WHITEOUT : 0);
    if (err == 0)
        return tree_renamed(t, from, old->name, to, new->name, false);
    if (new->node)
        tree_abandon_unlink(t, to, new->name);
    return err;
}

static errint_t copy_up_for_rename(struct tree *t, const struct known *old, const struct known *new)
{
    errint_t err = plain_copy_up(t, old->node->ino, false);

    if (err == 0) /* its name may be in a directory that holds another link of it */
        err = plain_copy_up(t, old->parent->ino, false);
    return err == 0 ? plain_copy_up(t, new->parent->ino, false) : err;
}

errint_t plain_rename(struct tree *t, uint64_t parent, const char *name, uint64_t new_parent,
                      const char *new_name)
{
    struct known old = {0}, new = {0};
    errint_t err;

    if (!t->plain || is_reserved(new_parent, new_name))
        return NOT_PLAIN;
    err = known_get(t, parent, name, &old);
    if (err < 0)
        return err;
    err = known_get(t, new_parent, new_name, &new);
    if (err == 0 && (!old.node || old.node == new.node || S_ISDIR(old.node->type)))
        err = NOT_PLAIN;
    if (err == 0)
        err = copy_up_for_rename(t, &old, &new);
    if (err == 0) {
        struct keyhold hold = {.keys = {old.node->ino, new.node ? new.node->ino : 0}};

        keys_take(&t->committing, &hold);
        err = rename_known(t, &old, &new);
        keys_give(&t->committing, &hold);
    }
    known_done(t, &new);
    known_done(t, &old);
    return err;
}

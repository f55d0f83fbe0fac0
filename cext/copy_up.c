/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Copy-up of a plain regular file: what copy_up.py does of all kinds of them, step by step. A
 * temporary in the work directory, its data, its metadata, fsync, and one rename. */
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/xattr.h>

#include "copy.h"
#include "loan.h"
#include "marks.h"
#include "plain.h"

/* Where a file is to be published. */
struct target {
    struct node *parent; /* NULL: it has no name any more */
    char name[NAME_BYTES];
};

static bool find_target(struct tree *t, struct node *n, struct target *ret_target)
{
    struct target g = {0};

    pthread_mutex_lock(&t->lock);
    struct alias *best = alias_best_locked(n);
    if (best) {
        g.parent = best->parent;
        g.parent->refs++;
        memcpy(g.name, best->name, strlen(best->name) + 1);
    }
    bool at_hand = best && node_dir_locked(best->parent, 0);
    pthread_mutex_unlock(&t->lock);
    *ret_target = g;
    return at_hand;
}

static void target_done(struct tree *t, struct target *g)
{
    if (g->parent)
        node_put(t, g->parent);
    g->parent = NULL;
}

/* NOT_PLAIN for what has to be counted, kept elsewhere, or stays in the lower. */
static errint_t check_source(struct tree *t, const struct stat *st, const char *src, bool data)
{
    if (t->index && st->st_nlink > 1)
        return NOT_PLAIN;
    if (!data && t->metacopy_bytes && (uint64_t)st->st_size >= t->metacopy_bytes)
        return NOT_PLAIN;
    /* An ACL that names ids outside our user namespace cannot be given to the copy. */
    if (!t->all_ids && getxattr(src, "system.posix_acl_access", NULL, 0) >= 0)
        return NOT_PLAIN;
    return 0;
}

static errint_t copy_metadata(struct tree *t, struct node *n, int src, int fd,
                              const struct stat *st)
{
    struct timespec times[2] = {st->st_atim, st->st_mtim};
    char src_path[PROC_BYTES], path[PROC_BYTES];
    mode_t mode = st->st_mode & 07777;
    errint_t err;
    bool kept;

    proc_path(src_path, src, NULL);
    proc_path(path, fd, NULL);
    /* The owner first: chown clears set-ID bits and capabilities. */
    err = give_owner(path, st->st_uid, st->st_gid, &mode);
    if (err == 0)
        err = copy_xattrs(src_path, path, t->prefix, NULL);
    if (err == 0)
        err = mark_origin(t, n, src, path, &kept);
    if (err < 0)
        return err;
    if (!kept)
        return NOT_PLAIN; /* recorded elsewhere */
    if (fchmod(fd, mode) < 0 || futimens(fd, times) < 0)
        return errno_or_eio();
    return t->sync_copies && fsync(fd) < 0 ? errno_or_eio() : 0;
}

static errint_t sync_dir(int dirfd)
{
    cleanup_fd int fd = reopen_fd(dirfd, O_RDONLY | O_DIRECTORY);

    if (fd < 0)
        return fd;
    return fsync(fd) < 0 ? errno_or_eio() : 0;
}

/* One rename; nothing but the copy itself changes for the union's users. */
static errint_t rename_into(struct tree *t, const char *temp, struct node *parent, const char *name)
{
    struct rdir *dir;
    struct loan *loan;
    char path[PROC_BYTES];
    struct stat st;
    int dirfd = upper_pin(t, parent, &dir);
    errint_t err;

    if (dirfd < 0)
        return NOT_PLAIN;
    proc_path(path, dirfd, NULL);
    err = loan_take(path, false, t->sync_names ? S_IRWXU : S_IWUSR | S_IXUSR, &loan);
    if (err == 0) {
        err = stat_fd(dirfd, &st);
        if (err == 0 && syscall(SYS_renameat2, t->work_fd, temp, dirfd, name, RENAME_NOREPLACE) < 0)
            err = errno_or_eio();
        if (err == 0) {
            struct timespec times[2] = {st.st_atim, st.st_mtim};

            (void)utimensat(AT_FDCWD, path, times, 0);
        }
        if (err == 0 && t->sync_names)
            err = sync_dir(dirfd);
        loan_return(loan);
    }
    upper_unpin(t, dir);
    return err;
}

/* Precondition: committing(n). */
static errint_t publish(struct tree *t, struct node *n, const char *temp, int fd)
{
    struct copied_up c = {.ino = n->ino, .orphan_fd = -1};
    struct target g;
    bool at_hand = find_target(t, n, &g);
    errint_t err = 0;

    if (!g.parent) {
        /* Unlinked, it may be while its bytes moved; open descriptors live on. */
        err = unlinkat(t->work_fd, temp, 0) < 0 ? errno_or_eio() : 0;
        c.orphan_fd = fd;
    } else {
        c.parent = g.parent->ino;
        c.name = g.name;
        err = at_hand ? tree_make_impure(t, g.parent->ino) : NOT_PLAIN;
        if (err == 0)
            err = rename_into(t, temp, g.parent, g.name);
    }
    if (err == 0)
        err = tree_copied_up(t, &c);
    target_done(t, &g);
    return err;
}

static errint_t copy_to_temp(struct tree *t, struct node *n, int src, const struct stat *st)
{
    struct keyhold hold = {.keys = {n->ino}};
    char temp[TEMP_BYTES];
    errint_t err;

    temp_name(t, temp);
    cleanup_fd int fd =
        openat(t->work_fd, temp, O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC, S_IRUSR | S_IWUSR);
    if (fd < 0)
        return errno_or_eio();
    err = copy_data(src, fd, (uint64_t)st->st_size);
    if (err == 0)
        err = copy_metadata(t, n, src, fd, st);
    if (err == 0) {
        keys_take(&t->committing, &hold);
        err = publish(t, n, temp, fd);
        keys_give(&t->committing, &hold);
    }
    if (err != 0)
        (void)unlinkat(t->work_fd, temp, 0);
    return err;
}

/* Precondition: copying(n). */
static errint_t copy_up_node(struct tree *t, struct node *n, bool data)
{
    char path[PROC_BYTES];
    struct target g;
    struct stat st;
    errint_t err;

    pthread_mutex_lock(&t->lock);
    bool upper = n->upper, metacopy = n->metacopy;
    pthread_mutex_unlock(&t->lock);
    if (upper && !(data && metacopy))
        return 0;
    if (metacopy)
        return NOT_PLAIN;
    bool at_hand = find_target(t, n, &g);
    target_done(t, &g);
    if (!at_hand)
        return NOT_PLAIN;
    cleanup_fd int src = node_open(t, n, O_RDONLY | O_NONBLOCK | O_NOFOLLOW, true);
    if (src < 0)
        return src == -EACCES ? NOT_PLAIN : src;
    err = stat_fd(src, &st);
    if (err < 0)
        return err;
    proc_path(path, src, NULL);
    err = check_source(t, &st, path, data);
    return err != 0 ? err : copy_to_temp(t, n, src, &st);
}

errint_t plain_copy_up(struct tree *t, uint64_t ino, bool data)
{
    struct keyhold hold = {.keys = {ino}};
    struct node *n;
    errint_t err;

    if (!t->plain)
        return NOT_PLAIN;
    n = node_get(t, ino);
    if (!n)
        return -ESTALE;
    pthread_mutex_lock(&t->lock);
    bool done = n->upper && !(data && n->metacopy);
    pthread_mutex_unlock(&t->lock);
    if (done) {
        err = 0;
    } else if (!S_ISREG(n->type)) {
        err = NOT_PLAIN;
    } else {
        keys_take(&t->copying, &hold);
        err = copy_up_node(t, n, data);
        keys_give(&t->copying, &hold);
    }
    node_put(t, n);
    return err;
}

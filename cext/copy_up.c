/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Copy-up of plain files and of directories: what copy_up.py does of all kinds, step by step. A
 * temporary in the work directory, its data, its metadata, fsync, and one rename. */
#include <fcntl.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/xattr.h>

#include "acl.h"
#include "copy.h"
#include "flags.h"
#include "loan.h"
#include "marks.h"
#include "plain.h"
#include "room.h"

/* One copy-up on its way. */
struct copying {
    int src;
    struct stat st;              /* of src */
    bool metacopy;               /* its data stay where they are */
    const struct change *change; /* to be in the copy at once, or NULL */
    char temp[TEMP_BYTES];
    int fd;            /* of temp */
    bool settled;      /* its data are on disk before its name */
    errint_t unsynced; /* it is published, but its name may not be on disk */
};

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

static bool has_acl(const char *path)
{
    return getxattr(path, "system.posix_acl_access", NULL, 0) >= 0;
}

/* NOT_PLAIN for what has to be counted, or cannot be given to a copy. */
static errint_t check_source(struct tree *t, uint16_t layer, const struct copying *c)
{
    char path[PROC_BYTES];

    if (S_ISREG(c->st.st_mode) && goes_to_index(t, layer, c->st.st_nlink))
        return NOT_PLAIN;
    if (has_flags_to_heed(c->src))
        return NOT_PLAIN;
    if (c->metacopy && !atomic_load(&t->metacopy_noted))
        return NOT_PLAIN;
    proc_path(path, c->src, NULL);
    /* An ACL that names ids outside our user namespace. */
    if (!t->all_ids && has_acl(path))
        return NOT_PLAIN;
    return 0;
}

/* Where the file came from, and that its data are still there. */
static errint_t write_marks(struct tree *t, struct node *n, const struct copying *c)
{
    bool kept;
    errint_t err = mark_origin(t, n, c->src, c->fd, &kept);

    if (err == 0 && !kept)
        err = NOT_PLAIN; /* recorded elsewhere */
    return err == 0 && c->metacopy ? set_mark(t, c->fd, "metacopy", "", 0) : err;
}

static bool sets_owner(const struct change *w)
{
    return w && (w->uid >= 0 || w->gid >= 0);
}

/* The mode that the copy is to have, where that of its source has become `mode`, before another
 * owner is set. */
static mode_t wanted_mode(const struct copying *c, mode_t mode)
{
    const struct change *w = c->change;

    return w && w->set_mode && !sets_owner(w) ? w->mode & 07777 : mode;
}

/* Mode and times, and what is wanted of them and of the owner; `now`: the mode that the copy has.
 * What is refused may be so for a reason that is not ours to judge. */
static errint_t settle_metadata(const struct copying *c, mode_t mode, mode_t now)
{
    struct timespec times[2] = {c->st.st_atim, c->st.st_mtim};
    const struct change *w = c->change;
    bool owner = sets_owner(w);

    mode = wanted_mode(c, mode);
    if (mode != now && fchmod(c->fd, mode) < 0)
        return w ? NOT_PLAIN : errno_or_eio();
    /* As of the file itself: set-ID bits and capabilities go. */
    if (owner && fchown(c->fd, (uid_t)w->uid, (gid_t)w->gid) < 0)
        return NOT_PLAIN;
    if (owner && w->set_mode && fchmod(c->fd, w->mode & 07777) < 0)
        return NOT_PLAIN;
    if (w && w->set_mode && geteuid() != 0) {
        char path[PROC_BYTES];

        proc_path(path, c->fd, NULL);
        if (acl_follow_mode(path, w->mode) < 0)
            return NOT_PLAIN;
    }
    for (int i = 0; w && w->set_times && i < 2; i++)
        if (w->times[i].tv_nsec != UTIME_OMIT)
            times[i] = w->times[i];
    if (futimens(c->fd, times) < 0)
        return w ? NOT_PLAIN : errno_or_eio();
    return 0;
}

static errint_t copy_metadata(struct tree *t, struct node *n, const struct copying *c)
{
    char src_path[PROC_BYTES], path[PROC_BYTES];
    mode_t mode = c->st.st_mode & 07777;
    struct stat now = {0};
    errint_t err = stat_fd(c->fd, &now);

    proc_path(src_path, c->src, NULL);
    proc_path(path, c->fd, NULL);
    bool foreign = now.st_uid != c->st.st_uid || now.st_gid != c->st.st_gid;
    bool xattrs = flistxattr(c->src, NULL, 0) != 0; /* an ACL sets the mode too */
    /* The owner first: chown clears set-ID bits and capabilities. */
    if (err == 0 && foreign)
        err = give_owner(path, c->st.st_uid, c->st.st_gid, &mode);
    if (err == 0 && xattrs)
        err = copy_xattrs(src_path, path, t->prefix, NULL);
    if (err == 0 && xattrs && has_acl(src_path) && !has_acl(path))
        err = NOT_PLAIN; /* the mode has to do without it: acl.py */
    if (err == 0 && S_ISREG(c->st.st_mode))
        err = write_marks(t, n, c);
    if (err != 0)
        return err;
    err = settle_metadata(c, mode, foreign || xattrs ? (mode_t)-1 : now.st_mode & 07777);
    if (err != 0)
        return err;
    bool data = S_ISREG(c->st.st_mode) && !c->metacopy && !c->settled;
    bool sync = data ? t->sync_copies : t->sync_names;
    return sync && fsync(c->fd) < 0 ? errno_or_eio() : 0;
}

static errint_t sync_dir(int dirfd)
{
    cleanup_fd int fd = reopen_fd(dirfd, O_RDONLY | O_DIRECTORY);

    if (fd < 0)
        return fd;
    return fsync(fd) < 0 ? errno_or_eio() : 0;
}

/* One rename; nothing but the copy itself changes for the union's users. */
static errint_t rename_at(struct tree *t, struct copying *c, int dirfd, const char *name)
{
    char path[PROC_BYTES];
    struct loan *own = NULL;
    struct stat st;
    errint_t err = stat_fd(dirfd, &st);

    proc_path(path, c->fd, NULL);
    if (err == 0 && S_ISDIR(c->st.st_mode)) /* its `..` changes */
        err = loan_take(path, false, S_IWUSR, &own);
    if (err == 0 && syscall(SYS_renameat2, t->work_fd, c->temp, dirfd, name, RENAME_NOREPLACE) < 0)
        err = errno_or_eio();
    loan_return(own);
    if (err == 0) {
        struct timespec times[2] = {st.st_atim, st.st_mtim};

        (void)set_times(dirfd, times);
        if (t->sync_names)
            c->unsynced = sync_dir(dirfd);
    }
    return err;
}

static errint_t rename_into(struct tree *t, struct copying *c, const struct target *g)
{
    mode_t needed = t->sync_names ? S_IRWXU : S_IWUSR | S_IXUSR;
    struct keyhold entering = {.keys = {g->parent->ino}};
    struct rdir *dir;
    struct loan *loan;
    char path[PROC_BYTES];
    int dirfd = upper_pin(t, g->parent, &dir);
    errint_t err;

    if (dirfd < 0)
        return NOT_PLAIN;
    proc_path(path, dirfd, NULL);
    err = loan_take(path, false, needed, &loan);
    if (err == 0) {
        keys_take(&t->entering, &entering);
        err = rename_at(t, c, dirfd, g->name);
        keys_give(&t->entering, &entering);
        loan_return(loan);
    }
    upper_unpin(t, dir);
    return err;
}

static errint_t discard(struct tree *t, const struct copying *c)
{
    int flags = S_ISDIR(c->st.st_mode) ? AT_REMOVEDIR : 0;

    return unlinkat(t->work_fd, c->temp, flags) < 0 ? errno_or_eio() : 0;
}

/* Precondition: committing(n). */
static errint_t publish(struct tree *t, struct node *n, struct copying *c)
{
    struct copied_up done = {.ino = n->ino, .metacopy = c->metacopy, .orphan_fd = -1};
    struct target g;
    bool at_hand = find_target(t, n, &g);
    errint_t err = 0;

    if (!g.parent && c->metacopy) {
        err = NOT_PLAIN; /* nothing leads to its data any more */
    } else if (!g.parent) {
        /* Unlinked, it may be while its bytes moved; open descriptors live on. */
        err = discard(t, c);
        done.orphan_fd = c->fd;
    } else {
        done.parent = g.parent->ino;
        done.name = g.name;
        err = at_hand ? 0 : NOT_PLAIN;
        if (err == 0 && !S_ISDIR(n->type))
            err = tree_make_impure(t, g.parent->ino);
        if (err == 0)
            err = rename_into(t, c, &g);
    }
    if (err == 0)
        err = tree_copied_up(t, &done);
    else if (err == -EPERM || err == -EINVAL)
        err = NOT_PLAIN; /* flags of the directory are to be lifted; no RENAME_NOREPLACE */
    target_done(t, &g);
    return err;
}

static int make_temp(struct tree *t, struct copying *c)
{
    temp_name(t, c->temp);
    if (!S_ISDIR(c->st.st_mode)) {
        /* Mostly with its last mode already; until then we may need to read and write it. */
        mode_t mode = (wanted_mode(c, c->st.st_mode) & 0777) | S_IRUSR | S_IWUSR;

        c->fd = openat(t->work_fd, c->temp, O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC, mode);
        return c->fd < 0 ? errno_or_eio() : 0;
    }
    if (mkdirat(t->work_fd, c->temp, S_IRWXU) < 0)
        return errno_or_eio();
    c->fd = openat(t->work_fd, c->temp, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (c->fd < 0) {
        errint_t err = errno_or_eio();

        (void)discard(t, c);
        return err;
    }
    return 0;
}

static errint_t fill_temp(const struct tree *t, struct copying *c)
{
    if (S_ISDIR(c->st.st_mode))
        return 0;
    if (!c->metacopy) {
        errint_t err = check_room(c->src, c->fd, t->image_fd, (uint64_t)c->st.st_size);

        return err < 0 ? err
                       : copy_data(c->src, c->fd, &c->st, (uint64_t)c->st.st_size,
                                   t->upper_in_order, &c->settled);
    }
    return ftruncate(c->fd, c->st.st_size) < 0 ? errno_or_eio() : 0;
}

static errint_t copy_by_temp(struct tree *t, struct node *n, struct copying *c)
{
    struct keyhold hold = {.keys = {n->ino}};
    errint_t err = make_temp(t, c);

    if (err < 0)
        return err;
    err = fill_temp(t, c);
    if (err == 0)
        err = copy_metadata(t, n, c);
    if (err == 0) {
        keys_take(&t->committing, &hold);
        err = publish(t, n, c);
        keys_give(&t->committing, &hold);
    }
    if (err != 0)
        (void)discard(t, c);
    close_keep_errno(c->fd);
    return err == 0 ? c->unsynced : err;
}

/* Precondition: copying(n), which is not done. */
static errint_t copy_up_node(struct tree *t, struct node *n, bool data, const struct change *change)
{
    int how = O_RDONLY | O_NONBLOCK | O_NOFOLLOW | (S_ISDIR(n->type) ? O_DIRECTORY : 0);
    struct copying c = {.fd = -1, .change = change};
    struct target g;
    errint_t err;

    pthread_mutex_lock(&t->lock);
    bool metacopy = n->metacopy;
    pthread_mutex_unlock(&t->lock);
    if (metacopy)
        return NOT_PLAIN;
    bool at_hand = find_target(t, n, &g);
    target_done(t, &g);
    if (!at_hand)
        return NOT_PLAIN;
    cleanup_fd int src = node_open_stat(t, n, how, true, &c.st);
    if (src < 0)
        return src == -EACCES ? NOT_PLAIN : src;
    c.src = src;
    c.metacopy = S_ISREG(c.st.st_mode) && !data && t->metacopy_bytes &&
                 (uint64_t)c.st.st_size >= t->metacopy_bytes;
    err = check_source(t, n->layer, &c);
    return err != 0 ? err : copy_by_temp(t, n, &c);
}

static bool is_done(struct tree *t, struct node *n, bool data)
{
    pthread_mutex_lock(&t->lock);
    bool done = n->upper && !(data && n->metacopy);
    pthread_mutex_unlock(&t->lock);
    return done;
}

/* Sets `ret_changed` if the copy was made here, with `change`. */
static errint_t copy_up_one(struct tree *t, struct node *n, bool data, const struct change *change,
                            bool *ret_changed)
{
    struct keyhold hold = {.keys = {n->ino}};
    errint_t err = 0;

    if (is_done(t, n, data))
        return 0;
    if (!S_ISREG(n->type) && !S_ISDIR(n->type))
        return NOT_PLAIN;
    keys_take(&t->copying, &hold);
    if (!is_done(t, n, data)) {
        err = copy_up_node(t, n, data, change);
        *ret_changed = err == 0 && change;
    }
    keys_give(&t->copying, &hold);
    return err;
}

/* The highest directory above `n` that is not in the upper yet, or NULL; put it back. */
static struct node *missing_above(struct tree *t, const struct node *n)
{
    struct node *missing = NULL;

    pthread_mutex_lock(&t->lock);
    for (struct alias *a = alias_best_locked(n); a && !a->parent->upper;
         a = alias_best_locked(a->parent))
        missing = a->parent;
    if (missing)
        missing->refs++;
    pthread_mutex_unlock(&t->lock);
    return missing;
}

static errint_t copy_up(struct tree *t, uint64_t ino, bool data, const struct change *change,
                        bool *ret_changed)
{
    struct node *n, *above;
    bool ignored;
    errint_t err = 0;

    if (!t->plain)
        return NOT_PLAIN;
    n = node_get(t, ino);
    if (!n)
        return -ESTALE;
    if (!is_done(t, n, data)) {
        while (err == 0 && (above = missing_above(t, n))) {
            err = copy_up_one(t, above, false, NULL, &ignored);
            node_put(t, above);
        }
        if (err == 0)
            err = copy_up_one(t, n, data, S_ISREG(n->type) ? change : NULL, ret_changed);
    }
    node_put(t, n);
    return err;
}

errint_t plain_copy_up(struct tree *t, uint64_t ino, bool data)
{
    bool ignored;

    return copy_up(t, ino, data, NULL, &ignored);
}

errint_t plain_copy_up_changed(struct tree *t, uint64_t ino, const struct change *c,
                               bool *ret_changed)
{
    *ret_changed = false;
    return copy_up(t, ino, false, c, ret_changed);
}

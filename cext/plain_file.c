/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Plain changes of what a file is: mode, owner, times, size. */
#include <fcntl.h>

#include "loan.h"
#include "plain.h"

enum { MODE_BITS = 07777 };

static errint_t change_at(int fd, const struct change *c)
{
    char path[PROC_BYTES];
    errint_t err = 0;

    /* By the link in /proc: it leads to the inode itself, be it a symbolic link. */
    proc_path(path, fd, NULL);
    if ((c->uid >= 0 || c->gid >= 0) && chown(path, (uid_t)c->uid, (gid_t)c->gid) < 0)
        err = errno_or_eio();
    if (err == 0 && c->set_mode)
        err = loan_set_mode(path, c->mode & MODE_BITS);
    if (err == 0 && c->set_times && set_times(fd, c->times) < 0)
        err = errno_or_eio();
    return err;
}

errint_t plain_change(struct tree *t, uint64_t ino, const struct change *c)
{
    struct keyhold hold = {.keys = {ino}}, entering = hold;
    struct node *n;
    errint_t err = 0;
    bool changed = false;

    if (!t->plain)
        return NOT_PLAIN;
    n = node_get(t, ino);
    if (!n)
        return -ESTALE;
    err = plain_copy_up_changed(t, ino, c, &changed);
    if (err == 0 && !changed) {
        keys_take(&t->committing, &hold);   /* not replaced meanwhile by its completed copy */
        keys_take(&t->entering, &entering); /* nor are its times put back, if it is a directory */
        pthread_mutex_lock(&t->lock);
        bool upper = n->upper;
        pthread_mutex_unlock(&t->lock);
        cleanup_fd int fd = upper ? node_open(t, n, O_PATH | O_NOFOLLOW, false) : -1;
        err = !upper ? NOT_PLAIN : fd < 0 ? fd : change_at(fd, c);
        if (err == -EPERM)
            err = NOT_PLAIN; /* append-only files may be given the time that is now */
        keys_give(&t->entering, &entering);
        keys_give(&t->committing, &hold);
    }
    node_put(t, n);
    return err;
}

/* Whether writing by one who is not root would take set-ID bits away: for those who judge that. */
static bool has_set_id(int fd)
{
    struct stat st;

    return stat_fd(fd, &st) < 0 || st.st_mode & (S_ISUID | S_ISGID);
}

/* truncate(2) changes the times with the size only (xfs, btrfs), ftruncate(2) and O_TRUNC always.
 * Precondition: committing(n). */
static errint_t truncate_at(int fd, off_t size, bool always)
{
    char path[PROC_BYTES];
    struct stat st;
    errint_t err = stat_fd(fd, &st);

    if (err < 0)
        return err;
    proc_path(path, fd, NULL);
    if (st.st_size == size && !always)
        return truncate(path, size) < 0 ? errno_or_eio() : 0;
    cleanup_fd int file = open(path, O_WRONLY | O_CLOEXEC);
    return file < 0 || ftruncate(file, size) < 0 ? errno_or_eio() : 0;
}

/* The writable descriptor of a handle, or NULL; put it back. */
static struct file *writable_file(struct tree *t, uint64_t fh)
{
    struct file *f = fh ? file_get(t, fh) : NULL;

    if (f && (f->flags & O_ACCMODE) == O_RDONLY) {
        file_put(t, f);
        f = NULL;
    }
    return f;
}

errint_t plain_truncate(struct tree *t, uint64_t ino, off_t size, enum truncation how, uint64_t fh,
                        bool root)
{
    struct keyhold hold = {.keys = {ino}};
    struct node *n;
    errint_t err;

    if (!t->plain)
        return NOT_PLAIN;
    n = node_get(t, ino);
    if (!n)
        return -ESTALE;
    keys_take(&t->committing, &hold);
    pthread_mutex_lock(&t->lock);
    bool whole = S_ISREG(n->type) && n->upper && !n->metacopy;
    pthread_mutex_unlock(&t->lock);
    cleanup_fd int fd = whole ? node_open(t, n, O_PATH | O_NOFOLLOW, false) : -1;
    if (fd < 0 || (!root && has_set_id(fd))) {
        err = NOT_PLAIN;
    } else {
        struct file *f = writable_file(t, fh);

        if (f) {
            err = ftruncate(f->fd, size) < 0 ? errno_or_eio() : 0;
            file_put(t, f);
        } else {
            err = truncate_at(fd, size, how == TRUNCATE_AT_OPEN);
        }
        if (err == -EACCES && t->euid != 0)
            err = NOT_PLAIN; /* a mode bit has to be lent */
    }
    keys_give(&t->committing, &hold);
    node_put(t, n);
    return err;
}

errint_t plain_sync(struct tree *t, uint64_t fh, bool datasync)
{
    struct file *f;

    if (!t->plain)
        return NOT_PLAIN;
    f = file_get(t, fh);
    if (!f)
        return -EBADF;
    pthread_mutex_lock(&t->lock);
    bool foreign = f->node->ino != f->node->real_ino;
    pthread_mutex_unlock(&t->lock);
    file_put(t, f);
    if (!t->sync_copies)
        return 0; /* fsync=volatile */
    /* Of what was copied up the name must be on disk too (copy_up.py, sync_names). */
    return foreign ? NOT_PLAIN : file_sync(t, fh, datasync);
}

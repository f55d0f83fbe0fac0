/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Open files. A handle keeps its number while the file behind it is copied up: its descriptor is
 * then replaced in place, so that a reader sees what is written afterwards. */
#include <fcntl.h>
#include <string.h>
#include <sys/uio.h>

#include "face.h"
#include "mapped.h"
#include "shelf.h"
#include "spare.h"

static errint_t file_add_locked(struct tree *t, struct file *f, uint64_t *ret_fh)
{
    uint32_t at = t->file_hint;

    while (at < t->nfiles && t->files[at])
        at++;
    if (at == t->nfiles && t->nfiles == t->files_cap) {
        uint32_t cap = t->files_cap ? t->files_cap * 2 : 64;
        struct file **files = realloc(t->files, cap * sizeof(struct file *));

        if (!files)
            return -ENOMEM;
        t->files = files;
        t->files_cap = cap;
    }
    if (at == t->nfiles)
        t->nfiles++;
    t->files[at] = f;
    t->file_hint = at + 1;
    *ret_fh = at + 1ULL;
    return 0;
}

static errint_t file_add(struct tree *t, struct node *n, int fd, int flags, bool lower,
                         uint64_t *ret_fh)
{
    struct file *f = calloc(1, sizeof *f);
    errint_t err;

    if (!f)
        return -ENOMEM;
    f->node = n;
    f->fd = fd;
    f->flags = flags;
    f->lower = lower;
    f->refs = 1;
    atomic_store(&t->last_open, fd);
    pthread_mutex_lock(&t->lock);
    err = file_add_locked(t, f, ret_fh);
    if (err == 0) {
        n->refs++;
        f->next = n->files;
        n->files = f;
    }
    pthread_mutex_unlock(&t->lock);
    if (err < 0)
        free(f);
    return err;
}

/* A write goes to the offset that the kernel names: O_APPEND must not come in between. O_TRUNC and
 * creation are the operations' business. */
static int flags_below(int flags)
{
    return (flags & (O_ACCMODE | O_SYNC | O_DSYNC | O_NOATIME)) | O_NONBLOCK | O_NOCTTY;
}

errint_t file_open(struct tree *t, uint64_t ino, int flags, uint64_t *ret_fh)
{
    struct node *n = node_get(t, ino);
    errint_t err = 0;

    if (!n)
        return -ESTALE;
    for (;;) {
        uint32_t generation;
        bool lower;

        pthread_mutex_lock(&t->lock);
        generation = n->generation;
        lower = !n->upper || n->metacopy;
        cleanup_fd int fd = lower ? shelf_take_locked(t, n, flags) : -1;
        if (!lower)
            (void)shelf_drop_locked(t, n);
        unlock_and_close(t);
        if (lower && (flags & O_ACCMODE) != O_RDONLY) {
            err = -EROFS; /* whoever wants to write copies up first */
            break;
        }
        if (fd < 0)
            fd = node_open(t, n, flags_below(flags), true);
        if (fd == -EPERM && (flags & O_NOATIME))
            fd = node_open(t, n, flags_below(flags & ~O_NOATIME), true);
        if (fd == -EPERM && (flags & O_APPEND)) /* append-only: the kernel writes at the end */
            fd = node_open(t, n, flags_below(flags) | O_APPEND, true);
        if (fd < 0) {
            err = fd;
            fd = -1;
            break;
        }
        err = spare_keep(t, &fd);
        if (err == 0)
            err = file_add(t, n, fd, flags, lower, ret_fh);
        if (err < 0)
            break;
        (void)steal_fd(&fd);
        pthread_mutex_lock(&t->lock);
        bool same = generation == n->generation;
        pthread_mutex_unlock(&t->lock);
        if (same || !lower)
            break;
        /* Copied up between the opening and the entry in the node's list: once more. */
        file_release(t, *ret_fh);
    }
    node_put(t, n);
    return err;
}

errint_t file_adopt(struct tree *t, uint64_t ino, int fd, int flags, uint64_t *ret_fh)
{
    struct node *n = node_get(t, ino);
    errint_t err;

    if (!n)
        return -ESTALE;
    cleanup_fd int other = spare_duplicate(t, fd);
    err = file_add(t, n, other >= 0 ? other : fd, flags, false, ret_fh);
    if (err == 0 && steal_fd(&other) >= 0)
        close_keep_errno(fd);
    node_put(t, n);
    return err;
}

struct file *file_get(struct tree *t, uint64_t fh)
{
    struct file *f = NULL;

    pthread_mutex_lock(&t->lock);
    if (fh >= 1 && fh <= t->nfiles)
        f = t->files[fh - 1];
    if (f)
        f->refs++;
    pthread_mutex_unlock(&t->lock);
    return f;
}

errint_t file_of(struct tree *t, uint64_t ino, uint64_t fh, struct file **ret_file)
{
    struct file *f;
    errint_t err;

    if (fh == 0) {
        err = file_open(t, ino, O_RDONLY, &fh);
        if (err < 0)
            return err;
        f = file_get(t, fh);
        file_release(t, fh);
    } else {
        f = file_get(t, fh);
    }
    if (!f)
        return -EBADF;
    *ret_file = f;
    return 0;
}

void file_put(struct tree *t, struct file *f)
{
    bool last;

    pthread_mutex_lock(&t->lock);
    last = --f->refs == 0;
    if (last) {
        struct file **link = &f->node->files;

        while (*link != f)
            link = &(*link)->next;
        *link = f->next;
        if (!shelf_put_locked(t, f))
            closing_add_locked(t, f->fd);
        node_put_locked(t, f->node);
    }
    unlock_and_close(t);
    if (last)
        free(f);
}

void file_release(struct tree *t, uint64_t fh)
{
    struct file *f = NULL;
    int32_t backing = 0;

    pthread_mutex_lock(&t->lock);
    if (fh >= 1 && fh <= t->nfiles && (f = t->files[fh - 1])) {
        t->files[fh - 1] = NULL;
        if (fh - 1 < t->file_hint)
            t->file_hint = (uint32_t)(fh - 1);
        backing = face_closed_locked(t, f);
    }
    pthread_mutex_unlock(&t->lock);
    face_close_backing(t, backing);
    if (f)
        file_put(t, f);
}

errint_t file_switch_to_upper(struct tree *t, struct node *n)
{
    errint_t err = 0;

    for (;;) {
        struct file *f;

        pthread_mutex_lock(&t->lock);
        for (f = n->files; f && !f->lower; f = f->next)
            ;
        if (f)
            f->refs++;
        pthread_mutex_unlock(&t->lock);
        if (!f)
            return err;
        cleanup_fd int fd = node_open(t, n, flags_below(f->flags), true);
        if (fd < 0)
            err = fd; /* the handle stays on the lower file, which is what it was opened on */
        else if (dup3(fd, f->fd, O_CLOEXEC) < 0)
            err = errno_or_eio();
        pthread_mutex_lock(&t->lock);
        f->lower = false;
        pthread_mutex_unlock(&t->lock);
        file_put(t, f);
    }
}

/* One read; with `nowait` only of what is in memory (-EAGAIN), where the file system can tell. */
static ssize_t read_some(const struct file *f, char *buf, size_t size, off_t offset, bool nowait)
{
    struct iovec iov = {.iov_base = buf, .iov_len = size};
    ssize_t n;

    if (nowait) {
        n = preadv2(f->fd, &iov, 1, offset, RWF_NOWAIT);
        if (n >= 0 || (errno != EOPNOTSUPP && errno != ENOSYS))
            return n;
        if (f->lower) {
            /* a network or a FUSE file system may wait for ever; an upper is a local one */
            errno = EAGAIN;
            return -1;
        }
    }
    return pread(f->fd, buf, size, offset);
}

ssize_t file_read(const struct file *f, char *buf, size_t size, off_t offset, bool nowait)
{
    size_t got = 0;
    errint_t err = 0;

    while (got < size) {
        ssize_t n = read_some(f, buf + got, size - got, offset + (off_t)got, nowait);

        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            err = errno_or_eio();
        if (n <= 0)
            break;
        got += (size_t)n;
    }
    if (err < 0 && (got == 0 || err == -EAGAIN))
        return err;
    return (ssize_t)got;
}

/* An append-only file, see file_open: where mmap(2) of a plain one fails, ours is not stored to. */
static bool only_grows(int fd)
{
    int flags = fcntl(fd, F_GETFL);

    return flags >= 0 && flags & O_APPEND;
}

ssize_t file_write(struct tree *t, uint64_t fh, const char *buf, size_t size, off_t offset,
                   bool mapped)
{
    struct file *f = file_get(t, fh);
    size_t done = 0;
    errint_t err = 0;

    if (!f)
        return -EBADF;
    if (mapped && only_grows(f->fd)) {
        err = -EPERM;
        pthread_mutex_lock(&t->lock);
        f->node->pages_old = true;
        pthread_mutex_unlock(&t->lock);
    } else if (mapped) {
        done = mapped_store(f->fd, buf, size, offset);
    }
    while (err == 0 && done < size) {
        ssize_t n = pwrite(f->fd, buf + done, size - done, offset + (off_t)done);

        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            err = errno_or_eio();
        else
            done += (size_t)n;
    }
    file_put(t, f);
    /* Of pages that it was stored to the kernel does not look at how much was written. */
    return err < 0 && (done == 0 || mapped) ? err : (ssize_t)done;
}

errint_t file_sync(struct tree *t, uint64_t fh, bool datasync)
{
    struct file *f = file_get(t, fh);
    errint_t err;
    int r;

    if (!f)
        return -EBADF;
    /* What lies in a lower layer is on disk, and squashfs would refuse. */
    r = f->lower ? 0 : datasync ? fdatasync(f->fd) : fsync(f->fd);
    err = r < 0 ? errno_or_eio() : 0;
    file_put(t, f);
    return err;
}

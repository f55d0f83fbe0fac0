/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Answers to requests for changes of the plain kind (plain.h); options.call has the others. */
#include <fcntl.h>
#include <sys/sysmacros.h>

#include "plain.h"
#include "serve.h"

/* The second of the two names of a request; NULL where it does not end. */
static const char *second_name(const struct answer *a, const char *first)
{
    const char *end = a->r->body + a->r->len, *second = first + strlen(first) + 1;

    return second < end && memchr(second, '\0', (size_t)(end - second)) ? second : NULL;
}

/* ---- attributes ---- */

enum {
    TIMES = FATTR_ATIME | FATTR_MTIME | FATTR_ATIME_NOW | FATTR_MTIME_NOW,
    OWNER = FATTR_UID | FATTR_GID,
    PLAIN = FATTR_MODE | OWNER | TIMES | FATTR_FH | FATTR_LOCKOWNER | FATTR_CTIME,
};

static struct timespec wanted_time(uint32_t valid, uint32_t set, uint32_t now, uint64_t seconds,
                                   uint32_t rest)
{
    if (valid & now)
        return (struct timespec){.tv_nsec = UTIME_NOW};
    if (valid & set)
        return (struct timespec){.tv_sec = (time_t)seconds, .tv_nsec = (long)rest};
    return (struct timespec){.tv_nsec = UTIME_OMIT};
}

/* As truncate(2) and ftruncate(2) ask for it. */
static bool only_size(uint32_t valid)
{
    uint32_t beside = FATTR_FH | FATTR_LOCKOWNER | FATTR_CTIME | FATTR_KILL_SUIDGID;

    return (valid & ~beside) == FATTR_SIZE;
}

static ssize_t answer_attr(struct answer *a, errint_t err)
{
    struct fuse_attr_out *out = REPLY(a, fuse_attr_out);
    struct node *n = err < 0 ? NULL : node_get(a->s->tree, a->r->head->nodeid);
    struct stat st;

    if (err == 0)
        err = n ? node_attr(a->s->tree, n, &st) : -ESTALE;
    if (n)
        node_put(a->s->tree, n);
    if (err < 0)
        return err;
    *out = (struct fuse_attr_out){.attr_valid = valid_seconds(a), .attr_valid_nsec = valid_rest(a)};
    wire_attr(&out->attr, &st);
    return sizeof *out;
}

ssize_t on_setattr(struct answer *a)
{
    const struct fuse_setattr_in *in = BODY(a, fuse_setattr_in);
    uint32_t valid = in->valid;
    struct change c = {.mode = in->mode, .uid = -1, .gid = -1};
    errint_t err;

    if (only_size(valid)) {
        err = plain_truncate(a->s->tree, a->r->head->nodeid, (off_t)in->size, TRUNCATE,
                             valid & FATTR_FH ? in->fh : 0,
                             a->r->head->uid == 0 && !(valid & FATTR_KILL_SUIDGID));
        return err == NOT_PLAIN ? by_call(a) : answer_attr(a, err);
    }
    if (valid & OWNER)
        valid &= ~(uint32_t)FATTR_KILL_SUIDGID; /* our chown does so by itself */
    /* Sizes and more; a change of nothing, which stands for more than it says; set-group-ID, which
     * is not everybody's to give, or to keep if root does the chown: attributes.py. */
    if (valid & ~(uint32_t)PLAIN || !(valid & (FATTR_MODE | OWNER | TIMES)) ||
        (valid & FATTR_MODE && in->mode & S_ISGID && a->r->head->uid != 0) ||
        (valid & OWNER && a->r->head->uid != 0 && a->s->tree->euid == 0))
        return by_call(a);
    c.set_mode = valid & FATTR_MODE;
    c.set_times = valid & TIMES;
    if (valid & FATTR_UID)
        c.uid = in->uid;
    if (valid & FATTR_GID)
        c.gid = in->gid;
    c.times[0] = wanted_time(valid, FATTR_ATIME, FATTR_ATIME_NOW, in->atime, in->atimensec);
    c.times[1] = wanted_time(valid, FATTR_MTIME, FATTR_MTIME_NOW, in->mtime, in->mtimensec);
    err = plain_change(a->s->tree, a->r->head->nodeid, &c);
    if (err == NOT_PLAIN)
        return by_call(a);
    return answer_attr(a, err);
}

ssize_t on_fsync(struct answer *a)
{
    const struct fuse_fsync_in *in = BODY(a, fuse_fsync_in);
    errint_t err;

    if (a->s->options.no_open)
        return -ENOSYS; /* nothing is ever written; never asked again */
    err = plain_sync(a->s->tree, in->fh, in->fsync_flags & FUSE_FSYNC_FDATASYNC);

    return err == NOT_PLAIN ? by_call(a) : err;
}

/* ---- new files ---- */

static ssize_t answer_entry(struct answer *a, const char *name)
{
    struct stat st;
    errint_t err = tree_lookup(a->s->tree, a->r->head->nodeid, name, &st);

    if (err < 0)
        return err;
    put_entry(a, REPLY(a, fuse_entry_out), &st);
    return sizeof(struct fuse_entry_out);
}

static ssize_t make(struct answer *a, const char *name, struct new_file *new)
{
    int fd = -1;
    errint_t err;

    new->uid = a->r->head->uid;
    new->gid = a->r->head->gid;
    err = plain_make(a->s->tree, a->r->head->nodeid, name, new, &fd);
    if (err == NOT_PLAIN)
        return by_call(a);
    close_keep_errno(fd);
    return err < 0 ? err : answer_entry(a, name);
}

ssize_t on_symlink(struct answer *a)
{
    const char *name = a->r->body;
    struct new_file new = {.mode = S_IFLNK | 0777, .target = second_name(a, name)};

    return new.target ? make(a, name, &new) : -EINVAL;
}

ssize_t on_mknod(struct answer *a)
{
    const struct fuse_mknod_in *in = BODY(a, fuse_mknod_in);
    /* The kernel's new_encode_dev, taken apart. */
    unsigned major = (in->rdev & 0xfff00) >> 8;
    unsigned minor = (in->rdev & 0xff) | ((in->rdev >> 12) & 0xfff00);
    struct new_file new = {
        .mode = in->mode, .umask = in->umask, .rdev = makedev(major, minor), .flags = O_RDWR};

    return make(a, (const char *)(in + 1), &new);
}

ssize_t on_mkdir(struct answer *a)
{
    const struct fuse_mkdir_in *in = BODY(a, fuse_mkdir_in);
    struct new_file new = {.mode = S_IFDIR | (in->mode & 07777), .umask = in->umask};

    return make(a, (const char *)(in + 1), &new);
}

ssize_t on_create(struct answer *a)
{
    const struct fuse_create_in *in = BODY(a, fuse_create_in);
    const char *name = (const char *)(in + 1);
    struct fuse_entry_out *entry = REPLY(a, fuse_entry_out);
    struct fuse_open_out *out = (void *)(entry + 1);
    struct tree *t = a->s->tree;
    uint64_t parent = a->r->head->nodeid, fh = 0;
    struct new_file new = {.mode = S_IFREG | (in->mode & 07777),
                           .umask = in->umask,
                           .flags = (int)in->flags,
                           .uid = a->r->head->uid,
                           .gid = a->r->head->gid};
    cleanup_fd int fd = -1;
    struct stat st;
    errint_t err = plain_make(t, parent, name, &new, &fd);

    if (err == NOT_PLAIN)
        return by_call(a);
    if (err == 0)
        err = tree_lookup_made(t, parent, name, fd, &st);
    if (err < 0)
        return err;
    err = file_adopt(t, st.st_ino, fd, (int)in->flags, &fh);
    if (err < 0) {
        node_forget(t, st.st_ino, 1);
        return err;
    }
    (void)steal_fd(&fd);
    put_entry(a, entry, &st);
    *out = (struct fuse_open_out){.fh = fh, .open_flags = FOPEN_KEEP_CACHE};
    return (ssize_t)(sizeof *entry + sizeof *out);
}

/* ---- names ---- */

ssize_t on_link(struct answer *a)
{
    const struct fuse_link_in *in = BODY(a, fuse_link_in);
    const char *name = (const char *)(in + 1);
    errint_t err = plain_link(a->s->tree, in->oldnodeid, a->r->head->nodeid, name);

    if (err == NOT_PLAIN)
        return by_call(a);
    return err < 0 ? err : answer_entry(a, name);
}

/* Nothing has been done; where it is full, there may be a reserve for removing. */
static bool for_removal(errint_t err)
{
    return err == NOT_PLAIN || err == -ENOSPC;
}

ssize_t on_rmdir(struct answer *a)
{
    errint_t err = plain_rmdir(a->s->tree, a->r->head->nodeid, a->r->body);

    return for_removal(err) ? by_call(a) : err;
}

ssize_t on_unlink(struct answer *a)
{
    errint_t err = plain_unlink(a->s->tree, a->r->head->nodeid, a->r->body);

    return for_removal(err) ? by_call(a) : err;
}

static ssize_t move(struct answer *a, const char *name, uint64_t to)
{
    const char *new_name = second_name(a, name);
    errint_t err;

    if (!new_name)
        return -EINVAL;
    err = plain_rename(a->s->tree, a->r->head->nodeid, name, to, new_name);
    return err == NOT_PLAIN ? by_call(a) : err;
}

ssize_t on_rename(struct answer *a)
{
    const struct fuse_rename_in *in = BODY(a, fuse_rename_in);

    return move(a, (const char *)(in + 1), in->newdir);
}

ssize_t on_rename2(struct answer *a)
{
    const struct fuse_rename2_in *in = BODY(a, fuse_rename2_in);

    return in->flags ? by_call(a) : move(a, (const char *)(in + 1), in->newdir);
}

/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Answers to what is asked of files seldom. */
#include <fcntl.h>

#include "asker.h"
#include "flags.h"
#include "serve.h"

static struct statx_timestamp wire_time(const struct timespec *ts)
{
    return (struct statx_timestamp){.tv_sec = ts->tv_sec, .tv_nsec = (uint32_t)ts->tv_nsec};
}

/* The birth time too: asked once of an inode that a program wants to know it of. */
ssize_t on_statx(struct answer *a)
{
    struct wire_statx_out *out = REPLY(a, wire_statx_out);
    struct node *n = node_get(a->s->tree, a->r->head->nodeid);
    int64_t birth = 0, valid = a->s->options.valid_ns;
    struct stat st;
    errint_t err;

    if (!n)
        return -ESTALE;
    err = node_attr(a->s->tree, n, &st);
    if (err == 0 && node_birth(a->s->tree, n, &birth) < 0)
        birth = 0; /* the rest can be told */
    node_put(a->s->tree, n);
    if (err < 0)
        return err;
    *out = (struct wire_statx_out){
        .attr_valid = (uint64_t)(valid / NS_PER_SECOND),
        .attr_valid_nsec = (uint32_t)(valid % NS_PER_SECOND),
        .stat =
            {
                .stx_mask = STATX_BASIC_STATS | (birth ? STATX_BTIME : 0),
                .stx_blksize = (uint32_t)st.st_blksize,
                .stx_nlink = (uint32_t)st.st_nlink,
                .stx_uid = st.st_uid,
                .stx_gid = st.st_gid,
                .stx_mode = (uint16_t)st.st_mode,
                .stx_ino = st.st_ino,
                .stx_size = (uint64_t)st.st_size,
                .stx_blocks = (uint64_t)st.st_blocks,
                .stx_atime = wire_time(&st.st_atim),
                .stx_btime = {.tv_sec = birth / NS_PER_SECOND,
                              .tv_nsec = (uint32_t)(birth % NS_PER_SECOND)},
                .stx_ctime = wire_time(&st.st_ctim),
                .stx_mtime = wire_time(&st.st_mtim),
                .stx_rdev_major = major(st.st_rdev),
                .stx_rdev_minor = minor(st.st_rdev),
            },
    };
    return sizeof *out;
}

/* The kernel does not know that a change of flags changes ctime (fuse_fileattr_set of
 * fs/fuse/ioctl.c), and would go on showing the attributes that it has. */
static void forget_attributes(const struct answer *a)
{
    struct {
        struct fuse_out_header head;
        struct fuse_notify_inval_inode_out which;
    } notice = {
        .head = {.len = sizeof notice, .error = FUSE_NOTIFY_INVAL_INODE},
        .which = {.ino = a->id, .off = -1}, /* no pages */
    };

    (void)!write(a->s->options.device, &notice, sizeof notice);
}

static ssize_t get_flags(struct answer *a, unsigned long cmd, size_t size)
{
    struct node *n;
    errint_t err;

    if (BODY(a, fuse_ioctl_in)->out_size < size)
        return -EINVAL;
    n = node_get(a->s->tree, a->r->head->nodeid);
    if (!n)
        return -ESTALE;
    err = node_flags(a->s->tree, n, cmd, a->data + sizeof(struct fuse_ioctl_out), size);
    node_put(a->s->tree, n);
    if (err < 0)
        return err;
    *REPLY(a, fuse_ioctl_out) = (struct fuse_ioctl_out){0};
    return (ssize_t)(sizeof(struct fuse_ioctl_out) + size);
}

static ssize_t set_flags(struct answer *a, size_t size)
{
    const struct fuse_ioctl_in *in = BODY(a, fuse_ioctl_in);
    ssize_t n;

    if (in->in_size < size || in->in_size > a->r->len - sizeof *in)
        return -EINVAL;
    /* With the program's own pointer it is not from vfs_fileattr_set, which asks whether the
     * program may: a kernel before 5.13. */
    if (in->arg)
        return -ENOTTY;
    n = by_call(a);
    if (n >= 0)
        forget_attributes(a);
    return n;
}

static errint_t hold(const struct answer *a)
{
    const struct fuse_ioctl_in *in = BODY(a, fuse_ioctl_in);
    uint32_t uid = a->r->head->uid;
    struct hold_wish wish;

    if (a->r->head->nodeid != ROOT_INO || in->in_size < sizeof wish ||
        in->in_size > a->r->len - sizeof *in)
        return -ENOTTY;
    if (uid != 0 && uid != geteuid())
        return -EPERM;
    memcpy(&wish, in + 1, sizeof wish);
    return hold_ask(&a->s->hold, &wish);
}

/* File flags, and what is ours; every other is not for a regular file or a directory. Each open()
 * of a Python program asks for a terminal's settings, so that must cost little: no answer keeps the
 * kernel from asking (fuse_send_ioctl). */
ssize_t on_ioctl(struct answer *a)
{
    errint_t err;

    switch (BODY(a, fuse_ioctl_in)->cmd) {
    case FS_IOC_GETFLAGS: /* a long by its number, an int in truth */
    case FS_IOC_GETVERSION:
        return get_flags(a, BODY(a, fuse_ioctl_in)->cmd, sizeof(int));
    case FS_IOC_FSGETXATTR:
        return get_flags(a, FS_IOC_FSGETXATTR, sizeof(struct fsxattr));
    case FS_IOC_SETFLAGS:
        return set_flags(a, sizeof(int));
    case FS_IOC_FSSETXATTR:
        return set_flags(a, sizeof(struct fsxattr));
    case UNIONFS_IOC_HOLD:
        err = hold(a);
        if (err < 0)
            return err;
        *REPLY(a, fuse_ioctl_out) = (struct fuse_ioctl_out){0};
        return sizeof(struct fuse_ioctl_out);
    default:
        return -ENOTTY;
    }
}

/* Kernels ask this of some FUSE file systems only (virtiofs, those on a block device), of others
 * they just write the pages that they hold: fuse_sync_fs of fs/fuse/inode.c. */
ssize_t on_syncfs(struct answer *a)
{
    cleanup_fd int fd = reopen_fd(a->s->options.statfs_fd, O_RDONLY | O_DIRECTORY);

    if (fd < 0)
        return fd;
    return syncfs(fd) < 0 ? errno_or_eio() : 0;
}

ssize_t on_lseek(struct answer *a)
{
    const struct fuse_lseek_in *in = BODY(a, fuse_lseek_in);
    struct file *f;
    off_t at;
    errint_t err = file_of(a->s->tree, a->r->head->nodeid, in->fh, &f);

    if (err < 0)
        return err;
    at = lseek(f->fd, (off_t)in->offset, (int)in->whence);
    err = at < 0 ? errno_or_eio() : 0;
    file_put(a->s->tree, f);
    if (err < 0)
        return err;
    *REPLY(a, fuse_lseek_out) = (struct fuse_lseek_out){.offset = (uint64_t)at};
    return sizeof(struct fuse_lseek_out);
}

ssize_t on_fallocate(struct answer *a)
{
    const struct fuse_fallocate_in *in = BODY(a, fuse_fallocate_in);
    struct file *f = file_get(a->s->tree, in->fh);
    errint_t err = 0;

    if (!f)
        return -EBADF;
    if (fallocate(f->fd, (int)in->mode, (off_t)in->offset, (off_t)in->length) < 0)
        err = errno_or_eio();
    file_put(a->s->tree, f);
    return err;
}

/* By steps, so that who was killed need not wait for all of it. */
static ssize_t copy_between(int from, off_t off_in, int to, off_t off_out, uint64_t len)
{
    uint64_t done = 0;

    do {
        size_t step = len - done < COPY_STEP_BYTES ? (size_t)(len - done) : COPY_STEP_BYTES;
        ssize_t n = copy_file_range(from, &off_in, to, &off_out, step, 0);

        if (n < 0 && done == 0)
            return errno_or_eio();
        if (n > 0)
            done += (uint64_t)n;
        if (n < (ssize_t)step)
            break;
    } while (done < len && !asker_was_killed());
    return (ssize_t)done;
}

ssize_t on_copy_file_range(struct answer *a)
{
    const struct fuse_copy_file_range_in *in = BODY(a, fuse_copy_file_range_in);
    struct file *from = file_get(a->s->tree, in->fh_in);
    struct file *to = file_get(a->s->tree, in->fh_out);
    bool wide = a->r->head->opcode == WIRE_COPY_FILE_RANGE_64;
    uint64_t most = wide ? INT64_MAX : UINT32_MAX / 2;
    ssize_t n = -EBADF;

    /* Across file systems, or where one cannot: the kernel then moves the bytes itself. */
    if (from && to)
        n = copy_between(from->fd, (off_t)in->off_in, to->fd, (off_t)in->off_out,
                         in->len < most ? in->len : most);
    if (from)
        file_put(a->s->tree, from);
    if (to)
        file_put(a->s->tree, to);
    if (n < 0)
        return n;
    if (wide) {
        *REPLY(a, wire_copy_file_range_out) = (struct wire_copy_file_range_out){(uint64_t)n};
        return sizeof(struct wire_copy_file_range_out);
    }
    *REPLY(a, fuse_write_out) = (struct fuse_write_out){.size = (uint32_t)n};
    return sizeof(struct fuse_write_out);
}

/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "flags.h"

#include <fcntl.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/vfs.h>

#define EROFS_MAGIC 0xe0f5e1e2U

/* Kernel overlayfs carries over SYNC and NOATIME (ovl_copy_fileattr of fs/overlayfs/copy_up.c);
 * these are the ones that mean the same on every file system that has them. */
enum {
    CARRIED = FS_SYNC_FL | FS_NOATIME_FL | FS_NODUMP_FL | FS_DIRSYNC_FL,
    PROTECTING = FS_IMMUTABLE_FL | FS_APPEND_FL,
};

static bool has_none(errint_t err)
{
    return err == -ENOTTY || err == -EOPNOTSUPP || err == -EINVAL || err == -ENOSYS;
}

static errint_t ask(int fd, unsigned long cmd, void *value)
{
    return ioctl(fd, cmd, value) < 0 ? errno_or_eio() : 0;
}

/* Whether the upper's file system has what `cmd` asks for. */
static bool upper_has(const struct tree *t, unsigned long cmd)
{
    char value[64] = {0};
    cleanup_fd int fd = t->has_upper ? reopen_fd(t->layers[0].fd, O_RDONLY | O_DIRECTORY) : -1;

    return fd >= 0 && ask(fd, cmd, value) == 0;
}

errint_t node_flags(struct tree *t, struct node *n, unsigned long cmd, void *value, size_t size)
{
    char buf[64] = {0}; /* some file systems write a long, some an int */
    errint_t err;

    if (!S_ISREG(n->type) && !S_ISDIR(n->type))
        return -ENOTTY; /* of a device the driver would be asked */
    cleanup_fd int fd = node_open(t, n, O_RDONLY | O_NONBLOCK, false);
    if (fd < 0)
        return fd;
    err = ask(fd, cmd, buf);
    if (has_none(err) && !n->upper && upper_has(t, cmd)) {
        memset(buf, 0, sizeof buf);
        err = 0;
    }
    if (err == 0)
        memcpy(value, buf, size);
    return err;
}

static errint_t flags_of(int fd, uint32_t *ret_flags)
{
    long flags = 0;
    errint_t err = ask(fd, FS_IOC_GETFLAGS, &flags);

    if (err == 0)
        *ret_flags = (uint32_t)flags;
    return err;
}

errint_t add_flags(int fd, uint32_t flags)
{
    cleanup_fd int file = reopen_fd(fd, O_RDONLY | O_NONBLOCK);
    uint32_t now = 0;
    long wanted;
    errint_t err = file < 0 ? file : flags_of(file, &now);

    if (err < 0 || (now & flags) == flags)
        return err;
    wanted = (long)(now | flags);
    return ask(file, FS_IOC_SETFLAGS, &wanted);
}

void copy_flags(int src, int dst, uint32_t *ret_late)
{
    cleanup_fd int from = reopen_fd(src, O_RDONLY | O_NONBLOCK);
    uint32_t flags = 0;

    *ret_late = 0;
    if (from < 0 || flags_of(from, &flags) < 0)
        return;
    *ret_late = flags & PROTECTING;
    flags &= CARRIED;
    if (!flags || add_flags(dst, flags) == 0)
        return;
    for (uint32_t one = 1; one; one <<= 1) /* those that it takes */
        if (flags & one)
            (void)add_flags(dst, one);
}

/* EROFS calls every file immutable, since it cannot be written (erofs_getattr). */
static bool all_immutable(int fd)
{
    struct statfs st;

    return fstatfs(fd, &st) == 0 && (uint32_t)st.f_type == EROFS_MAGIC;
}

/* The protecting ones, without opening the file. */
static uint32_t protecting(int fd)
{
    struct statx stx;

    if (statx(fd, "", AT_EMPTY_PATH, 0, &stx) < 0)
        return 0; /* the change itself will say so */
    if (stx.stx_attributes & STATX_ATTR_IMMUTABLE && all_immutable(fd))
        return 0;
    return (stx.stx_attributes & STATX_ATTR_IMMUTABLE ? FS_IMMUTABLE_FL : 0U) |
           (stx.stx_attributes & STATX_ATTR_APPEND ? FS_APPEND_FL : 0U);
}

bool is_protected(int fd)
{
    return protecting(fd) != 0;
}

bool has_flags_to_heed(int fd)
{
    uint32_t flags = 0;

    return flags_of(fd, &flags) == 0 && flags & (CARRIED | PROTECTING);
}

errint_t lift_flags(int fd, uint32_t *ret_lifted)
{
    uint32_t lifted = protecting(fd), now = 0;
    long wanted;
    errint_t err = 0;

    if (lifted) {
        cleanup_fd int file = reopen_fd(fd, O_RDONLY | O_NONBLOCK);

        err = file < 0 ? file : flags_of(file, &now);
        wanted = (long)(now & ~lifted);
        if (err == 0)
            err = ask(file, FS_IOC_SETFLAGS, &wanted);
    }
    if (err == 0)
        *ret_lifted = lifted;
    return err;
}

errint_t tree_changeable(struct tree *t, uint64_t ino, bool append, bool upper)
{
    struct node *n = node_get(t, ino);
    errint_t err = 0;

    if (!n)
        return 0;
    if (!n->upper || upper) {
        cleanup_fd int fd = node_open(t, n, O_PATH | O_NOFOLLOW, false);

        if (fd >= 0 && protecting(fd) & (append ? FS_IMMUTABLE_FL : PROTECTING))
            err = -EPERM;
    }
    node_put(t, n);
    return err;
}

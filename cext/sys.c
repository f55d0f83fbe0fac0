/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "sys.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <linux/openat2.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <sys/xattr.h>

void proc_path(char out[static PROC_BYTES], int fd, const char *name)
{
    if (name)
        (void)snprintf(out, PROC_BYTES, "/proc/self/fd/%d/%s", fd, name);
    else
        (void)snprintf(out, PROC_BYTES, "/proc/self/fd/%d", fd);
}

int open_beneath(int dirfd, const char *name, int flags, bool careful)
{
    int fd;

    flags |= O_NOFOLLOW | O_CLOEXEC;
    if (careful) {
        /* Also with O_PATH|O_NOFOLLOW: a link is opened itself, never followed. */
        struct open_how how = {
            .flags = (uint64_t)(unsigned)flags,
            .resolve = RESOLVE_BENEATH | RESOLVE_NO_XDEV | RESOLVE_NO_MAGICLINKS,
        };
        do
            fd = (int)syscall(SYS_openat2, dirfd, name, &how, sizeof how);
        while (fd < 0 && (errno == EINTR || errno == EAGAIN));
    } else {
        /* A single component cannot leave the directory: O_NOFOLLOW suffices. */
        do
            fd = openat(dirfd, name, flags);
        while (fd < 0 && errno == EINTR);
    }
    return fd < 0 ? errno_or_eio() : fd;
}

errint_t stat_fd(int fd, struct stat *ret_st)
{
    return fstat(fd, ret_st) < 0 ? errno_or_eio() : 0;
}

int set_times(int fd, const struct timespec times[static 2])
{
    char path[PROC_BYTES];
    int r = utimensat(fd, "", times, AT_EMPTY_PATH);

    if (r == 0 || errno != EINVAL)
        return r;
    proc_path(path, fd, NULL); /* a kernel before 5.8 */
    return utimensat(AT_FDCWD, path, times, 0);
}

bool is_in_fuse(int fd)
{
    struct statfs st;

    if (fstatfs(fd, &st) < 0)
        return errno == ENOSYS; /* what every other one has */
    return st.f_type == FUSE_SUPER_MAGIC;
}

bool is_near(int fd)
{
    struct statfs st;

    if (fstatfs(fd, &st) < 0)
        return false;
    switch (st.f_type) {
    case TMPFS_MAGIC:
    case SQUASHFS_MAGIC:
    case EROFS_SUPER_MAGIC_V1:
    case ISOFS_SUPER_MAGIC:
        return true;
    default:
        return false;
    }
}

bool keeps_order(int fd)
{
    struct statfs st;

    return fstatfs(fd, &st) == 0 && st.f_type == XFS_SUPER_MAGIC;
}

int reopen_fd(int fd, int flags)
{
    char path[PROC_BYTES];
    int out;

    proc_path(path, fd, NULL);
    out = open(path, (flags & ~O_NOFOLLOW) | O_CLOEXEC);
    return out < 0 ? errno_or_eio() : out;
}

int64_t birth_time(int dirfd, const char *name)
{
    struct statx stx;

    if (statx(dirfd, name, AT_SYMLINK_NOFOLLOW | AT_EMPTY_PATH, STATX_BTIME, &stx) < 0 ||
        !(stx.stx_mask & STATX_BTIME))
        return 0;
    return (int64_t)stx.stx_btime.tv_sec * 1000000000 + stx.stx_btime.tv_nsec;
}

static ssize_t call_xattr(const char *path, bool nofollow, const char *attr, char *buf, size_t size)
{
    if (!attr)
        return nofollow ? llistxattr(path, buf, size) : listxattr(path, buf, size);
    return nofollow ? lgetxattr(path, attr, buf, size) : getxattr(path, attr, buf, size);
}

errint_t read_xattr(const char *path, bool nofollow, const char *attr, char **ret_value,
                    size_t *ret_len)
{
    char small[512];
    ssize_t n = call_xattr(path, nofollow, attr, small, sizeof small);

    if (n >= 0) {
        char *value = malloc((size_t)n + 1);

        if (!value)
            return -ENOMEM;
        memcpy(value, small, (size_t)n);
        value[n] = '\0';
        *ret_value = value;
        *ret_len = (size_t)n;
        return 0;
    }
    if (errno != ERANGE)
        return errno_or_eio();
    /* The kernel's limit of a value and of a list (XATTR_SIZE_MAX, XATTR_LIST_MAX). */
    cleanup_free char *big = malloc(65536 + 1);
    if (!big)
        return -ENOMEM;
    n = call_xattr(path, nofollow, attr, big, 65536);
    if (n < 0)
        return errno_or_eio();
    big[n] = '\0';
    *ret_value = steal_pointer(&big);
    *ret_len = (size_t)n;
    return 0;
}

/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "copy.h"

#include <fcntl.h>
#include <linux/fs.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/sendfile.h>
#include <sys/xattr.h>

#include "asker.h"
#include "sys.h"

enum { SMALL_BYTES = 16 << 10, BUFFER_BYTES = 1 << 20 };

enum method { BY_RANGE, BY_SENDFILE, BY_BUFFER };

static ssize_t copy_step(enum method method, int src, int dst, off_t at, size_t n, char *buffer)
{
    off_t in = at, out = at;

    switch (method) {
    case BY_RANGE:
        return copy_file_range(src, &in, dst, &out, n, 0);
    case BY_SENDFILE:
        if (lseek(dst, at, SEEK_SET) < 0)
            return -1;
        return sendfile(dst, src, &in, n);
    case BY_BUFFER:
    default:
        break;
    }
    ssize_t got = pread(src, buffer, n < BUFFER_BYTES ? n : BUFFER_BYTES, at);
    for (ssize_t done = 0; done < got;) {
        ssize_t put = pwrite(dst, buffer + done, (size_t)(got - done), at + done);

        if (put < 0 && errno == EINTR)
            continue;
        if (put < 0)
            return -1;
        done += put;
    }
    return got;
}

/* What copy_file_range and sendfile say where they cannot work, rather than fail. */
static bool try_another(int e)
{
    return e == EXDEV || e == EINVAL || e == EOPNOTSUPP || e == ENOSYS || e == EBADF ||
           e == ETXTBSY || e == EPERM;
}

static errint_t copy_range(int src, int dst, off_t at, off_t end, enum method *method,
                           char **buffer)
{
    while (at < end) {
        off_t left = end - at;
        size_t n = left > COPY_STEP_BYTES ? COPY_STEP_BYTES : (size_t)left;
        ssize_t got;

        if (*method == BY_BUFFER && !*buffer && !(*buffer = malloc(BUFFER_BYTES)))
            return -ENOMEM;
        got = copy_step(*method, src, dst, at, n, *buffer);
        if (got > 0) {
            at += got;
            if (at < end && asker_was_killed())
                return -EINTR;
            continue;
        }
        if (got < 0 && errno == EINTR)
            continue;
        /* Some file systems answer 0 where they cannot: ask the next method before believing it. */
        if (*method != BY_BUFFER && (got == 0 || try_another(errno))) {
            (*method)++;
            continue;
        }
        return got < 0 ? errno_or_eio() : -EIO;
    }
    return 0;
}

static errint_t copy_all(int src, int dst, off_t at, off_t end, enum method *method, char **buffer)
{
    errint_t err = copy_range(src, dst, at, end, method, buffer);

    /* What did not fit must not keep the rest of the space from others. */
    if (err < 0)
        (void)fallocate(dst, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, end);
    return err;
}

/* All at once. -EIO: by parts, it may be. */
static errint_t copy_small(int src, int dst, size_t size)
{
    char buffer[SMALL_BYTES];

    if (pread(src, buffer, size, 0) != (ssize_t)size)
        return -EIO;
    return pwrite(dst, buffer, size, 0) == (ssize_t)size ? 0 : -EIO;
}

errint_t copy_data(int src, int dst, const struct stat *from, uint64_t size, bool in_order,
                   bool *ret_settled)
{
    enum method method = BY_RANGE;
    cleanup_free char *buffer = NULL;
    off_t end = (off_t)size, at = 0;
    bool whole = from->st_blocks * 512 >= from->st_size; /* without holes */

    *ret_settled = in_order && size == 0;
    if ((uint64_t)from->st_size < size)
        return -EIO;
    if (size == 0)
        return 0;
    /* Sooner copied than asked whether it can be shared; but copied it has to be synced. */
    if (size <= SMALL_BYTES && whole && !in_order && copy_small(src, dst, size) == 0)
        return 0;
    if ((uint64_t)from->st_size == size && ioctl(dst, FICLONE, src) == 0) {
        *ret_settled = in_order; /* the kernel has written back what of src was not on disk */
        return 0;
    }
    if (size <= SMALL_BYTES && whole && in_order && copy_small(src, dst, size) == 0)
        return 0;
    if (whole)
        return copy_all(src, dst, 0, end, &method, &buffer);
    if (ftruncate(dst, end) < 0)
        return errno_or_eio();
    while (at < end) {
        off_t data = lseek(src, at, SEEK_DATA);
        off_t hole;
        errint_t err;

        if (data < 0 && errno == ENXIO)
            break; /* nothing but a hole from here on */
        if (data < 0)
            data = at; /* not supported: all of it is data */
        hole = lseek(src, data, SEEK_HOLE);
        if (hole < 0 || hole > end)
            hole = end;
        if (data >= end)
            break;
        err = copy_all(src, dst, data, hole, &method, &buffer);
        if (err < 0)
            return err;
        at = hole;
    }
    return 0;
}

errint_t give_owner(const char *path, uid_t uid, gid_t gid, mode_t *mode)
{
    struct stat st;

    if (stat(path, &st) < 0)
        return errno_or_eio();
    if (st.st_uid == uid && st.st_gid == gid)
        return 0;
    if (chown(path, uid, gid) == 0)
        return 0;
    if (errno != EPERM && errno != EINVAL && errno != EOVERFLOW)
        return errno_or_eio();
    if (st.st_uid != uid)
        *mode &= ~(mode_t)S_ISUID;
    if (st.st_gid != gid && chown(path, (uid_t)-1, gid) < 0)
        *mode &= ~(mode_t)S_ISGID;
    return 0;
}

static bool left_out(const char *name, const char *prefix, const char *override)
{
    size_t len = strlen(prefix);

    if (override && strcmp(name, override) == 0)
        return true;
    if (strncmp(name, "user.fuseoverlayfs.", 19) == 0)
        return true; /* fuse-overlayfs's marks of that layer */
    /* Kernel overlayfs escapes marks of a nested overlay as PREFIXoverlay.NAME: they are data. */
    return strncmp(name, prefix, len) == 0 && strncmp(name + len, "overlay.", 8) != 0;
}

static bool tolerated(int e, const char *name)
{
    if (e == EOPNOTSUPP)
        return true;
    if (e == EINVAL && strncmp(name, "system.posix_acl_", 17) == 0)
        return true; /* names ids that this user namespace does not know: see copy_up.py */
    return e == EPERM && (strncmp(name, "trusted.", 8) == 0 || strncmp(name, "security.", 9) == 0);
}

/* Gone meanwhile; or not ours to see, so not the user's either; or a capability that is malformed
 * or of the root of a user namespace unknown here, with which nobody here gets anything. */
static bool unseen(errint_t err, const char *name)
{
    if (err == -ENODATA || err == -EACCES || err == -EPERM)
        return true;
    return (err == -EINVAL || err == -EOVERFLOW) && strcmp(name, "security.capability") == 0;
}

errint_t copy_xattrs(const char *src, const char *dst, const char *prefix, const char *override)
{
    cleanup_free char *list = NULL;
    size_t len;
    errint_t err = read_xattr(src, false, NULL, &list, &len);

    if (err == -EOPNOTSUPP)
        return 0;
    if (err < 0)
        return err;
    for (size_t at = 0; at < len; at += strlen(list + at) + 1) {
        const char *name = list + at;
        cleanup_free char *value = NULL;
        size_t size;

        if (left_out(name, prefix, override))
            continue;
        err = read_xattr(src, false, name, &value, &size);
        if (unseen(err, name))
            continue;
        if (err < 0)
            return err;
        if (setxattr(dst, name, value, size, 0) < 0 && !tolerated(errno, name))
            return errno_or_eio();
    }
    return 0;
}

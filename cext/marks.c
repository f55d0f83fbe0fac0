/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "marks.h"
#include "loan.h"

#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/sysmacros.h>

void marks_clear(struct marks *m)
{
    free(m->redirect);
    free(m->origin);
    free(m->nlink);
    *m = (struct marks){0};
}

static bool own_name(const struct tree *t, const char *name, const char *mark)
{
    size_t len = strlen(t->prefix);

    return strncmp(name, t->prefix, len) == 0 && strcmp(name + len, mark) == 0;
}

/* Any spelling of "opaque", of kernel overlayfs and fuse-overlayfs. In the upper only our own
 * prefix counts when it is trusted.*: an ordinary user can write user.* there. */
static bool opaque_name(const struct tree *t, const char *name, bool upper)
{
    if (own_name(t, name, "opaque"))
        return true;
    if (upper) /* rootless fuse-overlayfs's; we let nobody write it there (xattrs.c) */
        return t->prefix[0] == 'u' && strcmp(name, FUSEOVERLAYFS "opaque") == 0;
    return strcmp(name, "trusted.overlay.opaque") == 0 ||
           strcmp(name, "user.overlay.opaque") == 0 || strcmp(name, FUSEOVERLAYFS "opaque") == 0;
}

struct mark_query {
    const char *path, *name;
    bool nofollow;
    char *value;
    size_t len;
};

static errint_t mark_query(void *arg)
{
    struct mark_query *q = arg;

    return read_xattr(q->path, q->nofollow, q->name, &q->value, &q->len);
}

/* Nothing is lent in a lower layer: it is not written, not even for a moment. */
static errint_t read_mark(const char *path, bool nofollow, const char *name, bool upper,
                          char **ret_value, size_t *ret_len)
{
    struct mark_query q = {.path = path, .name = name, .nofollow = nofollow};
    errint_t err = upper ? as_owner(path, nofollow, S_IRUSR, mark_query, &q) : mark_query(&q);

    if (err == 0) {
        *ret_value = q.value;
        *ret_len = q.len;
    }
    return err;
}

static errint_t marks_read_one(struct tree *t, const char *path, bool nofollow, const char *name,
                               bool upper, struct marks *m)
{
    bool opaque = opaque_name(t, name, upper);
    bool impure = own_name(t, name, "impure");
    bool redirect = own_name(t, name, "redirect");
    bool origin = own_name(t, name, "origin");
    bool ino = own_name(t, name, "unionfs.ino");
    bool nlink = own_name(t, name, "nlink");
    bool links = own_name(t, name, "unionfs.links");
    cleanup_free char *value = NULL;
    size_t len = 0;
    errint_t err;

    if (own_name(t, name, "metacopy"))
        m->metacopy = true;
    if (!opaque && !impure && !redirect && !origin && !ino && !nlink && !links)
        return 0;
    err = read_mark(path, nofollow, name, upper, &value, &len);
    if (err == -EACCES && !upper && !opaque && !redirect) {
        m->impure = m->impure || impure; /* then only more is looked at; numbers are no loss */
        return 0;
    }
    if (err < 0)
        return err == -ENODATA ? 0 : err;
    if (opaque && len == 1) {
        m->opaque = m->opaque || value[0] == 'y';
        m->xwhiteouts = m->xwhiteouts || value[0] == 'x';
    } else if (impure) {
        m->impure = len == 1 && value[0] == 'y';
    } else if (redirect) { /* a list may name one twice: nothing keeps a FUSE lower from it */
        free(m->redirect);
        m->redirect = steal_pointer(&value);
    } else if (origin) {
        free(m->origin);
        m->origin = steal_pointer(&value);
        m->origin_len = len;
    } else if (ino) {
        m->ino = strtoull(value, NULL, 16);
    } else if (links) {
        m->links = (uint32_t)strtoul(value, NULL, 10);
    } else if (nlink) {
        free(m->nlink);
        m->nlink = steal_pointer(&value);
    }
    return 0;
}

errint_t marks_read(struct tree *t, const char *path, bool nofollow, bool upper,
                    struct marks *ret_marks)
{
    cleanup_free char *list = NULL;
    size_t len;
    struct marks m = {0};
    errint_t err = read_xattr(path, nofollow, NULL, &list, &len);

    if (err == -EOPNOTSUPP || err == -ENODATA || err == -EACCES || err == -EPERM) {
        /* No attributes here, or none that we may see: no marks. */
        *ret_marks = m;
        return 0;
    }
    if (err < 0)
        return err;
    for (size_t at = 0; at < len; at += strlen(list + at) + 1) {
        err = marks_read_one(t, path, nofollow, list + at, upper, &m);
        if (err < 0) {
            marks_clear(&m);
            return err;
        }
    }
    *ret_marks = m;
    return 0;
}

bool exists_at(int dirfd, const char *name)
{
    struct stat st;

    return fstatat(dirfd, name, &st, AT_SYMLINK_NOFOLLOW) == 0;
}

bool is_whiteout(struct tree *t, struct rdir *dir, int dirfd, const char *name,
                 const struct stat *st)
{
    if (S_ISCHR(st->st_mode) && st->st_rdev == makedev(0, 0))
        return true;
    if (!dir->xwhiteouts || !S_ISREG(st->st_mode) || st->st_size != 0)
        return false;
    char path[PROC_BYTES], attr[64];
    cleanup_free char *value = NULL;
    size_t len;

    proc_path(path, dirfd, name);
    (void)snprintf(attr, sizeof attr, "%swhiteout", t->prefix);
    return read_xattr(path, true, attr, &value, &len) == 0;
}

/* Numbers: real ones when all layers lie on one file system, else with the file system's number
 * above the 48 bits that real ones need; foreign giants are folded in. */
uint64_t union_ino(uint16_t fs, uint64_t ino)
{
    if (fs == 0 && ino > ROOT_INO)
        return ino;
    if (ino < (1ULL << 48) && fs < (1U << 13))
        return ((uint64_t)fs << 48) | ino | (fs == 0 ? 1ULL << 61 : 0);
    ino ^= (uint64_t)fs * 0x9e3779b97f4a7c15ULL;
    ino = (ino ^ (ino >> 31)) * 0xbf58476d1ce4e5b9ULL;
    return (ino >> 2) | (1ULL << 62);
}

bool redirect_is_sane(const char *redirect)
{
    if (!*redirect || strlen(redirect) >= REDIRECT_BYTES)
        return false;
    if (redirect[0] != '/')
        return !strchr(redirect, '/') && strcmp(redirect, ".") != 0 &&
               strcmp(redirect, "..") != 0 && strlen(redirect) < NAME_BYTES;
    for (const char *s = redirect; *s;) {
        const char *end = strchrnul(s + 1, '/');
        size_t len = (size_t)(end - s) - 1;

        if (len == 0 || len >= NAME_BYTES || (len == 1 && s[1] == '.') ||
            (len == 2 && s[1] == '.' && s[2] == '.'))
            return false;
        s = end;
    }
    return true;
}

/* A stable number from overlay.origin (struct ovl_fb of the kernel: version, magic, length, flags,
 * type, 16 bytes of uuid, then the file handle): the inode number inside the handle types that
 * ext4, xfs, btrfs and tmpfs use, so that it equals the lower file's. */
uint64_t origin_number(const struct tree *t, const char *origin, size_t len)
{
    const unsigned char *fb = (const unsigned char *)origin;
    uint64_t ino = 0;
    uint16_t fs = 1;

    if (len < 21 + 4 || fb[1] != 0xfb)
        return 0;
    for (uint16_t i = t->has_upper ? 1 : 0; i < t->nlayers; i++) {
        if (memcmp(t->layers[i].uuid, fb + 5, 16) == 0) {
            fs = t->layers[i].fs;
            break;
        }
    }
    const unsigned char *fid = fb + 21;
    size_t fid_len = len - 21;
    if (fb[4] == 1 && fid_len == 8) { /* FILEID_INO32_GEN */
        uint32_t ino32;

        memcpy(&ino32, fid, 4);
        ino = ino32;
    } else if (fb[4] == 1 && fid_len == 12) { /* tmpfs: generation, low and high half */
        memcpy(&ino, fid + 4, 8);
    } else if ((fb[4] == 0x81 || fb[4] == 0x4d) && fid_len >= 8) { /* xfs; btrfs */
        memcpy(&ino, fid, 8);
    }
    return ino ? union_ino(fs, ino) : 0;
}

/* Of a copy that can carry no attribute (a user's symbolic link or special file, any file of an
 * upper without xattrs): a symbolic link NUMBERS/INO to "NUMBER:BIRTH" or "NUMBER:BIRTH:ORIGIN",
 * which is only believed for the very file that was born then. */
static bool read_record(const struct tree *t, int dirfd, const char *name, ino_t ino,
                        uint64_t *ret_number, int64_t *ret_origin)
{
    char record[32], text[64];
    char *end;
    ssize_t len;
    uint64_t number;

    if (t->numbers_fd < 0)
        return false;
    (void)snprintf(record, sizeof record, "%llx", (unsigned long long)ino);
    len = readlinkat(t->numbers_fd, record, text, sizeof text - 1);
    if (len < 0)
        return false;
    text[len] = '\0';
    number = strtoull(text, &end, 16);
    if (*end != ':' || strtoll(end + 1, &end, 16) != birth_time(dirfd, name))
        return false;
    *ret_number = number;
    *ret_origin = *end == ':' ? strtoll(end + 1, NULL, 16) : 0;
    return true;
}

uint64_t recorded_number(const struct tree *t, int dirfd, const char *name, ino_t ino)
{
    uint64_t number;
    int64_t origin;

    return read_record(t, dirfd, name, ino, &number, &origin) ? number : 0;
}

int64_t recorded_birth(const struct tree *t, int fd, ino_t ino)
{
    uint64_t number;
    int64_t origin;

    return read_record(t, fd, "", ino, &number, &origin) ? origin : 0;
}

/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Hard links over copy-up: kernel overlayfs's index, a directory with an entry for each copied-up
 * file that had several links, named after the lower file's handle. */
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/xattr.h>

#include "marks.h"
#include "resolve.h"

enum { HANDLE_BYTES = 128 };

bool goes_to_index(const struct tree *t, uint16_t layer, nlink_t links)
{
    return t->index && links > 1 && !t->layers[layer].passing;
}

/* As xfs makes handles: a number, here without a generation. */
static void put_number(struct file_handle *handle, uint64_t number)
{
    handle->handle_type = 0x81; /* FILEID_INO64_GEN */
    handle->handle_bytes = sizeof number + 4;
    memset(handle->f_handle, 0, handle->handle_bytes);
    memcpy(handle->f_handle, &number, sizeof number);
}

/* Of FUSE the numbers of files, since its handles are those of one mount: at the next another file
 * has them. */
static errint_t handle_at(const struct layer *layer, int dirfd, const char *name,
                          struct file_handle *handle)
{
    int mount_id, flags = name[0] == '\0' ? AT_EMPTY_PATH : 0;
    struct stat st;

    if (!layer->in_fuse)
        return name_to_handle_at(dirfd, name, handle, &mount_id, flags) < 0 ? errno_or_eio() : 0;
    if (fstatat(dirfd, name, &st, AT_SYMLINK_NOFOLLOW | flags) < 0)
        return errno_or_eio();
    put_number(handle, st.st_ino);
    return 0;
}

/* The UUID in an origin with a handle, and the index's name for it. */
static void set_uuid(struct origin *o, const unsigned char uuid[static 16])
{
    memcpy(o->fb + 5, uuid, 16);
    for (size_t i = 0; i < o->len; i++) {
        o->hex[2 * i] = "0123456789abcdef"[o->fb[i] >> 4];
        o->hex[2 * i + 1] = "0123456789abcdef"[o->fb[i] & 15];
    }
}

/* What tells a lower file from another one that has its handle: of files that mke2fs or FUSE has
 * numbered the handles have a generation of 0, and where there are none numbers are given anew. */
struct mien {
    int64_t birth; /* 0: not known */
    off_t size;
    time_t mtime; /* fuse2fs shows whole seconds only */
};

/* A program that makes images may give the same one to all of them, in whole seconds. */
static bool tells_alone(int64_t birth)
{
    return birth % 1000000000 != 0;
}

static bool marked_mien(struct tree *t, int fd, struct mien *ret_mien)
{
    char path[PROC_BYTES], attr[64];
    cleanup_free char *value = NULL;
    char *end;
    size_t len;

    proc_path(path, fd, NULL);
    (void)snprintf(attr, sizeof attr, "%sunionfs.of", t->prefix);
    if (read_xattr(path, false, attr, &value, &len) < 0)
        return false;
    ret_mien->size = (off_t)strtoull(value, &end, 16);
    if (*end != ':')
        return false;
    ret_mien->mtime = (time_t)strtoll(end + 1, NULL, 16);
    return true;
}

/* Whether what is in the index is a copy of this lower file. Where nothing tells, it is. */
static bool is_copy_of(struct tree *t, const char *entry, const struct mien *lower, int dirfd,
                       const char *name)
{
    cleanup_fd int fd = openat(t->index->fd, entry, O_PATH | O_NOFOLLOW | O_CLOEXEC);
    struct mien of;
    struct stat st;

    if (fd < 0 || stat_fd(fd, &st) < 0)
        return true;
    of.birth = marked_birth(t, fd, true);
    if (!of.birth)
        of.birth = recorded_birth(t, fd, st.st_ino);
    if (of.birth && lower->birth && of.birth != lower->birth) {
        /* A former upper's copy shows the birth of what it is a copy of. */
        if (name[0] == '\0')
            return of.birth == marked_birth(t, dirfd, false);
        cleanup_fd int src = openat(dirfd, name, O_PATH | O_NOFOLLOW | O_CLOEXEC);
        return src >= 0 && of.birth == marked_birth(t, src, false);
    }
    if (lower->birth && tells_alone(of.birth))
        return true;
    return !marked_mien(t, fd, &of) || (of.size == lower->size && of.mtime == lower->mtime);
}

/* Its name in the index: another one, if there a copy of another file has that of its handle, or if
 * one had when it came there. */
static errint_t tell_apart(struct tree *t, int dirfd, const char *name, struct origin *o)
{
    struct origin other = *o;
    struct mien lower;
    struct stat st;
    bool taken;

    if (!t->index)
        return 0;
    if (fstatat(dirfd, name, &st, AT_SYMLINK_NOFOLLOW | AT_EMPTY_PATH) < 0)
        return errno_or_eio();
    if (st.st_nlink < 2)
        return 0;
    lower = (struct mien){birth_time(dirfd, name), st.st_size, st.st_mtim.tv_sec};
    taken = exists_at(t->index->fd, o->hex);
    if (taken && is_copy_of(t, o->hex, &lower, dirfd, name))
        return 0;
    uint64_t mark = (uint64_t)lower.birth;
    if (!tells_alone(lower.birth))
        mark ^= ((uint64_t)lower.mtime << 32) ^ (uint64_t)lower.size ^ 1;
    if (o->len > 0) {
        unsigned char uuid[16];

        memcpy(uuid, o->fb + 5, sizeof uuid);
        for (size_t i = 0; i < sizeof mark; i++)
            uuid[sizeof mark + i] ^= (unsigned char)(mark >> 8 * i);
        set_uuid(&other, uuid);
    } else {
        size_t len = strlen(o->hex);

        (void)snprintf(other.hex + len, sizeof other.hex - len, "-%llx", (unsigned long long)mark);
    }
    if (taken || exists_at(t->index->fd, other.hex))
        *o = other;
    return 0;
}

errint_t origin_at(struct tree *t, uint16_t layer, int dirfd, const char *name,
                   struct origin *ret_origin)
{
    union {
        struct file_handle handle;
        char space[sizeof(struct file_handle) + HANDLE_BYTES];
    } u = {.handle.handle_bytes = HANDLE_BYTES};
    struct origin o = {.len = 0};
    bool empty = name[0] == '\0';
    errint_t err;

    if (t->layers[layer].passing) {
        o.hex[0] = '\0';
    } else if (handle_at(&t->layers[layer], dirfd, name, &u.handle) == 0 &&
               u.handle.handle_bytes + 21 <= sizeof o.fb && u.handle.handle_type <= 0xff) {
        /* struct ovl_fb of fs/overlayfs/overlayfs.h: version 0, magic, length, flags, type, uuid;
         * flag 1 says big endian. */
        o.len = 21 + u.handle.handle_bytes;
        o.fb[1] = 0xfb;
        o.fb[2] = (unsigned char)o.len;
        o.fb[3] = __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__;
        o.fb[4] = (unsigned char)u.handle.handle_type;
        memcpy(o.fb + 21, u.handle.f_handle, u.handle.handle_bytes);
        set_uuid(&o, t->layers[layer].uuid);
    } else {
        struct stat st;

        if (fstatat(dirfd, name, &st, AT_SYMLINK_NOFOLLOW | (empty ? AT_EMPTY_PATH : 0)) < 0)
            return errno_or_eio();
        (void)snprintf(o.hex, sizeof o.hex, "unionfs-%x-%llx", (unsigned)t->layers[layer].fs,
                       (unsigned long long)st.st_ino);
    }
    err = o.hex[0] ? tell_apart(t, dirfd, name, &o) : 0;
    if (err == 0)
        *ret_origin = o;
    return err;
}

errint_t origin_of(struct tree *t, uint64_t ino, struct origin *ret_origin)
{
    struct node *n = node_get(t, ino);
    errint_t err;

    if (!n)
        return -ESTALE;
    cleanup_fd int fd = node_open(t, n, O_PATH | O_NOFOLLOW, false);
    err = fd < 0 ? fd : origin_at(t, n->layer, fd, "", ret_origin);
    node_put(t, n);
    return err;
}

errint_t set_mark(struct tree *t, int fd, const char *mark, const void *value, size_t len)
{
    char name[64], path[PROC_BYTES];

    (void)snprintf(name, sizeof name, "%s%s", t->prefix, mark);
    if (fsetxattr(fd, name, value, len, 0) == 0)
        return 0;
    if (errno != EBADF)
        return errno_or_eio();
    proc_path(path, fd, NULL); /* O_PATH */
    return setxattr(path, name, value, len, 0) < 0 ? errno_or_eio() : 0;
}

/* Of a metadata-only copy that is being completed: what it says. */
static errint_t origin_of_copy(struct tree *t, int fd, struct origin *ret_origin)
{
    char path[PROC_BYTES], name[64];
    cleanup_free char *value = NULL;
    struct origin o = {.len = 0};
    errint_t err;

    proc_path(path, fd, NULL);
    (void)snprintf(name, sizeof name, "%sorigin", t->prefix);
    err = read_xattr(path, false, name, &value, &o.len);
    if (err == -ENODATA || (err == 0 && o.len > sizeof o.fb))
        o.len = 0;
    else if (err < 0)
        return err;
    memcpy(o.fb, value ? value : "", o.len);
    *ret_origin = o;
    return 0;
}

errint_t mark_origin(struct tree *t, struct node *n, int src, int copy, bool *ret_kept)
{
    bool own = n->ino == union_ino(t->layers[n->layer].fs, n->real_ino);
    int64_t birth = 0;
    struct origin o;
    char number[36];
    struct stat st;
    errint_t err;

    *ret_kept = false;
    if (!t->upper_xattrs)
        return 0;
    err = n->upper ? origin_of_copy(t, src, &o) : origin_at(t, n->layer, src, "", &o);
    if (err < 0)
        return err;
    if (own)
        birth = birth_time(src, "");
    else
        err = node_birth(t, n, &birth);
    if (err < 0)
        return err;
    int len = snprintf(number, sizeof number, birth ? "%llx:%llx" : "%llx",
                       (unsigned long long)n->ino, (unsigned long long)birth);
    err = set_mark(t, copy, "unionfs.ino", number, (size_t)len);
    if (err == 0 && o.len > 0)
        err = set_mark(t, copy, "origin", o.fb, o.len);
    if (err == 0 && !tells_alone(birth) && !n->upper && stat_fd(src, &st) == 0 &&
        goes_to_index(t, n->layer, st.st_nlink)) {
        len = snprintf(number, sizeof number, "%llx:%llx", (unsigned long long)st.st_size,
                       (unsigned long long)st.st_mtim.tv_sec);
        err = set_mark(t, copy, "unionfs.of", number, (size_t)len);
    }
    *ret_kept = err == 0;
    return err == -EPERM || err == -EOPNOTSUPP ? 0 : err;
}

static void settle_nlink(struct hit *h, nlink_t lower_nlink)
{
    if (!h->nlink_of_lower)
        return;
    h->nlink_diff += (int64_t)lower_nlink - (int64_t)h->st.st_nlink;
    h->nlink_of_lower = false;
}

/* Also by the name that kernel overlayfs gives it. */
static errint_t look_up(const struct tree *t, const struct layer *layer, struct origin *o,
                        struct stat *ret_st)
{
    if (fstatat(t->index->fd, o->hex, ret_st, AT_SYMLINK_NOFOLLOW) == 0)
        return 0;
    if (errno != ENOENT || !layer->other_uuid || o->len == 0)
        return errno_or_eio();
    set_uuid(o, layer->kernel_uuid);
    return fstatat(t->index->fd, o->hex, ret_st, AT_SYMLINK_NOFOLLOW) < 0 ? errno_or_eio() : 0;
}

/* A lower file with several links may have been copied up under another name: the index knows. */
errint_t index_of_lower(struct tree *t, struct node *parent, const char *name, struct hit *h)
{
    struct stat lower = h->st, st;
    struct rdir *dir;
    struct origin origin;
    errint_t err;

    if (S_ISDIR(h->type) || h->layer == 0 || !goes_to_index(t, h->layer, lower.st_nlink))
        return 0;
    pthread_mutex_lock(&t->lock);
    dir = node_dir_locked(parent, h->layer);
    if (dir)
        rdir_ref_locked(dir);
    pthread_mutex_unlock(&t->lock);
    if (!dir)
        return 0;
    int dirfd = rdir_pin(t, dir);
    if (dirfd < 0) {
        rdir_put(t, dir);
        return dirfd;
    }
    err = origin_at(t, h->layer, dirfd, name, &origin);
    rdir_unpin(t, dir);
    rdir_put(t, dir);
    if (err < 0)
        return err;
    err = look_up(t, &t->layers[h->layer], &origin, &st);
    if (err < 0)
        return err == -ENOENT ? 0 : err;
    if ((st.st_mode & S_IFMT) != h->type)
        return 0; /* a whiteout in the index, or nonsense: kernel overlayfs ignores it too */

    struct walk *w = calloc(1, sizeof *w);
    if (!w)
        return -ENOMEM;
    w->t = t;
    w->hit = h;
    (void)snprintf(w->path, sizeof w->path, "%s", name);
    uint64_t lower_ino = h->ino;
    /* A former upper's metadata-only copy has its data below, the copy of that its own. */
    hit_clear(t, h);
    h->metacopy = false;
    h->st = st;
    h->layer = 0;
    h->indexed = true;
    h->nlink_diff = -1; /* the index's own link */
    h->index_name = strdup(origin.hex);
    err = h->index_name ? upper_file_marks(w, t->index, origin.hex, 0) : -ENOMEM;
    settle_nlink(h, lower.st_nlink);
    if (err == 0 && h->ino != lower_ino && h->ino == union_ino(0, st.st_ino))
        h->ino = lower_ino;
    if (err == 0 && h->metacopy) {
        w->stop = false;
        err = walk_down(w, parent, 1);
    }
    free(w);
    return err;
}

/* An upper file found by its own name says that it is indexed: is it, and with how many links? */
errint_t index_of_upper(struct tree *t, struct node *parent, const char *name, struct hit *h)
{
    struct stat st;
    errint_t err = 0;

    if (!h->indexed)
        return 0;
    if (!t->index || !h->index_name ||
        fstatat(t->index->fd, h->index_name, &st, AT_SYMLINK_NOFOLLOW) < 0 ||
        st.st_ino != h->st.st_ino) {
        free(steal_pointer(&h->index_name));
        h->indexed = h->nlink_of_lower = false;
        h->nlink_diff = 0;
        return 0;
    }
    if (h->nlink_of_lower) { /* written by the kernel: relative to the lower file of this name */
        struct hit *below = calloc(1, sizeof *below);
        struct walk *w = calloc(1, sizeof *w);

        err = below && w ? 0 : -ENOMEM;
        if (err == 0) {
            w->t = t;
            w->hit = below;
            (void)snprintf(w->path, sizeof w->path, "%s", name);
            err = walk_down(w, parent, 1);
            /* Renamed since: then it has at least the names that the upper has. */
            settle_nlink(h, below->any ? below->st.st_nlink : h->st.st_nlink - 1);
            hit_clear(t, below);
        }
        free(below);
        free(w);
    }
    return err;
}

/* SPDX-License-Identifier: GPL-2.0-or-later */
/* From a node to the file it stands for: its place now, verified after every look, since a rename
 * or a copy-up may have come between. */
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/sysmacros.h>
#include <sys/xattr.h>

#include "loan.h"
#include "tree.h"

enum { ATTEMPTS = 16 };

static void copy_name(char out[static NAME_BYTES], const char *name)
{
    (void)strncpy(out, name, NAME_BYTES - 1);
    out[NAME_BYTES - 1] = '\0';
}

static errint_t place_of_dir_locked(struct tree *t, struct node *n, struct place *p)
{
    if (n->ndirs == 0)
        return -ENOENT;
    struct rdir *top = n->dirs[0];
    p->layer = top->layer;
    p->dev = top->dev;
    p->ino = top->ino;
    p->dir = top;
    p->name[0] = '\0'; /* the directory itself */
    rdir_ref_locked(top);
    (void)t;
    return 0;
}

static errint_t place_of_name_locked(struct tree *t, struct node *n, struct place *p)
{
    p->layer = n->layer;
    p->dev = n->dev;
    p->ino = n->real_ino;
    if (n->index_name && t->index) {
        p->dir = t->index;
        copy_name(p->name, n->index_name);
        rdir_ref_locked(p->dir);
        return 0;
    }
    for (struct alias *a = n->aliases; a; a = a->next) {
        struct rdir *dir = a->real ? node_dir_locked(a->parent, n->layer) : NULL;

        if (dir) {
            p->dir = dir;
            copy_name(p->name, a->name);
            rdir_ref_locked(dir);
            return 0;
        }
    }
    return -ENOENT;
}

errint_t node_place(struct tree *t, struct node *n, bool data, struct place *ret_place)
{
    struct place p = {.fd = -1};
    errint_t err = 0;

    pthread_mutex_lock(&t->lock);
    p.generation = n->generation;
    if (data && n->metacopy && n->data_dir) {
        p.layer = n->data_dir->layer;
        p.dev = n->data_dev;
        p.ino = n->data_ino;
        p.dir = n->data_dir;
        copy_name(p.name, n->data_name);
        rdir_ref_locked(p.dir);
    } else if (n->pin >= 0) {
        p.layer = n->layer;
        p.dev = n->dev;
        p.ino = n->real_ino;
        p.fd = fcntl(n->pin, F_DUPFD_CLOEXEC, 0);
        err = p.fd < 0 ? errno_or_eio() : 0;
    } else if (S_ISDIR(n->type)) {
        err = place_of_dir_locked(t, n, &p);
    } else {
        err = place_of_name_locked(t, n, &p);
    }
    p.careful = t->layers[p.layer].careful;
    pthread_mutex_unlock(&t->lock);
    if (err < 0)
        p = (struct place){.fd = -1, .generation = p.generation}; /* for moved() */
    *ret_place = p;
    return err;
}

void place_done(struct tree *t, struct place *p)
{
    if (p->dir)
        rdir_put(t, p->dir);
    close_keep_errno(p->fd);
    p->dir = NULL;
    p->fd = -1;
}

static bool is_there(const struct place *p, const struct stat *st)
{
    return p->ino == 0 || (p->ino == st->st_ino && p->dev == st->st_dev);
}

/* Of a file with several names an ordinary user may have closed the directory of one to himself:
 * the next is tried. False when all have been. */
static bool try_other_name(struct tree *t, struct node *n, int attempt)
{
    struct alias *first, **link;
    int names = 0;

    pthread_mutex_lock(&t->lock);
    first = n->aliases;
    for (link = &n->aliases; *link; link = &(*link)->next)
        names++;
    if (names > 1) {
        *link = first;
        n->aliases = first->next;
        first->next = NULL;
    }
    pthread_mutex_unlock(&t->lock);
    return attempt + 1 < names;
}

/* Was the failure perhaps only a change of place that we raced with? */
static bool moved(struct tree *t, struct node *n, const struct place *p, errint_t err, int attempt)
{
    bool changed;

    if (err == -EACCES && !S_ISDIR(n->type) && geteuid() != 0)
        return try_other_name(t, n, attempt);
    if (err == -EMFILE)
        return attempt < ATTEMPTS && rdirs_release(t);
    /* The last two: what came in its place is a whiteout, or a directory. */
    if (err != -ENOENT && err != -ESTALE && err != -ENOTDIR && err != -ELOOP && err != -ENXIO &&
        err != -EISDIR)
        return false;
    pthread_mutex_lock(&t->lock);
    changed = n->generation != p->generation;
    pthread_mutex_unlock(&t->lock);
    if (t->live && !n->upper)
        return changed; /* somebody has changed the lower: the caller finds out by its name */
    /* A change that is committed on disk and not yet told to the table takes a moment longer. */
    if (!changed && attempt > 0 && attempt < ATTEMPTS) {
        (void)usleep(50U << (attempt < 8 ? attempt : 8));
        return true;
    }
    return changed || attempt == 0;
}

static int open_place(struct tree *t, const struct place *p, int flags)
{
    if (!p->dir) {
        if (flags & O_PATH)
            return fcntl(p->fd, F_DUPFD_CLOEXEC, 0);
        return reopen_fd(p->fd, flags);
    }
    int dirfd = rdir_pin(t, p->dir);
    if (dirfd < 0)
        return dirfd;
    int fd;
    if (p->name[0])
        fd = open_beneath(dirfd, p->name, flags, p->careful);
    else if (flags & O_PATH)
        fd = fcntl(dirfd, F_DUPFD_CLOEXEC, 0);
    else
        fd = reopen_fd(dirfd, flags);
    if (fd == -1)
        fd = errno_or_eio();
    rdir_unpin(t, p->dir);
    return fd;
}

/* What its user has open goes on, though he has closed to himself the directory that it is in. */
static int open_by_handle(struct tree *t, struct node *n, int flags)
{
    int fd = -EACCES;

    pthread_mutex_lock(&t->lock);
    for (struct file *f = n->files; f && fd < 0; f = f->next)
        if (!f->lower && (fd = fcntl(f->fd, F_DUPFD_CLOEXEC, 0)) < 0)
            fd = errno_or_eio();
    pthread_mutex_unlock(&t->lock);
    if (fd >= 0 && !(flags & O_PATH)) {
        cleanup_fd int held = fd;

        fd = reopen_fd(held, flags);
    }
    return fd;
}

int node_open_stat(struct tree *t, struct node *n, int flags, bool data, struct stat *ret_st)
{
    for (int attempt = 0;; attempt++) {
        struct place p;
        errint_t err = node_place(t, n, data, &p);

        if (err == 0) {
            cleanup_fd int fd = open_place(t, &p, flags);

            err = fd < 0 ? fd : stat_fd(fd, ret_st);
            if (err == 0 && !is_there(&p, ret_st))
                err = -ESTALE;
            place_done(t, &p);
            if (err == 0)
                return steal_fd(&fd);
        }
        if (moved(t, n, &p, err, attempt))
            continue;
        if (err == -EACCES) {
            cleanup_fd int fd = open_by_handle(t, n, flags);

            err = fd < 0 ? fd : stat_fd(fd, ret_st);
            return err < 0 ? err : steal_fd(&fd);
        }
        return err;
    }
}

int node_open(struct tree *t, struct node *n, int flags, bool data)
{
    struct stat st;

    return node_open_stat(t, n, flags, data, &st);
}

static errint_t stat_place(struct tree *t, const struct place *p, struct stat *ret_st)
{
    if (!p->dir)
        return loan_stat(p->fd, "", AT_EMPTY_PATH, ret_st);
    int dirfd = rdir_pin(t, p->dir);
    if (dirfd < 0)
        return dirfd;
    errint_t err;
    if (!p->name[0]) {
        err = loan_stat(dirfd, "", AT_EMPTY_PATH, ret_st);
    } else if (p->careful) {
        cleanup_fd int fd = open_beneath(dirfd, p->name, O_PATH, true);

        err = fd < 0 ? fd : stat_fd(fd, ret_st);
    } else {
        err = loan_stat(dirfd, p->name, AT_SYMLINK_NOFOLLOW, ret_st);
    }
    rdir_unpin(t, p->dir);
    return err;
}

/* A mount point in a layer whose inside we do not look at. */
static bool sealed_attr(struct node *n, struct stat *ret_st)
{
    if (!S_ISDIR(n->type) || n->ndirs == 0 || !n->dirs[0]->sealed)
        return false;
    *ret_st = (struct stat){.st_mode = S_IFDIR | 0755, .st_nlink = 2, .st_blksize = 4096};
    return true;
}

static errint_t stat_verified(struct tree *t, struct node *n, bool data, struct stat *ret_st)
{
    for (int attempt = 0;; attempt++) {
        struct place p;
        struct stat st;
        errint_t err = node_place(t, n, data, &p);

        if (err == 0) {
            err = stat_place(t, &p, &st);
            if (err == 0 && !is_there(&p, &st))
                err = -ESTALE;
            place_done(t, &p);
            if (err == 0) {
                *ret_st = st;
                return 0;
            }
        }
        if (!moved(t, n, &p, err, attempt))
            return err;
    }
}

/* What is open goes on, though the lower has something else at its name now, or its user has closed
 * the directory that it is in. */
static errint_t stat_open_file(struct tree *t, struct node *n, errint_t otherwise,
                               struct stat *ret_st)
{
    errint_t err = otherwise;

    pthread_mutex_lock(&t->lock);
    if (n->files)
        err = stat_fd(n->files->fd, ret_st);
    pthread_mutex_unlock(&t->lock);
    return err;
}

errint_t node_stat(struct tree *t, struct node *n, struct stat *ret_st)
{
    errint_t err;

    if (sealed_attr(n, ret_st))
        return 0;
    err = stat_verified(t, n, false, ret_st);
    if (err == -EACCES || (t->live && (err == -ESTALE || err == -ENOENT)))
        return stat_open_file(t, n, err, ret_st);
    return err;
}

/* A handle of the upper file that the node is, or NULL; put it back. */
static struct file *upper_handle(struct tree *t, struct node *n)
{
    struct file *f = NULL;

    pthread_mutex_lock(&t->lock);
    if (n->upper && !n->metacopy)
        for (f = n->files; f && f->lower; f = f->next)
            ;
    if (f)
        f->refs++;
    pthread_mutex_unlock(&t->lock);
    return f;
}

errint_t node_with_path(struct tree *t, struct node *n,
                        errint_t (*fn)(const char *path, bool nofollow, void *arg), void *arg)
{
    struct file *f = upper_handle(t, n); /* spares an open, before each first write */
    cleanup_fd int fd = f ? -1 : node_open(t, n, O_PATH | O_NOFOLLOW, false);
    char path[PROC_BYTES];
    errint_t err;

    if (!f && fd < 0)
        return fd;
    /* The link in /proc leads to the inode itself, be it a symbolic link, so it is followed. */
    proc_path(path, f ? f->fd : fd, NULL);
    err = fn(path, false, arg);
    if (f)
        file_put(t, f);
    return err;
}

static uint32_t map_id(uint32_t id, const struct idrange *ranges, uint32_t n)
{
    if (n == 0)
        return id;
    for (uint32_t i = 0; i < n; i++)
        if (id >= ranges[i].inside && id - ranges[i].inside < ranges[i].length)
            return ranges[i].outside + (id - ranges[i].inside);
    return 65534; /* the kernel's overflow id, as fuse-overlayfs shows what is not mapped */
}

/* The attribute has had three names; fuse-overlayfs 1.10 writes the last for mode 2. */
static errint_t read_override(int mode, const char *path, bool nofollow, char **ret_value)
{
    size_t len;
    errint_t err;

    if (mode == 1)
        return read_xattr(path, nofollow, "security.fuseoverlayfs.override_stat", ret_value, &len);
    err = read_xattr(path, nofollow, "user.containers.override_stat", ret_value, &len);
    if (err == -ENODATA)
        err = read_xattr(path, nofollow, "user.fuseoverlayfs.override_stat", ret_value, &len);
    return err;
}

/* What a regular file stands for, "char-1-3" (fuse-overlayfs reads colons): devices that could not
 * be made. */
static void override_type(const char *type, struct stat *st)
{
    static const struct {
        const char *word;
        mode_t type;
    } types[] = {{"pipe", S_IFIFO}, {"socket", S_IFSOCK}, {"char", S_IFCHR}, {"block", S_IFBLK}};

    for (size_t i = 0; i < sizeof types / sizeof *types; i++) {
        size_t len = strlen(types[i].word);
        unsigned major = 0, minor = 0;

        if (strncmp(type, types[i].word, len) != 0)
            continue;
        if (types[i].type == S_IFCHR || types[i].type == S_IFBLK) {
            if (sscanf(type + len, "%*1[-:]%u%*1[-:]%u", &major, &minor) != 2)
                return;
            st->st_rdev = makedev(major, minor);
        }
        st->st_mode = (st->st_mode & ~(mode_t)S_IFMT) | types[i].type;
        return;
    }
}

/* Owner and mode that the daemon could not give, kept as "UID:GID:MODE[:TYPE]" (containers/storage
 * and fuse-overlayfs's xattr_permissions). */
void override_stat(int mode, const char *path, bool nofollow, struct stat *st)
{
    cleanup_free char *value = NULL;
    unsigned uid, gid, perm;
    int end = 0;

    if (!S_ISREG(st->st_mode) && !S_ISDIR(st->st_mode))
        return;
    if (read_override(mode, path, nofollow, &value) < 0)
        return;
    if (sscanf(value, "%u:%u:%o%n", &uid, &gid, &perm, &end) != 3)
        return;
    st->st_uid = uid;
    st->st_gid = gid;
    st->st_mode = (st->st_mode & S_IFMT) | (perm & 07777);
    if (S_ISREG(st->st_mode) && value[end] == ':')
        override_type(value + end + 1, st);
}

void attr_show(struct tree *t, const char *path, bool nofollow, struct stat *st)
{
    if (t->override_mode && path)
        override_stat(t->override_mode, path, nofollow, st);
    st->st_uid =
        t->squash_uid >= 0 ? (uint32_t)t->squash_uid : map_id(st->st_uid, t->uids, t->nuids);
    st->st_gid =
        t->squash_gid >= 0 ? (uint32_t)t->squash_gid : map_id(st->st_gid, t->gids, t->ngids);
}

static errint_t show_at_path(const char *path, bool nofollow, void *arg)
{
    void **args = arg;

    attr_show(args[0], path, nofollow, args[1]);
    return 0;
}

static errint_t attr_now(struct tree *t, struct node *n, struct stat *ret_st)
{
    struct stat st;
    bool metacopy, unlinked, indexed;
    int64_t diff;
    uint16_t ndirs;
    errint_t err = node_stat(t, n, &st);

    if (err < 0)
        return err;
    pthread_mutex_lock(&t->lock);
    metacopy = n->metacopy;
    unlinked = n->unlinked;
    indexed = n->indexed;
    diff = n->nlink_diff;
    ndirs = n->ndirs;
    pthread_mutex_unlock(&t->lock);
    st.st_ino = n->ino;
    if (S_ISDIR(n->type)) {
        /* As kernel overlayfs: 1 says "not counted" (find(1) and fts(3) know it from btrfs). */
        if (unlinked)
            st.st_nlink = 0;
        else if (ndirs > 1 || t->static_nlink)
            st.st_nlink = 1;
    } else if (unlinked) {
        st.st_nlink = 0;
    } else if (indexed) {
        int64_t links = (int64_t)st.st_nlink + diff;

        st.st_nlink = links > 0 ? (nlink_t)links : 1;
    }
    if (metacopy) {
        struct stat data;

        if (stat_verified(t, n, true, &data) == 0)
            st.st_blocks = data.st_blocks;
    }
    if (t->override_mode) {
        void *args[] = {t, &st};

        err = node_with_path(t, n, show_at_path, args);
        if (err < 0)
            return err;
    } else {
        attr_show(t, NULL, false, &st);
    }
    *ret_st = st;
    return 0;
}

/* Of the root what was seen last, where a file system in user space has ended: it is by the root
 * that the union tells what is wrong. */
errint_t node_attr(struct tree *t, struct node *n, struct stat *ret_st)
{
    errint_t err = attr_now(t, n, ret_st);

    if (n->ino != ROOT_INO)
        return err;
    pthread_mutex_lock(&t->lock);
    if (err == 0) {
        t->root_seen = *ret_st;
    } else if (err == -ENOTCONN && t->root_seen.st_ino) {
        *ret_st = t->root_seen;
        err = 0;
    }
    pthread_mutex_unlock(&t->lock);
    return err;
}

ssize_t tree_readlink(struct tree *t, uint64_t ino, char *target, size_t size)
{
    struct node *n = node_get(t, ino);
    ssize_t len = -ESTALE;

    if (n) {
        cleanup_fd int fd = node_open(t, n, O_PATH | O_NOFOLLOW, false);

        len = fd;
        if (fd >= 0) {
            len = readlinkat(fd, "", target, size);
            if (len < 0)
                len = errno_or_eio();
        }
        node_put(t, n);
    }
    return len;
}

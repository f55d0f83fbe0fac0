/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Answers to requests: what asks what is there, and what moves bytes, from the tree. What changes
 * the union is in serve_changes.c, or options.call's. */
#include <fcntl.h>
#include <sys/statvfs.h>

#include "asker.h"
#include "chute.h"
#include "face.h"
#include "plain.h"
#include "room.h"
#include "serve.h"
#include "xattrs.h"

enum {
    SILENT = -0x10000, /* no answer is due */
    COUNTS = 64,       /* what is less than this part of what is free does not */
};

uint64_t valid_seconds(const struct answer *a)
{
    return (uint64_t)(a->s->options.valid_ns / 1000000000);
}

uint32_t valid_rest(const struct answer *a)
{
    return (uint32_t)(a->s->options.valid_ns % 1000000000);
}

void put_entry(const struct answer *a, struct fuse_entry_out *out, const struct stat *st)
{
    *out = (struct fuse_entry_out){
        .nodeid = st ? st->st_ino : 0,
        .entry_valid = valid_seconds(a),
        .entry_valid_nsec = valid_rest(a),
        .attr_valid = valid_seconds(a),
        .attr_valid_nsec = valid_rest(a),
    };
    if (st)
        wire_attr(&out->attr, st);
}

ssize_t by_call(struct answer *a)
{
    atomic_fetch_add_explicit(&a->s->called[a->r->head->opcode], 1, memory_order_relaxed);
    return a->s->options.call(a->s->options.arg, a->r, a->data, a->cap);
}

/* ---- names and attributes ---- */

static ssize_t on_lookup(struct answer *a)
{
    struct stat st;
    errint_t err = tree_lookup(a->s->tree, a->r->head->nodeid, a->r->body, &st);

    if (err < 0 && err != -ENOENT)
        return err;
    /* Number 0: a name that the kernel may remember not to be there. */
    put_entry(a, REPLY(a, fuse_entry_out), err < 0 ? NULL : &st);
    return sizeof(struct fuse_entry_out);
}

static ssize_t on_forget(struct answer *a)
{
    face_forget(a->s->tree, a->id, BODY(a, fuse_forget_in)->nlookup);
    return SILENT;
}

static ssize_t on_batch_forget(struct answer *a)
{
    const struct fuse_batch_forget_in *in = BODY(a, fuse_batch_forget_in);
    const struct fuse_forget_one *one = (const void *)(in + 1);
    size_t fit = (a->r->len - sizeof *in) / sizeof *one;

    for (size_t i = 0; i < in->count && i < fit; i++)
        face_forget(a->s->tree, one[i].nodeid, one[i].nlookup);
    return SILENT;
}

static ssize_t on_getattr(struct answer *a)
{
    struct fuse_attr_out *out = REPLY(a, fuse_attr_out);
    struct node *n = node_get(a->s->tree, a->r->head->nodeid);
    struct stat st;
    errint_t err;

    if (!n)
        return -ESTALE;
    err = node_attr(a->s->tree, n, &st);
    node_put(a->s->tree, n);
    if (err < 0)
        return err;
    *out = (struct fuse_attr_out){.attr_valid = valid_seconds(a), .attr_valid_nsec = valid_rest(a)};
    wire_attr(&out->attr, &st);
    return sizeof *out;
}

static ssize_t on_readlink(struct answer *a)
{
    return tree_readlink(a->s->tree, a->r->head->nodeid, a->data, a->cap);
}

static ssize_t on_statfs(struct answer *a)
{
    struct fuse_statfs_out *out = REPLY(a, fuse_statfs_out);
    struct statvfs st;
    int image = a->s->tree->image_fd;

    freed_await(&a->s->freed, &a->s->tree->leaving);
    if (fstatvfs(a->s->options.statfs_fd, &st) < 0)
        return errno_or_eio();
    if (image >= 0 && st.f_frsize > 0) {
        uint64_t missing = room_missing(image, st.f_bfree * st.f_frsize) / st.f_frsize;

        st.f_bfree -= missing;
        st.f_bavail -= missing < st.f_bavail ? missing : st.f_bavail;
    }
    *out = (struct fuse_statfs_out){
        .st =
            {
                .blocks = st.f_blocks,
                .bfree = st.f_bfree,
                .bavail = st.f_bavail,
                .files = st.f_files,
                .ffree = st.f_ffree,
                .bsize = (uint32_t)st.f_bsize,
                .namelen = (uint32_t)st.f_namemax,
                .frsize = (uint32_t)st.f_frsize,
            },
    };
    return sizeof *out;
}

/* ---- extended attributes ---- */

/* `size` of the asker's buffer; 0 asks for the length alone. Frees the value. */
static ssize_t give_value(struct answer *a, uint32_t size, char *value, size_t len)
{
    ssize_t n;

    if (size == 0) {
        *REPLY(a, fuse_getxattr_out) = (struct fuse_getxattr_out){.size = (uint32_t)len};
        n = sizeof(struct fuse_getxattr_out);
    } else if (len > size || len > a->cap) {
        n = -ERANGE;
    } else {
        memcpy(a->data, value, len);
        n = (ssize_t)len;
    }
    free(value);
    return n;
}

static ssize_t on_getxattr(struct answer *a)
{
    const struct fuse_getxattr_in *in = BODY(a, fuse_getxattr_in);
    const char *name = (const char *)(in + 1);
    char *value;
    size_t len;
    errint_t err;

    /* The union tells its own status. */
    if (a->r->head->nodeid == ROOT_INO && strcmp(name, "user.unionfs.status") == 0)
        return by_call(a);
    err = xattr_get(a->s->tree, a->r->head->nodeid, name, &value, &len);
    return err < 0 ? err : give_value(a, in->size, value, len);
}

static ssize_t on_listxattr(struct answer *a)
{
    const struct fuse_getxattr_in *in = BODY(a, fuse_getxattr_in);
    char *list;
    size_t len;
    errint_t err = xattr_list(a->s->tree, a->r->head->nodeid, a->r->head->uid == 0, &list, &len);

    return err < 0 ? err : give_value(a, in->size, list, len);
}

/* ---- open files ---- */

static ssize_t on_open(struct answer *a)
{
    const struct fuse_open_in *in = BODY(a, fuse_open_in);
    struct fuse_open_out *out = REPLY(a, fuse_open_out);
    uint64_t fh = 0;
    errint_t err;

    if (a->s->options.no_open)
        return -ENOSYS; /* never asked again: the kernel opens by itself, and keeps the pages */
    if (in->flags & O_TRUNC) {
        err = plain_truncate(a->s->tree, a->r->head->nodeid, 0, TRUNCATE_AT_OPEN, 0,
                             a->r->head->uid == 0 && !(in->open_flags & FUSE_OPEN_KILL_SUIDGID));
        if (err == NOT_PLAIN)
            return by_call(a);
        if (err < 0)
            return err;
    }
    err = file_open(a->s->tree, a->r->head->nodeid, (int)in->flags, &fh);
    if (err == -EROFS) { /* it has to be copied up first */
        err = plain_copy_up(a->s->tree, a->r->head->nodeid, true);
        if (err == NOT_PLAIN)
            return by_call(a);
        if (err < 0)
            return err;
        err = file_open(a->s->tree, a->r->head->nodeid, (int)in->flags, &fh);
    }
    if (err < 0)
        return err;
    *out = (struct fuse_open_out){.fh = fh,
                                  .open_flags = a->s->options.keep_cache ? FOPEN_KEEP_CACHE : 0};
    return sizeof *out;
}

static ssize_t by_chute(struct answer *a, const struct file *f, size_t size, off_t offset)
{
    struct fuse_out_header *head = (void *)(a->data - sizeof *head);
    ssize_t n;

    head->unique = a->r->head->unique;
    n = chute_read(a->r->chute, a->s->options.device, f, head, a->data, size, offset);
    return n == CHUTE_SENT ? SILENT : n;
}

static ssize_t on_read(struct answer *a)
{
    const struct fuse_read_in *in = BODY(a, fuse_read_in);
    struct file *f;
    ssize_t n;

    if (in->size > a->cap)
        return -EINVAL;
    n = file_of(a->s->tree, a->r->head->nodeid, in->fh, &f);
    if (n < 0)
        return n;
    if (a->r->chute && chute_takes(a->r->chute, f, in->size))
        n = by_chute(a, f, in->size, (off_t)in->offset);
    else
        n = file_read(f, a->data, in->size, (off_t)in->offset, false);
    file_put(a->s->tree, f);
    return n;
}

/* FUSE_WRITE_KILL_SUIDGID: asked as a change of nothing, which stands for a write to come. */
static errint_t kill_set_id(struct answer *a, uint64_t fh)
{
    struct fuse_in_header head = *a->r->head;
    struct fuse_setattr_in in = {.valid = FATTR_KILL_SUIDGID};
    struct request r = {.head = &head, .body = (const char *)&in, .len = sizeof in};
    struct file *f = file_get(a->s->tree, fh);
    struct stat st;
    ssize_t n;

    if (!f)
        return -EBADF;
    n = fstat(f->fd, &st) < 0 ? errno_or_eio() : 0;
    file_put(a->s->tree, f);
    if (n < 0 || !(st.st_mode & (S_ISUID | S_ISGID)))
        return (errint_t)n;
    head.opcode = FUSE_SETATTR;
    n = a->s->options.call(a->s->options.arg, &r, a->data, a->cap);
    return n < 0 ? (errint_t)n : 0;
}

static ssize_t on_write(struct answer *a)
{
    const struct fuse_write_in *in = BODY(a, fuse_write_in);
    ssize_t n;

    if (in->size > a->r->len - sizeof *in)
        return -EINVAL;
    if (in->write_flags & FUSE_WRITE_KILL_SUIDGID && (n = kill_set_id(a, in->fh)) < 0)
        return n;
    n = file_write(a->s->tree, in->fh, (const char *)(in + 1), in->size, (off_t)in->offset,
                   in->write_flags & FUSE_WRITE_CACHE);
    if (n < 0)
        return n;
    *REPLY(a, fuse_write_out) = (struct fuse_write_out){.size = (uint32_t)n};
    return sizeof(struct fuse_write_out);
}

static ssize_t on_flush(struct answer *a)
{
    struct file *f;
    int r;

    if (!a->s->options.flush)
        return -ENOSYS; /* never asked again */
    f = file_get(a->s->tree, BODY(a, fuse_flush_in)->fh);
    if (!f)
        return -EBADF;
    r = dup(f->fd);
    r = r < 0 ? r : close(r);
    r = r < 0 ? errno_or_eio() : 0;
    file_put(a->s->tree, f);
    return r;
}

static ssize_t on_release(struct answer *a)
{
    file_release(a->s->tree, BODY(a, fuse_release_in)->fh);
    return 0;
}

/* ---- directories ---- */

static ssize_t on_opendir(struct answer *a)
{
    struct fuse_open_out *out = REPLY(a, fuse_open_out);
    uint64_t dh = 0;
    bool keep = false;
    errint_t err = dir_open(a->s->tree, a->r->head->nodeid, &dh, &keep);

    if (err < 0)
        return err;
    *out = (struct fuse_open_out){.fh = dh};
    if (keep && a->s->options.keep_cache)
        out->open_flags = FOPEN_CACHE_DIR | FOPEN_KEEP_CACHE;
    return sizeof *out;
}

struct listing_out {
    struct answer *a;
    uint64_t dir, parent;
    size_t len, size;
};

static int put_direntplus(void *arg, const struct dirent_out *entry)
{
    struct listing_out *l = arg;
    struct answer *a = l->a;
    size_t name_len = strlen(entry->name);
    size_t step = FUSE_DIRENT_ALIGN(FUSE_NAME_OFFSET_DIRENTPLUS + name_len);
    struct fuse_direntplus *out = (void *)(a->data + l->len);
    bool dots =
        entry->name[0] == '.' && (name_len == 1 || (name_len == 2 && entry->name[1] == '.'));
    struct stat st = {.st_ino = name_len == 2 ? l->parent : l->dir}; /* of ".." and "." */
    bool seen = false, known = false;

    if (l->len + step > l->size)
        return 1;
    /* What it knows it will ask for only if it does not know it any more. */
    if (!dots && a->s->options.keep_cache) {
        uint64_t ino = tree_known(a->s->tree, l->dir, entry->name);

        known = ino != 0;
        st.st_ino = known ? ino : st.st_ino;
    }
    if (!dots && !known) {
        errint_t err = tree_lookup(a->s->tree, l->dir, entry->name, &st);

        if (err == -ENOENT)
            return 0; /* gone since it was listed */
        seen = err == 0;
        /* A directory that its owner may list and not search, or a damaged entry, which must not
         * hide the others: the kernel gets a name without attributes, and asks when it needs them.
         * The number stands for nothing then. */
        if (!seen) {
            st.st_ino = 1ULL << 63 | entry->next;
            dir_unsure(a->s->tree, l->dir);
        }
    }
    memset(out, 0, step);
    put_entry(a, &out->entry_out, seen ? &st : NULL);
    face_show(a->s->tree, &out->entry_out);
    out->dirent.ino = st.st_ino;
    out->dirent.off = entry->next;
    out->dirent.namelen = (uint32_t)name_len;
    out->dirent.type = entry->type;
    memcpy(out->dirent.name, entry->name, name_len);
    l->len += step;
    return 0;
}

static ssize_t on_readdirplus(struct answer *a)
{
    const struct fuse_read_in *in = BODY(a, fuse_read_in);
    struct listing_out l = {.a = a,
                            .dir = dir_ino(a->s->tree, in->fh),
                            .parent = dir_parent(a->s->tree, in->fh),
                            .size = in->size < a->cap ? in->size : a->cap};
    errint_t err = dir_read(a->s->tree, in->fh, in->offset, put_direntplus, &l);

    return err < 0 && l.len == 0 ? err : (ssize_t)l.len;
}

static ssize_t on_releasedir(struct answer *a)
{
    dir_release(a->s->tree, BODY(a, fuse_release_in)->fh);
    return 0;
}

/* ---- the rest ---- */

static ssize_t on_interrupt(struct answer *a)
{
    (void)a; /* what has begun is ended, but for long copies: see asker.h */
    return SILENT;
}

static ssize_t on_destroy(struct answer *a)
{
    (void)a;
    return 0;
}

/* What a request needs at least behind its header; a name more where `name`. */
static const struct {
    handler *handler;
    size_t least;
    bool name;
} handlers[WIRE_OPCODES] = {
    [FUSE_LOOKUP] = {on_lookup, 0, true},
    [FUSE_FORGET] = {on_forget, sizeof(struct fuse_forget_in), false},
    [FUSE_GETATTR] = {on_getattr, 0, false},
    [FUSE_SETATTR] = {on_setattr, sizeof(struct fuse_setattr_in), false},
    [FUSE_READLINK] = {on_readlink, 0, false},
    [FUSE_SYMLINK] = {on_symlink, 0, true},
    [FUSE_MKNOD] = {on_mknod, sizeof(struct fuse_mknod_in), true},
    [FUSE_MKDIR] = {on_mkdir, sizeof(struct fuse_mkdir_in), true},
    [FUSE_UNLINK] = {on_unlink, 0, true},
    [FUSE_RMDIR] = {on_rmdir, 0, true},
    [FUSE_RENAME] = {on_rename, sizeof(struct fuse_rename_in), true},
    [FUSE_LINK] = {on_link, sizeof(struct fuse_link_in), true},
    [FUSE_OPEN] = {on_open, sizeof(struct fuse_open_in), false},
    [FUSE_READ] = {on_read, sizeof(struct fuse_read_in), false},
    [FUSE_WRITE] = {on_write, sizeof(struct fuse_write_in), false},
    [FUSE_STATFS] = {on_statfs, 0, false},
    [FUSE_RELEASE] = {on_release, sizeof(struct fuse_release_in), false},
    [FUSE_FSYNC] = {on_fsync, sizeof(struct fuse_fsync_in), false},
    [FUSE_SETXATTR] = {by_call, FUSE_COMPAT_SETXATTR_IN_SIZE, true},
    [FUSE_GETXATTR] = {on_getxattr, sizeof(struct fuse_getxattr_in), true},
    [FUSE_LISTXATTR] = {on_listxattr, sizeof(struct fuse_getxattr_in), false},
    [FUSE_REMOVEXATTR] = {by_call, 0, true},
    [FUSE_FLUSH] = {on_flush, sizeof(struct fuse_flush_in), false},
    [FUSE_OPENDIR] = {on_opendir, sizeof(struct fuse_open_in), false},
    [FUSE_RELEASEDIR] = {on_releasedir, sizeof(struct fuse_release_in), false},
    [FUSE_FSYNCDIR] = {by_call, sizeof(struct fuse_fsync_in), false},
    [FUSE_CREATE] = {on_create, sizeof(struct fuse_create_in), true},
    [FUSE_INTERRUPT] = {on_interrupt, 0, false},
    [FUSE_DESTROY] = {on_destroy, 0, false},
    [FUSE_IOCTL] = {on_ioctl, sizeof(struct fuse_ioctl_in), false},
    [FUSE_BATCH_FORGET] = {on_batch_forget, sizeof(struct fuse_batch_forget_in), false},
    [FUSE_FALLOCATE] = {on_fallocate, sizeof(struct fuse_fallocate_in), false},
    [FUSE_READDIRPLUS] = {on_readdirplus, sizeof(struct fuse_read_in), false},
    [FUSE_RENAME2] = {on_rename2, sizeof(struct fuse_rename2_in), true},
    [FUSE_LSEEK] = {on_lseek, sizeof(struct fuse_lseek_in), false},
    [FUSE_COPY_FILE_RANGE] = {on_copy_file_range, sizeof(struct fuse_copy_file_range_in), false},
    [FUSE_TMPFILE] = {by_call, sizeof(struct fuse_create_in), false},
    [WIRE_COPY_FILE_RANGE_64] = {on_copy_file_range, sizeof(struct fuse_copy_file_range_in), false},
    [FUSE_SYNCFS] = {on_syncfs, sizeof(struct fuse_syncfs_in), false},
    [WIRE_STATX] = {on_statx, sizeof(struct wire_statx_in), false},
};

static bool is_whole(const struct request *r)
{
    size_t least = handlers[r->head->opcode].least;

    if (r->len < least)
        return false;
    return !handlers[r->head->opcode].name || memchr(r->body + least, '\0', r->len - least) != NULL;
}

/* allow_root, as libfuse has it: what has been opened can be used. */
static bool may_ask(const struct server *s, const struct fuse_in_header *h)
{
    if (s->options.only_uid < 0 || h->uid == 0 || h->uid == s->options.only_uid)
        return true;
    switch (h->opcode) {
    case FUSE_FORGET:
    case FUSE_BATCH_FORGET:
    case FUSE_READ:
    case FUSE_WRITE:
    case FUSE_FSYNC:
    case FUSE_RELEASE:
    case FUSE_READDIRPLUS:
    case FUSE_FSYNCDIR:
    case FUSE_RELEASEDIR:
        return true;
    default:
        return false;
    }
}

void serve_undo(struct server *s, const struct request *r, const char *out)
{
    const struct fuse_out_header *head = (const void *)out;
    const void *data = out + sizeof *head;
    const struct fuse_entry_out *entry = data;

    if (head->error)
        return;
    switch (r->head->opcode) {
    case FUSE_CREATE:
    case FUSE_TMPFILE:
        file_release(s->tree, ((const struct fuse_open_out *)(const void *)(entry + 1))->fh);
        __attribute__((fallthrough));
    case FUSE_LOOKUP:
    case FUSE_MKDIR:
    case FUSE_MKNOD:
    case FUSE_SYMLINK:
    case FUSE_LINK:
        if (entry->nodeid)
            face_forget(s->tree, entry->nodeid, 1);
        break;
    case FUSE_OPEN:
        file_release(s->tree, ((const struct fuse_open_out *)data)->fh);
        break;
    case FUSE_OPENDIR:
        dir_release(s->tree, ((const struct fuse_open_out *)data)->fh);
        break;
    default:
        break;
    }
}

static ssize_t free_something(struct answer *a, handler *handler)
{
    ssize_t n;

    freed_begin(&a->s->freed);
    n = with_faces(a, handler);
    freed_end(&a->s->freed);
    return n;
}

static bool lacks_room(ssize_t n)
{
    return n == -ENOSPC || n == -EDQUOT;
}

static ssize_t find_room(struct answer *a, handler *handler)
{
    struct freed *freed = &a->s->freed;
    uint64_t before = freed_count(freed);
    ssize_t n = with_faces(a, handler);

    for (int i = 0; lacks_room(n) && i < FREED_MOST; i++) {
        /* Programs that only close what others have too may use up all attempts. */
        freed_await(freed, &a->s->tree->leaving);
        if (!freed_since(freed, &before))
            break;
        n = with_faces(a, handler);
    }
    return n;
}

/* Whether a file was opened, and passes us by. */
static bool passes_by(const struct answer *a, ssize_t n)
{
    uint32_t opcode = a->r->head->opcode;
    const struct fuse_open_out *out;
    size_t at = opcode == FUSE_OPEN ? 0 : sizeof(struct fuse_entry_out);

    if (opcode != FUSE_OPEN && opcode != FUSE_CREATE && opcode != FUSE_TMPFILE)
        return false;
    out = (const void *)(a->data + at);
    return n >= (ssize_t)(at + sizeof *out) && out->open_flags & FOPEN_PASSTHROUGH;
}

/* What the kernel will write by itself is not tried again: it finds the room that there will be. */
static void make_room(struct answer *a)
{
    struct server *s = a->s;
    uint64_t due = freed_due(&s->freed, &s->tree->leaving);
    struct statvfs st;

    if (due && fstatvfs(s->options.statfs_fd, &st) == 0 &&
        due * LEAVING_BYTES >= st.f_bavail * st.f_frsize / COUNTS)
        freed_await(&s->freed, &s->tree->leaving);
}

static ssize_t change_something(struct answer *a, handler *handler)
{
    ssize_t n;

    hold_pass(&a->s->hold);
    n = find_room(a, handler);
    if (passes_by(a, n))
        make_room(a);
    if (removes_something(a->r))
        freed_soon(&a->s->freed);
    hold_passed(&a->s->hold);
    return n;
}

static ssize_t handle(struct answer *a, handler *handler)
{
    if (!is_whole(a->r))
        return -EINVAL;
    if (changes_something(a->r))
        return change_something(a, handler);
    if (frees_something(a->r))
        return free_something(a, handler);
    if (a->r->head->opcode == FUSE_WRITE) /* of pages that were stored to: see hold.h */
        return find_room(a, handler);
    return with_faces(a, handler);
}

size_t serve(struct server *s, const struct request *r, char *out)
{
    struct fuse_out_header *head = (void *)out;
    struct fuse_in_header in = *r->head;
    struct request inner = {.head = &in, .body = r->body, .len = r->len, .chute = r->chute};
    struct answer a = {
        .s = s, .r = &inner, .id = in.nodeid, .data = out + sizeof *head, .cap = WIRE_DATA};
    uint32_t opcode = in.opcode;
    ssize_t n = -ENOSYS; /* of most requests the kernel then knows not to send them again */

    asker_is(in.pid);
    in.nodeid = face_ino(s->tree, a.id);
    if (!may_ask(s, r->head))
        n = -EACCES;
    else if (in.nodeid != a.id && !in.nodeid)
        n = opcode == FUSE_FORGET ? SILENT : -ESTALE;
    else if (opcode < WIRE_OPCODES && handlers[opcode].handler)
        n = handle(&a, handlers[opcode].handler);
    if (opcode == FUSE_OPEN && n > 0)
        give_ahead(&a);
    if (n == SILENT)
        return 0;
    *head = (struct fuse_out_header){
        .unique = r->head->unique,
        .error = n < 0 ? (int32_t)n : 0,
        .len = (uint32_t)(sizeof *head + (n > 0 ? (size_t)n : 0)),
    };
    return head->len;
}

/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What the files of handlers share: serve.c and serve_*.c. */
#ifndef UNIONFS_SERVE_H
#define UNIONFS_SERVE_H

#include "engine.h"

struct answer {
    struct server *s;
    const struct request *r;
    uint64_t id; /* what the request calls its node; r->head has the node's number */
    char *data;  /* after the header */
    size_t cap;
};

/* A handler answers the length of what it has put into a->data, or -errno. */
typedef ssize_t handler(struct answer *a);

#define BODY(a, type) ((const struct type *)(const void *)(a)->r->body)
#define REPLY(a, type) ((struct type *)(void *)(a)->data)

enum { NS_PER_SECOND = 1000000000 };

/* Asks options.call. */
ssize_t by_call(struct answer *a);

uint64_t valid_seconds(const struct answer *a);
uint32_t valid_rest(const struct answer *a);
/* Without attributes: a name that the kernel may remember not to be there. */
void put_entry(const struct answer *a, struct fuse_entry_out *out, const struct stat *st);

/* serve_faces.c: runs a handler; its answer says how the kernel is to get a file's data, and by
 * which numbers and for how long it may know what it is told of. */
ssize_t with_faces(struct answer *a, handler *handler);
enum {
    /* More may not be wanted by whoever opens it. */
    AHEAD_MOST = 64 * 1024,
    /* Where in the buffer for answers, behind that to the open. */
    AHEAD_AT = 4096,
};
/* ahead.c: after an open that succeeded. What is small is mostly read at once and whole: of a lower
 * file the kernel gets the pages now, before it asks. */
void give_ahead(struct answer *a);
/* serve_changes.c */
handler on_setattr, on_symlink, on_mknod, on_mkdir, on_create, on_link, on_unlink, on_rmdir;
handler on_rename, on_rename2, on_fsync;
/* serve_files.c */
handler on_statx, on_ioctl, on_syncfs, on_lseek, on_fallocate, on_copy_file_range;

#endif

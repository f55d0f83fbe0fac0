/* SPDX-License-Identifier: GPL-2.0-or-later */
/* FUSE passthrough: which of the kernel's inodes reads and writes which file of a layer by itself.
 *
 * The kernel allows one inode one *backing* file at a time, for as long as a handle is open in
 * passthrough, and no handle with pages of its own beside it (fs/fuse/iomode.c): else open(2) fails
 * with EIO. A *face* is what the kernel knows a file as, one inode number of its own, and how that
 * is open. Mostly a node has one, its own number, and only while it is open.
 *
 * A lower file that is open in passthrough when it is copied up gets a second face: whoever opens
 * it by its old number is told ESTALE, upon which the kernel looks its name up anew (open(2) is
 * repeated with LOOKUP_REVAL, the program sees nothing of it) and is given the new one. It is shown
 * with the same st_ino. */
#ifndef UNIONFS_FACE_H
#define UNIONFS_FACE_H

#include "tree.h"
#include "wire.h"

struct face {
    struct face *next; /* of the same node: the newest first, which new lookups are given */
    struct node *node;
    uint64_t id;      /* the node's number, or one with FACE_BIT */
    uint64_t nlookup; /* of those the kernel has been told `id`; not of the node's own number */
    uint32_t cached;  /* handles with pages of the kernel's own */
    uint32_t backed;  /* handles in passthrough */
    uint32_t writers; /* of these */
    int32_t backing;  /* while there are any */
    dev_t dev;        /* the file that it is */
    ino_t ino;
};

/* No inode number of a union has it. */
#define FACE_BIT (1ULL << 63)

/* From now on files are opened in passthrough. `device`: of the mount, whose INIT has agreed. */
void face_start(struct tree *t, int device, enum passthrough which);

/* The node's number behind what the kernel calls it; 0 if there is none. */
uint64_t face_ino(struct tree *t, uint64_t id);
void face_forget(struct tree *t, uint64_t id, uint64_t nlookup);
/* An entry is about to be given to the kernel: under which number, and whether its attributes may
 * be kept. */
void face_show(struct tree *t, struct fuse_entry_out *entry);
/* The same of attributes alone. To be asked before they are. */
bool face_keeps_attr(struct tree *t, struct node *n);

/* Around the opening of a file for writing and its face_opened. */
void face_writer_enter(struct tree *t);
void face_writer_leave(struct tree *t);
/* Before a file is opened. -ESTALE: by another number. `ret_direct`: by this one, if need be. */
errint_t face_may_open(struct tree *t, uint64_t id, int flags, uint32_t thread, bool *ret_direct);
/* Decides how an open file gets its data, and completes `out`. -ESTALE as above, -EINVAL where the
 * file system has no O_DIRECT; the handle is then released. */
errint_t face_opened(struct tree *t, uint64_t id, bool direct, bool fresh,
                     struct fuse_open_out *out);

/* Shared by face.c and backing.c. `odd`: not only its own number, or not all attributes may be
 * kept; to be counted anew after a change. */
bool face_is_odd(const struct node *n);
void face_count_odd_locked(struct tree *t, const struct node *n, bool before);
/* The number that a name of this node is given. */
uint64_t face_shown_id(const struct node *n);
struct face *face_find_locked(struct node *n, uint64_t id);
/* The node's own number, where it has no face yet; a further one, which is shown from now on. */
struct face *face_own_locked(struct node *n);
struct face *face_new_locked(struct tree *t, struct node *n);
/* Takes away what nothing needs any more. */
void faces_spare_locked(struct tree *t, struct node *n);
/* What the kernel holds for the attributes of an inode is to be asked for again. */
void face_forget_attr(const struct tree *t, uint64_t id);

/* For io.c and tree.c. The backing to be closed once the lock is dropped, or 0. */
int32_t face_closed_locked(struct tree *t, struct file *f);
void face_close_backing(struct tree *t, int32_t backing);
void faces_drop_locked(struct tree *t, struct node *n);

#endif

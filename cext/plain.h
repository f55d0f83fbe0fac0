/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Changes of the plain kind, decided and made here alone: marks are kept in attributes and
 * whiteouts are devices, the directory lies in the upper, one system call is the whole change.
 * Whatever is otherwise is NOT_PLAIN, said before anything has been changed, and is for the
 * operations in Python (create.py, remove.py, rename.py, attributes.py, copy_up.py).
 *
 * Callable from any thread; needs no interpreter. Lock order: copying, committing, entering,
 * the tree's. */
#ifndef UNIONFS_PLAIN_H
#define UNIONFS_PLAIN_H

#include "tree.h"

enum { NOT_PLAIN = 1 };

struct new_file {
    mode_t mode; /* with the type; the umask not yet taken off */
    mode_t umask;
    dev_t rdev;
    const char *target; /* of a symbolic link */
    int flags;          /* of open(2), for a regular file */
    uint32_t uid, gid;  /* who makes it */
};

/* `ret_fd`: a regular file's descriptor, opened with wanted->flags, else -1. */
errint_t plain_make(struct tree *t, uint64_t parent, const char *name,
                    const struct new_file *wanted, int *ret_fd);
/* A further name for a file that has one. */
errint_t plain_link(struct tree *t, uint64_t ino, uint64_t parent, const char *name);
/* Anything but a directory. */
errint_t plain_unlink(struct tree *t, uint64_t parent, const char *name);
errint_t plain_rmdir(struct tree *t, uint64_t parent, const char *name);
/* Anything but a directory, without flags. */
errint_t plain_rename(struct tree *t, uint64_t parent, const char *name, uint64_t new_parent,
                      const char *new_name);

struct change {
    bool set_mode, set_times;
    mode_t mode;
    int64_t uid, gid;         /* -1: stays */
    struct timespec times[2]; /* utimensat(2) */
};

errint_t plain_change(struct tree *t, uint64_t ino, const struct change *c);
enum truncation { TRUNCATE, TRUNCATE_AT_OPEN };
/* `fh`: the handle it was asked through, or 0; `root`: whoever asks is above set-ID bits. */
errint_t plain_truncate(struct tree *t, uint64_t ino, off_t size, enum truncation how, uint64_t fh,
                        bool root);
errint_t plain_sync(struct tree *t, uint64_t fh, bool datasync);
/* copy_up.c. A regular file or a directory, and what it lies in; `data`: the file is wanted whole.
 * Nothing to do is 0. */
errint_t plain_copy_up(struct tree *t, uint64_t ino, bool data);
/* The same without the data, and the copy of a regular file comes changed, if it was not there
 * yet: `ret_changed`. */
errint_t plain_copy_up_changed(struct tree *t, uint64_t ino, const struct change *c,
                               bool *ret_changed);

#endif

/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What a look down the layers finds, before the table knows it. */
#ifndef UNIONFS_RESOLVE_H
#define UNIONFS_RESOLVE_H

#include <limits.h>

#include "tree.h"

struct hit {
    enum upper_state upper;
    bool any;       /* something is shown */
    struct stat st; /* of the winner */
    mode_t type;
    uint16_t layer; /* of the winner */
    uint64_t ino;   /* number in the union */
    uint16_t ndirs; /* directories: the stack, references owned */
    struct rdir *dirs[MAX_LAYERS];
    bool metacopy; /* waiting for, then having, lower data */
    struct rdir *data_dir;
    char *data_name;
    struct stat data_st;
    char *redirect; /* of the upper's entry */
    char *index_name;
    int64_t nlink_diff;
    bool indexed;
    bool nlink_of_lower; /* nlink_diff is relative to the lower's count, not yet known */
    bool have_lower_ino;
};

struct walk {
    struct tree *t;
    char path[PATH_MAX]; /* NAME, or /absolute/path from the layers' roots */
    bool stop;
    struct hit *hit;
};

/* What `name` means in `parent`. On success the caller clears the hit. */
errint_t resolve(struct tree *t, struct node *parent, const char *name, struct hit *h);
/* The same, and its node, which is to be put back. -ENOENT: nothing is shown; nor is the hit to be
 * cleared then, or after another error. */
errint_t node_lookup(struct tree *t, struct node *parent, const char *name, struct hit *h,
                     struct node **ret_node);
void hit_clear(struct tree *t, struct hit *h);

/* The number of a file whose own, `ino`, is taken by something else: by the real inode, for its
 * links. */
uint64_t other_file_number(uint64_t ino, const struct stat *st);
/* The number of what has one for each of its names. */
uint64_t number_by_name(uint64_t ino, const struct node *parent, const char *name);

/* Looks for w->path in the layers of `parent`, from `first_layer` on. */
errint_t walk_down(struct walk *w, struct node *parent, uint16_t first_layer);
/* Marks of the upper's file that was found: number, link count, metadata-only copy, redirect. */
errint_t upper_file_marks(struct walk *w, struct rdir *dir, const char *name, size_t prelen);

/* index.c: a lower file with several links may have been copied up under another name. */
errint_t index_of_lower(struct tree *t, struct node *parent, const char *name, struct hit *h);
/* index.c: an upper file says that it is in the index; is it, and with how many links? */
errint_t index_of_upper(struct tree *t, struct node *parent, const char *name, struct hit *h);

#endif

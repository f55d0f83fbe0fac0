/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What files of a layer say of themselves: marks in extended attributes or `.wh.` names, read as
 * kernel overlayfs and fuse-overlayfs write them. Only resolve.c and index.c give them meaning. */
#ifndef UNIONFS_MARKS_H
#define UNIONFS_MARKS_H

#include "tree.h"

struct marks {
    bool opaque, xwhiteouts, impure, metacopy;
    uint64_t ino;   /* overlay.unionfs.ino: the union's number, 0 if not there */
    uint32_t links; /* overlay.unionfs.links: the link count while a name is made, 0 if not there */
    char *redirect;
    char *origin;
    size_t origin_len;
    char *nlink;
};

void marks_clear(struct marks *m);
/* Reads all marks of a path; `upper`: only our own prefix counts where it is trusted. */
errint_t marks_read(struct tree *t, const char *path, bool nofollow, bool upper,
                    struct marks *ret_marks);
bool exists_at(int dirfd, const char *name);
/* A number that the union shows for an inode of a layer. */
uint64_t union_ino(uint16_t fs, uint64_t ino);
/* The number of the file that overlay.origin names, or 0. */
uint64_t origin_number(const struct tree *t, const char *origin, size_t len);
/* The number recorded for a file that can carry no attribute, or 0. */
uint64_t recorded_number(const struct tree *t, int dirfd, const char *name, ino_t ino);
/* And when the file that it is a copy of was made; 0 where that is not recorded. */
int64_t recorded_birth(const struct tree *t, int fd, ino_t ino);
/* The same by overlay.unionfs.ino, NUMBER:BIRTH. */
int64_t marked_birth(struct tree *t, int fd, bool upper);
/* A redirect leads to a place inside the layers: a name, or an absolute path without dots. */
bool redirect_is_sane(const char *redirect);

/* Rootless fuse-overlayfs's own marks. */
#define FUSEOVERLAYFS "user.fuseoverlayfs."

#endif

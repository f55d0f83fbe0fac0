/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The raw kernel interfaces that libc does not wrap, and extended attributes of a place
 * (directory descriptor, name). */
#ifndef UNIONFS_SYS_H
#define UNIONFS_SYS_H

#include <stddef.h>
#include <sys/stat.h>
#include <sys/types.h>

#include "util.h"

/* A redirect, with its end: what is longer fits no xattr of every file system. */
enum { NAME_BYTES = 256, PROC_BYTES = 32 + NAME_BYTES, REDIRECT_BYTES = 2048 };

/* "/proc/self/fd/FD" or "/proc/self/fd/FD/NAME": how a path-taking call reaches a place. */
void proc_path(char out[static PROC_BYTES], int fd, const char *name);

/* Opens NAME beneath DIRFD without following a link and, if `careful`, without crossing into
 * another mount (-EXDEV then). Returns the descriptor or -errno. */
int open_beneath(int dirfd, const char *name, int flags, bool careful);

errint_t stat_fd(int fd, struct stat *ret_st);

/* futimens of a descriptor that may be O_PATH. */
int set_times(int fd, const struct timespec times[static 2]);

bool is_in_fuse(int fd);

/* Whether a read waits for nothing but a disk of this machine, on a file system that cannot be
 * asked for what is in memory alone (RWF_NOWAIT). */
bool is_near(int fd);

/* Whether a change that is on disk has all earlier ones on disk with it: xfs has one log, in which
 * every change of metadata has its place. Not so where a single file or directory can be logged
 * ahead of others: the log tree of btrfs, the fast commits of ext4. */
bool keeps_order(int fd);

/* Opens again what `fd` (perhaps O_PATH) stands for. */
int reopen_fd(int fd, int flags);

/* When a file was made, in nanoseconds; 0 where the file system does not know. */
int64_t birth_time(int dirfd, const char *name);

/* Reads a whole attribute, or list of names if attr is NULL, of a path (links are not followed
 * when `nofollow`). The buffer is allocated and NUL-terminated. Missing: -ENODATA. */
errint_t read_xattr(const char *path, bool nofollow, const char *attr, char **ret_value,
                    size_t *ret_len);

#endif

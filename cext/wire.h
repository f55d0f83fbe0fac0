/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The kernel's side of /dev/fuse: <linux/fuse.h>, what younger kernels than the header's add to it,
 * and attributes put into its form. */
#ifndef UNIONFS_WIRE_H
#define UNIONFS_WIRE_H

#include <linux/fuse.h>
#include <stddef.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>

enum {
    WIRE_OPCODES = 64,    /* numbers above are not requests of ours */
    WIRE_DATA = 1 << 20,  /* bytes of one read or write: 256 pages */
    WIRE_HEADER = 1 << 12 /* more than any request has before its data */
};

/* Requests of younger kernels, and their structures. */
enum { WIRE_STATX = 52, WIRE_COPY_FILE_RANGE_64 = 53 };

struct wire_statx_in {
    uint32_t getattr_flags, reserved;
    uint64_t fh;
    uint32_t sx_flags, sx_mask;
};

struct wire_statx_out {
    uint64_t attr_valid;
    uint32_t attr_valid_nsec, flags;
    uint64_t spare[2];
    struct statx stat; /* struct fuse_statx is laid out alike */
};

struct wire_copy_file_range_out {
    uint64_t bytes_copied;
};

/* Linux 6.9 */
#ifndef FOPEN_PASSTHROUGH
#define FOPEN_PASSTHROUGH (1U << 7)
struct fuse_backing_map {
    int32_t fd;
    uint32_t flags;
    uint64_t padding;
};
#define FUSE_DEV_IOC_BACKING_OPEN _IOW(FUSE_DEV_IOC_MAGIC, 1, struct fuse_backing_map)
#define FUSE_DEV_IOC_BACKING_CLOSE _IOW(FUSE_DEV_IOC_MAGIC, 2, uint32_t)
#endif

/* Older headers call the field `padding`. */
static inline void wire_set_backing(struct fuse_open_out *out, int32_t backing)
{
    memcpy((char *)out + offsetof(struct fuse_open_out, open_flags) + sizeof out->open_flags,
           &backing, sizeof backing);
}

/* FUSE over io_uring, Linux 6.14. */
#ifndef FUSE_URING_IN_OUT_HEADER_SZ
struct fuse_uring_ent_in_out {
    uint64_t flags;
    uint64_t commit_id;
    uint32_t payload_sz;
    uint32_t padding;
    uint64_t reserved;
};

struct fuse_uring_req_header {
    char in_out[128];
    char op_in[128];
    struct fuse_uring_ent_in_out ring_ent_in_out;
};

enum fuse_uring_cmd {
    FUSE_IO_URING_CMD_REGISTER = 1,
    FUSE_IO_URING_CMD_COMMIT_AND_FETCH = 2,
};

struct fuse_uring_cmd_req {
    uint64_t flags;
    uint64_t commit_id;
    uint16_t qid;
    uint8_t padding[6];
};
#endif

static inline void wire_attr(struct fuse_attr *out, const struct stat *st)
{
    *out = (struct fuse_attr){
        .ino = st->st_ino,
        .size = (uint64_t)st->st_size,
        .blocks = (uint64_t)st->st_blocks,
        .atime = (uint64_t)st->st_atim.tv_sec,
        .mtime = (uint64_t)st->st_mtim.tv_sec,
        .ctime = (uint64_t)st->st_ctim.tv_sec,
        .atimensec = (uint32_t)st->st_atim.tv_nsec,
        .mtimensec = (uint32_t)st->st_mtim.tv_nsec,
        .ctimensec = (uint32_t)st->st_ctim.tv_nsec,
        .mode = st->st_mode,
        .nlink = (uint32_t)st->st_nlink,
        .uid = st->st_uid,
        .gid = st->st_gid,
        /* the kernel's new_encode_dev, which is what dev_t has in these bits */
        .rdev = (uint32_t)st->st_rdev,
        .blksize = (uint32_t)st->st_blksize,
    };
}

#endif

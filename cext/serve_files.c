/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Answers to what is asked of files seldom. */
#include "serve.h"

static struct statx_timestamp wire_time(const struct timespec *ts)
{
    return (struct statx_timestamp){.tv_sec = ts->tv_sec, .tv_nsec = (uint32_t)ts->tv_nsec};
}

/* The birth time too: asked once of an inode that a program wants to know it of. */
ssize_t on_statx(struct answer *a)
{
    struct wire_statx_out *out = REPLY(a, wire_statx_out);
    struct node *n = node_get(a->s->tree, a->r->head->nodeid);
    int64_t birth = 0, valid = a->s->options.valid_ns;
    struct stat st;
    errint_t err;

    if (!n)
        return -ESTALE;
    err = node_attr(a->s->tree, n, &st);
    if (err == 0 && node_birth(a->s->tree, n, &birth) < 0)
        birth = 0; /* the rest can be told */
    node_put(a->s->tree, n);
    if (err < 0)
        return err;
    *out = (struct wire_statx_out){
        .attr_valid = (uint64_t)(valid / NS_PER_SECOND),
        .attr_valid_nsec = (uint32_t)(valid % NS_PER_SECOND),
        .stat =
            {
                .stx_mask = STATX_BASIC_STATS | (birth ? STATX_BTIME : 0),
                .stx_blksize = (uint32_t)st.st_blksize,
                .stx_nlink = (uint32_t)st.st_nlink,
                .stx_uid = st.st_uid,
                .stx_gid = st.st_gid,
                .stx_mode = (uint16_t)st.st_mode,
                .stx_ino = st.st_ino,
                .stx_size = (uint64_t)st.st_size,
                .stx_blocks = (uint64_t)st.st_blocks,
                .stx_atime = wire_time(&st.st_atim),
                .stx_btime = {.tv_sec = birth / NS_PER_SECOND,
                              .tv_nsec = (uint32_t)(birth % NS_PER_SECOND)},
                .stx_ctime = wire_time(&st.st_ctim),
                .stx_mtime = wire_time(&st.st_mtim),
                .stx_rdev_major = major(st.st_rdev),
                .stx_rdev_minor = minor(st.st_rdev),
            },
    };
    return sizeof *out;
}

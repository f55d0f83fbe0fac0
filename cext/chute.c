/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "chute.h"

#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <unistd.h>

#include "sys.h"

enum {
    PAGE = 4096,
    /* Below this the three calls cost more than the copy. */
    LEAST = 64 * 1024,
    /* What anybody may have: /proc/sys/fs/pipe-max-size. */
    ROOM = 1024 * 1024,
    UNUSABLE = 1,
};

static void chute_make(struct chute *c)
{
    int ends[2], room;

    c->room = UNUSABLE;
    if (pipe2(ends, O_CLOEXEC | O_NONBLOCK) < 0)
        return;
    c->from = ends[0];
    c->to = ends[1];
    room = fcntl(c->to, F_SETPIPE_SZ, ROOM);
    if (room > 0) {
        c->room = (size_t)room;
        return;
    }
    /* Its user has as many as he may have. */
    (void)close(c->from);
    (void)close(c->to);
}

void chute_close(struct chute *c)
{
    if (c->room > UNUSABLE) {
        (void)close(c->from);
        (void)close(c->to);
    }
    c->room = UNUSABLE;
}

bool chute_takes(struct chute *c, const struct file *f, size_t size)
{
    if (size < LEAST || f->flags & O_DIRECT)
        return false;
    if (c->room == 0)
        chute_make(c);
    /* A page for the header, and one more where the data begins within one. */
    return size + (size_t)2 * PAGE <= c->room;
}

/* What has come into the pipe, header and all, is brought to where the plain answer is. */
static ssize_t take_back(struct chute *c, struct fuse_out_header *head, size_t in_pipe)
{
    char *at = (char *)head;
    size_t got = 0;

    while (got < in_pipe) {
        ssize_t n = read(c->from, at + got, in_pipe - got);

        if (n <= 0) {
            chute_close(c);
            return -EIO;
        }
        got += (size_t)n;
    }
    return (ssize_t)(in_pipe - sizeof *head);
}

/* Puts the header and the data into the pipe; how many bytes of data, or -errno. */
static ssize_t fill(struct chute *c, const struct file *f, const struct fuse_out_header *head,
                    size_t size, off_t offset)
{
    loff_t at = offset;
    size_t got = 0;

    if (write(c->to, head, sizeof *head) != (ssize_t)sizeof *head)
        return -EIO;
    while (got < size) {
        ssize_t n = splice(f->fd, &at, c->to, NULL, size - got, 0);

        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            break; /* the plain way finds out why */
        got += (size_t)n;
    }
    return (ssize_t)got;
}

ssize_t chute_read(struct chute *c, int device, const struct file *f, struct fuse_out_header *head,
                   char *data, size_t size, off_t offset)
{
    uint64_t unique = head->unique;
    struct stat st;
    size_t left;
    ssize_t got;

    if (stat_fd(f->fd, &st) < 0 || st.st_size - offset < LEAST)
        return file_read(f, data, size, offset, false);
    left = (size_t)(st.st_size - offset);
    if (left < size)
        size = left;
    *head = (struct fuse_out_header){.unique = unique, .len = (uint32_t)(sizeof *head + size)};
    got = fill(c, f, head, size, offset);
    if (got < 0) {
        chute_close(c);
        return file_read(f, data, size, offset, false);
    }
    if ((size_t)got < size) {
        ssize_t taken = take_back(c, head, sizeof *head + (size_t)got);
        ssize_t more;

        if (taken < 0)
            return taken;
        more = file_read(f, data + taken, size - (size_t)taken, offset + taken, false);
        if (more < 0)
            return taken > 0 ? taken : more;
        return taken + more;
    }
    /* Not SPLICE_F_MOVE: that takes the pages out of the layer's own cache, for which the next to
     * read them, by this union or another way, has to go to the disk.
     *
     * Shorter than asked for, or an error: nobody waits for the answer, or the device is gone, as
     * read(2) will tell. What is left in the pipe must not come into the next answer. */
    if (splice(c->from, NULL, device, NULL, sizeof *head + size, 0) !=
        (ssize_t)(sizeof *head + size)) {
        chute_close(c);
        c->room = 0; /* a new one for the next */
    }
    return CHUTE_SENT;
}

/* SPDX-License-Identifier: GPL-2.0-or-later */
/* How each inode of the kernel gets its data, so that the kernel never has to refuse an open; see
 * face.h. What the kernel counts is behind what is counted here: it begins with our answer to OPEN
 * and has ended when it sends RELEASE. */
#include <fcntl.h>
#include <signal.h>
#include <sys/ioctl.h>

#include "face.h"
#include "flags.h"

enum { WRITES = O_WRONLY | O_RDWR };

/* With PASSTHROUGH_ALL. A smaller lower file of a union that can change is read once, and its pages
 * are then kept in the kernel: to open it again costs less so. */
enum { LOWER_LEAST = 128 * 1024 };

void face_start(struct tree *t, int device, enum passthrough which)
{
    pthread_mutex_lock(&t->lock);
    t->device = which == PASSTHROUGH_OFF ? -1 : device;
    t->passthrough = which;
    pthread_mutex_unlock(&t->lock);
    if (which != PASSTHROUGH_OFF)
        (void)signal(SIGIO, SIG_IGN); /* that somebody waits for a lease: nobody_writes */
}

static void send_away_locked(struct tree *t, uint64_t id, uint32_t thread)
{
    uint32_t at = t->nsent++ % (sizeof t->sent / sizeof *t->sent);

    t->sent[at].thread = thread;
    t->sent[at].id = id;
}

/* Was this thread told ESTALE of that number when it last opened something? Then it does not open a
 * name, which would have led elsewhere, but an open file (/proc/self/fd) or a bind mount. */
static bool comes_again_locked(struct tree *t, uint64_t id, uint32_t thread)
{
    bool again = false;

    for (size_t i = 0; i < sizeof t->sent / sizeof *t->sent; i++) {
        if (t->sent[i].id && t->sent[i].thread == thread) {
            again = again || t->sent[i].id == id;
            t->sent[i].id = 0;
        }
    }
    return again;
}

/* Is a writer who was sent away still on his way? His next answer has to be the last one, and he
 * may be back by the same number, when all who had it open have closed it. Until then nobody is
 * given the lower file, from which he would be sent away again. The node forgets it with the
 * kernel, which may happen before he comes. */
static bool awaits_writer_locked(const struct tree *t, const struct node *n, uint64_t id)
{
    if (n->awaits_writer)
        return true;
    for (size_t i = 0; i < sizeof t->sent / sizeof *t->sent; i++)
        if (t->sent[i].id == id)
            return true;
    return false;
}

/* -ESTALE, or -ENOMEM. */
static errint_t give_new_face_locked(struct tree *t, struct node *n)
{
    if (!face_new_locked(t, n))
        return -ENOMEM;
    atomic_fetch_add(&t->opened_anew, 1);
    return -ESTALE;
}

errint_t face_may_open(struct tree *t, uint64_t id, int flags, uint32_t thread, bool *ret_direct)
{
    uint64_t ino = face_ino(t, id);
    struct node *n;
    errint_t err = 0;
    bool direct = false, again, writes = flags & (WRITES | O_TRUNC), first = false;

    if (t->device < 0)
        return 0;
    pthread_mutex_lock(&t->lock);
    n = node_find_locked(t, ino);
    /* 0: of a process that we cannot see */
    again = thread && t->nsent && comes_again_locked(t, id, thread);
    if (n && again && writes)
        n->awaits_writer = true;
    if (n && face_shown_id(n) != id) {
        struct face *face = face_find_locked(n, id);

        direct = again && !(writes && face && face->backed);
        err = direct ? 0 : -ESTALE;
    } else if (n && writes && n->faces && n->faces->backed && (!n->upper || n->metacopy)) {
        /* What its readers have is a lower file, and will not be what is written. */
        err = give_new_face_locked(t, n);
        first = n->awaits_writer = true;
    }
    if (err == -ESTALE && !again)
        send_away_locked(t, id, thread);
    pthread_mutex_unlock(&t->lock);
    if (first)
        face_forget_attr(t, id);
    *ret_direct = direct;
    return err;
}

static bool takes_o_direct(int fd)
{
    int flags = fcntl(fd, F_GETFL);

    if (flags < 0 || fcntl(fd, F_SETFL, flags | O_DIRECT) < 0)
        return false;
    return fcntl(fd, F_SETFL, flags) == 0;
}

struct opening {
    uint64_t id;
    struct file *f;
    struct stat st; /* of the file behind the handle, if that may be backed */
    uint32_t generation;
    int32_t backing; /* of it, not yet anybody's */
    bool direct;
    bool moved; /* changed place meanwhile: once more */
    bool inval_attr;
};

/* What may be copied up while it is open would go on showing the lower file. */
static bool backs_lowers(const struct tree *t)
{
    return !t->has_upper || t->passthrough == PASSTHROUGH_ALL;
}

static bool pays(const struct tree *t, const struct opening *o, bool lower)
{
    const struct file *f = o->f;
    const struct stat *st = &o->st;

    if (!S_ISREG(st->st_mode) || (f->flags & O_DIRECT && !takes_o_direct(f->fd)))
        return false;
    if (!lower)
        return !is_protected(f->fd); /* stores to a mapping would reach what can only grow */
    if (o->id & FACE_BIT)
        return false; /* somebody is about to write, and must not be sent away once more */
    return backs_lowers(t) && (!t->has_upper || st->st_size >= LOWER_LEAST);
}

/* The kernel's number for the file, or 0: then it goes without. */
static int32_t open_backing(struct tree *t, int fd)
{
    struct fuse_backing_map map = {.fd = fd};
    int32_t backing = ioctl(t->device, FUSE_DEV_IOC_BACKING_OPEN, &map);

    if (backing <= 0)
        atomic_store(&t->refused, backing < 0 ? errno : EIO);
    return backing > 0 ? backing : 0;
}

void face_close_backing(struct tree *t, int32_t backing)
{
    uint32_t number = (uint32_t)backing;

    if (backing)
        (void)ioctl(t->device, FUSE_DEV_IOC_BACKING_CLOSE, &number);
}

int32_t face_closed_locked(struct tree *t, struct file *f)
{
    struct face *face = f->face;
    int32_t backing = 0;

    if (!face)
        return 0;
    f->face = NULL;
    if (f->how == OPEN_CACHED)
        face->cached--;
    else if (f->how == OPEN_BACKED && --face->backed == 0)
        backing = face->backing;
    if (f->how == OPEN_BACKED && f->flags & WRITES)
        face->writers--;
    faces_spare_locked(t, face->node);
    return backing;
}

/* A program may drop O_DIRECT for an end that fills no block (dd does): the kernel tells nobody,
 * and goes on with O_DIRECT. Who also reads is not known to do so, and is what has to be fast. */
static bool may_drop_o_direct(int flags)
{
    return (flags & O_ACCMODE) == O_WRONLY && flags & O_DIRECT;
}

static void join_locked(struct tree *t, struct face *face, struct file *f, bool backed,
                        struct fuse_open_out *out, bool *ret_inval)
{
    struct node *n = face->node;
    bool odd = face_is_odd(n);

    f->face = face;
    f->how = backed ? OPEN_BACKED : OPEN_CACHED;
    if (!backed) {
        face->cached++;
        if (n->pages_old)
            out->open_flags &= ~(uint32_t)FOPEN_KEEP_CACHE;
        n->pages_old = false;
        return;
    }
    face->backed++;
    out->open_flags = (out->open_flags & ~(uint32_t)FOPEN_KEEP_CACHE) | FOPEN_PASSTHROUGH;
    if (may_drop_o_direct(f->flags))
        out->open_flags |= FOPEN_DIRECT_IO; /* written through us, which the mode allows */
    wire_set_backing(out, face->backing);
    atomic_fetch_add(&t->opened_backed, 1);
    if (f->flags & WRITES) {
        face->writers++;
        n->pages_old = true;
    }
    if ((f->flags & O_ACCMODE) == O_RDWR) {
        *ret_inval = !n->mapped;
        n->mapped = true;
        face_count_odd_locked(t, n, odd);
    }
}

/* By a number that is no longer shown: data through us, so that they are the node's; what is
 * mapped is what the number's other handles have. */
static void join_direct_locked(struct face *face, struct file *f, struct fuse_open_out *out)
{
    out->open_flags = FOPEN_DIRECT_IO;
    if (face && face->backed) {
        f->face = face;
        f->how = OPEN_BACKED;
        face->backed++;
        out->open_flags |= FOPEN_PASSTHROUGH;
        wire_set_backing(out, face->backing);
    }
}

static errint_t settle_locked(struct tree *t, struct opening *o, struct fuse_open_out *out)
{
    struct file *f = o->f;
    struct node *n = f->node;
    struct face *face = face_find_locked(n, o->id);

    if (o->direct) {
        join_direct_locked(face, f, out);
        return 0;
    }
    o->moved = n->generation != o->generation;
    if (o->moved)
        return 0;
    if (face_shown_id(n) != o->id)
        return -ESTALE; /* another face came meanwhile */
    if (!face && !(face = face_own_locked(n)))
        return -ENOMEM;
    if (face->backed && (face->dev != o->st.st_dev || face->ino != o->st.st_ino)) {
        o->inval_attr = true;
        return give_new_face_locked(t, n);
    }
    if (!face->backed && !face->cached && o->backing &&
        !(f->lower && awaits_writer_locked(t, n, o->id))) {
        face->backing = o->backing;
        face->dev = o->st.st_dev;
        face->ino = o->st.st_ino;
        o->backing = 0;
        join_locked(t, face, f, true, out, &o->inval_attr);
    } else if (face->backed && f->flags & O_DIRECT && !takes_o_direct(f->fd)) {
        return -EINVAL; /* open(2) of such a file system; the kernel would make it EIO */
    } else {
        join_locked(t, face, f, face->backed > 0, out, &o->inval_attr);
    }
    return 0;
}

static errint_t try_to_settle(struct tree *t, struct opening *o, struct fuse_open_out *out)
{
    struct file *f = o->f;
    struct node *n = f->node;
    struct face *face;
    bool lower, first, left;
    errint_t err;

    pthread_mutex_lock(&t->lock);
    o->generation = n->generation;
    lower = f->lower;
    left = lower && n->upper && !n->metacopy;
    face = face_find_locked(n, o->id);
    first = !face || (!face->cached && !face->backed);
    pthread_mutex_unlock(&t->lock);
    if (left) {
        /* Copied up since it was opened, and whoever did so has not come to this handle yet. With
         * the lower file it would be sent away by a number that has the upper one. */
        (void)file_switch_to_upper(t, n);
        o->moved = true;
        return 0;
    }
    o->backing = 0;
    if (!lower || backs_lowers(t)) {
        err = stat_fd(f->fd, &o->st);
        if (err < 0)
            return err;
        if (first && !o->direct && pays(t, o, lower))
            o->backing = open_backing(t, f->fd);
    }
    pthread_mutex_lock(&t->lock);
    err = settle_locked(t, o, out);
    pthread_mutex_unlock(&t->lock);
    face_close_backing(t, o->backing);
    return err;
}

errint_t face_opened(struct tree *t, uint64_t id, bool direct, bool fresh,
                     struct fuse_open_out *out)
{
    struct opening o = {.id = id, .direct = direct};
    errint_t err;

    if (t->device < 0)
        return 0;
    o.f = file_get(t, out->fh);
    if (!o.f)
        return -EBADF;
    do {
        err = try_to_settle(t, &o, out);
    } while (err == 0 && o.moved);
    if (o.inval_attr && !fresh)
        face_forget_attr(t, id);
    file_put(t, o.f);
    if (err < 0)
        file_release(t, out->fh);
    return err;
}

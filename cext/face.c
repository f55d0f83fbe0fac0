/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The numbers that the kernel knows files by, and which attributes it may keep; see face.h. */
#include "face.h"

#include <fcntl.h>
#include <sys/uio.h>

/* ---- numbers ---- */

static struct face *face_by_id_locked(struct tree *t, uint64_t id)
{
    uint64_t slot = (id & ~FACE_BIT) - 1;

    return id & FACE_BIT && slot < t->nfaces ? t->faces[slot] : NULL;
}

uint64_t face_ino(struct tree *t, uint64_t id)
{
    struct face *face;
    uint64_t ino;

    if (!(id & FACE_BIT))
        return id;
    pthread_mutex_lock(&t->lock);
    face = face_by_id_locked(t, id);
    ino = face ? face->node->ino : 0;
    pthread_mutex_unlock(&t->lock);
    return ino;
}

bool face_is_odd(const struct node *n)
{
    return n->mapped || (n->faces && n->faces->id != n->ino);
}

uint64_t face_shown_id(const struct node *n)
{
    return n->faces ? n->faces->id : n->ino;
}

void face_count_odd_locked(struct tree *t, const struct node *n, bool before)
{
    bool after = face_is_odd(n);

    if (after && !before)
        t->odd_nodes++;
    else if (before && !after)
        t->odd_nodes--;
}

struct face *face_find_locked(struct node *n, uint64_t id)
{
    struct face *face = n->faces;

    while (face && face->id != id)
        face = face->next;
    return face;
}

static bool is_open(const struct face *face)
{
    return face->cached || face->backed;
}

/* A further number lasts as long as it is known, or another one is open: who has been sent to it
 * may still be on his way. */
static bool is_needed(const struct face *face)
{
    if (is_open(face) || face->nlookup)
        return true;
    for (const struct face *other = face->node->faces; other; other = other->next)
        if (face->id & FACE_BIT && is_open(other))
            return true;
    return false;
}

void faces_spare_locked(struct tree *t, struct node *n)
{
    bool odd = face_is_odd(n);
    struct face **link = &n->faces, *face;

    while ((face = *link)) {
        if (is_needed(face)) {
            link = &face->next;
            continue;
        }
        *link = face->next;
        if (face->id & FACE_BIT) {
            t->faces[(face->id & ~FACE_BIT) - 1] = NULL;
            n->pages_old = true; /* of the number that is shown from now on */
        }
        free(face);
    }
    face_count_odd_locked(t, n, odd);
}

void faces_drop_locked(struct tree *t, struct node *n)
{
    if (face_is_odd(n))
        t->odd_nodes--;
    for (struct face *face = n->faces, *next; face; face = next) {
        next = face->next;
        if (face->id & FACE_BIT)
            t->faces[(face->id & ~FACE_BIT) - 1] = NULL;
        free(face);
    }
    n->faces = NULL;
}

struct face *face_own_locked(struct node *n)
{
    struct face *face = calloc(1, sizeof *face), **link = &n->faces;

    if (!face)
        return NULL;
    face->node = n;
    face->id = n->ino;
    while (*link)
        link = &(*link)->next;
    *link = face;
    return face;
}

struct face *face_new_locked(struct tree *t, struct node *n)
{
    struct face *face = calloc(1, sizeof *face);
    bool odd = face_is_odd(n);
    uint32_t slot = 0;

    while (slot < t->nfaces && t->faces[slot])
        slot++;
    if (slot == t->nfaces) {
        struct face **faces = realloc(t->faces, (slot + 1UL) * sizeof(struct face *));

        if (!faces) {
            free(face);
            return NULL;
        }
        t->faces = faces;
        t->faces[slot] = NULL;
        t->nfaces++;
    }
    if (!face)
        return NULL;
    face->node = n;
    face->id = FACE_BIT | (slot + 1ULL);
    face->next = n->faces;
    n->faces = face;
    t->faces[slot] = face;
    face_count_odd_locked(t, n, odd);
    return face;
}

void face_forget(struct tree *t, uint64_t id, uint64_t nlookup)
{
    uint64_t ino = id;

    if (id & FACE_BIT) {
        struct face *face;

        pthread_mutex_lock(&t->lock);
        face = face_by_id_locked(t, id);
        ino = face ? face->node->ino : 0;
        if (face) {
            face->nlookup = nlookup < face->nlookup ? face->nlookup - nlookup : 0;
            faces_spare_locked(t, face->node);
        }
        pthread_mutex_unlock(&t->lock);
    }
    if (ino)
        node_forget(t, ino, nlookup);
}

/* ---- attributes ---- */

void face_show(struct tree *t, struct fuse_entry_out *entry)
{
    struct node *n;

    if (!atomic_load(&t->odd_nodes))
        return;
    pthread_mutex_lock(&t->lock);
    n = node_find_locked(t, entry->nodeid);
    if (n && face_is_odd(n)) {
        entry->attr_valid = entry->attr_valid_nsec = 0;
        if (n->faces && n->faces->id != n->ino) {
            entry->nodeid = n->faces->id;
            n->faces->nlookup++;
        }
    }
    pthread_mutex_unlock(&t->lock);
}

void face_writer_enter(struct tree *t)
{
    (void)pthread_rwlock_rdlock(&t->leasing);
}

void face_writer_leave(struct tree *t)
{
    (void)pthread_rwlock_unlock(&t->leasing);
}

/* Nobody can write to the file: not by a mapping either, which holds the kernel's own file open
 * though the handle has been released. A lease tells; for a moment it would refuse to be opened for
 * writing (open(2) with O_NONBLOCK), which `leasing` keeps apart. */
static bool nobody_writes(struct tree *t, struct node *n)
{
    bool alone;

    if (pthread_rwlock_trywrlock(&t->leasing) != 0)
        return false;
    int fd = node_open(t, n, O_RDONLY | O_NONBLOCK | O_NOCTTY, false);
    alone = fd >= 0 && fcntl(fd, F_SETLEASE, F_RDLCK) == 0;
    if (alone)
        (void)fcntl(fd, F_SETLEASE, F_UNLCK);
    close_keep_errno(fd);
    (void)pthread_rwlock_unlock(&t->leasing);
    return alone;
}

static bool has_writers(const struct node *n)
{
    for (const struct face *face = n->faces; face; face = face->next)
        if (face->writers)
            return true;
    return false;
}

bool face_keeps_attr(struct tree *t, struct node *n)
{
    bool odd, busy;

    if (!atomic_load(&t->odd_nodes))
        return true;
    pthread_mutex_lock(&t->lock);
    odd = face_is_odd(n);
    busy = !n->mapped || has_writers(n);
    pthread_mutex_unlock(&t->lock);
    if (!odd)
        return true;
    if (busy || !nobody_writes(t, n))
        return false;
    pthread_mutex_lock(&t->lock);
    odd = face_is_odd(n);
    if (!has_writers(n))
        n->mapped = false;
    face_count_odd_locked(t, n, odd);
    odd = face_is_odd(n);
    pthread_mutex_unlock(&t->lock);
    return !odd;
}

void face_forget_attr(const struct tree *t, uint64_t id)
{
    struct fuse_notify_inval_inode_out inval = {.ino = id, .off = -1};
    struct fuse_out_header head = {.len = sizeof head + sizeof inval,
                                   .error = FUSE_NOTIFY_INVAL_INODE};
    struct iovec iov[] = {{&head, sizeof head}, {&inval, sizeof inval}};

    (void)!writev(t->device, iov, 2); /* ENOENT: it holds nothing */
}

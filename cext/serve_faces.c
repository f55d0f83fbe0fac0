/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What passthrough has to say of answers, whoever has given them: face.h. */
#include <fcntl.h>

#include "face.h"
#include "serve.h"

static ssize_t opened(struct answer *a, handler *handler)
{
    uint32_t flags = BODY(a, fuse_open_in)->flags;
    struct tree *t = a->s->tree;
    bool writes = flags & (O_WRONLY | O_RDWR | O_TRUNC), direct = false;
    ssize_t n = face_may_open(t, a->id, (int)flags, a->r->head->pid, &direct);

    if (n < 0)
        return n;
    if (writes)
        face_writer_enter(t);
    n = handler(a);
    if (n >= (ssize_t)sizeof(struct fuse_open_out)) {
        errint_t err = face_opened(t, a->id, direct, false, REPLY(a, fuse_open_out));

        n = err < 0 ? err : n;
    }
    if (writes)
        face_writer_leave(t);
    return n;
}

static ssize_t shown(struct answer *a, ssize_t n)
{
    if (n >= (ssize_t)sizeof(struct fuse_entry_out))
        face_show(a->s->tree, REPLY(a, fuse_entry_out));
    return n;
}

/* An entry, and the file open. */
static ssize_t created(struct answer *a, handler *handler)
{
    struct fuse_entry_out *entry = REPLY(a, fuse_entry_out);
    ssize_t n = handler(a);

    if (n >= (ssize_t)(sizeof *entry + sizeof(struct fuse_open_out))) {
        errint_t err = face_opened(a->s->tree, entry->nodeid, false, true,
                                   (struct fuse_open_out *)(entry + 1));

        if (err < 0) {
            node_forget(a->s->tree, entry->nodeid, 1);
            return err;
        }
    }
    return shown(a, n);
}

/* The file that gets another name is named in the body. */
static ssize_t linked(struct answer *a, handler *handler)
{
    struct {
        struct fuse_link_in in;
        char name[NAME_BYTES];
    } body;
    struct request r = {.head = a->r->head, .body = (const char *)&body, .len = a->r->len};
    struct answer inner = *a;

    if (r.len > sizeof body)
        return -ENAMETOOLONG;
    memcpy(&body, a->r->body, r.len);
    body.in.oldnodeid = face_ino(a->s->tree, body.in.oldnodeid);
    inner.r = &r;
    return body.in.oldnodeid ? shown(a, handler(&inner)) : -ESTALE;
}

/* Attributes alone. */
static ssize_t told(struct answer *a, handler *handler)
{
    struct tree *t = a->s->tree;
    uint32_t opcode = a->r->head->opcode;
    struct node *n = node_get(t, a->r->head->nodeid);
    bool keeps = !n || face_keeps_attr(t, n);
    bool writes = opcode == FUSE_SETATTR && BODY(a, fuse_setattr_in)->valid & FATTR_SIZE;
    ssize_t len;

    if (n)
        node_put(t, n);
    if (writes)
        face_writer_enter(t);
    len = handler(a);
    if (writes)
        face_writer_leave(t);
    if (len > 0 && !keeps && opcode == WIRE_STATX)
        REPLY(a, wire_statx_out)->attr_valid = REPLY(a, wire_statx_out)->attr_valid_nsec = 0;
    else if (len > 0 && !keeps)
        REPLY(a, fuse_attr_out)->attr_valid = REPLY(a, fuse_attr_out)->attr_valid_nsec = 0;
    return len;
}

ssize_t with_faces(struct answer *a, handler *handler)
{
    if (a->s->tree->device < 0)
        return handler(a);
    switch (a->r->head->opcode) {
    case FUSE_OPEN:
        return opened(a, handler);
    case FUSE_CREATE:
    case FUSE_TMPFILE:
        return created(a, handler);
    case FUSE_LOOKUP:
    case FUSE_SYMLINK:
    case FUSE_MKNOD:
    case FUSE_MKDIR:
        return shown(a, handler(a));
    case FUSE_LINK:
        return linked(a, handler);
    case FUSE_GETATTR:
    case FUSE_SETATTR:
    case WIRE_STATX:
        return told(a, handler);
    default:
        return handler(a);
    }
}

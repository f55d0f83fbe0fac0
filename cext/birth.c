/* SPDX-License-Identifier: GPL-2.0-or-later */
/* When what a node stands for was made. It goes with the inode number, so that both together name
 * one file for ever, as on a plain directory: a copy shows the birth of what it is a copy of, a
 * directory that merges several that of the one whose number it has. */
#include <fcntl.h>
#include <stdio.h>

#include "loan.h"
#include "marks.h"

static int64_t birth_of_dir(struct tree *t, struct node *n)
{
    struct rdir *r = NULL;
    int64_t birth = 0;
    int fd;

    pthread_mutex_lock(&t->lock);
    if (n->ndirs > 0) {
        r = n->dirs[t->has_upper && n->dirs[0]->layer == 0 && n->ndirs > 1 ? 1 : 0];
        rdir_ref_locked(r);
    }
    pthread_mutex_unlock(&t->lock);
    if (!r || r->sealed) {
        if (r)
            rdir_put(t, r);
        return 0;
    }
    fd = rdir_pin(t, r);
    if (fd >= 0) {
        birth = birth_time(fd, "");
        rdir_unpin(t, r);
    }
    rdir_put(t, r);
    return birth;
}

struct mark_query {
    const char *path, *name;
    char *value;
};

static errint_t mark_query(void *arg)
{
    struct mark_query *q = arg;
    size_t len;

    return read_xattr(q->path, false, q->name, &q->value, &len);
}

int64_t marked_birth(struct tree *t, int fd, bool upper)
{
    char path[PROC_BYTES], name[64], *end;
    struct mark_query q = {.path = path, .name = name};
    int64_t birth = 0;
    errint_t err;

    proc_path(path, fd, NULL);
    (void)snprintf(name, sizeof name, "%sunionfs.ino", t->prefix);
    err = upper ? as_owner(path, false, S_IRUSR, mark_query, &q) : mark_query(&q);
    if (err < 0)
        return 0;
    (void)strtoull(q.value, &end, 16);
    if (*end == ':')
        birth = strtoll(end + 1, NULL, 16);
    free(q.value);
    return birth;
}

errint_t node_birth(struct tree *t, struct node *n, int64_t *ret_birth)
{
    int64_t birth = 0;
    struct stat st;
    bool upper, own;

    if (S_ISDIR(n->type) && (birth = birth_of_dir(t, n)) != 0) {
        *ret_birth = birth;
        return 0;
    }
    cleanup_fd int fd = node_open(t, n, O_PATH | O_NOFOLLOW, false);
    if (fd < 0)
        return fd;
    if (stat_fd(fd, &st) < 0)
        return errno_or_eio();
    pthread_mutex_lock(&t->lock);
    upper = n->upper;
    own = n->ino == union_ino(t->layers[n->layer].fs, st.st_ino);
    pthread_mutex_unlock(&t->lock);
    if (!own && !S_ISDIR(n->type)) {
        birth = marked_birth(t, fd, upper);
        if (!birth && upper)
            birth = recorded_birth(t, fd, st.st_ino);
    }
    *ret_birth = birth ? birth : birth_time(fd, "");
    return 0;
}

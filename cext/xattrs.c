/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "xattrs.h"

#include <stdio.h>
#include <string.h>

#include "marks.h"

static const char CONTAINERS[] = "user.containers.override_";
static const char ACL[] = "system.posix_acl_";

static bool starts(const char *name, const char *prefix)
{
    return strncmp(name, prefix, strlen(prefix)) == 0;
}

/* Of stores/fscrypt.py, at the root of an upper. Without it all that lies there is lost, and a copy
 * of attributes onto the root of the union (rsync -X, cp -a) would replace it. It has the prefix of
 * trusted marks, which protects it; but not where marks are user.*. */
static bool is_key(const struct tree *t, const char *name)
{
    return t->prefix[0] == 'u' && strcmp(name, "trusted.overlay.unionfs_fscrypt") == 0;
}

static bool is_override(const struct tree *t, const char *name)
{
    if (t->override_mode == 1)
        return strcmp(name, "security.fuseoverlayfs.override_stat") == 0;
    return t->override_mode == 2 && starts(name, CONTAINERS);
}

errint_t xattr_stored_name(const struct tree *t, const char *name,
                           char stored[static XATTR_STORED_BYTES])
{
    const char *format = "%s%s%s";
    int n;

    if (is_override(t, name) || starts(name, FUSEOVERLAYFS) || is_key(t, name))
        return -EPERM;
    if (starts(name, t->prefix))
        n = snprintf(stored, XATTR_STORED_BYTES, format, t->prefix, "overlay.",
                     name + strlen(t->prefix));
    else if (t->override_mode == 2 && starts(name, "security."))
        n = snprintf(stored, XATTR_STORED_BYTES, format, CONTAINERS, "", name);
    else
        n = snprintf(stored, XATTR_STORED_BYTES, format, "", "", name);
    return n > 255 ? -ERANGE : 0; /* XATTR_NAME_MAX */
}

/* The other way: what a stored name is shown as, or false if it is not. */
static bool shown_name(const struct tree *t, const char *stored,
                       char out[static XATTR_STORED_BYTES])
{
    size_t prefix_len = strlen(t->prefix);

    if (starts(stored, t->prefix)) {
        if (!starts(stored + prefix_len, "overlay."))
            return false;
        (void)snprintf(out, XATTR_STORED_BYTES, "%s%s", t->prefix, stored + prefix_len + 8);
        return true;
    }
    if (t->override_mode == 2 && starts(stored, CONTAINERS)) {
        if (!starts(stored + sizeof CONTAINERS - 1, "security."))
            return false;
        (void)snprintf(out, XATTR_STORED_BYTES, "%s", stored + sizeof CONTAINERS - 1);
        return true;
    }
    if (starts(stored, FUSEOVERLAYFS) || is_key(t, stored))
        return false;
    if (is_override(t, stored) || (t->override_mode == 2 && starts(stored, "security.")))
        return false;
    (void)snprintf(out, XATTR_STORED_BYTES, "%s", stored);
    return true;
}

struct query {
    const char *name;
    char *value;
    size_t len;
};

static errint_t query(const char *path, bool nofollow, void *arg)
{
    struct query *q = arg;

    return read_xattr(path, nofollow, q->name, &q->value, &q->len);
}

static errint_t ask(struct tree *t, uint64_t ino, struct query *q)
{
    struct node *n = node_get(t, ino);
    errint_t err;

    if (!n)
        return -ESTALE;
    if (S_ISDIR(n->type) && n->ndirs && n->dirs[0]->sealed)
        err = q->name ? -ENODATA : -EOPNOTSUPP;
    else
        err = node_with_path(t, n, query, q);
    node_put(t, n);
    return err;
}

errint_t xattr_get(struct tree *t, uint64_t ino, const char *name, char **ret_value,
                   size_t *ret_len)
{
    char stored[XATTR_STORED_BYTES];
    struct query q = {.name = stored};
    errint_t err;

    if (t->noxattrs || (t->noacl && starts(name, ACL)))
        return -EOPNOTSUPP;
    if (xattr_stored_name(t, name, stored) < 0)
        return -ENODATA;
    err = ask(t, ino, &q);
    /* A layer that has none: the upper could hold it; and of an ACL, the kernel's permission check
     * believes only ENODATA. */
    if (err == -EOPNOTSUPP && ((t->has_upper && t->upper_xattrs) || starts(name, ACL)))
        err = -ENODATA;
    if (err == 0) {
        *ret_value = q.value;
        *ret_len = q.len;
    }
    return err;
}

errint_t xattr_list(struct tree *t, uint64_t ino, bool trusted, char **ret_list, size_t *ret_len)
{
    struct query q = {0};
    errint_t err;
    size_t len = 0;

    if (t->noxattrs)
        return -EOPNOTSUPP;
    err = ask(t, ino, &q);
    if (err == -EOPNOTSUPP) {
        q.len = 0;
        q.value = calloc(1, 1);
        err = q.value ? 0 : -ENOMEM;
    }
    if (err < 0)
        return err;
    /* A shown name is never longer than the stored one: rewritten in place. */
    for (size_t at = 0; at < q.len;) {
        size_t step = strlen(q.value + at) + 1;
        char out[XATTR_STORED_BYTES];

        if (shown_name(t, q.value + at, out) && (trusted || !starts(out, "trusted.")) &&
            !(t->noacl && starts(out, ACL))) {
            memcpy(q.value + len, out, strlen(out) + 1);
            len += strlen(out) + 1;
        }
        at += step;
    }
    *ret_list = q.value;
    *ret_len = len;
    return 0;
}

/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Tree: what is there. */
#include "flags.h"
#include "glue.h"

#include <fcntl.h>
#include <string.h>

#include "xattrs.h"

PyObject *py_lookup(PyObject *op, PyObject *args)
{
    unsigned long long parent;
    const char *name;
    struct stat st;
    errint_t err;

    if (!PyArg_ParseTuple(args, "Ky:lookup", &parent, &name))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    err = tree_lookup(TREE(op), parent, name, &st);
    Py_END_ALLOW_THREADS
    return err < 0 ? raise_errno(err, name) : attr_tuple(&st);
}

PyObject *py_getattr(PyObject *op, PyObject *args)
{
    unsigned long long ino;
    struct stat st;
    errint_t err = -ESTALE;

    if (!PyArg_ParseTuple(args, "K:getattr", &ino))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    struct node *n = node_get(TREE(op), ino);
    if (n) {
        err = node_attr(TREE(op), n, &st);
        node_put(TREE(op), n);
    }
    Py_END_ALLOW_THREADS
    return err < 0 ? raise_errno(err, NULL) : attr_tuple(&st);
}

PyObject *py_forget(PyObject *op, PyObject *args)
{
    unsigned long long ino, nlookup;

    if (!PyArg_ParseTuple(args, "KK:forget", &ino, &nlookup))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    node_forget(TREE(op), ino, nlookup);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

PyObject *py_entry(PyObject *op, PyObject *args)
{
    unsigned long long parent;
    const char *name;
    struct entry e;
    errint_t err;

    if (!PyArg_ParseTuple(args, "Ky:entry", &parent, &name))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    err = tree_entry(TREE(op), parent, name, &e);
    Py_END_ALLOW_THREADS
    if (err < 0)
        return raise_errno(err, name);
    return Py_BuildValue("KIiO", (unsigned long long)e.ino, (unsigned)e.type, (int)e.upper,
                         e.lower ? Py_True : Py_False);
}

PyObject *py_info(PyObject *op, PyObject *args)
{
    unsigned long long ino;
    struct node *n;
    PyObject *out = NULL;

    if (!PyArg_ParseTuple(args, "K:info", &ino))
        return NULL;
    n = node_get(TREE(op), ino);
    if (!n)
        return raise_errno(-ESTALE, NULL);
    pthread_mutex_lock(&TREE(op)->lock);
    bool foreign = S_ISDIR(n->type) ? n->ndirs > 1 : n->ino != n->real_ino;
    out = Py_BuildValue("IOOOOIyzLO", (unsigned)n->type, n->upper ? Py_True : Py_False,
                        n->metacopy ? Py_True : Py_False, n->indexed ? Py_True : Py_False,
                        n->unlinked ? Py_True : Py_False, (unsigned)n->ndirs,
                        n->index_name ? n->index_name : "", NULL, (long long)n->nlink_diff,
                        foreign ? Py_True : Py_False);
    PyObject *redirect = n->redirect ? PyBytes_FromString(n->redirect) : NULL;
    pthread_mutex_unlock(&TREE(op)->lock);
    node_put(TREE(op), n);
    if (out && redirect) {
        Py_DECREF(PyTuple_GET_ITEM(out, 7));
        PyTuple_SET_ITEM(out, 7, redirect);
    } else {
        Py_XDECREF(redirect);
    }
    return out;
}

/* Whether somebody has it open for writing. */
PyObject *py_is_written(PyObject *op, PyObject *args)
{
    unsigned long long ino;
    bool written = false;
    struct node *n;

    if (!PyArg_ParseTuple(args, "K:is_written", &ino))
        return NULL;
    n = node_get(TREE(op), ino);
    if (!n)
        return raise_errno(-ESTALE, NULL);
    pthread_mutex_lock(&TREE(op)->lock);
    for (const struct file *f = n->files; f && !written; f = f->next)
        written = (f->flags & O_ACCMODE) != O_RDONLY;
    pthread_mutex_unlock(&TREE(op)->lock);
    node_put(TREE(op), n);
    return PyBool_FromLong(written);
}

/* A name of the node: one that is real in its layer, if there is one. */
PyObject *py_name_of(PyObject *op, PyObject *args)
{
    unsigned long long ino;
    struct node *n;
    PyObject *out = NULL;

    if (!PyArg_ParseTuple(args, "K:name_of", &ino))
        return NULL;
    n = node_get(TREE(op), ino);
    if (!n)
        return raise_errno(-ESTALE, NULL);
    pthread_mutex_lock(&TREE(op)->lock);
    struct alias *best = alias_best_locked(n);
    if (best)
        out = Py_BuildValue("KyO", (unsigned long long)best->parent->ino, best->name,
                            best->real ? Py_True : Py_False);
    pthread_mutex_unlock(&TREE(op)->lock);
    node_put(TREE(op), n);
    if (!best)
        Py_RETURN_NONE;
    return out;
}

PyObject *py_name_is_real(PyObject *op, PyObject *args)
{
    unsigned long long parent_ino;
    const char *name;
    bool real = false;

    if (!PyArg_ParseTuple(args, "Ky:name_is_real", &parent_ino, &name))
        return NULL;
    pthread_mutex_lock(&TREE(op)->lock);
    struct node *parent = node_find_locked(TREE(op), parent_ino);
    struct alias *a = parent ? alias_find_locked(TREE(op), parent, name) : NULL;
    real = a && a->real;
    pthread_mutex_unlock(&TREE(op)->lock);
    return PyBool_FromLong(real);
}

PyObject *py_open_node(PyObject *op, PyObject *args)
{
    unsigned long long ino;
    int flags, data = 0, fd = -ESTALE;

    if (!PyArg_ParseTuple(args, "Ki|p:open_node", &ino, &flags, &data))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    struct node *n = node_get(TREE(op), ino);
    if (n) {
        fd = node_open(TREE(op), n, flags, data != 0);
        node_put(TREE(op), n);
    }
    Py_END_ALLOW_THREADS
    return fd < 0 ? raise_errno(fd, NULL) : PyLong_FromLong(fd);
}

PyObject *py_readlink(PyObject *op, PyObject *args)
{
    unsigned long long ino;
    char target[4097];
    ssize_t len;

    if (!PyArg_ParseTuple(args, "K:readlink", &ino))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    len = tree_readlink(TREE(op), ino, target, sizeof target);
    Py_END_ALLOW_THREADS
    return len < 0 ? raise_errno((errint_t)len, NULL) : PyBytes_FromStringAndSize(target, len);
}

PyObject *py_getxattr(PyObject *op, PyObject *args)
{
    unsigned long long ino;
    const char *name;
    char *value = NULL;
    size_t len = 0;
    errint_t err;

    if (!PyArg_ParseTuple(args, "Ky:getxattr", &ino, &name))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    err = xattr_get(TREE(op), ino, name, &value, &len);
    Py_END_ALLOW_THREADS
    if (err < 0)
        return raise_errno(err, name);
    PyObject *out = PyBytes_FromStringAndSize(value, (Py_ssize_t)len);
    free(value);
    return out;
}

PyObject *py_listxattr(PyObject *op, PyObject *args)
{
    unsigned long long ino;
    int trusted;
    char *list = NULL;
    size_t len = 0;
    errint_t err;

    if (!PyArg_ParseTuple(args, "Kp:listxattr", &ino, &trusted))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    err = xattr_list(TREE(op), ino, trusted != 0, &list, &len);
    Py_END_ALLOW_THREADS
    if (err < 0)
        return raise_errno(err, NULL);
    PyObject *out = PyList_New(0);
    for (size_t at = 0; out && at < len; at += strlen(list + at) + 1) {
        PyObject *item = PyBytes_FromString(list + at);

        if (!item || PyList_Append(out, item) < 0)
            Py_CLEAR(out);
        Py_XDECREF(item);
    }
    free(list);
    return out;
}

PyObject *py_xattr_stored(PyObject *op, PyObject *args)
{
    const char *name;
    char stored[XATTR_STORED_BYTES];
    errint_t err;

    if (!PyArg_ParseTuple(args, "y:xattr_stored", &name))
        return NULL;
    err = xattr_stored_name(TREE(op), name, stored);
    return err < 0 ? raise_errno(err, name) : PyBytes_FromString(stored);
}

PyObject *py_take_warning(PyObject *op, PyObject *args)
{
    struct tree *t = TREE(op);
    char text[sizeof t->warning];

    (void)args;
    pthread_mutex_lock(&t->lock);
    memcpy(text, t->warning, sizeof text);
    t->warning[0] = '\0';
    pthread_mutex_unlock(&t->lock);
    if (!text[0])
        Py_RETURN_NONE;
    return PyUnicode_DecodeFSDefault(text);
}

PyObject *py_close(PyObject *op, PyObject *args)
{
    (void)args;
    Py_BEGIN_ALLOW_THREADS
    tree_shut(TREE(op));
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

PyObject *py_counts(PyObject *op, PyObject *args)
{
    struct tree *t = TREE(op);
    uint64_t nodes, names;
    uint32_t dirs, files = 0;

    (void)args;
    pthread_mutex_lock(&t->lock);
    nodes = t->node_count;
    names = t->name_count;
    dirs = t->open_dirs;
    for (uint32_t i = 0; i < t->nfiles; i++)
        files += t->files[i] != NULL;
    pthread_mutex_unlock(&t->lock);
    return Py_BuildValue("{s:K,s:K,s:I,s:I}", "nodes", (unsigned long long)nodes, "names",
                         (unsigned long long)names, "open_dirs", dirs, "open_files", files);
}

PyObject *py_birth(PyObject *op, PyObject *args)
{
    unsigned long long ino;
    int64_t birth = 0;
    errint_t err = -ESTALE;

    if (!PyArg_ParseTuple(args, "K:birth", &ino))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    struct node *n = node_get(TREE(op), ino);
    if (n) {
        err = node_birth(TREE(op), n, &birth);
        node_put(TREE(op), n);
    }
    Py_END_ALLOW_THREADS
    return err < 0 ? raise_errno(err, NULL) : PyLong_FromLongLong(birth);
}

PyObject *py_flags(PyObject *op, PyObject *args)
{
    unsigned long long ino;
    int extended;
    errint_t err = -ESTALE;
    union {
        uint32_t flags;
        struct fsxattr attr;
    } u = {0};

    if (!PyArg_ParseTuple(args, "Kp:flags", &ino, &extended))
        return NULL;
    size_t size = extended ? sizeof u.attr : sizeof u.flags;
    Py_BEGIN_ALLOW_THREADS
    struct node *n = node_get(TREE(op), ino);
    if (n) {
        err = node_flags(TREE(op), n, extended ? FS_IOC_FSGETXATTR : FS_IOC_GETFLAGS, &u, size);
        node_put(TREE(op), n);
    }
    Py_END_ALLOW_THREADS
    return err < 0 ? raise_errno(err, NULL)
                   : PyBytes_FromStringAndSize((const char *)&u, (Py_ssize_t)size);
}

PyObject *py_changeable(PyObject *op, PyObject *args)
{
    unsigned long long ino;
    int append, upper;
    errint_t err;

    if (!PyArg_ParseTuple(args, "Kpp:changeable", &ino, &append, &upper))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    err = tree_changeable(TREE(op), ino, append != 0, upper != 0);
    Py_END_ALLOW_THREADS
    return none_or_errno(err, NULL);
}

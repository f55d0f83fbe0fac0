/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Tree: where changes are made, and being told of them. */
#include "glue.h"

#include "whiteout.h"

PyObject *py_upper_dir(PyObject *op, PyObject *args)
{
    unsigned long long ino;
    struct tree *t = TREE(op);
    struct rdir *dir = NULL;
    int fd = -ESTALE;

    if (!PyArg_ParseTuple(args, "K:upper_dir", &ino))
        return NULL;
    struct module_state *state = PyType_GetModuleState(Py_TYPE(op));
    DirObject *out = PyObject_New(DirObject, state->dir_type);
    if (!out)
        return NULL;
    out->owner = NULL;
    Py_BEGIN_ALLOW_THREADS
    struct node *n = node_get(t, ino);
    if (n) {
        fd = upper_pin(t, n, &dir);
        node_put(t, n);
    }
    Py_END_ALLOW_THREADS
    if (fd < 0) {
        Py_DECREF(out);
        return raise_errno(fd, NULL);
    }
    out->owner = (TreeObject *)Py_NewRef(op);
    out->dir = dir;
    out->fd = fd;
    return (PyObject *)out;
}

PyObject *py_ask_anew(PyObject *op, PyObject *args)
{
    const char *name;
    int dirfd;

    if (!PyArg_ParseTuple(args, "iy:ask_anew", &dirfd, &name))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    ask_anew(TREE(op), dirfd, name);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

PyObject *py_make_whiteout(PyObject *op, PyObject *args)
{
    const char *name;
    int dirfd;
    errint_t err;

    if (!PyArg_ParseTuple(args, "iy:make_whiteout", &dirfd, &name))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    err = make_whiteout(TREE(op), dirfd, name);
    Py_END_ALLOW_THREADS
    if (err < 0)
        return raise_errno(err, name);
    Py_RETURN_NONE;
}

PyObject *py_index_name(PyObject *op, PyObject *args)
{
    unsigned long long ino;
    struct origin o;
    errint_t err;

    if (!PyArg_ParseTuple(args, "K:index_name", &ino))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    err = origin_of(TREE(op), ino, &o);
    Py_END_ALLOW_THREADS
    if (err < 0)
        return raise_errno(err, NULL);
    return PyUnicode_FromString(o.hex);
}

PyObject *py_copied_up(PyObject *op, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"ino",        "parent",     "name",      "metacopy",
                            "index_name", "nlink_diff", "orphan_fd", NULL};
    struct copied_up c = {.orphan_fd = -1};
    unsigned long long ino, parent;
    long long diff = 0;
    int metacopy = 0;
    errint_t err;

    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "KKy|$pzLi:copied_up", names, &ino, &parent,
                                     &c.name, &metacopy, &c.index_name, &diff, &c.orphan_fd))
        return NULL;
    c.ino = ino;
    c.parent = parent;
    c.metacopy = metacopy != 0;
    c.nlink_diff = diff;
    Py_BEGIN_ALLOW_THREADS
    err = tree_copied_up(TREE(op), &c);
    Py_END_ALLOW_THREADS
    return none_or_errno(err, c.name);
}

PyObject *py_data_copied(PyObject *op, PyObject *args)
{
    unsigned long long ino;
    errint_t err;

    if (!PyArg_ParseTuple(args, "K:data_copied", &ino))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    err = tree_data_copied(TREE(op), ino);
    Py_END_ALLOW_THREADS
    return none_or_errno(err, NULL);
}

#define NAMED_CALL(py_name, format, call)                                                          \
    PyObject *py_name(PyObject *op, PyObject *args)                                                \
    {                                                                                              \
        unsigned long long parent;                                                                 \
        const char *name;                                                                          \
        errint_t err = 0;                                                                          \
                                                                                                   \
        if (!PyArg_ParseTuple(args, format, &parent, &name))                                       \
            return NULL;                                                                           \
        Py_BEGIN_ALLOW_THREADS                                                                     \
        call;                                                                                      \
        Py_END_ALLOW_THREADS                                                                       \
        return none_or_errno(err, name);                                                           \
    }

NAMED_CALL(py_prepare_unlink, "Ky:prepare_unlink",
           err = tree_prepare_unlink(TREE(op), parent, name))
NAMED_CALL(py_abandon_unlink, "Ky:abandon_unlink", tree_abandon_unlink(TREE(op), parent, name))
NAMED_CALL(py_unlinked, "Ky:unlinked", err = tree_unlinked(TREE(op), parent, name))
NAMED_CALL(py_name_made_real, "Ky:name_made_real",
           err = tree_alias_made_real(TREE(op), parent, name))
NAMED_CALL(py_set_redirect, "Ky:set_redirect", err = tree_set_redirect(TREE(op), parent, name))

PyObject *py_renamed(PyObject *op, PyObject *args)
{
    unsigned long long parent, new_parent;
    const char *name, *new_name;
    int exchange;
    errint_t err;

    if (!PyArg_ParseTuple(args, "KyKyp:renamed", &parent, &name, &new_parent, &new_name, &exchange))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    err = tree_renamed(TREE(op), parent, name, new_parent, new_name, exchange != 0);
    Py_END_ALLOW_THREADS
    return none_or_errno(err, name);
}

PyObject *py_made_opaque(PyObject *op, PyObject *args)
{
    unsigned long long ino;

    if (!PyArg_ParseTuple(args, "K:made_opaque", &ino))
        return NULL;
    return none_or_errno(tree_made_opaque(TREE(op), ino), NULL);
}

PyObject *py_make_impure(PyObject *op, PyObject *args)
{
    unsigned long long ino;
    errint_t err;

    if (!PyArg_ParseTuple(args, "K:make_impure", &ino))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    err = tree_make_impure(TREE(op), ino);
    Py_END_ALLOW_THREADS
    return none_or_errno(err, NULL);
}

PyObject *py_set_nlink_diff(PyObject *op, PyObject *args)
{
    unsigned long long ino;
    long long diff;

    if (!PyArg_ParseTuple(args, "KL:set_nlink_diff", &ino, &diff))
        return NULL;
    tree_set_nlink_diff(TREE(op), ino, diff);
    Py_RETURN_NONE;
}

PyObject *py_redirect_path(PyObject *op, PyObject *args)
{
    unsigned long long ino;
    char *path = NULL;
    errint_t err;

    if (!PyArg_ParseTuple(args, "K:redirect_path", &ino))
        return NULL;
    err = tree_redirect_path(TREE(op), ino, &path);
    if (err < 0)
        return raise_errno(err, NULL);
    PyObject *out = PyBytes_FromString(path);
    free(path);
    return out;
}

PyObject *py_made_nameless(PyObject *op, PyObject *args)
{
    struct stat st;
    errint_t err;
    int fd;

    if (!PyArg_ParseTuple(args, "i:made_nameless", &fd))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    err = tree_made_nameless(TREE(op), fd, &st);
    Py_END_ALLOW_THREADS
    return err < 0 ? raise_errno(err, NULL) : attr_tuple(&st);
}

PyObject *py_named(PyObject *op, PyObject *args)
{
    unsigned long long ino;

    if (!PyArg_ParseTuple(args, "K:named", &ino))
        return NULL;
    tree_named(TREE(op), ino);
    Py_RETURN_NONE;
}

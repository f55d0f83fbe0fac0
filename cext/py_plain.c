/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Tree: changes that are made in C, True where they were plain; the locks by number. */
#include "glue.h"

#include "plain.h"

/* True, False for what is not plain, or OSError. */
static PyObject *plain_or_errno(errint_t err, const char *name)
{
    return err < 0 ? raise_errno(err, name) : PyBool_FromLong(err == 0);
}

/* The descriptor of a regular file, -1 of anything else, None where it was not plain. */
PyObject *py_plain_make(PyObject *op, PyObject *args)
{
    unsigned long long parent;
    unsigned mode, umask, uid, gid;
    unsigned long long rdev;
    struct new_file new = {0};
    const char *name;
    int fd = -1;
    errint_t err;

    if (!PyArg_ParseTuple(args, "KyIIKyiII:plain_make", &parent, &name, &mode, &umask, &rdev,
                          &new.target, &new.flags, &uid, &gid))
        return NULL;
    new.mode = (mode_t)mode;
    new.umask = (mode_t)umask;
    new.rdev = (dev_t)rdev;
    new.uid = uid;
    new.gid = gid;
    Py_BEGIN_ALLOW_THREADS
    err = plain_make(TREE(op), parent, name, &new, &fd);
    Py_END_ALLOW_THREADS
    if (err < 0)
        return raise_errno(err, name);
    if (err == NOT_PLAIN)
        Py_RETURN_NONE;
    return PyLong_FromLong(fd);
}

static PyObject *remove_name(PyObject *op, PyObject *args,
                             errint_t (*call)(struct tree *t, uint64_t parent, const char *name))
{
    unsigned long long parent;
    const char *name;
    errint_t err;

    if (!PyArg_ParseTuple(args, "Ky", &parent, &name))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    err = call(TREE(op), parent, name);
    Py_END_ALLOW_THREADS
    return plain_or_errno(err, name);
}

PyObject *py_plain_unlink(PyObject *op, PyObject *args)
{
    return remove_name(op, args, plain_unlink);
}

PyObject *py_plain_rmdir(PyObject *op, PyObject *args)
{
    return remove_name(op, args, plain_rmdir);
}

PyObject *py_plain_link(PyObject *op, PyObject *args)
{
    unsigned long long ino, parent;
    const char *name;
    errint_t err;

    if (!PyArg_ParseTuple(args, "KKy:plain_link", &ino, &parent, &name))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    err = plain_link(TREE(op), ino, parent, name);
    Py_END_ALLOW_THREADS
    return plain_or_errno(err, name);
}

PyObject *py_plain_rename(PyObject *op, PyObject *args)
{
    unsigned long long parent, new_parent;
    const char *name, *new_name;
    errint_t err;

    if (!PyArg_ParseTuple(args, "KyKy:plain_rename", &parent, &name, &new_parent, &new_name))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    err = plain_rename(TREE(op), parent, name, new_parent, new_name);
    Py_END_ALLOW_THREADS
    return plain_or_errno(err, name);
}

PyObject *py_plain_copy_up(PyObject *op, PyObject *args)
{
    unsigned long long ino;
    int data;
    errint_t err;

    if (!PyArg_ParseTuple(args, "Kp:plain_copy_up", &ino, &data))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    err = plain_copy_up(TREE(op), ino, data != 0);
    Py_END_ALLOW_THREADS
    return plain_or_errno(err, NULL);
}

PyObject *py_mark_origin(PyObject *op, PyObject *args)
{
    unsigned long long ino;
    int src, fd;
    bool kept = false;
    errint_t err = -ESTALE;

    if (!PyArg_ParseTuple(args, "Kii:mark_origin", &ino, &src, &fd))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    struct node *n = node_get(TREE(op), ino);
    if (n) {
        err = mark_origin(TREE(op), n, src, fd, &kept);
        node_put(TREE(op), n);
    }
    Py_END_ALLOW_THREADS
    return err < 0 ? raise_errno(err, NULL) : PyBool_FromLong(kept);
}

PyObject *py_metacopy_noted(PyObject *op, PyObject *args)
{
    (void)args;
    TREE(op)->metacopy_noted = true;
    Py_RETURN_NONE;
}

PyObject *py_temp_name(PyObject *op, PyObject *args)
{
    char name[TEMP_BYTES];

    (void)args;
    temp_name(TREE(op), name);
    return PyBytes_FromString(name);
}

/* ---- Hold: a lock by number, as a context manager ---- */

typedef struct {
    PyObject_HEAD
    TreeObject *owner;
    struct keylocks *locks;
    struct keyhold hold;
    bool held;
} HoldObject;

static PyObject *hold_new(PyObject *op, struct keylocks *locks, PyObject *args)
{
    struct module_state *state = PyType_GetModuleState(Py_TYPE(op));
    unsigned long long first, second = 0;
    HoldObject *self;

    if (!PyArg_ParseTuple(args, "K|K", &first, &second))
        return NULL;
    self = PyObject_New(HoldObject, state->hold_type);
    if (!self)
        return NULL;
    self->owner = (TreeObject *)Py_NewRef(op);
    self->locks = locks;
    self->hold = (struct keyhold){.keys = {first, second == first ? 0 : second}};
    self->held = false;
    return (PyObject *)self;
}

PyObject *py_copying(PyObject *op, PyObject *args)
{
    return hold_new(op, &TREE(op)->copying, args);
}

PyObject *py_committing(PyObject *op, PyObject *args)
{
    return hold_new(op, &TREE(op)->committing, args);
}

PyObject *py_entering(PyObject *op, PyObject *args)
{
    return hold_new(op, &TREE(op)->entering, args);
}

static PyObject *hold_enter(PyObject *op, PyObject *unused)
{
    HoldObject *self = (HoldObject *)op;

    (void)unused;
    if (self->held) {
        PyErr_SetString(PyExc_RuntimeError, "it is held already");
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    keys_take(self->locks, &self->hold);
    Py_END_ALLOW_THREADS
    self->held = true;
    Py_RETURN_NONE;
}

static void hold_end(HoldObject *self)
{
    if (self->held)
        keys_give(self->locks, &self->hold);
    self->held = false;
}

static PyObject *hold_exit(PyObject *op, PyObject *args)
{
    (void)args;
    hold_end((HoldObject *)op);
    Py_RETURN_NONE;
}

static void hold_dealloc(PyObject *op)
{
    PyTypeObject *type = Py_TYPE(op);

    hold_end((HoldObject *)op);
    Py_DECREF(((HoldObject *)op)->owner);
    PyObject_Free(op);
    Py_DECREF(type);
}

static PyMethodDef hold_methods[] = {
    {"__enter__", hold_enter, METH_NOARGS, NULL},
    {"__exit__", hold_exit, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot hold_slots[] = {
    {Py_tp_dealloc, hold_dealloc},
    {Py_tp_methods, hold_methods},
    {0, NULL},
};

PyType_Spec hold_spec = {
    .name = "unionfs._native.Hold",
    .basicsize = sizeof(HoldObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = hold_slots,
};

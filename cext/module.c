/* SPDX-License-Identifier: GPL-2.0-or-later */
/* unionfs._native: the module, its functions and its state. The contract stands in
 * unionfs/_native.pyi. */
#include "glue.h"

#include <fcntl.h>
#include <sys/syscall.h>

#include "copy.h"
#include "flags.h"
#include "loan.h"
#include "room.h"

/* OSError(errno, text, name). */
PyObject *raise_errno(errint_t err, const char *name)
{
    errno = -err;
    if (!name)
        return PyErr_SetFromErrno(PyExc_OSError);
    PyObject *bytes = PyBytes_FromString(name);
    if (!bytes)
        return NULL;
    errno = -err;
    PyErr_SetFromErrnoWithFilenameObject(PyExc_OSError, bytes);
    Py_DECREF(bytes);
    return NULL;
}

PyObject *none_or_errno(errint_t err, const char *name)
{
    if (err < 0)
        return raise_errno(err, name);
    Py_RETURN_NONE;
}

static PyObject *time_ns(const struct timespec *ts)
{
    return PyLong_FromLongLong((long long)ts->tv_sec * 1000000000LL + ts->tv_nsec);
}

PyObject *attr_tuple(const struct stat *st)
{
    PyObject *t = PyTuple_New(12);
    int i = 0;

    if (!t)
        return NULL;
    PyTuple_SET_ITEM(t, i++, PyLong_FromUnsignedLongLong(st->st_ino));
    PyTuple_SET_ITEM(t, i++, PyLong_FromUnsignedLong(st->st_mode));
    PyTuple_SET_ITEM(t, i++, PyLong_FromUnsignedLong(st->st_nlink));
    PyTuple_SET_ITEM(t, i++, PyLong_FromUnsignedLong(st->st_uid));
    PyTuple_SET_ITEM(t, i++, PyLong_FromUnsignedLong(st->st_gid));
    PyTuple_SET_ITEM(t, i++, PyLong_FromUnsignedLongLong(st->st_rdev));
    PyTuple_SET_ITEM(t, i++, PyLong_FromLongLong(st->st_size));
    PyTuple_SET_ITEM(t, i++, PyLong_FromLongLong(st->st_blksize));
    PyTuple_SET_ITEM(t, i++, PyLong_FromLongLong(st->st_blocks));
    PyTuple_SET_ITEM(t, i++, time_ns(&st->st_atim));
    PyTuple_SET_ITEM(t, i++, time_ns(&st->st_mtim));
    PyTuple_SET_ITEM(t, i++, time_ns(&st->st_ctim));
    for (i = 0; i < 12; i++) {
        if (!PyTuple_GET_ITEM(t, i)) {
            Py_DECREF(t);
            return NULL;
        }
    }
    return t;
}

static PyObject *py_copy_data(PyObject *module, PyObject *args)
{
    int src, dst;
    unsigned long long size;
    struct stat st;
    bool settled = false;
    errint_t err;

    (void)module;
    if (!PyArg_ParseTuple(args, "iiK:copy_data", &src, &dst, &size))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    err = fstat(src, &st) < 0 ? errno_or_eio()
                              : copy_data(src, dst, &st, size, keeps_order(dst), &settled);
    Py_END_ALLOW_THREADS
    return err < 0 ? raise_errno(err, NULL) : PyBool_FromLong(settled);
}

static PyObject *py_copy_xattrs(PyObject *module, PyObject *args)
{
    int src, dst;
    const char *prefix, *override;
    char from[PROC_BYTES], to[PROC_BYTES];
    errint_t err;

    (void)module;
    if (!PyArg_ParseTuple(args, "iisz:copy_xattrs", &src, &dst, &prefix, &override))
        return NULL;
    proc_path(from, src, NULL);
    proc_path(to, dst, NULL);
    Py_BEGIN_ALLOW_THREADS
    err = copy_xattrs(from, to, prefix, override);
    Py_END_ALLOW_THREADS
    return none_or_errno(err, NULL);
}

static PyObject *py_birth_time(PyObject *module, PyObject *args)
{
    int fd;

    (void)module;
    if (!PyArg_ParseTuple(args, "i:birth_time", &fd))
        return NULL;
    return PyLong_FromLongLong(birth_time(fd, ""));
}

/* A loan as a number: 0 where there was nothing to lend. */
static PyObject *py_lend(PyObject *module, PyObject *args)
{
    int fd;
    unsigned bits;
    char path[PROC_BYTES];
    struct loan *l = NULL;
    errint_t err;

    (void)module;
    if (!PyArg_ParseTuple(args, "iI:lend", &fd, &bits))
        return NULL;
    proc_path(path, fd, NULL);
    Py_BEGIN_ALLOW_THREADS
    err = loan_take(path, false, (mode_t)bits, &l);
    Py_END_ALLOW_THREADS
    return err < 0 ? raise_errno(err, NULL) : PyLong_FromVoidPtr(l);
}

static PyObject *py_give_back(PyObject *module, PyObject *args)
{
    PyObject *number;
    void *l;

    (void)module;
    if (!PyArg_ParseTuple(args, "O!:give_back", &PyLong_Type, &number))
        return NULL;
    l = PyLong_AsVoidPtr(number);
    if (!l && PyErr_Occurred())
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    loan_return(l);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *py_set_mode(PyObject *module, PyObject *args)
{
    int fd;
    unsigned mode;
    char path[PROC_BYTES];
    errint_t err;

    (void)module;
    if (!PyArg_ParseTuple(args, "iI:set_mode", &fd, &mode))
        return NULL;
    proc_path(path, fd, NULL);
    Py_BEGIN_ALLOW_THREADS
    err = loan_set_mode(path, (mode_t)mode);
    Py_END_ALLOW_THREADS
    return none_or_errno(err, NULL);
}

static PyObject *py_check_room(PyObject *module, PyObject *args)
{
    int src, dst, image;
    unsigned long long size;

    (void)module;
    if (!PyArg_ParseTuple(args, "iiiK:check_room", &src, &dst, &image, &size))
        return NULL;
    return none_or_errno(check_room(src, dst, image, size), NULL);
}

static PyObject *py_room_missing(PyObject *module, PyObject *args)
{
    int image;
    unsigned long long free_bytes;

    (void)module;
    if (!PyArg_ParseTuple(args, "iK:room_missing", &image, &free_bytes))
        return NULL;
    return PyLong_FromUnsignedLongLong(room_missing(image, free_bytes));
}

/* The mode that may be set afterwards. */
static PyObject *py_give_owner(PyObject *module, PyObject *args)
{
    int fd;
    unsigned uid, gid, bits;
    char path[PROC_BYTES];
    mode_t mode;
    errint_t err;

    (void)module;
    if (!PyArg_ParseTuple(args, "iIII:give_owner", &fd, &uid, &gid, &bits))
        return NULL;
    mode = (mode_t)bits;
    proc_path(path, fd, NULL);
    Py_BEGIN_ALLOW_THREADS
    err = give_owner(path, uid, gid, &mode);
    Py_END_ALLOW_THREADS
    return err < 0 ? raise_errno(err, NULL) : PyLong_FromUnsignedLong(mode);
}

static PyObject *py_mode_of(PyObject *module, PyObject *args)
{
    int fd;
    struct stat st;
    errint_t err;

    (void)module;
    if (!PyArg_ParseTuple(args, "i:mode_of", &fd))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    err = loan_stat(fd, "", AT_EMPTY_PATH, &st);
    Py_END_ALLOW_THREADS
    return err < 0 ? raise_errno(err, NULL) : PyLong_FromUnsignedLong(st.st_mode);
}

static PyObject *py_copy_flags(PyObject *module, PyObject *args)
{
    int src, dst;
    uint32_t late;

    (void)module;
    if (!PyArg_ParseTuple(args, "ii:copy_flags", &src, &dst))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    copy_flags(src, dst, &late);
    Py_END_ALLOW_THREADS
    return PyLong_FromUnsignedLong(late);
}

static PyObject *py_add_flags(PyObject *module, PyObject *args)
{
    int fd;
    unsigned flags;
    errint_t err;

    (void)module;
    if (!PyArg_ParseTuple(args, "iI:add_flags", &fd, &flags))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    err = add_flags(fd, flags);
    Py_END_ALLOW_THREADS
    return none_or_errno(err, NULL);
}

static PyObject *py_lift_flags(PyObject *module, PyObject *args)
{
    int fd;
    uint32_t lifted = 0;
    errint_t err;

    (void)module;
    if (!PyArg_ParseTuple(args, "i:lift_flags", &fd))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    err = lift_flags(fd, &lifted);
    Py_END_ALLOW_THREADS
    return err < 0 ? raise_errno(err, NULL) : PyLong_FromUnsignedLong(lifted);
}

static PyObject *py_renameat2(PyObject *module, PyObject *args)
{
    int olddir, newdir;
    unsigned flags;
    const char *old, *new;
    errint_t err;

    (void)module;
    if (!PyArg_ParseTuple(args, "iyiyI:renameat2", &olddir, &old, &newdir, &new, &flags))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    err = syscall(SYS_renameat2, olddir, old, newdir, new, flags) < 0 ? errno_or_eio() : 0;
    Py_END_ALLOW_THREADS
    return none_or_errno(err, old);
}

static PyMethodDef functions[] = {
    {"copy_data", py_copy_data, METH_VARARGS, NULL},
    {"copy_xattrs", py_copy_xattrs, METH_VARARGS, NULL},
    {"copy_flags", py_copy_flags, METH_VARARGS, NULL},
    {"add_flags", py_add_flags, METH_VARARGS, NULL},
    {"lift_flags", py_lift_flags, METH_VARARGS, NULL},
    {"birth_time", py_birth_time, METH_VARARGS, NULL},
    {"lend", py_lend, METH_VARARGS, NULL},
    {"give_back", py_give_back, METH_VARARGS, NULL},
    {"set_mode", py_set_mode, METH_VARARGS, NULL},
    {"check_room", py_check_room, METH_VARARGS, NULL},
    {"room_missing", py_room_missing, METH_VARARGS, NULL},
    {"give_owner", py_give_owner, METH_VARARGS, NULL},
    {"mode_of", py_mode_of, METH_VARARGS, NULL},
    {"renameat2", py_renameat2, METH_VARARGS, NULL},
    {"open_rings", open_rings, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

static int module_exec(PyObject *module)
{
    struct module_state *state = PyModule_GetState(module);

    state->tree_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &tree_spec, NULL);
    state->dir_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &dir_spec, NULL);
    state->engine_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &engine_spec, NULL);
    state->hold_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &hold_spec, NULL);
    if (!state->tree_type || !state->dir_type || !state->engine_type || !state->hold_type ||
        PyModule_AddType(module, state->tree_type) < 0 ||
        PyModule_AddType(module, state->dir_type) < 0 ||
        PyModule_AddType(module, state->engine_type) < 0)
        return -1;
    return PyModule_AddIntMacro(module, ROOT_INO);
}

static int module_traverse(PyObject *module, visitproc visit, void *arg)
{
    struct module_state *state = PyModule_GetState(module);

    Py_VISIT(state->tree_type);
    Py_VISIT(state->dir_type);
    Py_VISIT(state->engine_type);
    Py_VISIT(state->hold_type);
    return 0;
}

static int module_clear(PyObject *module)
{
    struct module_state *state = PyModule_GetState(module);

    Py_CLEAR(state->tree_type);
    Py_CLEAR(state->dir_type);
    Py_CLEAR(state->engine_type);
    Py_CLEAR(state->hold_type);
    return 0;
}

static PyModuleDef_Slot module_slots[] = {
    {Py_mod_exec, module_exec},
    {0, NULL},
};

static struct PyModuleDef module_def = {
    PyModuleDef_HEAD_INIT,   .m_name = "unionfs._native", .m_size = sizeof(struct module_state),
    .m_methods = functions,  .m_slots = module_slots,     .m_traverse = module_traverse,
    .m_clear = module_clear,
};

PyMODINIT_FUNC PyInit__native(void);
PyMODINIT_FUNC PyInit__native(void)
{
    return PyModuleDef_Init(&module_def);
}

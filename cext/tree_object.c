/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The types: Tree, and UpperDir, a pinned directory descriptor. */
#include "glue.h"

#include <string.h>

static int parse_ranges(PyObject *list, struct idrange **ret_ranges, uint32_t *ret_n)
{
    Py_ssize_t n = PySequence_Size(list);
    struct idrange *ranges;

    if (n < 0)
        return -1;
    ranges = PyMem_Calloc((size_t)n + 1, sizeof *ranges);
    if (!ranges) {
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t i = 0; i < n; i++) {
        PyObject *item = PySequence_GetItem(list, i);
        int ok = item && PyArg_ParseTuple(item, "III:range", &ranges[i].inside, &ranges[i].outside,
                                          &ranges[i].length);

        Py_XDECREF(item);
        if (!ok) {
            PyMem_Free(ranges);
            return -1;
        }
    }
    *ret_ranges = ranges;
    *ret_n = (uint32_t)n;
    return 0;
}

static int parse_layers(PyObject *list, struct layer **ret_layers, uint16_t *ret_n)
{
    Py_ssize_t n = PySequence_Size(list);
    struct layer *layers;

    if (n < 0)
        return -1;
    if (n < 1 || n > MAX_LAYERS) {
        PyErr_Format(PyExc_ValueError, "between 1 and %d layers, not %zd", MAX_LAYERS, n);
        return -1;
    }
    layers = PyMem_Calloc((size_t)n, sizeof *layers);
    if (!layers) {
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t i = 0; i < n; i++) {
        PyObject *item = PySequence_GetItem(list, i);
        int careful = 0, wh_files = 0;
        unsigned short fs = 0;
        const char *uuid = NULL;
        Py_ssize_t uuid_len = 0;
        struct stat st;
        int ok = item && PyArg_ParseTuple(item, "iHppy#:layer", &layers[i].fd, &fs, &careful,
                                          &wh_files, &uuid, &uuid_len);

        if (ok && uuid_len != 16 && uuid_len != 0 && uuid_len != 32) {
            PyErr_SetString(PyExc_ValueError, "a uuid has 16 bytes, or none, or there are two");
            ok = 0;
        }
        if (ok && fstat(layers[i].fd, &st) < 0) {
            PyErr_SetFromErrno(PyExc_OSError);
            ok = 0;
        }
        if (ok) {
            layers[i].fs = fs;
            layers[i].careful = careful != 0;
            layers[i].wh_files = wh_files != 0;
            layers[i].dev = st.st_dev;
            layers[i].in_fuse = is_in_fuse(layers[i].fd);
            layers[i].passing = uuid_len == 0;
            layers[i].other_uuid = uuid_len == 32;
            if (uuid_len > 0)
                memcpy(layers[i].uuid, uuid, 16);
            if (uuid_len == 32)
                memcpy(layers[i].kernel_uuid, uuid + 16, 16);
        }
        Py_XDECREF(item);
        if (!ok) {
            PyMem_Free(layers);
            return -1;
        }
    }
    *ret_layers = layers;
    *ret_n = (uint16_t)n;
    return 0;
}

static PyObject *tree_new_object(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {
        "layers",     "has_upper",  "live",         "upper_xattrs", "user_prefix",    "override",
        "squash_uid", "squash_gid", "uids",         "gids",         "max_open_dirs",  "index_fd",
        "numbers_fd", "image_fd",   "static_nlink", "noxattrs",     "noacl",          "work_fd",
        "plain",      "all_ids",    "sync_copies",  "sync_names",   "metacopy_bytes", NULL};
    PyObject *layer_list, *uid_list, *gid_list;
    int has_upper, live, upper_xattrs, user_prefix, override, index_fd, numbers_fd, image_fd;
    int static_nlink, noxattrs, noacl, work_fd, plain, all_ids, sync_copies, sync_names;
    unsigned long long metacopy_bytes;
    long long squash_uid, squash_gid;
    unsigned max_open_dirs;
    struct layer *layers = NULL;
    struct idrange *uids = NULL, *gids = NULL;
    uint16_t nlayers = 0;
    struct tree_options o = {0};
    TreeObject *self = NULL;
    errint_t err;

    if (!PyArg_ParseTupleAndKeywords(
            args, kwargs, "O$ppppiLLOOIiiipppippppK:Tree", names, &layer_list, &has_upper, &live,
            &upper_xattrs, &user_prefix, &override, &squash_uid, &squash_gid, &uid_list, &gid_list,
            &max_open_dirs, &index_fd, &numbers_fd, &image_fd, &static_nlink, &noxattrs, &noacl,
            &work_fd, &plain, &all_ids, &sync_copies, &sync_names, &metacopy_bytes))
        return NULL;
    if (parse_layers(layer_list, &layers, &nlayers) < 0 ||
        parse_ranges(uid_list, &uids, &o.nuids) < 0 || parse_ranges(gid_list, &gids, &o.ngids) < 0)
        goto out;
    o.has_upper = has_upper != 0;
    o.live = live != 0;
    o.static_nlink = static_nlink != 0;
    o.noxattrs = noxattrs != 0;
    o.noacl = noacl != 0;
    o.upper_xattrs = upper_xattrs != 0;
    o.user_prefix = user_prefix != 0;
    o.override_mode = override;
    o.squash_uid = squash_uid;
    o.squash_gid = squash_gid;
    o.uids = uids;
    o.gids = gids;
    o.max_open_dirs = max_open_dirs;
    o.index_fd = index_fd;
    o.numbers_fd = numbers_fd;
    o.image_fd = image_fd;
    o.work_fd = work_fd;
    o.plain = plain != 0;
    o.all_ids = all_ids != 0;
    o.sync_copies = sync_copies != 0;
    o.sync_names = sync_names != 0;
    o.metacopy_bytes = metacopy_bytes;
    self = (TreeObject *)type->tp_alloc(type, 0);
    if (!self)
        goto out;
    err = tree_new(layers, nlayers, &o, &self->tree);
    if (err < 0) {
        raise_errno(err, NULL);
        Py_CLEAR(self);
    }
out:
    PyMem_Free(layers);
    PyMem_Free(uids);
    PyMem_Free(gids);
    return (PyObject *)self;
}

static void tree_dealloc(PyObject *op)
{
    TreeObject *self = (TreeObject *)op;
    PyTypeObject *type = Py_TYPE(op);

    if (self->tree)
        tree_free(self->tree);
    type->tp_free(op);
    Py_DECREF(type);
}

#define METHOD(name) {#name, py_##name, METH_VARARGS, NULL},
static PyMethodDef tree_methods[] = {
    TREE_METHODS(METHOD)
    /* The one with keywords. */
    {"copied_up", (PyCFunction)(void (*)(void))py_copied_up, METH_VARARGS | METH_KEYWORDS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot tree_slots[] = {
    {Py_tp_new, tree_new_object},
    {Py_tp_dealloc, tree_dealloc},
    {Py_tp_methods, tree_methods},
    {0, NULL},
};

PyType_Spec tree_spec = {
    .name = "unionfs._native.Tree",
    .basicsize = sizeof(TreeObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = tree_slots,
};

/* ---- UpperDir: a pinned directory descriptor ---- */

static void dir_unpin(DirObject *self)
{
    if (!self->owner)
        return;
    rdir_unpin(self->owner->tree, self->dir);
    rdir_put(self->owner->tree, self->dir);
    self->fd = -1;
    Py_CLEAR(self->owner);
}

static void dir_dealloc(PyObject *op)
{
    PyTypeObject *type = Py_TYPE(op);

    dir_unpin((DirObject *)op);
    PyObject_Free(op);
    Py_DECREF(type);
}

static PyObject *dir_enter(PyObject *op, PyObject *unused)
{
    (void)unused;
    return PyLong_FromLong(((DirObject *)op)->fd);
}

static PyObject *dir_exit(PyObject *op, PyObject *args)
{
    (void)args;
    dir_unpin((DirObject *)op);
    Py_RETURN_NONE;
}

static PyMethodDef dir_methods[] = {
    {"__enter__", dir_enter, METH_NOARGS, NULL},
    {"__exit__", dir_exit, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot dir_slots[] = {
    {Py_tp_dealloc, dir_dealloc},
    {Py_tp_methods, dir_methods},
    {0, NULL},
};

PyType_Spec dir_spec = {
    .name = "unionfs._native.UpperDir",
    .basicsize = sizeof(DirObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = dir_slots,
};

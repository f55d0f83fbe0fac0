/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Shared by the few files that see Python.h: arguments in, one call without the GIL, results out.
 */
#ifndef UNIONFS_GLUE_H
#define UNIONFS_GLUE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "tree.h"

typedef struct {
    PyObject_HEAD
    struct tree *tree;
} TreeObject;

typedef struct {
    PyObject_HEAD
    TreeObject *owner;
    struct rdir *dir;
    int fd;
} DirObject;

struct module_state {
    PyTypeObject *tree_type;
    PyTypeObject *dir_type;
    PyTypeObject *engine_type;
    PyTypeObject *hold_type;
};

#define TREE(op) (((TreeObject *)(op))->tree)

/* OSError(errno, text, name). */
PyObject *raise_errno(errint_t err, const char *name);
PyObject *none_or_errno(errint_t err, const char *name);
/* The attributes of _native.pyi's _Attr. */
PyObject *attr_tuple(const struct stat *st);

extern PyType_Spec tree_spec, dir_spec, engine_spec, hold_spec;
/* Tree's methods: py_query.c, py_files.c, py_changes.c, py_plain.c; copied_up takes keywords. */
// clang-format off
#define TREE_METHODS(X) \
    X(lookup) X(getattr) X(forget) X(entry) X(info) X(name_of) X(name_is_real) X(open_node) \
    X(readlink) X(getxattr) X(listxattr) X(xattr_stored) X(take_warning) X(counts) X(open) \
    X(adopt) X(release) X(read) X(write) X(fsync) X(file_info) X(opendir) X(releasedir) \
    X(dir_ino) X(readdir) X(is_empty) X(upper_dir) X(index_name) X(ask_anew) X(make_whiteout) X(data_copied) \
    X(is_written) X(prepare_unlink) X(abandon_unlink) X(unlinked) X(name_made_real) X(set_redirect) \
    X(renamed) X(made_opaque) X(make_impure) X(set_nlink_diff) X(redirect_path) \
    X(made_nameless) X(named) X(plain_make) X(plain_link) X(plain_unlink) X(plain_rmdir) \
    X(plain_rename) X(plain_copy_up) X(mark_origin) X(temp_name) X(metacopy_noted) X(copying) \
    X(committing) X(entering) X(birth) X(flags) X(changeable) X(close)
// clang-format on
#define DECLARE(name) PyObject *py_##name(PyObject *op, PyObject *args);
TREE_METHODS(DECLARE)
#undef DECLARE
PyObject *open_rings(PyObject *module, PyObject *queues); /* py_engine.c */
PyObject *py_copied_up(PyObject *op, PyObject *args, PyObject *kwargs);

#endif

/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Tree: open files and directories. */
#include "glue.h"

#include <string.h>

PyObject *py_open(PyObject *op, PyObject *args)
{
    unsigned long long ino;
    int flags;
    uint64_t fh = 0;
    errint_t err;

    if (!PyArg_ParseTuple(args, "Ki:open", &ino, &flags))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    err = file_open(TREE(op), ino, flags, &fh);
    Py_END_ALLOW_THREADS
    return err < 0 ? raise_errno(err, NULL) : PyLong_FromUnsignedLongLong(fh);
}

PyObject *py_adopt(PyObject *op, PyObject *args)
{
    unsigned long long ino;
    int fd, flags;
    uint64_t fh = 0;
    errint_t err;

    if (!PyArg_ParseTuple(args, "Kii:adopt", &ino, &fd, &flags))
        return NULL;
    err = file_adopt(TREE(op), ino, fd, flags, &fh);
    return err < 0 ? raise_errno(err, NULL) : PyLong_FromUnsignedLongLong(fh);
}

PyObject *py_release(PyObject *op, PyObject *args)
{
    unsigned long long fh;

    if (!PyArg_ParseTuple(args, "K:release", &fh))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    file_release(TREE(op), fh);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

PyObject *py_read(PyObject *op, PyObject *args)
{
    unsigned long long fh;
    long long offset;
    Py_ssize_t size;
    int nowait;
    ssize_t got;

    if (!PyArg_ParseTuple(args, "KLnp:read", &fh, &offset, &size, &nowait))
        return NULL;
    PyObject *out = PyBytes_FromStringAndSize(NULL, size);
    if (!out)
        return NULL;
    char *buf = PyBytes_AS_STRING(out);
    Py_BEGIN_ALLOW_THREADS
    struct file *f = file_get(TREE(op), fh);
    got = f ? file_read(f, buf, (size_t)size, (off_t)offset, nowait != 0) : -EBADF;
    if (f)
        file_put(TREE(op), f);
    Py_END_ALLOW_THREADS
    if (got < 0) {
        Py_DECREF(out);
        if (got == -EAGAIN && nowait)
            Py_RETURN_NONE;
        return raise_errno((errint_t)got, NULL);
    }
    if (got < size)
        (void)_PyBytes_Resize(&out, got);
    return out;
}

PyObject *py_write(PyObject *op, PyObject *args)
{
    unsigned long long fh;
    long long offset;
    Py_buffer data;
    ssize_t done;

    if (!PyArg_ParseTuple(args, "KLy*:write", &fh, &offset, &data))
        return NULL;
    const char *buf = data.buf;
    size_t size = (size_t)data.len;
    Py_BEGIN_ALLOW_THREADS
    done = file_write(TREE(op), fh, buf, size, (off_t)offset, false);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&data);
    return done < 0 ? raise_errno((errint_t)done, NULL) : PyLong_FromSsize_t(done);
}

PyObject *py_fsync(PyObject *op, PyObject *args)
{
    unsigned long long fh;
    int datasync;
    errint_t err;

    if (!PyArg_ParseTuple(args, "Kp:fsync", &fh, &datasync))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    err = file_sync(TREE(op), fh, datasync != 0);
    Py_END_ALLOW_THREADS
    return none_or_errno(err, NULL);
}

PyObject *py_file_info(PyObject *op, PyObject *args)
{
    unsigned long long fh;

    if (!PyArg_ParseTuple(args, "K:file_info", &fh))
        return NULL;
    struct file *f = file_get(TREE(op), fh);
    if (!f)
        return raise_errno(-EBADF, NULL);
    PyObject *out = Py_BuildValue("Kii", (unsigned long long)f->node->ino, f->flags, f->fd);
    file_put(TREE(op), f);
    return out;
}

/* ---- Tree: directories ---- */

PyObject *py_opendir(PyObject *op, PyObject *args)
{
    unsigned long long ino;
    uint64_t dh = 0;
    bool keep;
    errint_t err;

    if (!PyArg_ParseTuple(args, "K:opendir", &ino))
        return NULL;
    err = dir_open(TREE(op), ino, &dh, &keep);
    return err < 0 ? raise_errno(err, NULL) : PyLong_FromUnsignedLongLong(dh);
}

PyObject *py_releasedir(PyObject *op, PyObject *args)
{
    unsigned long long dh;

    if (!PyArg_ParseTuple(args, "K:releasedir", &dh))
        return NULL;
    dir_release(TREE(op), dh);
    Py_RETURN_NONE;
}

PyObject *py_dir_ino(PyObject *op, PyObject *args)
{
    unsigned long long dh;

    if (!PyArg_ParseTuple(args, "K:dir_ino", &dh))
        return NULL;
    return PyLong_FromUnsignedLongLong(dir_ino(TREE(op), dh));
}

struct collected {
    struct {
        char name[NAME_BYTES];
        unsigned char type;
        uint64_t next;
    } * items;
    uint32_t count, cap;
};

static int collect(void *arg, const struct dirent_out *entry)
{
    struct collected *c = arg;

    if (c->count == c->cap)
        return 1;
    (void)strncpy(c->items[c->count].name, entry->name, NAME_BYTES - 1);
    c->items[c->count].name[NAME_BYTES - 1] = '\0';
    c->items[c->count].type = entry->type;
    c->items[c->count].next = entry->next;
    c->count++;
    return 0;
}

PyObject *py_readdir(PyObject *op, PyObject *args)
{
    unsigned long long dh, offset;
    struct collected c = {0};
    PyObject *out = NULL;
    errint_t err;

    if (!PyArg_ParseTuple(args, "KKI:readdir", &dh, &offset, &c.cap))
        return NULL;
    c.items = calloc(c.cap, sizeof *c.items);
    if (!c.items)
        return PyErr_NoMemory();
    Py_BEGIN_ALLOW_THREADS
    err = dir_read(TREE(op), dh, offset, collect, &c);
    Py_END_ALLOW_THREADS
    if (err < 0) {
        raise_errno(err, NULL);
    } else {
        out = PyList_New((Py_ssize_t)c.count);
        for (uint32_t i = 0; out && i < c.count; i++) {
            PyObject *item = Py_BuildValue("yBK", c.items[i].name, c.items[i].type,
                                           (unsigned long long)c.items[i].next);

            if (item)
                PyList_SET_ITEM(out, (Py_ssize_t)i, item);
            else
                Py_CLEAR(out);
        }
    }
    free(c.items);
    return out;
}

PyObject *py_is_empty(PyObject *op, PyObject *args)
{
    unsigned long long ino;
    bool empty = false;
    errint_t err;

    if (!PyArg_ParseTuple(args, "K:is_empty", &ino))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    err = dir_is_empty(TREE(op), ino, &empty);
    Py_END_ALLOW_THREADS
    return err < 0 ? raise_errno(err, NULL) : PyBool_FromLong(empty);
}

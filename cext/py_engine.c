/* SPDX-License-Identifier: GPL-2.0-or-later */
/* unionfs._native.Engine: the engine for Python, which starts it, answers what it asks, stops it.
 */
#include "glue.h"

#include "engine.h"

typedef struct {
    PyObject_HEAD
    struct engine *engine;
    TreeObject *tree;
    PyObject *call;
} EngineObject;

/* The interpreter's state of an engine's thread: made when it first calls, kept until it ends. */
static _Thread_local PyThreadState *of_thread;

static void enter_python(void)
{
    if (of_thread) {
        PyEval_RestoreThread(of_thread);
    } else {
        (void)PyGILState_Ensure();
        of_thread = PyThreadState_Get();
    }
}

static void leave_python(void)
{
    (void)PyEval_SaveThread();
}

static void thread_ends(void *arg)
{
    (void)arg;
    if (of_thread) {
        PyEval_RestoreThread(of_thread);
        of_thread = NULL;
        PyGILState_Release(PyGILState_UNLOCKED);
    }
}

/* Bytes, or a negative errno. An exception is for the log, and costs this request EIO. */
static ssize_t take_answer(PyObject *result, char *out, size_t cap)
{
    ssize_t n = -EIO;

    if (!result) {
        PyErr_WriteUnraisable(NULL);
    } else if (PyBytes_Check(result)) {
        n = PyBytes_GET_SIZE(result);
        if ((size_t)n > cap)
            n = -ERANGE;
        else
            memcpy(out, PyBytes_AS_STRING(result), (size_t)n);
    } else {
        long code = PyLong_AsLong(result);

        if (code < 0 && code > -4096 && !PyErr_Occurred())
            n = code;
        PyErr_Clear();
    }
    Py_XDECREF(result);
    return n;
}

static ssize_t call_python(void *arg, const struct request *r, char *out, size_t cap)
{
    EngineObject *self = arg;
    const struct fuse_in_header *h = r->head;
    ssize_t n;

    enter_python();
    n = take_answer(PyObject_CallFunction(self->call, "IKIIIy#", h->opcode,
                                          (unsigned long long)h->nodeid, h->uid, h->gid, h->pid,
                                          r->body, (Py_ssize_t)r->len),
                    out, cap);
    leave_python();
    return n;
}

static const char RINGS[] = "unionfs rings";

static void rings_dealloc(PyObject *capsule)
{
    rings_free(PyCapsule_GetPointer(capsule, RINGS));
}

PyObject *open_rings(PyObject *module, PyObject *queues)
{
    unsigned long n = PyLong_AsUnsignedLong(queues);
    struct rings *rings;
    PyObject *capsule;
    errint_t err;

    (void)module;
    if (PyErr_Occurred())
        return NULL;
    err = rings_open((unsigned)n, &rings);
    if (err < 0)
        return raise_errno(err, NULL);
    capsule = PyCapsule_New(rings, RINGS, rings_dealloc);
    if (!capsule)
        rings_free(rings);
    return capsule;
}

static PyObject *engine_new_object(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"tree",       "device", "statfs_fd", "valid_ns",
                            "keep_cache", "flush",  "only_uid",  "passthrough",
                            "no_open",    "call",   "rings",     NULL};
    struct engine_options o = {.call = call_python, .leave = thread_ends};
    PyObject *tree, *call, *rings;
    int keep_cache, flush, passthrough, no_open;
    long long valid_ns, only_uid;
    struct module_state *state = PyType_GetModuleState(type);
    EngineObject *self;
    errint_t err;

    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!$iiLppLipOO:Engine", names, state->tree_type,
                                     &tree, &o.device, &o.statfs_fd, &valid_ns, &keep_cache, &flush,
                                     &only_uid, &passthrough, &no_open, &call, &rings))
        return NULL;
    if (rings != Py_None && !(o.rings = PyCapsule_GetPointer(rings, RINGS)))
        return NULL;
    o.valid_ns = valid_ns;
    o.only_uid = only_uid;
    o.keep_cache = keep_cache != 0;
    o.flush = flush != 0;
    o.passthrough = (enum passthrough)passthrough;
    o.no_open = no_open != 0;
    self = (EngineObject *)type->tp_alloc(type, 0);
    if (!self)
        return NULL;
    o.arg = self;
    self->tree = (TreeObject *)Py_NewRef(tree);
    self->call = Py_NewRef(call);
    err = engine_start(self->tree->tree, &o, &self->engine);
    if (err < 0) {
        Py_DECREF(self);
        return raise_errno(err, NULL);
    }
    return (PyObject *)self;
}

static void end_engine(EngineObject *self)
{
    struct engine *e = self->engine;

    self->engine = NULL;
    if (e) {
        /* Its threads may be waiting for the interpreter. */
        Py_BEGIN_ALLOW_THREADS
        engine_free(e);
        Py_END_ALLOW_THREADS
    }
}

static void engine_dealloc(PyObject *op)
{
    EngineObject *self = (EngineObject *)op;
    PyTypeObject *type = Py_TYPE(op);

    end_engine(self);
    Py_XDECREF(self->tree);
    Py_XDECREF(self->call);
    type->tp_free(op);
    Py_DECREF(type);
}

static PyObject *engine_fileno(PyObject *op, PyObject *unused)
{
    (void)unused;
    return PyLong_FromLong(engine_ended_fd(((EngineObject *)op)->engine));
}

static PyObject *engine_py_stop(PyObject *op, PyObject *unused)
{
    (void)unused;
    if (((EngineObject *)op)->engine)
        engine_stop(((EngineObject *)op)->engine);
    Py_RETURN_NONE;
}

static PyObject *engine_close(PyObject *op, PyObject *unused)
{
    (void)unused;
    end_engine((EngineObject *)op);
    Py_RETURN_NONE;
}

static PyObject *engine_py_counts(PyObject *op, PyObject *unused)
{
    uint64_t all[WIRE_OPCODES], called[WIRE_OPCODES];
    PyObject *out = PyDict_New();

    (void)unused;
    engine_counts(((EngineObject *)op)->engine, all, called);
    for (unsigned i = 0; out && i < WIRE_OPCODES; i++) {
        if (!all[i])
            continue;
        PyObject *key = PyLong_FromUnsignedLong(i);
        PyObject *value = Py_BuildValue("KK", (unsigned long long)(all[i] - called[i]),
                                        (unsigned long long)called[i]);

        if (!key || !value || PyDict_SetItem(out, key, value) < 0)
            Py_CLEAR(out);
        Py_XDECREF(key);
        Py_XDECREF(value);
    }
    return out;
}

static PyObject *engine_passed(PyObject *op, PyObject *unused)
{
    struct tree *t = ((EngineObject *)op)->tree->tree;

    (void)unused;
    return Py_BuildValue("KKi", (unsigned long long)atomic_load(&t->opened_backed),
                         (unsigned long long)atomic_load(&t->opened_anew),
                         atomic_load(&t->refused));
}

static PyObject *engine_py_ring_error(PyObject *op, PyObject *unused)
{
    (void)unused;
    return PyLong_FromLong(-engine_ring_error(((EngineObject *)op)->engine));
}

static PyMethodDef engine_methods[] = {
    {"fileno", engine_fileno, METH_NOARGS, NULL},
    {"stop", engine_py_stop, METH_NOARGS, NULL},
    {"close", engine_close, METH_NOARGS, NULL},
    {"ring_error", engine_py_ring_error, METH_NOARGS, NULL},
    {"passed", engine_passed, METH_NOARGS, NULL},
    {"counts", engine_py_counts, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot engine_slots[] = {
    {Py_tp_new, engine_new_object},
    {Py_tp_dealloc, engine_dealloc},
    {Py_tp_methods, engine_methods},
    {0, NULL},
};

PyType_Spec engine_spec = {
    .name = "unionfs._native.Engine",
    .basicsize = sizeof(EngineObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = engine_slots,
};

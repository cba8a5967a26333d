// SPDX-License-Identifier: Apache-2.0
// noether_writer._core: the session, the pool and the copy for Python, in the limited API of CPython 3.10 and newer.
//
// Two rules keep a call whole. What may run Python (a signal's handler, a destructor) runs before anything is changed,
// or after all of it; and waiting, without the interpreter's lock, changes nothing.
#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030A0000
#include <Python.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <string.h>
#include <time.h>

#include "noether_copy.h"
#include "noether_crc.h"
#include "noether_pages.h"
#include "noether_tensors.h"
#include "pool.h"
#include "session.h"

// A wait looks for signals so often: one that another thread has got wakes nobody.
static const double SIGNAL_SECONDS = 0.05;

// Counts forks on the way from the process that has loaded this.
static unsigned forks;

static void forget(void) {
    forks++;
    nw_sessions_forget();
    nw_pools_forget();
}

// Waits in slices, so that a signal's handler runs soon: `step` waits for at most so many seconds and returns whether
// it is over.
static int wait_for(double seconds, int (*step)(void *, double), void *context) {
    double until = nw_now() + seconds;
    for (;;) {
        double left = until - nw_now();
        int is_over;
        Py_BEGIN_ALLOW_THREADS
        is_over = step(context, left > SIGNAL_SECONDS ? SIGNAL_SECONDS : left > 0 ? left : 0);
        Py_END_ALLOW_THREADS
        // Calls that wait for the main thread too: this may be it, and it does nothing else.
        if (PyErr_CheckSignals() < 0 || Py_MakePendingCalls() < 0) return -1;
        if (is_over) return 1;
        if (left <= 0) return 0;
    }
}

static PyObject *json_text(char *text) {
    if (!text) Py_RETURN_NONE;
    PyObject *found = PyUnicode_DecodeUTF8(text, (Py_ssize_t)strlen(text), "replace");
    free(text);
    return found;
}

static int column(PyObject *numbers, uint64_t **values, Py_ssize_t *count) {
    *count = PySequence_Size(numbers);
    if (*count < 0) return -1;
    *values = PyMem_Malloc(sizeof **values * (size_t)(*count ? *count : 1));
    if (!*values) {
        PyErr_NoMemory();
        return -1;
    }
    int is_list = PyList_CheckExact(numbers);
    for (Py_ssize_t i = 0; i < *count; i++) {
        PyObject *item = is_list ? PyList_GetItem(numbers, i) : PySequence_GetItem(numbers, i);
        if (!item) return -1;
        (*values)[i] = PyLong_AsUnsignedLongLong(item);
        if (!is_list) Py_DECREF(item);
        if ((*values)[i] == (uint64_t)-1 && PyErr_Occurred()) return -1;
    }
    return 0;
}

static void free_object(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

static PyObject *new_object(PyTypeObject *type) {
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    return allocate(type, 0);
}

// MARK: Buffer

typedef struct {
    PyObject_HEAD
    struct nw_buffer *buffer;
} Buffer;

static PyTypeObject *buffer_type, *save_type;

static PyObject *buffer_of(struct nw_buffer *buffer) {
    Buffer *self = (Buffer *)new_object(buffer_type);
    if (!self) {
        nw_buffer_drop(buffer);
        return NULL;
    }
    self->buffer = buffer;
    return (PyObject *)self;
}

static void buffer_dealloc(PyObject *self) {
    struct nw_buffer *buffer = ((Buffer *)self)->buffer;
    if (buffer) {
        Py_BEGIN_ALLOW_THREADS
        nw_buffer_drop(buffer);
        Py_END_ALLOW_THREADS
    }
    free_object(self);
}

static PyObject *buffer_number(PyObject *self, void *unused) {
    return PyLong_FromUnsignedLong(((Buffer *)self)->buffer->number);
}
static PyObject *buffer_capacity(PyObject *self, void *unused) {
    return PyLong_FromSize_t(((Buffer *)self)->buffer->capacity);
}
static PyObject *buffer_address(PyObject *self, void *unused) {
    return PyLong_FromVoidPtr(((Buffer *)self)->buffer->address);
}
static PyObject *buffer_fd(PyObject *self, void *unused) { return PyLong_FromLong(((Buffer *)self)->buffer->fd); }
static PyObject *buffer_pinned(PyObject *self, void *unused) {
    return PyBool_FromLong(((Buffer *)self)->buffer->is_pinned);
}
static int buffer_set_pinned(PyObject *self, PyObject *value, void *unused) {
    int is_pinned = value ? PyObject_IsTrue(value) : 0;
    if (is_pinned < 0) return -1;
    ((Buffer *)self)->buffer->is_pinned = is_pinned;
    return 0;
}

static PyObject *buffer_destroy(PyObject *self, PyObject *unused) {
    struct nw_buffer *buffer = ((Buffer *)self)->buffer;
    ((Buffer *)self)->buffer = NULL;
    if (buffer) nw_buffer_destroy(buffer);
    Py_RETURN_NONE;
}

static PyGetSetDef buffer_members[] = {
    {"number", buffer_number, NULL, "Its name in frames.", NULL},
    {"capacity", buffer_capacity, NULL, "In bytes.", NULL},
    {"address", buffer_address, NULL, "Where its mapping begins.", NULL},
    {"fd", buffer_fd, NULL, "The memfd.", NULL},
    {"pinned", buffer_pinned, buffer_set_pinned, "Whether CUDA knows its memory.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};
static PyMethodDef buffer_methods[] = {
    {"destroy", buffer_destroy, METH_NOARGS, "Gives its memory back to the system; it must not be used any more."},
    {NULL, NULL, 0, NULL},
};
static PyType_Slot buffer_slots[] = {
    {Py_tp_dealloc, buffer_dealloc}, {Py_tp_getset, buffer_members}, {Py_tp_methods, buffer_methods},
    {Py_tp_doc, "One memfd of a pool; it goes back with the last reference."}, {0, NULL},
};
static PyType_Spec buffer_spec = {
    "noether_writer._core.Buffer",
    sizeof(Buffer),
    0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    buffer_slots,
};

// MARK: Pool

typedef struct {
    PyObject_HEAD
    struct nw_pool *pool;
} Pool;

static PyObject *pool_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords) {
    unsigned long long limit;
    if (!PyArg_ParseTuple(arguments, "K", &limit)) return NULL;
    Pool *self = (Pool *)new_object(type);
    if (self && !(self->pool = nw_pool_new((size_t)limit))) {
        Py_DECREF(self);
        return PyErr_NoMemory();
    }
    return (PyObject *)self;
}

static void pool_dealloc(PyObject *self) {
    if (((Pool *)self)->pool) nw_pool_free(((Pool *)self)->pool);
    free_object(self);
}

struct taking {
    struct nw_pool *pool;
    size_t needed, wanted;
    uint64_t seen;
    struct nw_buffer *found;
    enum nw_take result;
    int error;
};

static int take_step(void *context, double seconds) {
    struct taking *taking = context;
    uint64_t returns = nw_pool_returns(taking->pool);
    taking->result = nw_pool_take(taking->pool, taking->needed, &taking->found, &taking->wanted);
    taking->error = errno;
    if (taking->result != NW_POOL_FULL) return 1;
    nw_pool_wait(taking->pool, returns, seconds);
    return 0;
}

static PyObject *pool_take(PyObject *self, PyObject *arguments) {
    unsigned long long needed;
    double seconds;
    if (!PyArg_ParseTuple(arguments, "Kd", &needed, &seconds)) return NULL;
    struct taking taking = {.pool = ((Pool *)self)->pool, .needed = (size_t)needed};
    int is_over = wait_for(seconds, take_step, &taking);
    if (is_over < 0) {
        if (taking.found) nw_buffer_drop(taking.found);
        return NULL;
    }
    if (taking.found) return buffer_of(taking.found);
    if (taking.result == NW_POOL_FULL) Py_RETURN_NONE;
    return PyLong_FromLong(taking.error);
}

static PyObject *pool_shrink(PyObject *self, PyObject *argument) {
    double idle = PyFloat_AsDouble(argument), next;
    if (idle == -1 && PyErr_Occurred()) return NULL;
    Py_BEGIN_ALLOW_THREADS
    next = nw_pool_shrink(((Pool *)self)->pool, idle);
    Py_END_ALLOW_THREADS
    return PyFloat_FromDouble(next);
}

static PyObject *pool_retired(PyObject *self, PyObject *unused) {
    struct nw_buffer *buffer = nw_pool_retired(((Pool *)self)->pool);
    if (!buffer) Py_RETURN_NONE;
    return buffer_of(buffer);
}

static PyObject *pool_sizes(PyObject *self, PyObject *unused) {
    struct nw_pool_sizes sizes = nw_pool_sizes(((Pool *)self)->pool);
    return Py_BuildValue("KKKK", (unsigned long long)sizes.limit, (unsigned long long)sizes.held,
                         (unsigned long long)sizes.all, (unsigned long long)sizes.out);
}

static PyObject *pool_set_limit(PyObject *self, PyObject *argument) {
    unsigned long long limit = PyLong_AsUnsignedLongLong(argument);
    if (PyErr_Occurred()) return NULL;
    nw_pool_set_limit(((Pool *)self)->pool, (size_t)limit);
    Py_RETURN_NONE;
}

static PyObject *pool_is_forked(PyObject *self, void *unused) {
    return PyBool_FromLong(nw_pool_is_forked(((Pool *)self)->pool));
}

static PyGetSetDef pool_members[] = {
    {"is_forked", pool_is_forked, NULL, "Whether it is the parent's.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};
static PyMethodDef pool_methods[] = {
    {"take", pool_take, METH_VARARGS,
     "take(needed, seconds): a Buffer; None if the pool stays full; errno if there is no memory."},
    {"shrink", pool_shrink, METH_O,
     "shrink(idle): lets go of what was not used for so long. Seconds until there is more; -1: none."},
    {"retired", pool_retired, METH_NOARGS, "A buffer that CUDA has to forget before it can go, or None."},
    {"set_limit", pool_set_limit, METH_O, "set_limit(bytes): for all buffers in all, from the next one on."},
    {"sizes", pool_sizes, METH_NOARGS,
     "(limit, bytes that are out, bytes of all buffers, number of those that are out)"},
    {NULL, NULL, 0, NULL},
};
static PyType_Slot pool_slots[] = {
    {Py_tp_new, pool_new}, {Py_tp_dealloc, pool_dealloc}, {Py_tp_getset, pool_members}, {Py_tp_methods, pool_methods},
    {Py_tp_doc, "Pool(limit): buffers of at most so many bytes in all; one is always allowed."}, {0, NULL},
};
static PyType_Spec pool_spec = {"noether_writer._core.Pool", sizeof(Pool), 0, Py_TPFLAGS_DEFAULT, pool_slots};

// MARK: Watch

typedef struct {
    PyObject_HEAD
    // Until it has been told what has changed.
    struct nw_pages *pages;
    uint64_t *changed;
    unsigned char *watched;
    Py_ssize_t count;
    pthread_mutex_t mutex;
    bool is_settled, is_known;
    unsigned forks;
} Watch;

static PyTypeObject *watch_type;

static PyObject *watch_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords) {
    PyObject *addresses, *lengths;
    if (!PyArg_ParseTuple(arguments, "OO", &addresses, &lengths)) return NULL;
    Watch *self = (Watch *)new_object(type);
    if (!self) return NULL;
    pthread_mutex_init(&self->mutex, NULL);
    self->forks = forks;
    uint64_t *starts = NULL, *sizes = NULL;
    Py_ssize_t sizes_count;
    int error = 0;
    if (column(addresses, &starts, &self->count) == 0 && column(lengths, &sizes, &sizes_count) == 0) {
        size_t count = (size_t)self->count;
        self->changed = PyMem_Calloc(count + 1, sizeof *self->changed);
        self->watched = PyMem_Calloc(count + 1, 1);
        if (self->count != sizes_count) {
            PyErr_SetString(PyExc_ValueError, "as many addresses and lengths");
        } else if (!self->changed || !self->watched) {
            PyErr_NoMemory();
        } else {
            Py_BEGIN_ALLOW_THREADS
            self->pages = nw_pages_watch(starts, sizes, count, self->watched);
            error = errno;
            Py_END_ALLOW_THREADS
            if (!self->pages) {
                errno = error;
                PyErr_SetFromErrno(PyExc_OSError);
            }
        }
    }
    PyMem_Free(starts);
    PyMem_Free(sizes);
    if (PyErr_Occurred()) {
        Py_DECREF(self);
        return NULL;
    }
    return (PyObject *)self;
}

// Without the interpreter's lock: looks what has changed, once, and watches no more. Whoever else comes waits for the
// end of it, since until then each write costs a fault.
static void watch_settle(Watch *self) {
    // The thread that was about to do it is in the parent, and so is what was watched.
    if (self->forks != forks) return;
    pthread_mutex_lock(&self->mutex);
    if (!self->is_settled) {
        self->is_known = nw_pages_changed(self->pages, self->changed) >= 0;
        nw_pages_end(self->pages);
        self->pages = NULL;
        self->is_settled = true;
    }
    pthread_mutex_unlock(&self->mutex);
}

static void watch_dealloc(PyObject *object) {
    Watch *self = (Watch *)object;
    struct nw_pages *pages = self->pages;
    if (pages && self->forks == forks) {
        Py_BEGIN_ALLOW_THREADS
        nw_pages_end(pages);
        Py_END_ALLOW_THREADS
    }
    PyMem_Free(self->changed);
    PyMem_Free(self->watched);
    free_object(object);
}

static PyObject *watch_watched(PyObject *object, void *unused) {
    return PyBytes_FromStringAndSize((const char *)((Watch *)object)->watched, ((Watch *)object)->count);
}

static PyObject *watch_changed(PyObject *object, PyObject *unused) {
    Watch *self = (Watch *)object;
    Py_BEGIN_ALLOW_THREADS
    watch_settle(self);
    Py_END_ALLOW_THREADS
    if (!self->is_known) Py_RETURN_NONE;
    PyObject *list = PyList_New(self->count);
    for (Py_ssize_t i = 0; list && i < self->count; i++) {
        PyObject *number = PyLong_FromUnsignedLongLong(self->changed[i]);
        if (!number || PyList_SetItem(list, i, number) < 0) {
            Py_DECREF(list);
            return NULL;
        }
    }
    return list;
}

static PyGetSetDef watch_members[] = {
    {"watched", watch_watched, NULL, "A byte for each piece of memory: whether it is watched.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};
static PyMethodDef watch_methods[] = {
    {"changed", watch_changed, METH_NOARGS,
     "The pages of each piece that were written until the first such call; None: nobody can tell."},
    {NULL, NULL, 0, NULL},
};
static PyType_Slot watch_slots[] = {
    {Py_tp_new, watch_new},
    {Py_tp_dealloc, watch_dealloc},
    {Py_tp_getset, watch_members},
    {Py_tp_methods, watch_methods},
    {Py_tp_doc,
     "Watch(addresses, lengths): which whole pages are written from now on. OSError: the kernel can't tell."},
    {0, NULL},
};
static PyType_Spec watch_spec = {"noether_writer._core.Watch", sizeof(Watch), 0, Py_TPFLAGS_DEFAULT, watch_slots};

// MARK: Copy

// The three arrays of a struct nw_copy.
struct pieces {
    struct nw_copy copy;
    uint64_t *targets, *sources, *ends;
};

typedef struct {
    PyObject_HEAD
    // What is copied before the trainer continues, and what is copied beside it.
    struct pieces now, later;
    unsigned forks;
    PyObject *held;
    PyObject *buffer;
    Watch *watch;
} Copy;

static int pieces_new(struct pieces *pieces, Py_ssize_t room) {
    size_t bytes = sizeof(uint64_t) * (size_t)(room ? room : 1);
    pieces->targets = PyMem_Malloc(bytes);
    pieces->sources = PyMem_Malloc(bytes);
    pieces->ends = PyMem_Malloc(bytes);
    pieces->copy = (struct nw_copy){.targets = pieces->targets, .sources = pieces->sources, .ends = pieces->ends};
    return pieces->targets && pieces->sources && pieces->ends ? 0 : -1;
}

static void pieces_free(struct pieces *pieces) {
    PyMem_Free(pieces->targets);
    PyMem_Free(pieces->sources);
    PyMem_Free(pieces->ends);
}

static uint64_t pieces_bytes(const struct pieces *pieces) {
    return pieces->copy.count ? pieces->ends[pieces->copy.count - 1] : 0;
}

static void pieces_add(struct pieces *pieces, uint64_t target, uint64_t source, uint64_t length) {
    if (!length) return;
    uint64_t before = pieces_bytes(pieces), at = pieces->copy.count++;
    pieces->targets[at] = target;
    pieces->sources[at] = source;
    pieces->ends[at] = before + length;
}

static void pieces_stop(struct pieces *pieces) {
    nw_copy_stop(&pieces->copy);
    nw_copy_wait(&pieces->copy);
}

static void pieces_finish(struct pieces *pieces) {
    nw_copy_run(&pieces->copy, UINT64_MAX);
    nw_copy_wait(&pieces->copy);
}

static PyObject *copy_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords) {
    PyObject *buffer, *held, *offsets, *addresses, *lengths, *watch = NULL;
    const char *later = NULL;
    Py_ssize_t later_count = 0;
    if (!PyArg_ParseTuple(arguments, "O!OOOO|z#O", buffer_type, &buffer, &held, &offsets, &addresses, &lengths, &later,
                          &later_count, &watch))
        return NULL;
    if (watch && watch != Py_None && !PyObject_TypeCheck(watch, watch_type)) {
        PyErr_SetString(PyExc_TypeError, "a watch is wanted");
        return NULL;
    }
    Copy *self = (Copy *)new_object(type);
    if (!self) return NULL;
    self->forks = forks;
    uint64_t *targets = NULL, *sources = NULL, *sizes = NULL;
    Py_ssize_t counts[3] = {0, 0, 0};
    struct nw_buffer *memory = ((Buffer *)buffer)->buffer;
    if (column(offsets, &targets, &counts[0]) < 0 || column(addresses, &sources, &counts[1]) < 0 ||
        column(lengths, &sizes, &counts[2]) < 0)
        goto failed;
    Py_ssize_t count = counts[0];
    if (count != counts[1] || count != counts[2] || (later && later_count != count)) {
        PyErr_SetString(PyExc_ValueError, "as many offsets, addresses and lengths");
        goto failed;
    }
    if (pieces_new(&self->now, 2 * count) < 0 || pieces_new(&self->later, count) < 0) {
        PyErr_NoMemory();
        goto failed;
    }
    self->watch = watch && watch != Py_None ? (Watch *)watch : NULL;
    Py_XINCREF((PyObject *)self->watch);
    for (Py_ssize_t i = 0; i < count; i++) {
        if (targets[i] > memory->capacity || sizes[i] > memory->capacity - targets[i]) {
            PyErr_SetString(PyExc_ValueError, "a storage that does not fit into the buffer");
            goto failed;
        }
        uint64_t target = targets[i] + (uint64_t)(uintptr_t)memory->address, source = sources[i],
                 end = source + sizes[i];
        if (!later || !later[i]) {
            pieces_add(&self->now, target, source, sizes[i]);
            continue;
        }
        // Pages at its ends hold what belongs to others too, and can't be watched.
        uint64_t inner = source, inner_length = sizes[i];
        if (self->watch) inner = nw_pages_inner(source, sizes[i], &inner_length);
        pieces_add(&self->now, target, source, inner - source);
        pieces_add(&self->later, target + (inner - source), inner, inner_length);
        pieces_add(&self->now, target + (inner + inner_length - source), inner + inner_length,
                   end - inner - inner_length);
    }
    self->later.copy.fresh = memory->is_fresh;
    // Small pieces far apart: each makes the page that it needs, and not all that lies between.
    self->now.copy.fresh = memory->is_fresh && !self->later.copy.count;
    self->later.copy.guarded = 1;
    memory->is_fresh = false;
    self->held = held;
    self->buffer = buffer;
    Py_INCREF(held);
    Py_INCREF(buffer);
failed:
    PyMem_Free(targets);
    PyMem_Free(sources);
    PyMem_Free(sizes);
    if (!PyErr_Occurred()) return (PyObject *)self;
    Py_DECREF(self);
    return NULL;
}

static void copy_dealloc(PyObject *object) {
    Copy *self = (Copy *)object;
    // The threads that copied are in the parent.
    if (self->held && self->forks == forks) {
        Py_BEGIN_ALLOW_THREADS
        pieces_stop(&self->now);
        pieces_stop(&self->later);
        Py_END_ALLOW_THREADS
    }
    Py_XDECREF((PyObject *)self->watch);
    Py_XDECREF(self->held);
    Py_XDECREF(self->buffer);
    pieces_free(&self->now);
    pieces_free(&self->later);
    free_object(object);
}

static PyObject *copy_start(PyObject *object, PyObject *unused) {
    nw_copy_start(&((Copy *)object)->now.copy);
    Py_RETURN_NONE;
}

static PyObject *copy_run_now(PyObject *object, PyObject *unused) {
    Copy *self = (Copy *)object;
    // The threads that copied are in the parent, and this process's memory is its own.
    if (self->forks != forks) Py_RETURN_NONE;
    Py_BEGIN_ALLOW_THREADS
    pieces_finish(&self->now);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *copy_finish(PyObject *object, PyObject *unused) {
    Copy *self = (Copy *)object;
    // The threads that copied are in the parent, and this process's memory is its own.
    if (self->forks != forks) Py_RETURN_NONE;
    Py_BEGIN_ALLOW_THREADS
    pieces_finish(&self->now);
    pieces_finish(&self->later);
    if (self->watch) watch_settle(self->watch);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *copy_is_same(PyObject *object, PyObject *unused) {
    Copy *self = (Copy *)object;
    int is_same;
    Py_BEGIN_ALLOW_THREADS
    is_same = nw_copy_is_same(&self->later.copy);
    Py_END_ALLOW_THREADS
    return PyBool_FromLong(is_same);
}

static PyObject *copy_now_bytes(PyObject *object, void *unused) {
    return PyLong_FromUnsignedLongLong(pieces_bytes(&((Copy *)object)->now));
}
static PyObject *copy_later_bytes(PyObject *object, void *unused) {
    return PyLong_FromUnsignedLongLong(pieces_bytes(&((Copy *)object)->later));
}
static PyObject *copy_failed(PyObject *object, void *unused) {
    return PyBool_FromLong(__atomic_load_n(&((Copy *)object)->later.copy.failed, __ATOMIC_RELAXED) != 0);
}

static PyGetSetDef copy_members[] = {
    {"now_bytes", copy_now_bytes, NULL, "Bytes that are copied before the trainer continues.", NULL},
    {"later_bytes", copy_later_bytes, NULL, "Bytes that are copied beside it.", NULL},
    {"failed", copy_failed, NULL, "Whether memory was gone when it was to be copied.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};
static PyMethodDef copy_methods[] = {
    {"start", copy_start, METH_NOARGS, "A thread begins with what is copied now; the caller goes on."},
    {"run_now", copy_run_now, METH_NOARGS, "Returns when what is copied now is copied."},
    {"finish", copy_finish, METH_NOARGS,
     "Takes part, and returns when all is copied, and nothing is watched any more."},
    {"is_same", copy_is_same, METH_NOARGS,
     "Whether the memory that was copied beside the trainer is what the copy is."},
    {NULL, NULL, 0, NULL},
};
static PyType_Slot copy_slots[] = {
    {Py_tp_new, copy_new}, {Py_tp_dealloc, copy_dealloc}, {Py_tp_methods, copy_methods}, {Py_tp_getset, copy_members},
    {Py_tp_doc,
     "Copy(buffer, held, offsets, addresses, lengths, later=None, watch=None): storages into a buffer; those with a "
     "byte of `later` that is not 0 may be copied beside the trainer, as far as `watch` can watch them. `held` stays "
     "alive until it has ended; what is let go of stops first."},
    {0, NULL},
};
static PyType_Spec copy_spec = {"noether_writer._core.Copy", sizeof(Copy), 0, Py_TPFLAGS_DEFAULT, copy_slots};

// MARK: The main thread

// Between the thread that wants it done and the main thread, whoever comes last frees it.
struct pending {
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    PyObject *callable;
    unsigned references, forks;
    bool is_wanted, has_run, is_over;
};

// With the interpreter's lock.
static void pending_drop(struct pending *pending) {
    if (--pending->references) return;
    Py_XDECREF(pending->callable);
    pthread_mutex_destroy(&pending->mutex);
    pthread_cond_destroy(&pending->changed);
    PyMem_Free(pending);
}

static int pending_run(void *argument) {
    struct pending *pending = argument;
    // A child has the parent's calls before it, and nobody waits there.
    if (pending->forks != forks) return 0;
    PyObject *result = pending->is_wanted ? PyObject_CallNoArgs(pending->callable) : NULL;
    int code = result || !PyErr_Occurred() ? 0 : -1;
    pthread_mutex_lock(&pending->mutex);
    pending->has_run = result != NULL;
    pending->is_over = true;
    pthread_cond_broadcast(&pending->changed);
    pthread_mutex_unlock(&pending->mutex);
    Py_XDECREF(result);
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    pending_drop(pending);
    PyErr_Restore(type, value, trace);
    // What was raised belongs to the main thread: it was interrupted.
    return code;
}

static int pending_step(void *context, double seconds) {
    struct pending *pending = context;
    double until = nw_now() + seconds;
    pthread_mutex_lock(&pending->mutex);
    while (!pending->is_over && nw_condition_wait(&pending->changed, &pending->mutex, until)) {}
    bool is_over = pending->is_over;
    pthread_mutex_unlock(&pending->mutex);
    return is_over;
}

static PyObject *on_main_thread(PyObject *module, PyObject *arguments) {
    PyObject *callable;
    double seconds;
    if (!PyArg_ParseTuple(arguments, "Od", &callable, &seconds)) return NULL;
    struct pending *pending = PyMem_Calloc(1, sizeof *pending);
    if (!pending) return PyErr_NoMemory();
    pthread_mutex_init(&pending->mutex, NULL);
    nw_condition_init(&pending->changed);
    Py_INCREF(callable);
    pending->callable = callable;
    pending->references = 2;
    pending->forks = forks;
    pending->is_wanted = true;
    bool is_queued = Py_AddPendingCall(pending_run, pending) == 0;
    if (!is_queued) pending->references = 1;
    int code = wait_for(is_queued ? seconds : 0, pending_step, pending);
    bool has_run = pending->has_run;
    pending->is_wanted = false;
    pending_drop(pending);
    return code < 0 ? NULL : PyBool_FromLong(has_run);
}

// MARK: Session

typedef struct {
    PyObject_HEAD
    struct nw_session *session;
    // Keys that this has seen, str -> int, and those of the last update: nearly always the same ones again.
    PyObject *ids;
    PyObject **last_keys;
    uint32_t *last_ids;
    uint32_t last_count;
} Session;

typedef struct {
    PyObject_HEAD
    struct nw_save *save;
    Session *session;
} Save;

static PyObject *session_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords) {
    unsigned long long queue_bytes;
    int refuses;
    struct nw_options options = {0};
    if (!PyArg_ParseTuple(arguments, "Kpd", &queue_bytes, &refuses, &options.busy_seconds)) return NULL;
    options.queue_bytes = (size_t)queue_bytes;
    options.refuses = refuses;
    Session *self = (Session *)new_object(type);
    if (!self) return NULL;
    self->session = nw_session_new(&options);
    self->ids = self->session ? PyDict_New() : NULL;
    if (!self->session) PyErr_SetFromErrno(PyExc_OSError);
    if (!self->ids) {
        Py_DECREF(self);
        return NULL;
    }
    return (PyObject *)self;
}

static void forget_last(Session *self) {
    PyObject **keys = self->last_keys;
    uint32_t count = self->last_count;
    self->last_keys = NULL;
    self->last_count = 0;
    for (uint32_t i = 0; i < count; i++) Py_DECREF(keys[i]);
    PyMem_Free(keys);
    PyMem_Free(self->last_ids);
    self->last_ids = NULL;
}

// Saves that have ended, or all: their objects may go.
static void reap(Session *self, bool all) {
    struct nw_save *save;
    while ((save = nw_session_reap(self->session, all))) {
        PyObject *user = save->user;
        nw_save_drop(self->session, save);
        Py_XDECREF(user);
    }
}

static void session_dealloc(PyObject *object) {
    Session *self = (Session *)object;
    if (self->session) {
        reap(self, true);
        nw_session_free(self->session);
    }
    forget_last(self);
    Py_XDECREF(self->ids);
    free_object(object);
}

static PyObject *session_attach(PyObject *object, PyObject *argument) {
    long fd = PyLong_AsLong(argument);
    if (fd == -1 && PyErr_Occurred()) return NULL;
    errno = 0;
    bool is_taken = nw_session_attach(((Session *)object)->session, (int)fd);
    // No descriptor is free; an ended session leaves errno as it is.
    if (!is_taken && errno) return PyErr_SetFromErrno(PyExc_OSError);
    return PyBool_FromLong(is_taken);
}

static PyObject *session_opened(PyObject *object, PyObject *arguments) {
    unsigned long long last;
    int merges;
    if (!PyArg_ParseTuple(arguments, "Kp", &last, &merges)) return NULL;
    nw_session_opened(((Session *)object)->session, last, merges);
    Py_RETURN_NONE;
}

static PyObject *session_detach(PyObject *object, PyObject *unused) {
    nw_session_detach(((Session *)object)->session);
    Py_RETURN_NONE;
}
static PyObject *session_close(PyObject *object, PyObject *unused) {
    nw_session_close(((Session *)object)->session);
    Py_RETURN_NONE;
}
static PyObject *session_end(PyObject *object, PyObject *unused) {
    nw_session_end(((Session *)object)->session);
    Py_RETURN_NONE;
}
static PyObject *session_drop_saves(PyObject *object, PyObject *unused) {
    reap((Session *)object, true);
    Py_RETURN_NONE;
}

static PyObject *session_want(PyObject *object, PyObject *unused) {
    nw_session_want(((Session *)object)->session);
    Py_RETURN_NONE;
}
static PyObject *session_claim(PyObject *object, PyObject *unused) {
    return PyBool_FromLong(nw_session_claim(((Session *)object)->session));
}
static PyObject *session_unclaim(PyObject *object, PyObject *unused) {
    nw_session_unclaim(((Session *)object)->session);
    Py_RETURN_NONE;
}
static PyObject *session_dismiss(PyObject *object, PyObject *unused) {
    nw_session_dismiss(((Session *)object)->session);
    Py_RETURN_NONE;
}

struct serving {
    struct nw_session *session;
    const uint64_t *seen;
    unsigned reason;
};

static int serve_step(void *context, double seconds) {
    struct serving *serving = context;
    serving->reason = nw_session_serve(serving->session, serving->seen, false, seconds);
    return serving->reason != 0;
}

static PyObject *session_wait(PyObject *object, PyObject *arguments) {
    unsigned long long generation;
    double seconds;
    if (!PyArg_ParseTuple(arguments, "Kd", &generation, &seconds)) return NULL;
    uint64_t seen = generation;
    struct serving serving = {.session = ((Session *)object)->session, .seen = &seen};
    if (wait_for(seconds, serve_step, &serving) < 0) return NULL;
    return PyLong_FromUnsignedLong(serving.reason);
}

static PyObject *session_serve(PyObject *object, PyObject *arguments) {
    double seconds;
    int heeds_loss;
    if (!PyArg_ParseTuple(arguments, "dp", &seconds, &heeds_loss)) return NULL;
    Session *self = (Session *)object;
    unsigned reason;
    Py_BEGIN_ALLOW_THREADS
    reason = nw_session_serve(self->session, NULL, heeds_loss, seconds);
    Py_END_ALLOW_THREADS
    reap(self, false);
    return PyLong_FromUnsignedLong(reason);
}

// What `log` returns where it needs Python's help: a value that is not plain, a key that is no str, epoch twice.
enum { NOT_PLAIN = -1, NO_NUMBER = -2 };
// What stays in here: a tensor is among the values; Python's exception is set.
enum { HAS_TENSOR = -3, RAISED = -4 };
// Values of an update that stand on the stack.
enum { FEW = 64 };

struct row {
    struct nw_value *values;
    struct nw_key *new_keys;
    PyObject **keys;
    uint32_t count, new_count, first_new;
    // For how many there is room.
    Py_ssize_t room;
    // Whether `values` has the numbers of the tensors already.
    bool is_read;
};

// torch.Tensor, once one was logged, and the name of its method.
static PyObject *tensor_type, *item_name;

// Returns 0, or why not.
static int take_value(PyObject *value, bool is_converted, struct nw_value *to) {
    PyTypeObject *type = Py_TYPE(value);
    to->tail = NULL;
    if (type == &PyFloat_Type) {
        double number = PyFloat_AsDouble(value);
        to->tag = NW_FLOAT;
        memcpy(&to->bits, &number, sizeof number);
    } else if (type == &PyLong_Type) {
        int overflow;
        to->tag = NW_INT;
        to->bits = (uint64_t)PyLong_AsLongLongAndOverflow(value, &overflow);
        if (overflow) return NOT_PLAIN;
    } else if (type == &PyBool_Type) {
        to->tag = NW_BOOL;
        to->bits = value == Py_True;
    } else if (value == Py_None) {
        to->tag = NW_NONE;
        to->bits = 0;
    } else if (type == &PyUnicode_Type) {
        Py_ssize_t length;
        to->tag = NW_STR;
        to->tail = PyUnicode_AsUTF8AndSize(value, &length);
        to->bits = (uint64_t)length;
        if (!to->tail) {
            PyErr_Clear();
            return NOT_PLAIN;
        }
    } else if (is_converted && type == &PyBytes_Type) {
        // An integer beyond 64 bits, as two's complement.
        to->tag = NW_BIG_INT;
        to->tail = PyBytes_AsString(value);
        to->bits = (uint64_t)PyBytes_Size(value);
    } else {
        return (PyObject *)type == tensor_type ? HAS_TENSOR : NOT_PLAIN;
    }
    return 0;
}

static int take_key(Session *self, PyObject *key, struct row *row) {
    uint32_t at = row->count;
    if (at < self->last_count && self->last_keys[at] == key) {
        row->values[at].key = self->last_ids[at];
        return 0;
    }
    if (Py_TYPE(key) != &PyUnicode_Type) return NOT_PLAIN;
    PyObject *known = PyDict_GetItemWithError(self->ids, key);
    if (known) {
        row->values[at].key = (uint32_t)PyLong_AsUnsignedLong(known);
        return 0;
    }
    Py_ssize_t length;
    const char *name = PyUnicode_AsUTF8AndSize(key, &length);
    if (!name || length < 1 || length > NW_KEY_BYTES || memchr(name, 0, (size_t)length)) {
        PyErr_Clear();
        return NOT_PLAIN;
    }
    int64_t id = nw_session_key(self->session, name, (size_t)length);
    if (id < 0) {
        row->new_keys[row->new_count] = (struct nw_key){name, (size_t)length};
        id = row->first_new + row->new_count++;
    }
    row->values[at].key = (uint32_t)id;
    return 0;
}

static int take_item(Session *self, PyObject *key, PyObject *value, bool is_converted, struct row *row) {
    // A key of an odd type may have changed the dict when it was compared.
    if (row->count >= row->room || Py_TYPE(key) != &PyUnicode_Type) return NOT_PLAIN;
    int error = take_key(self, key, row);
    if (!error && !(row->is_read && (PyObject *)Py_TYPE(value) == tensor_type))
        error = take_value(value, is_converted, &row->values[row->count]);
    if (!error) row->keys[row->count++] = key;
    return error;
}

// For the next update, which has the same keys. What can't be kept is looked up.
static void remember_keys(Session *self, const struct row *row) {
    bool is_same = row->count == self->last_count;
    for (uint32_t i = 0; is_same && i < row->count; i++) is_same = self->last_keys[i] == row->keys[i];
    if (is_same) return;
    for (uint32_t i = 0; i < row->count; i++) {
        if (PyDict_GetItemWithError(self->ids, row->keys[i])) continue;
        PyObject *id = PyLong_FromUnsignedLong(row->values[i].key);
        if (!id || PyDict_SetItem(self->ids, row->keys[i], id) < 0) PyErr_Clear();
        Py_XDECREF(id);
    }
    PyObject **keys = PyMem_Malloc(sizeof *keys * (row->count + 1));
    uint32_t *ids = PyMem_Malloc(sizeof *ids * (row->count + 1));
    if (!keys || !ids) {
        PyMem_Free(keys);
        PyMem_Free(ids);
        return;
    }
    for (uint32_t i = 0; i < row->count; i++) {
        Py_INCREF(row->keys[i]);
        keys[i] = row->keys[i];
        ids[i] = row->values[i].key;
    }
    forget_last(self);
    self->last_keys = keys;
    self->last_ids = ids;
    self->last_count = row->count;
}

static PyObject *epoch_name, *sample_name;

// Runs nothing of Python's. Returns 0, or why not.
static int take_row(Session *self, PyObject *dict, PyObject *epoch, PyObject *sample, bool is_converted,
                    struct row *row) {
    row->count = row->new_count = 0;
    row->first_new = nw_session_key_count(self->session);
    int result = 0;
    if (epoch != Py_None) result = take_item(self, epoch_name, epoch, is_converted, row);
    if (!result && sample != Py_None) result = take_item(self, sample_name, sample, is_converted, row);
    if (result) return NOT_PLAIN;
    Py_ssize_t position = 0;
    PyObject *key, *value;
    uint32_t extra = row->count;
    while (!result && PyDict_Next(dict, &position, &key, &value))
        result = take_item(self, key, value, is_converted, row);
    // Twice in one update: Python says which one counts.
    for (uint32_t i = 0; !result && i < extra; i++)
        for (uint32_t other = extra; other < row->count; other++)
            if (row->values[i].key == row->values[other].key ||
                PyUnicode_Compare(row->keys[i], row->keys[other]) == 0)
                result = NOT_PLAIN;
    return !result && row->count > NW_VALUES ? NOT_PLAIN : result;
}

// Reads the numbers of the tensors in `dict`, as their method `item` gives them: what a tensor is (the negative of what
// its memory holds, a part of torch.func, watched by a mode) only torch knows. That may run any code, and lets other
// threads run: `dict` is the caller's own, and nothing of the session has been looked at yet.
// Returns 0, or why not; nothing is read if another value is not plain.
static int read_numbers(PyObject *dict, bool is_converted, uint32_t extra, struct row *row) {
    Py_ssize_t position = 0;
    PyObject *key, *value;
    Py_ssize_t at = extra;
    for (; PyDict_Next(dict, &position, &key, &value); at++) {
        if (at >= row->room) return NOT_PLAIN;
        if ((PyObject *)Py_TYPE(value) == tensor_type) continue;
        if (take_value(value, is_converted, &row->values[at])) return NOT_PLAIN;
    }
    PyObject *item = PyObject_GetAttr(tensor_type, item_name);
    if (!item) return RAISED;
    int result = 0;
    at = extra;
    for (position = 0; !result && PyDict_Next(dict, &position, &key, &value); at++) {
        if ((PyObject *)Py_TYPE(value) != tensor_type) continue;
        PyObject *number = PyObject_CallFunctionObjArgs(item, value, NULL);
        if (!number) {
            result = RAISED;
        } else {
            // A text would end with `number`.
            if (take_value(number, false, &row->values[at]) || row->values[at].tail) result = NOT_PLAIN;
            Py_DECREF(number);
        }
    }
    Py_DECREF(item);
    row->is_read = true;
    return result;
}

// log(values, update, epoch, sample, is_converted)
static PyObject *session_log(PyObject *object, PyObject *const *arguments, Py_ssize_t count) {
    Session *self = (Session *)object;
    if (count != 5) {
        PyErr_SetString(PyExc_TypeError, "log takes values, update, epoch, sample and is_converted");
        return NULL;
    }
    PyObject *dict = arguments[0], *epoch = arguments[2], *sample = arguments[3];
    bool is_converted = arguments[4] == Py_True;
    if (Py_TYPE(dict) != &PyDict_Type) return PyLong_FromLong(NOT_PLAIN);
    int64_t update = 0;
    if (arguments[1] != Py_None) {
        int overflow = 0;
        if (Py_TYPE(arguments[1]) != &PyLong_Type) return PyLong_FromLong(NO_NUMBER);
        update = PyLong_AsLongLongAndOverflow(arguments[1], &overflow);
        // The smallest one says that there is none.
        if (overflow || update == INT64_MIN) return PyLong_FromLong(NO_NUMBER);
    }
    Py_ssize_t size = PyDict_Size(dict) + 2;
    if (size - 2 > NW_VALUES) return PyLong_FromLong(NOT_PLAIN);
    struct nw_value few_values[FEW];
    struct nw_key few_new[FEW];
    PyObject *few_keys[FEW];
    struct row row = {few_values, few_new, few_keys, 0, 0, 0, size, false};
    void *many = NULL;
    if (size > FEW) {
        many = PyMem_Malloc((size_t)size * (sizeof *row.values + sizeof *row.new_keys + sizeof *row.keys));
        if (!many) return PyErr_NoMemory();
        row.values = many;
        row.new_keys = (struct nw_key *)(row.values + size);
        row.keys = (PyObject **)(row.new_keys + size);
    }
    int result = take_row(self, dict, epoch, sample, is_converted, &row);
    PyObject *own = NULL;
    if (result == HAS_TENSOR) {
        own = PyDict_Copy(dict);
        if (!own) {
            result = RAISED;
        } else {
            // Nobody finds it, so nobody changes it.
            PyObject_GC_UnTrack(own);
            result = read_numbers(own, is_converted, (epoch != Py_None) + (sample != Py_None), &row);
            if (!result) result = take_row(self, own, epoch, sample, is_converted, &row);
        }
    }
    if (!result) {
        struct timespec now;
        clock_gettime(CLOCK_REALTIME, &now);
        result = (int)nw_session_log(self->session, arguments[1] == Py_None ? NULL : &update,
                                     (double)now.tv_sec + (double)now.tv_nsec * 1e-9, row.values, row.count,
                                     row.first_new, row.new_keys, row.new_count);
        if (result < NW_NOT_KEPT) remember_keys(self, &row);
    }
    PyMem_Free(many);
    // It may run any code, too.
    Py_XDECREF(own);
    return result == RAISED ? NULL : PyLong_FromLong(result);
}

static PyObject *session_number(PyObject *object, PyObject *unused) {
    return PyLong_FromUnsignedLongLong(nw_session_number(((Session *)object)->session));
}

static PyObject *session_ask(PyObject *object, PyObject *arguments) {
    unsigned char type;
    const char *payload;
    Py_ssize_t length;
    int is_greeting;
    const char *path = NULL;
    if (!PyArg_ParseTuple(arguments, "by#p|z", &type, &payload, &length, &is_greeting, &path)) return NULL;
    if (length > NW_PAYLOAD_BYTES) {
        PyErr_Format(PyExc_ValueError, "a message of %zd bytes; at most %d can be sent", length, NW_PAYLOAD_BYTES);
        return NULL;
    }
    // Here, and not in Python, where an exception could come between it and whoever closes it.
    int directory = -1, failed = 0;
    if (path) {
        Py_BEGIN_ALLOW_THREADS
        directory = open(path, O_PATH | O_DIRECTORY | O_CLOEXEC);
        if (directory < 0) failed = errno;
        Py_END_ALLOW_THREADS
        // Without one the daemon takes the path as it sees it, and says what is wrong with it. What this process lacks
        // is no reason to let it write somewhere else.
        if (failed == EMFILE || failed == ENFILE || failed == ENOMEM) {
            errno = failed;
            return PyErr_SetFromErrnoWithFilename(PyExc_OSError, path);
        }
    }
    return PyLong_FromUnsignedLong(
        nw_session_ask(((Session *)object)->session, type, payload, (size_t)length, is_greeting, directory));
}

static PyObject *session_answer(PyObject *object, PyObject *argument) {
    unsigned long number = PyLong_AsUnsignedLong(argument);
    if (number == (unsigned long)-1 && PyErr_Occurred()) return NULL;
    uint8_t type;
    size_t length;
    unsigned char *payload = nw_session_answer(((Session *)object)->session, (uint32_t)number, &type, &length);
    if (!payload) Py_RETURN_NONE;
    PyObject *found = Py_BuildValue("iy#", type, payload, (Py_ssize_t)length);
    free(payload);
    return found;
}

static PyObject *session_end_log(PyObject *object, PyObject *argument) {
    unsigned long long sequence = PyLong_AsUnsignedLongLong(argument);
    if (sequence == (unsigned long long)-1 && PyErr_Occurred()) return NULL;
    nw_session_end_log(((Session *)object)->session, sequence);
    Py_RETURN_NONE;
}

static PyObject *session_refuse(PyObject *object, PyObject *argument) {
    unsigned long long sequence = PyLong_AsUnsignedLongLong(argument);
    if (sequence == (unsigned long long)-1 && PyErr_Occurred()) return NULL;
    return PyBool_FromLong(nw_session_refuse(((Session *)object)->session, sequence));
}

static PyObject *session_take_log_on(PyObject *object, PyObject *arguments) {
    long long update;
    unsigned long long rows;
    if (!PyArg_ParseTuple(arguments, "LK", &update, &rows)) return NULL;
    nw_session_take_log_on(((Session *)object)->session, update, rows);
    Py_RETURN_NONE;
}

static PyObject *session_news(PyObject *object, PyObject *unused) {
    size_t length;
    bool is_event;
    uint64_t number;
    char *text = nw_session_news(((Session *)object)->session, &length, &is_event, &number);
    if (!text) Py_RETURN_NONE;
    PyObject *found =
        Py_BuildValue("KOy#", (unsigned long long)number, is_event ? Py_True : Py_False, text, (Py_ssize_t)length);
    free(text);
    return found;
}

static PyObject *session_drop_news(PyObject *object, PyObject *argument) {
    unsigned long long number = PyLong_AsUnsignedLongLong(argument);
    if (number == (unsigned long long)-1 && PyErr_Occurred()) return NULL;
    nw_session_drop_news(((Session *)object)->session, number);
    Py_RETURN_NONE;
}

static PyObject *session_last_words(PyObject *object, PyObject *unused) {
    bool is_json;
    char *words = nw_session_last_words(((Session *)object)->session, &is_json);
    if (!words) Py_RETURN_NONE;
    PyObject *text = json_text(words);
    return text ? Py_BuildValue("ON", is_json ? Py_True : Py_False, text) : NULL;
}

static PyObject *session_take_not_kept(PyObject *object, PyObject *unused) {
    return PyLong_FromUnsignedLongLong(nw_session_take_not_kept(((Session *)object)->session));
}

// A save's object, with a reference of its own; takes the reference of `save`.
static PyObject *user_of(Session *self, struct nw_save *save) {
    PyObject *user = save ? save->user : NULL;
    if (user) Py_INCREF(user);
    if (save) nw_save_drop(self->session, save);
    if (user) return user;
    Py_RETURN_NONE;
}

static PyObject *session_pending(PyObject *object, PyObject *unused) {
    Session *self = (Session *)object;
    return user_of(self, nw_session_pending(self->session));
}

static PyObject *session_find(PyObject *object, PyObject *arguments) {
    unsigned long long after;
    int failed;
    if (!PyArg_ParseTuple(arguments, "Kp", &after, &failed)) return NULL;
    Session *self = (Session *)object;
    return user_of(self, nw_session_find(self->session, after, failed));
}

// send(save, type, buffer, payload, place, pickles): see nw_session_send; a barrier has None in place of a buffer.
static int send_frame_of(Session *self, PyObject *arguments) {
    Save *save;
    PyObject *maybe;
    const char *payload;
    Py_ssize_t length;
    unsigned char type;
    unsigned long long place;
    PyObject *pickles;
    if (!PyArg_ParseTuple(arguments, "O!bOy#KO!", save_type, &save, &type, &maybe, &payload, &length, &place,
                          &PyTuple_Type, &pickles))
        return -1;
    struct nw_buffer *buffer = NULL;
    if (PyObject_TypeCheck(maybe, buffer_type)) buffer = ((Buffer *)maybe)->buffer;
    if (!buffer && (maybe != Py_None || !save->save->is_barrier)) {
        PyErr_SetString(PyExc_TypeError, "a save needs a buffer");
        return -1;
    }
    const unsigned char *starts[NW_TARGETS];
    size_t lengths[NW_TARGETS];
    Py_ssize_t count = PyTuple_Size(pickles);
    size_t end = (size_t)place;
    if (count > NW_TARGETS || length < 8 || length > NW_PAYLOAD_BYTES) {
        PyErr_SetString(PyExc_ValueError, "a save that no frame can hold");
        return -1;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *pickle = PyTuple_GetItem(pickles, i);
        starts[i] = (const unsigned char *)PyBytes_AsString(pickle);
        if (!starts[i]) return -1;
        end += lengths[i] = (size_t)PyBytes_Size(pickle);
    }
    if (end > (buffer ? buffer->capacity : 0)) {
        PyErr_SetString(PyExc_ValueError, "a pickle that does not fit into the buffer");
        return -1;
    }
    bool is_sent;
    Py_BEGIN_ALLOW_THREADS
    is_sent =
        nw_session_send(self->session, save->save, type, buffer, (const unsigned char *)payload, (size_t)length,
                        (size_t)place, starts, lengths, (int)count);
    Py_END_ALLOW_THREADS
    if (!is_sent) PyErr_NoMemory();
    return is_sent ? 0 : -1;
}

static PyObject *session_send(PyObject *object, PyObject *arguments) {
    if (send_frame_of((Session *)object, arguments) < 0) return NULL;
    Py_RETURN_NONE;
}

// hand_over(saves, frames): the saves are the session's from here on; `frames` are the arguments of `send` for each, or
// None.
static PyObject *session_hand_over(PyObject *object, PyObject *arguments) {
    Session *self = (Session *)object;
    PyObject *saves, *frames;
    if (!PyArg_ParseTuple(arguments, "O!O!", &PyTuple_Type, &saves, &PyTuple_Type, &frames)) return NULL;
    struct nw_save *handed[NW_TARGETS];
    Py_ssize_t count = PyTuple_Size(saves);
    if (count > NW_TARGETS || PyTuple_Size(frames) != count) {
        PyErr_SetString(PyExc_ValueError, "too many saves");
        return NULL;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *save = PyTuple_GetItem(saves, i);
        if (!PyObject_TypeCheck(save, save_type)) {
            PyErr_SetString(PyExc_TypeError, "saves are wanted");
            return NULL;
        }
        handed[i] = ((Save *)save)->save;
    }
    reap(self, false);
    for (Py_ssize_t i = 0; i < count; i++) Py_INCREF(PyTuple_GetItem(saves, i));
    if (!nw_session_hand_over(self->session, handed, (int)count)) {
        for (Py_ssize_t i = 0; i < count; i++) Py_DECREF(PyTuple_GetItem(saves, i));
        Py_RETURN_FALSE;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *frame = PyTuple_GetItem(frames, i);
        // Without memory for the frame it stays pending: whoever keeps the session tries again.
        if (frame != Py_None && send_frame_of(self, frame) < 0) PyErr_Clear();
    }
    Py_RETURN_TRUE;
}

static PyObject *session_fail(PyObject *object, PyObject *save) {
    if (!PyObject_TypeCheck(save, save_type)) {
        PyErr_SetString(PyExc_TypeError, "a save is wanted");
        return NULL;
    }
    nw_session_fail(((Session *)object)->session, ((Save *)save)->save);
    Py_RETURN_NONE;
}

static struct nw_status status_of(PyObject *object) {
    struct nw_status status;
    nw_session_status(((Session *)object)->session, &status);
    return status;
}

#define STATUS(NAME, VALUE)                                           \
    static PyObject *session_##NAME(PyObject *object, void *unused) { \
        struct nw_status status = status_of(object);                  \
        return VALUE;                                                 \
    }
static PyObject *number_or_none(bool is_there, int64_t number) {
    if (!is_there) Py_RETURN_NONE;
    return PyLong_FromLongLong(number);
}
STATUS(generation, PyLong_FromUnsignedLongLong(status.generation))
STATUS(connection, PyLong_FromUnsignedLongLong(status.connection))
STATUS(is_open, PyBool_FromLong(status.state == NW_OPEN))
STATUS(is_connected, PyBool_FromLong(status.state != NW_AWAY))
STATUS(is_closed, PyBool_FromLong(status.is_closed))
STATUS(is_over, PyBool_FromLong(status.is_over))
STATUS(is_forked, PyBool_FromLong(status.is_forked))
STATUS(has_work, PyBool_FromLong(status.has_work))
STATUS(is_kept, PyBool_FromLong(status.is_kept))
STATUS(is_wanted, PyBool_FromLong(status.is_wanted))
STATUS(has_news, PyBool_FromLong(status.has_news))
STATUS(log_ended, PyBool_FromLong(status.log_ended))
STATUS(away_seconds, PyFloat_FromDouble(status.state == NW_OPEN ? 0.0 : nw_now() - status.away_since))
STATUS(open_seconds, PyFloat_FromDouble(status.connected_at ? status.away_since - status.connected_at : 0.0))
STATUS(sequence, PyLong_FromUnsignedLongLong(status.sequence))
STATUS(last_update, number_or_none(status.has_update, status.last_update))
STATUS(durable_update, number_or_none(status.has_durable, status.durable_update))
STATUS(rows, PyLong_FromUnsignedLongLong(status.rows))
STATUS(taken, PyLong_FromUnsignedLongLong(status.taken))
STATUS(kept_rows, PyLong_FromUnsignedLongLong(status.kept_rows))
STATUS(kept_bytes, PyLong_FromUnsignedLongLong(status.kept_bytes))
STATUS(not_kept, PyLong_FromUnsignedLongLong(status.not_kept))
STATUS(saves, PyLong_FromUnsignedLongLong(status.saves))
STATUS(saves_not_accepted, PyLong_FromUnsignedLongLong(status.saves_not_accepted))

#define MEMBER(NAME, WORDS) {#NAME, session_##NAME, NULL, WORDS, NULL}
static PyGetSetDef session_members[] = {
    MEMBER(generation, "Counts changes; see `wait`."),
    MEMBER(connection, "Counts connections."),
    MEMBER(is_open, "Whether there is a connection, and the run is open on it."),
    MEMBER(is_connected, "Whether there is a connection."),
    MEMBER(is_closed, "Whether nothing more is taken."),
    MEMBER(is_over, "Whether it is closed, and nothing is on its way to the socket."),
    MEMBER(is_forked, "Whether it is the parent's."),
    MEMBER(has_work, "Whether the daemon has not taken, or not ended, something."),
    MEMBER(is_kept, "Whether a thread keeps it."),
    MEMBER(is_wanted, "Whether somebody asks, without a connection."),
    MEMBER(has_news, "Whether something was not said yet."),
    MEMBER(log_ended, "Whether the daemon takes no more updates."),
    MEMBER(away_seconds, "For how long there has been no open connection; 0 with one."),
    MEMBER(open_seconds, "How long the last connection was open."),
    MEMBER(sequence, "The last number that was given."),
    MEMBER(last_update, "The last update that was logged, or None."),
    MEMBER(durable_update, "The last update that survives power loss, or None."),
    MEMBER(rows, "Rows of the log."),
    MEMBER(taken, "The last number up to which the daemon has every update."),
    MEMBER(kept_rows, "Updates that the daemon has not taken."),
    MEMBER(kept_bytes, "Their bytes."),
    MEMBER(not_kept, "Updates that were left out, since the daemon was away for too long."),
    MEMBER(saves, "Saves that have not ended."),
    MEMBER(saves_not_accepted, "Those of them that the daemon has not accepted."),
    {NULL, NULL, NULL, NULL, NULL},
};

// Abandons its session when it goes: without a line of Python that could be interrupted.
typedef struct {
    PyObject_HEAD
    Session *session;
} Tether;
static PyTypeObject *tether_type;

static PyObject *session_tether(PyObject *object, PyObject *unused) {
    Tether *self = (Tether *)new_object(tether_type);
    if (!self) return NULL;
    Py_INCREF(object);
    self->session = (Session *)object;
    return (PyObject *)self;
}

static void tether_dealloc(PyObject *object) {
    Session *session = ((Tether *)object)->session;
    if (session) {
        nw_session_abandon(session->session);
        Py_DECREF(session);
    }
    free_object(object);
}

static PyType_Slot tether_slots[] = {
    {Py_tp_dealloc, tether_dealloc}, {Py_tp_doc, "While it is there the run is wanted."}, {0, NULL},
};
static PyType_Spec tether_spec = {
    "noether_writer._core.Tether",
    sizeof(Tether),
    0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    tether_slots,
};

static PyMethodDef session_methods[] = {
    {"attach", session_attach, METH_O, "attach(fd): takes a connected socket; False: the session is closed."},
    {"opened", session_opened, METH_VARARGS,
     "opened(last_sequence, merges_rows): the run is open; what the daemon does not have is sent."},
    {"detach", session_detach, METH_NOARGS, "Closes the connection."},
    {"close", session_close, METH_NOARGS, "Nothing more is taken; it ends when the daemon has what it was given."},
    {"end", session_end, METH_NOARGS, "It ends now."},
    {"drop_saves", session_drop_saves, METH_NOARGS, "Forgets all saves: nothing more will be heard of them."},
    {"tether", session_tether, METH_NOARGS, "What abandons the session when it goes."},
    {"wait", session_wait, METH_VARARGS,
     "wait(generation, seconds): serves until something has changed since; runs signal handlers."},
    {"serve", session_serve, METH_VARARGS,
     "serve(seconds, heeds_loss): serves until there is something to do for whoever keeps the session."},
    {"want", session_want, METH_NOARGS, "Somebody asks: a missing connection is something to do."},
    {"claim", session_claim, METH_NOARGS,
     "Whether the caller keeps the session from now on; False: somebody else does."},
    {"unclaim", session_unclaim, METH_NOARGS, "Nobody keeps it."},
    {"dismiss", session_dismiss, METH_NOARGS, "Whoever keeps it leaves, and nobody keeps it from now on."},
    {"log", (PyCFunction)(void (*)(void))session_log, METH_FASTCALL,
     "log(values, update, epoch, sample, is_converted): all of it or nothing."},
    {"number", session_number, METH_NOARGS, "The next sequence number; 0: closed."},
    {"ask", session_ask, METH_VARARGS,
     "ask(type, payload, is_greeting, directory): the number of a question; 0: there is no connection. A descriptor of "
     "the directory goes with it, if it can be opened."},
    {"answer", session_answer, METH_O, "answer(number): (type, payload), once, or None."},
    {"end_log", session_end_log, METH_O, "end_log(sequence): the daemon takes no update from this one on."},
    {"refuse", session_refuse, METH_O, "refuse(sequence): the daemon has refused this update; False: that was heard."},
    {"take_log_on", session_take_log_on, METH_VARARGS, "take_log_on(update, rows): a log that was there before."},
    {"news", session_news, METH_NOARGS,
     "(number, whether it is an event of a save, JSON) of the first thing to say, or None."},
    {"drop_news", session_drop_news, METH_O, "drop_news(number): it was said."},
    {"last_words", session_last_words, METH_NOARGS,
     "Why the connection has ended: (whether it is JSON, words), or None."},
    {"take_not_kept", session_take_not_kept, METH_NOARGS, "How many updates were not kept; 0 from then on."},
    {"pending", session_pending, METH_NOARGS, "The first save that waits for its frame, or None."},
    {"find", session_find, METH_VARARGS,
     "find(sequence, failed): the first save from this number on that has not ended (or has failed)."},
    {"send", session_send, METH_VARARGS,
     "send(save, type, buffer, payload, place, pickles): the frame of a save that was handed over."},
    {"hand_over", session_hand_over, METH_VARARGS,
     "hand_over(saves, frames): from here on they are the session's; False: it is closed."},
    {"fail", session_fail, METH_O, "fail(save): it can't be sent."},
    {NULL, NULL, 0, NULL},
};
static PyType_Slot session_slots[] = {
    {Py_tp_new, session_new},
    {Py_tp_dealloc, session_dealloc},
    {Py_tp_getset, session_members},
    {Py_tp_methods, session_methods},
    {Py_tp_doc, "Session(queue_bytes, refuses, busy_seconds)"},
    {0, NULL},
};
static PyType_Spec session_spec = {"noether_writer._core.Session", sizeof(Session), 0, Py_TPFLAGS_DEFAULT,
                                   session_slots};

// MARK: Save

static PyTypeObject *session_type;

static PyObject *save_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords) {
    PyObject *session;
    int targets;
    int is_barrier = 0;
    unsigned long long number;
    if (!PyArg_ParseTuple(arguments, "O!iK|p", session_type, &session, &targets, &number, &is_barrier)) return NULL;
    if (targets < 1 || targets > NW_TARGETS) {
        PyErr_SetString(PyExc_ValueError, "a save has 1 to 4 targets");
        return NULL;
    }
    Save *self = (Save *)new_object(type);
    if (!self) return NULL;
    self->save = nw_save_new(number, targets, is_barrier, self);
    if (!self->save) {
        Py_DECREF(self);
        return PyErr_NoMemory();
    }
    Py_INCREF(session);
    self->session = (Session *)session;
    return (PyObject *)self;
}

static int save_init(PyObject *self, PyObject *arguments, PyObject *keywords) { return 0; }

static void save_dealloc(PyObject *object) {
    Save *self = (Save *)object;
    struct nw_save *save = self->save;
    Session *session = self->session;
    self->save = NULL;
    self->session = NULL;
    if (save) {
        // The session may still hold it, for an event that was about to come; nobody asks it for its object then.
        save->user = NULL;
        if (session) nw_save_drop(session->session, save); else free(save);
    }
    free_object(object);
    Py_XDECREF(session);
}

static struct nw_save_status save_status_of(PyObject *object) {
    struct nw_save_status status;
    nw_save_status(((Save *)object)->session->session, ((Save *)object)->save, &status);
    return status;
}

#define SAVE_STATUS(NAME, VALUE)                                   \
    static PyObject *save_##NAME(PyObject *object, void *unused) { \
        struct nw_save_status status = save_status_of(object);     \
        return VALUE;                                              \
    }
SAVE_STATUS(sequence, PyLong_FromUnsignedLongLong(status.sequence))
SAVE_STATUS(is_handed_over, PyBool_FromLong(status.is_handed_over))
SAVE_STATUS(is_sent, PyBool_FromLong(status.is_sent))
SAVE_STATUS(is_ended, PyBool_FromLong(status.is_ended))
SAVE_STATUS(is_accepted, PyBool_FromLong(status.is_accepted))
SAVE_STATUS(is_failed, PyBool_FromLong(status.is_failed))
SAVE_STATUS(is_told, PyBool_FromLong(status.is_told))
SAVE_STATUS(written, PyLong_FromUnsignedLong(status.written))
SAVE_STATUS(durable, PyLong_FromUnsignedLong(status.durable))
SAVE_STATUS(bytes_total, PyLong_FromUnsignedLongLong(status.total_bytes))
SAVE_STATUS(bytes_done, PyLong_FromUnsignedLongLong(status.done_bytes))
SAVE_STATUS(stalled_since, PyFloat_FromDouble(status.stalled_since))

static PyObject *save_stalled(PyObject *object, void *unused) {
    return json_text(nw_save_text(((Save *)object)->session->session, ((Save *)object)->save, NW_STALLED, 0));
}
static PyObject *save_error(PyObject *object, void *unused) {
    return json_text(nw_save_text(((Save *)object)->session->session, ((Save *)object)->save, NW_ERROR, 0));
}
static PyObject *save_path(PyObject *object, PyObject *argument) {
    long target = PyLong_AsLong(argument);
    if (target == -1 && PyErr_Occurred()) return NULL;
    if (target < 0 || target >= ((Save *)object)->save->targets) {
        PyErr_SetString(PyExc_IndexError, "no such target");
        return NULL;
    }
    return json_text(nw_save_text(((Save *)object)->session->session, ((Save *)object)->save, NW_PATH, (int)target));
}
static PyObject *save_tell(PyObject *object, PyObject *unused) {
    nw_session_tell(((Save *)object)->session->session, ((Save *)object)->save);
    Py_RETURN_NONE;
}

#define SAVE_MEMBER(NAME, WORDS) {#NAME, save_##NAME, NULL, WORDS, NULL}
static PyGetSetDef save_members[] = {
    SAVE_MEMBER(sequence, "Its number, by when it was begun."),
    SAVE_MEMBER(is_handed_over, "Whether it is the session's."),
    SAVE_MEMBER(is_sent, "Whether its frame is there."),
    SAVE_MEMBER(is_ended, "Whether the daemon has released it, or it could not be sent."),
    SAVE_MEMBER(is_accepted, "Whether the daemon holds it."),
    SAVE_MEMBER(is_failed, "Whether a file of it was given up."),
    SAVE_MEMBER(is_told, "Whether somebody was told of that."),
    SAVE_MEMBER(written, "A bit for each target."),
    SAVE_MEMBER(durable, "A bit for each target."),
    SAVE_MEMBER(bytes_total, "Of all files, once it is accepted."),
    SAVE_MEMBER(bytes_done, "Those that the file system has."),
    SAVE_MEMBER(stalled_since, "In monotonic seconds."),
    SAVE_MEMBER(stalled, "Why storage refuses for now, as JSON, or None."),
    SAVE_MEMBER(error, "Why it failed, as JSON, or None."),
    {NULL, NULL, NULL, NULL, NULL},
};
static PyMethodDef save_methods[] = {
    {"path", save_path, METH_O, "path(target): as JSON, or None."},
    {"tell", save_tell, METH_NOARGS, "Its failure was raised."},
    {NULL, NULL, 0, NULL},
};
static PyType_Slot save_slots[] = {
    {Py_tp_new, save_new}, {Py_tp_init, save_init}, {Py_tp_dealloc, save_dealloc}, {Py_tp_getset, save_members},
    {Py_tp_methods, save_methods},
    {Py_tp_doc, "Save(session, targets, number, is_barrier): what became of a save."}, {0, NULL},
};
static PyType_Spec save_spec = {
    "noether_writer._core.Save", sizeof(Save), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE, save_slots,
};

// MARK: The module

static PyObject *read_tensors(PyObject *module, PyObject *arguments) {
    PyObject *capsule;
    unsigned long long address;
    if (!PyArg_ParseTuple(arguments, "OK", &capsule, &address)) return NULL;
    const void *api = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
    if (!api) return NULL;
    int result = nw_tensors_read(api, (struct nw_tensors *)(uintptr_t)address);
    if (result < 0 && PyErr_Occurred()) return NULL;
    return PyBool_FromLong(result == 0);
}

static PyObject *know_tensor(PyObject *module, PyObject *type) {
    PyObject *before = tensor_type;
    Py_INCREF(type);
    tensor_type = type;
    Py_XDECREF(before);
    Py_RETURN_NONE;
}

static PyObject *can_guard(PyObject *module, PyObject *unused) { return PyBool_FromLong(nw_copy_can_guard()); }

static PyObject *sum_of(PyObject *module, PyObject *arguments) {
    PyObject *buffer;
    unsigned long long offset, length, sum;
    if (!PyArg_ParseTuple(arguments, "O!KK", buffer_type, &buffer, &offset, &length)) return NULL;
    struct nw_buffer *memory = ((Buffer *)buffer)->buffer;
    if (offset > memory->capacity || length > memory->capacity - offset) {
        PyErr_SetString(PyExc_ValueError, "memory that is not in the buffer");
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    sum = nw_sum(memory->address + offset, length);
    Py_END_ALLOW_THREADS
    return PyLong_FromUnsignedLongLong(sum);
}

static PyObject *crc32(PyObject *module, PyObject *arguments) {
    unsigned long long address, length;
    unsigned int crc = 0;
    if (!PyArg_ParseTuple(arguments, "KK|I", &address, &length, &crc)) return NULL;
    Py_BEGIN_ALLOW_THREADS
    crc = nw_crc32(crc, (const void *)(uintptr_t)address, length);
    Py_END_ALLOW_THREADS
    return PyLong_FromUnsignedLong(crc);
}

static PyObject *crc32_combine(PyObject *module, PyObject *arguments) {
    unsigned int first, second;
    unsigned long long length;
    if (!PyArg_ParseTuple(arguments, "IIK", &first, &second, &length)) return NULL;
    return PyLong_FromUnsignedLong(nw_crc32_combine(first, second, length));
}

static PyMethodDef functions[] = {
    {"crc32", crc32, METH_VARARGS, "crc32(address, length, crc=0): zlib's, of memory that stays; see nw_crc32."},
    {"crc32_combine", crc32_combine, METH_VARARGS,
     "crc32_combine(first, second, length of the second): of one after the other."},
    {"can_guard", can_guard, METH_NOARGS, "Whether memory that may be gone can be copied."},
    {"sum_of", sum_of, METH_VARARGS,
     "sum_of(buffer, offset, length): of its 64-bit words and the bytes after them; see nw_sum."},
    {"know_tensor", know_tensor, METH_O,
     "know_tensor(type): from now on Session.log takes values of this very type, as their `item` gives them."},
    {"on_main_thread", on_main_thread, METH_VARARGS,
     "on_main_thread(callable, seconds): has the main thread call it between two of its own steps; False: it did not "
     "come to it."},
    {"read_tensors", read_tensors, METH_VARARGS,
     "read_tensors(capsule, address of a struct nw_tensors): False: one is not known here."},
    {NULL, NULL, 0, NULL},
};

static int add_type(PyObject *module, PyType_Spec *spec, const char *name, PyTypeObject **type) {
    *type = (PyTypeObject *)PyType_FromSpec(spec);
    if (!*type) return -1;
    Py_INCREF(*type);
    return PyModule_AddObject(module, name, (PyObject *)*type);
}

static const struct {
    const char *name;
    long value;
} constants[] = {
    {"CHANGED", NW_CHANGED},
    {"NEWS", NW_NEWS},
    {"PENDING", NW_PENDING},
    {"LOST", NW_LOST},
    {"OVER", NW_OVER},
    {"DISMISSED", NW_DISMISSED},
    {"LOGGED", NW_LOGGED},
    {"LOGGED_TWICE", NW_LOGGED_TWICE},
    {"NOT_KEPT", NW_NOT_KEPT},
    {"LOG_ENDED", NW_LOG_ENDED},
    {"CLOSED", NW_CLOSED},
    {"FORKED", NW_FORKED},
    {"IN_DISORDER", NW_IN_DISORDER},
    {"QUEUE_FULL", NW_QUEUE_FULL},
    {"TOO_MANY_KEYS", NW_TOO_MANY_KEYS},
    {"TOO_LARGE", NW_TOO_LARGE},
    {"NO_MEMORY", NW_MEMORY},
    {"SLOW", NW_SLOW},
    {"NOT_PLAIN", NOT_PLAIN},
    {"NO_NUMBER", NO_NUMBER},
};

static int add_constants(PyObject *module) {
    for (size_t i = 0; i < sizeof constants / sizeof *constants; i++)
        if (PyModule_AddIntConstant(module, constants[i].name, constants[i].value) < 0) return -1;
    return 0;
}

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "noether_writer._core",
    "The session with the daemon, in calls that nothing can enter or leave in the middle.", -1,
    functions, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__core(void) {
    static PyTypeObject *pool_type, *copy_type;
    PyObject *module = PyModule_Create(&definition);
    if (!module) return NULL;
    epoch_name = PyUnicode_InternFromString("epoch");
    sample_name = PyUnicode_InternFromString("sample");
    item_name = PyUnicode_InternFromString("item");
    if (!epoch_name || !sample_name || !item_name || add_type(module, &buffer_spec, "Buffer", &buffer_type) < 0 ||
        add_type(module, &pool_spec, "Pool", &pool_type) < 0 ||
        add_type(module, &watch_spec, "Watch", &watch_type) < 0 ||
        add_type(module, &copy_spec, "Copy", &copy_type) < 0 ||
        add_type(module, &session_spec, "Session", &session_type) < 0 ||
        add_type(module, &tether_spec, "Tether", &tether_type) < 0 ||
        add_type(module, &save_spec, "Save", &save_type) < 0 || add_constants(module) < 0) {
        Py_DECREF(module);
        return NULL;
    }
    pthread_atfork(NULL, NULL, forget);
    return module;
}

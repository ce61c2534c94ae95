// The Python module `implicit_layers._kernel`: functions of tensors, and threads to share the programs.
//
//     prepare(…)   takes what is asked of PyTorch, such as what makes a tensor and what tells its address
//     structure(…) the shapes and dtypes of tensors that are ordinary ones
//     ordinary(…)  whether tensors are such
//     solve(…)     the answers of the programs that it could settle, and how many those are
//     adjoint(…)   solves the linear system of the derivative, where all programs allow it
//     describe()   which instructions it uses, and how many programs go side by side

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif
#if !defined(_WIN32)
#include <pthread.h>
#endif
#if defined(__linux__)
#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "programs.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512vl,avx2,fma,bmi2")
#define TARGET avx512
#define LANES 8
#include "kernel.h"
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi2")
#define TARGET avx2
#define LANES 4
#include "kernel.h"
#pragma GCC pop_options
#endif
#define TARGET basic
#define LANES 2
#include "kernel.h"

namespace implicit_layers {

double* Room::take(unsigned long doubles) {
    if (doubles > size) {
        double* larger = static_cast<double*>(aligned_alloc(64, (doubles * sizeof(double) + 63) / 64 * 64));
        if (!larger) throw std::bad_alloc();
        for (unsigned long i = 0; i < size; ++i) larger[i] = memory[i];
        free(memory);
        memory = larger;
        size = doubles;
    }
    return memory;
}

Room::~Room() { free(memory); }

// The best instructions that this processor has; IMPLICIT_LAYERS_KERNEL names lesser ones, to compare with.
static Kernel choose() {
    const char* wish = std::getenv("IMPLICIT_LAYERS_KERNEL");
    const std::string most = wish ? wish : "";
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
    __builtin_cpu_init();
    const bool fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (fma && wide && most != "avx2" && most != "basic") return avx512::kernel("avx512");
    if (fma && most != "basic") return avx2::kernel("avx2");
#endif
    return basic::kernel("basic");
}

static const Kernel KERNEL = choose();

// One call's programs, handed out to whoever asks. How they are grouped does not depend on the threads, so an answer does
// not depend on who computed it.
class Job {
   public:
    Job(Work Width::*what, const void* task, long batch)
        : what_(what), task_(task), groups_(KERNEL.groups(batch)), call_(++calls_) {
        const long rest = batch - groups_ * KERNEL.together.lanes;
        parts_ = groups_ + (rest > 0 ? rest : 0);
    }

    void take() {
        thread_local Room room;
        try {
            for (long part = next_++; part < parts_; part = next_++) {
                const bool alone = part >= groups_;
                room.current = 2 * call_ + alone;
                if (alone)
                    (KERNEL.alone.*what_)(task_, part + groups_ * (KERNEL.together.lanes - 1), room);
                else
                    (KERNEL.together.*what_)(task_, part, room);
            }
        } catch (const std::bad_alloc&) {
            failed_ = true;
        }
    }

    long parts() const { return parts_; }
    bool failed() const { return failed_; }

   private:
    static std::atomic<long> calls_;
    Work Width::*const what_;
    const void* const task_;
    const long groups_, call_;
    long parts_;
    std::atomic<long> next_{0};
    std::atomic<bool> failed_{false};
};

std::atomic<long> Job::calls_{0};

// Threads of our own that wait for work.
class Team {
   public:
    void work(Job& job, int threads) {
        std::unique_lock<std::mutex> turn(turn_);  // one call after the other
        const int helpers = enlist(threads - 1);
        if (helpers > 0) {
            std::lock_guard<std::mutex> lock(mutex_);
            job_ = &job;
            invited_ = helpers;
            busy_ = helpers;
            ++round_;
            start_.notify_all();
        }
        job.take();
        if (helpers > 0) {
            std::unique_lock<std::mutex> lock(mutex_);
            end_.wait(lock, [this] { return busy_ == 0; });
        }
    }

   private:
    int enlist(int wanted) {  // fewer where the system gives no more threads
        try {
            while (int(helpers_.size()) < wanted) helpers_.emplace_back(&Team::wait, this, int(helpers_.size()), round_);
        } catch (const std::system_error&) {
        }
        return wanted < int(helpers_.size()) ? wanted : int(helpers_.size());
    }

    void wait(int number, long seen) {
        while (true) {
            {
                std::unique_lock<std::mutex> lock(mutex_);
                start_.wait(lock, [&] { return round_ != seen; });
                seen = round_;
                if (number >= invited_) continue;
            }
            job_->take();
            std::lock_guard<std::mutex> lock(mutex_);
            if (--busy_ == 0) end_.notify_one();
        }
    }

    std::mutex turn_, mutex_;
    std::condition_variable start_, end_;
    std::vector<std::thread> helpers_;
    Job* job_ = nullptr;
    long round_ = 0;
    int invited_ = 0, busy_ = 0;
};

// The threads that PyTorch itself works with, where they are those of an OpenMP with GNU's entry point: after an
// operation they wait at full speed for the next, and would keep threads of our own off the processors.
typedef void (*OpenMP)(void (*)(void*), void*, unsigned, unsigned);

static OpenMP find_openmp() {
#if defined(__linux__)
    return reinterpret_cast<OpenMP>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
#else
    return nullptr;
#endif
}

static OpenMP openmp = nullptr;
static Team* team = nullptr;

static int useful_threads(const Data& d, long groups, int threads) {
    const double n = double(d.n), m = double(d.n_ineq), rows = double(d.n_eq + d.n_ineq);
    const double iteration = d.form == WIDE ? m * m * m : n * n * (d.form == NARROW ? m : n + m);
    const double formed = d.form == WIDE ? rows : n + d.n_eq, last = d.form == BOUNDED ? d.hold : m;
    const double steps = n * n * n / 3 + n * n * rows + n * rows * formed + 2 * iteration + 20 * (n * n + n * rows + last * last);
    const double worth = 1.0 + groups * steps * (openmp ? 2e-5 : 4e-6);  // to wake a thread takes as long as so many
    if (threads > worth) threads = int(worth);
    if (threads > groups) threads = int(groups);
    return threads < 1 ? 1 : threads;
}

static void work(Team* team, Work Width::*what, const void* task, const Data& d, int threads) {
    Job job(what, task, d.batch);
    threads = useful_threads(d, job.parts(), threads);
    if (threads == 1) {
        job.take();
    } else if (openmp) {
        openmp([](void* job) { static_cast<Job*>(job)->take(); }, &job, threads, 0);
    } else {
        team->work(job, threads);
    }
    if (job.failed()) throw std::bad_alloc();
}

// What is asked of PyTorch, handed over by `prepare`: how memory is made, where it is, whether it has no gaps; and what
// an ordinary tensor is.
static PyObject *torch_empty, *torch_data_ptr, *torch_is_contiguous, *torch_is_neg, *torch_is_zero, *torch_is_wrapped;
static PyObject *torch_strided, *torch_tensor, *torch_parameter;
static PyObject *name_layout, *name_is_cpu, *name_shape, *name_dtype;

static bool prepared() {
    if (!torch_empty) PyErr_SetString(PyExc_RuntimeError, "prepare() comes first");
    return torch_empty;
}

// The numbers that batches of programs alike in their sizes have in common.
struct Head {
    long long is_float, batch, n, n_eq, n_ineq, hold, form;
    long long step_Q, step_p, step_A, step_b, step_G, step_h, step_lb, step_ub;
    long long starts[6], apart[6];  // of a factor's parts, in elements
};

static bool read_head(PyObject* bytes, Head& head, Data& d) {
    if (!PyBytes_Check(bytes) || PyBytes_GET_SIZE(bytes) != sizeof head) {
        PyErr_SetString(PyExc_TypeError, "not a head of numbers");
        return false;
    }
    std::memcpy(&head, PyBytes_AS_STRING(bytes), sizeof head);
    d = {};
    d.batch = head.batch, d.n = head.n, d.n_eq = head.n_eq, d.n_ineq = head.n_ineq;
    d.hold = head.hold, d.form = int(head.form);
    d.step_Q = head.step_Q, d.step_p = head.step_p, d.step_A = head.step_A, d.step_b = head.step_b;
    d.step_G = head.step_G, d.step_h = head.step_h, d.step_lb = head.step_lb, d.step_ub = head.step_ub;
    return true;
}

// Tensors one after the other, of which those that are None have no address.
class Tensors {
   public:
    Tensors(PyObject* given, Py_ssize_t count) {
        if (PyTuple_Check(given) && PyTuple_GET_SIZE(given) == count)
            next_ = &PyTuple_GET_ITEM(given, 0);
        else if (fine_ = false, !PyErr_Occurred())
            PyErr_SetString(PyExc_TypeError, "wrong number of tensors");
    }
    explicit Tensors(PyObject** first) : next_(first) {}
    template <class P>
    void address(P& to) {
        to = nullptr;
        if (!fine_) return;
        PyObject* const tensor = *next_++;
        if (!tensor || tensor == Py_None) return;
        PyObject* const number = PyObject_Vectorcall(torch_data_ptr, &tensor, 1, nullptr);
        if (number) to = reinterpret_cast<P>(PyLong_AsVoidPtr(number));
        Py_XDECREF(number);
        if (!to) fine_ = !PyErr_Occurred() && empty(tensor);
    }
    bool fine() const { return fine_; }

   private:
    static bool empty(PyObject* tensor) {  // as it may be without memory
        PyObject* const count = PyObject_CallMethod(tensor, "numel", nullptr);
        const bool none = count && PyLong_AsLong(count) == 0;
        Py_XDECREF(count);
        if (!none && !PyErr_Occurred()) PyErr_SetString(PyExc_RuntimeError, "the memory of a tensor has been freed");
        return none;
    }

    PyObject** next_ = nullptr;
    bool fine_ = true;
};

// Whether a function of a tensor says so; -1 where it fails.
static int says(PyObject* function, PyObject* tensor) {
    PyObject* const answer = PyObject_Vectorcall(function, &tensor, 1, nullptr);
    const int yes = answer ? PyObject_IsTrue(answer) : -1;
    Py_XDECREF(answer);
    return yes;
}

// 1 for an ordinary tensor, whose numbers lie in the processor's memory as they are; 0 for others; -1 for a failure.
static int ordinary(PyObject* tensor) {
    PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(tensor));
    if (type != torch_tensor && type != torch_parameter) return 0;
    PyObject* const layout = PyObject_GetAttr(tensor, name_layout);
    Py_XDECREF(layout);  // somebody else holds it too
    if (layout != torch_strided) return layout ? 0 : -1;
    PyObject* const is_cpu = PyObject_GetAttr(tensor, name_is_cpu);
    Py_XDECREF(is_cpu);
    if (is_cpu != Py_True) return is_cpu ? 0 : -1;
    const int negated = says(torch_is_neg, tensor);
    if (negated) return negated < 0 ? -1 : 0;
    const int zero = says(torch_is_zero, tensor);
    if (zero) return zero < 0 ? -1 : 0;
    const int wrapped = says(torch_is_wrapped, tensor);
    return wrapped < 0 ? -1 : !wrapped;
}

// 1 where none of the first tensors has gaps, 0 where one has, -1 where the question failed.
static int gapless(PyObject* tensors, Py_ssize_t count) {
    for (Py_ssize_t i = 0; i < count && i < PyTuple_GET_SIZE(tensors); ++i) {
        PyObject* const tensor = PyTuple_GET_ITEM(tensors, i);
        if (tensor == Py_None) continue;
        const int yes = says(torch_is_contiguous, tensor);
        if (yes != 1) return yes;
    }
    return 1;
}

// A row of new tensors, or None, each in a room: what `torch_empty` is called with.
class Made {
   public:
    explicit Made(Py_ssize_t count) : row_(PyTuple_New(count)) {}
    ~Made() { Py_XDECREF(row_); }
    bool add(PyObject* room) {
        PyObject* const tensor = !row_ ? nullptr : room == Py_None ? Py_NewRef(Py_None) : PyObject_Call(torch_empty, room, nullptr);
        if (!tensor) return false;
        PyTuple_SET_ITEM(row_, filled_++, tensor);
        return true;
    }
    PyObject* row() const { return row_; }

   private:
    PyObject* row_;
    Py_ssize_t filled_ = 0;
};

// The parts of a factor that lie one behind the other.
template <class Task, class Number>
static void take_apart(Task& task, Number* memory, const long long* starts) {
    task.chol_q = memory + starts[0], task.chol_eq = memory + starts[1], task.across = memory + starts[2];
    task.chol_ineq = memory + starts[3], task.scale = memory + starts[4], task.active = memory + starts[5];
}

static bool finish(Work Width::*what, const void* task, const Data& data, int threads) {
    bool full = false;
    if (!team) team = new Team();  // by one Python thread; never deleted: its threads wait until the process ends
    Team* const ours = team;
    Py_BEGIN_ALLOW_THREADS;
    try {
        work(ours, what, task, data, threads);
    } catch (const std::bad_alloc&) {
        full = true;
    }
    Py_END_ALLOW_THREADS;
    if (full) PyErr_NoMemory();
    return !full;
}

// Fresh memory that is written once from end to end: asked for in large pages, of which the system hands out fewer.
static void take_large_pages(void* start, long count, long size) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const unsigned long bytes = static_cast<unsigned long>(count) * size;
    if (!start || bytes < (4ul << 20)) return;
    const unsigned long page = sysconf(_SC_PAGESIZE), at = reinterpret_cast<unsigned long>(start);
    const unsigned long first = (at + page - 1) / page * page, last = (at + bytes) / page * page;
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
    (void)start, (void)count, (void)size;
#endif
}

// (head, threads, tol, max_iter, start, (Q, p, A, b, G, h, lb, ub), rooms) to (number, tensors), the tensors being z, ν,
// λ, s, value, residual, condition, the factor, iterations, weak, settled; the bounds' dual and what pulls, where there
// are bounds; and zeros, as many as there are rooms for: one number a program in bytes, then as b, as h and twice as z.
// None where the data has gaps.
static PyObject* solve(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    if (!prepared()) return nullptr;
    Head head;
    Solve task;
    Data& d = task.data;
    if (count != 7 || !PyTuple_Check(arguments[5]) || !PyTuple_Check(arguments[6])) {
        PyErr_SetString(PyExc_TypeError, "wrong number of arguments, or kind of one");
        return nullptr;
    }
    if (!read_head(arguments[0], head, d)) return nullptr;
    const int threads = int(PyLong_AsLong(arguments[1]));
    task.tol = PyFloat_AsDouble(arguments[2]);
    task.max_iter = PyLong_AsLong(arguments[3]);
    if (PyErr_Occurred()) return nullptr;
    const int whole = gapless(arguments[5], 8);
    if (whole < 0) return nullptr;
    if (!whole) Py_RETURN_NONE;
    Tensors data(arguments[5], 8);
    data.address(d.Q), data.address(d.p), data.address(d.A), data.address(d.b), data.address(d.G), data.address(d.h);
    data.address(d.lb), data.address(d.ub);
    PyObject* begin = arguments[4];
    Tensors start(&begin);
    start.address(task.start);
    const Py_ssize_t rooms = PyTuple_GET_SIZE(arguments[6]), bounds = d.form == BOUNDED ? 3 : 0, fixed = 11 + bounds;
    if (!data.fine() || !start.fine()) return nullptr;
    Made made(rooms);
    for (Py_ssize_t i = 0; i < rooms; ++i)
        if (!made.add(PyTuple_GET_ITEM(arguments[6], i))) return nullptr;
    Tensors to(made.row(), rooms < fixed ? fixed : rooms);
    to.address(task.z), to.address(task.nu), to.address(task.lam), to.address(task.s), to.address(task.value);
    to.address(task.residual), to.address(task.condition);
    double* memory;
    to.address(memory);
    to.address(task.iterations), to.address(task.weak), to.address(task.settled);
    task.bound = task.pull_lb = task.pull_ub = nullptr;
    if (bounds) to.address(task.bound), to.address(task.pull_lb), to.address(task.pull_ub);
    const bool is_float = head.is_float;
    const size_t number = is_float ? sizeof(float) : sizeof(double);
    const size_t zeros[5] = {1, number * d.n_eq, number * d.n_ineq, number * d.n, number * d.n};
    for (Py_ssize_t i = fixed; i < rooms && i < fixed + 5; ++i) {
        char* zero;
        to.address(zero);
        if (zero) std::memset(zero, 0, d.batch * zeros[i - fixed]);
    }
    if (!to.fine()) return nullptr;
    take_apart(task, memory, head.starts);
    const long batch = task.data.batch;
    for (long b = 0; b < batch; ++b) task.settled[b] = 0;
    if (d.step_Q) take_large_pages(task.chol_q, batch * d.n * d.n, sizeof(double));
    take_large_pages(task.chol_ineq, batch * d.hold * d.hold, sizeof(double));
    if (!finish(is_float ? &Width::solve_float : &Width::solve_double, &task, task.data, threads)) return nullptr;
    long settled = 0;
    for (long b = 0; b < batch; ++b) settled += task.settled[b] && !task.weak[b];  // which another look may undo
    return Py_BuildValue("(lO)", settled, made.row());
}

// (head, threads, (Q, A, G, z, ν, λ, pull_ub, the factor's memory), (g_z, g_ν, g_λ, g_bound), their steps, (degenerate,
// converged), the factor's parts or None, rooms) to the tensors v_z, v_ν, v_λ, d_Q, d_A, d_G, d_p, d_lb, d_ub, those
// without a room being None. False where a problem does not allow it, None where the first eight have gaps. Gradients g
// that are None are zero; without `degenerate` and `converged` all problems are known to allow it.
static PyObject* adjoint(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    if (!prepared()) return nullptr;
    Head head;
    Adjoint task;
    if (count != 8 || !PyTuple_Check(arguments[2]) || !PyTuple_Check(arguments[7]) || PyTuple_GET_SIZE(arguments[7]) != 9) {
        PyErr_SetString(PyExc_TypeError, "wrong number of arguments, or kind of one");
        return nullptr;
    }
    if (!read_head(arguments[0], head, task.data)) return nullptr;
    const bool is_float = head.is_float;
    const int threads = int(PyLong_AsLong(arguments[1]));
    const int whole = gapless(arguments[2], 8);
    if (whole < 0) return nullptr;
    if (!whole) Py_RETURN_NONE;
    Tensors data(arguments[2], 8), right(arguments[3], 4), state(arguments[5], 2);
    data.address(task.data.Q), data.address(task.data.A), data.address(task.data.G);
    data.address(task.z), data.address(task.nu), data.address(task.lam), data.address(task.pull_ub);
    const double* memory;
    data.address(memory);
    right.address(task.g_z), right.address(task.g_nu), right.address(task.g_lam), right.address(task.g_bound);
    const signed char* degenerate;
    const unsigned char* converged;
    state.address(degenerate), state.address(converged);
    if (!data.fine() || !right.fine() || !state.fine()) return nullptr;
    if (!PyArg_ParseTuple(arguments[4], "llll", &task.step_g_z, &task.step_g_nu, &task.step_g_lam, &task.step_g_bound))
        return nullptr;
    if (arguments[6] == Py_None) {
        take_apart(task, memory, head.starts);
    } else {
        Tensors parts(arguments[6], 6);
        parts.address(task.chol_q), parts.address(task.chol_eq), parts.address(task.across);
        parts.address(task.chol_ineq), parts.address(task.scale), parts.address(task.active);
        if (!parts.fine()) return nullptr;
    }
    const long long* apart = head.apart;
    task.step_chol_q = apart[0], task.step_chol_eq = apart[1], task.step_across = apart[2], task.step_scale = apart[4];
    const long batch = task.data.batch;
    for (long b = 0; b < batch; ++b)
        if ((degenerate && degenerate[b]) || (converged && !converged[b])) Py_RETURN_FALSE;
    Made made(9);
    for (Py_ssize_t i = 0; i < 9; ++i)
        if (!made.add(PyTuple_GET_ITEM(arguments[7], i))) return nullptr;
    Tensors to(made.row(), 9);
    to.address(task.v_z), to.address(task.v_nu), to.address(task.v_lam);
    to.address(task.d_Q), to.address(task.d_A), to.address(task.d_G), to.address(task.d_p);
    to.address(task.d_lb), to.address(task.d_ub);
    if (!to.fine()) return nullptr;
    const Data& d = task.data;
    const long size = is_float ? sizeof(float) : sizeof(double);
    take_large_pages(task.d_Q, batch * d.n * d.n, size);
    take_large_pages(task.d_A, batch * d.n_eq * d.n, size);
    take_large_pages(task.d_G, batch * d.n_ineq * d.n, size);
    if (!finish(is_float ? &Width::adjoint_float : &Width::adjoint_double, &task, task.data, threads)) return nullptr;
    return Py_NewRef(made.row());
}

// Of tensors, or None, in a tuple: their shapes and dtypes in one row; None where one is no ordinary tensor.
static PyObject* structure(PyObject*, PyObject* tensors) {
    if (!prepared()) return nullptr;
    if (!PyTuple_Check(tensors)) {
        PyErr_SetString(PyExc_TypeError, "not a tuple of tensors");
        return nullptr;
    }
    const Py_ssize_t count = PyTuple_GET_SIZE(tensors);
    PyObject* const row = PyTuple_New(2 * count);
    for (Py_ssize_t i = 0; row && i < count; ++i) {
        PyObject* const tensor = PyTuple_GET_ITEM(tensors, i);
        const bool none = tensor == Py_None;
        const int fine = none ? 1 : ordinary(tensor);
        PyObject* const shape = fine != 1 ? nullptr : none ? Py_NewRef(Py_None) : PyObject_GetAttr(tensor, name_shape);
        PyObject* const dtype = !shape ? nullptr : none ? Py_NewRef(Py_None) : PyObject_GetAttr(tensor, name_dtype);
        PyTuple_SET_ITEM(row, 2 * i, shape);
        PyTuple_SET_ITEM(row, 2 * i + 1, dtype);
        if (!dtype) {
            Py_DECREF(row);
            if (fine == 0) Py_RETURN_NONE;
            return nullptr;
        }
    }
    return row;
}

// Whether all tensors of a tuple are ordinary ones, or None.
static PyObject* all_ordinary(PyObject*, PyObject* tensors) {
    if (!prepared()) return nullptr;
    for (Py_ssize_t i = 0; PyTuple_Check(tensors) && i < PyTuple_GET_SIZE(tensors); ++i) {
        PyObject* const tensor = PyTuple_GET_ITEM(tensors, i);
        const int fine = tensor == Py_None ? 1 : ordinary(tensor);
        if (fine < 0) return nullptr;
        if (!fine) Py_RETURN_FALSE;
    }
    Py_RETURN_TRUE;
}

static PyObject* prepare(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    PyObject** const kept[] = {&torch_empty,   &torch_data_ptr,   &torch_is_contiguous, &torch_is_neg,
                               &torch_is_zero, &torch_is_wrapped, &torch_strided,       &torch_tensor,
                               &torch_parameter};
    const Py_ssize_t expected = sizeof kept / sizeof *kept;
    if (count != expected) {
        PyErr_SetString(PyExc_TypeError, "wrong number of arguments, or kind of one");
        return nullptr;
    }
    for (Py_ssize_t i = 0; i < count; ++i) *kept[i] = Py_NewRef(arguments[i]);
    name_layout = PyUnicode_InternFromString("layout"), name_is_cpu = PyUnicode_InternFromString("is_cpu");
    name_shape = PyUnicode_InternFromString("shape"), name_dtype = PyUnicode_InternFromString("dtype");
    Py_RETURN_NONE;
}

static PyObject* describe(PyObject*, PyObject*) { return Py_BuildValue("(si)", KERNEL.name, KERNEL.together.lanes); }

static PyMethodDef METHODS[] = {
    {"structure", structure, METH_O, nullptr},
    {"ordinary", all_ordinary, METH_O, nullptr},
    {"prepare", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(prepare)), METH_FASTCALL, nullptr},
    {"solve", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(solve)), METH_FASTCALL, nullptr},
    {"adjoint", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(adjoint)), METH_FASTCALL, nullptr},
    {"describe", describe, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

static PyModuleDef MODULE = {PyModuleDef_HEAD_INIT, "_kernel", nullptr, -1, METHODS, nullptr, nullptr, nullptr, nullptr};

}  // namespace implicit_layers

PyMODINIT_FUNC PyInit__kernel(void) {
#if !defined(_WIN32)
    // a forked child has none of the threads: it makes its own, and leaves the parent's record of them alone
    pthread_atfork(nullptr, nullptr, [] { implicit_layers::openmp = nullptr, implicit_layers::team = nullptr; });
#endif
    implicit_layers::openmp = implicit_layers::find_openmp();
    return PyModule_Create(&implicit_layers::MODULE);
}

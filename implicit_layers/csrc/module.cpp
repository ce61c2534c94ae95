// The Python module `implicit_layers._kernel`: functions that take addresses, and threads to share the programs.
//
//     solve(…)     writes the answers of the programs that it could settle; returns how many those are
//     adjoint(…)   solves the linear system of the derivative; returns whether all programs allow it
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

// Arguments are `head`, the numbers that batches alike in their sizes have in common, and then one row of addresses.
class Numbers {
   public:
    Numbers(PyObject* const* arguments, Py_ssize_t count) : next_(arguments), end_(arguments + count) {
        if (count && PyBytes_Check(*next_) && PyBytes_GET_SIZE(*next_) == sizeof head)
            std::memcpy(&head, PyBytes_AS_STRING(*next_++), sizeof head);
        else
            short_ = true;
    }
    long long number() {
        if (next_ == end_) {
            short_ = true;
            return 0;
        }
        return PyLong_AsLongLong(*next_++);
    }
    template <class P>
    void address(P& to) {
        to = reinterpret_cast<P>(number());
    }
    double real() { return next_ == end_ ? (short_ = true, 0.0) : PyFloat_AsDouble(*next_++); }
    bool fine() {
        if (PyErr_Occurred()) return false;
        if (short_ || next_ != end_) {
            PyErr_SetString(PyExc_TypeError, "wrong number of arguments");
            return false;
        }
        return true;
    }

    struct {
        long long is_float, batch, n, n_eq, n_ineq, hold, form;
        long long step_Q, step_p, step_A, step_b, step_G, step_h, step_lb, step_ub;
        long long starts[6], apart[6];  // of a factor's parts, in elements
    } head = {};

   private:
    PyObject* const* next_;
    PyObject* const* end_;
    bool short_ = false;
};

static Data sizes(const Numbers& in) {
    Data d = {};
    d.batch = in.head.batch, d.n = in.head.n, d.n_eq = in.head.n_eq, d.n_ineq = in.head.n_ineq;
    d.hold = in.head.hold, d.form = int(in.head.form);
    d.step_Q = in.head.step_Q, d.step_p = in.head.step_p, d.step_A = in.head.step_A, d.step_b = in.head.step_b;
    d.step_G = in.head.step_G, d.step_h = in.head.step_h, d.step_lb = in.head.step_lb, d.step_ub = in.head.step_ub;
    return d;
}

// The parts of a factor that lie one behind the other.
template <class Task, class Number>
static void take_apart(Task& task, Number* memory, const Numbers& in) {
    const long long* starts = in.head.starts;
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

static PyObject* solve(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    Numbers in(arguments, count);
    Solve task;
    Data& data = task.data = sizes(in);
    const bool is_float = in.head.is_float;
    const int threads = int(in.number());
    in.address(data.Q), in.address(data.p), in.address(data.A), in.address(data.b), in.address(data.G);
    in.address(data.h), in.address(data.lb), in.address(data.ub);
    in.address(task.start);
    task.tol = in.real();
    task.max_iter = in.number();
    in.address(task.z), in.address(task.nu), in.address(task.lam), in.address(task.bound), in.address(task.s);
    in.address(task.value), in.address(task.pull_lb), in.address(task.pull_ub);
    in.address(task.residual), in.address(task.condition);
    double* memory;
    in.address(memory);
    in.address(task.iterations), in.address(task.weak), in.address(task.settled);
    if (!in.fine()) return nullptr;
    take_apart(task, memory, in);
    const long batch = task.data.batch;
    for (long b = 0; b < batch; ++b) task.settled[b] = 0;
    const Data& d = task.data;
    if (d.step_Q) take_large_pages(task.chol_q, batch * d.n * d.n, sizeof(double));
    take_large_pages(task.chol_ineq, batch * d.hold * d.hold, sizeof(double));
    if (!finish(is_float ? &Width::solve_float : &Width::solve_double, &task, task.data, threads)) return nullptr;
    long settled = 0;
    for (long b = 0; b < batch; ++b) settled += task.settled[b] && !task.weak[b];  // which another look may undo
    return PyLong_FromLong(settled);
}

static PyObject* adjoint(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    Numbers in(arguments, count);
    Adjoint task;
    task.data = sizes(in);
    const bool is_float = in.head.is_float;
    const int threads = int(in.number());
    in.address(task.data.Q), in.address(task.data.A), in.address(task.data.G);
    in.address(task.z), in.address(task.nu), in.address(task.lam), in.address(task.pull_ub);
    in.address(task.g_z), in.address(task.g_nu), in.address(task.g_lam), in.address(task.g_bound);
    task.step_g_z = in.number(), task.step_g_nu = in.number(), task.step_g_lam = in.number();
    task.step_g_bound = in.number();
    in.address(task.v_z), in.address(task.v_nu), in.address(task.v_lam);
    in.address(task.d_Q), in.address(task.d_A), in.address(task.d_G), in.address(task.d_p);
    in.address(task.d_lb), in.address(task.d_ub);
    const signed char* degenerate;
    const unsigned char* converged;
    in.address(degenerate), in.address(converged);  // none: nothing is degenerate, all have converged
    const double* memory;
    in.address(memory);
    if (memory)
        take_apart(task, memory, in);
    else
        in.address(task.chol_q), in.address(task.chol_eq), in.address(task.across), in.address(task.chol_ineq),
            in.address(task.scale), in.address(task.active);
    if (!in.fine()) return nullptr;
    const long long* apart = in.head.apart;
    task.step_chol_q = apart[0], task.step_chol_eq = apart[1], task.step_across = apart[2], task.step_scale = apart[4];
    const long batch = task.data.batch;
    for (long b = 0; b < batch; ++b)
        if ((degenerate && degenerate[b]) || (converged && !converged[b])) Py_RETURN_FALSE;
    const Data& d = task.data;
    const long size = is_float ? sizeof(float) : sizeof(double);
    take_large_pages(task.d_Q, batch * d.n * d.n, size);
    take_large_pages(task.d_A, batch * d.n_eq * d.n, size);
    take_large_pages(task.d_G, batch * d.n_ineq * d.n, size);
    if (!finish(is_float ? &Width::adjoint_float : &Width::adjoint_double, &task, task.data, threads)) return nullptr;
    Py_RETURN_TRUE;
}

static PyObject* describe(PyObject*, PyObject*) { return Py_BuildValue("(si)", KERNEL.name, KERNEL.together.lanes); }

static PyMethodDef METHODS[] = {
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

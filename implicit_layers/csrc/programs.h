// What a call works on: batches of programs in memory, and what is to be written of each. Shared by all instruction sets.
//
//     min ½ zᵀQz + pᵀz   subject to   A z = b,   G z ≤ h,   lb ≤ z ≤ ub
//
// Matrices are row by row; a step of 0 from one program to the next means that all share the matrix.
#pragma once

namespace implicit_layers {

// Of the iteration: see the files of that name. With bounds it is the last.
enum { WIDE, NARROW, BOUNDED };

struct Data {
    const char *Q, *p, *A, *b, *G, *h, *lb, *ub;              // of the type of the data; lb, ub: perhaps none
    long step_Q, step_p, step_A, step_b, step_G, step_h, step_lb, step_ub;  // in elements
    long batch, n, n_eq, n_ineq;
    long hold;                                                // at most so many inequalities and bounds are active
    int form;
};

struct Solve {
    Data data;
    const double* start;  // (batch, n_eq + n_ineq + bounds) active rows to try first, or none; lower bounds: -1
    double tol;
    long max_iter;
    char *z, *nu, *lam, *bound, *s, *value, *pull_lb, *pull_ub, *residual, *condition;  // of the type of the data
    double *chol_q, *chol_eq, *across, *chol_ineq, *scale;    // (1, …) where all of what it depends on is shared;
                                                              // chol_ineq (batch, hold, hold)
    double* active;                                           // (batch, n_eq + n_ineq + bounds), as `scale`
    long long* iterations;
    signed char* weak;
    unsigned char* settled;
};

struct Adjoint {
    Data data;  // without p, b, h, lb, ub
    const double *chol_q, *chol_eq, *across, *chol_ineq, *scale, *active;
    long step_chol_q, step_chol_eq, step_across, step_scale;  // 0 or the size of one
    const char *z, *nu, *lam, *pull_ub;
    const char *g_z, *g_nu, *g_lam, *g_bound;                 // none: zero
    long step_g_z, step_g_nu, step_g_lam, step_g_bound;
    char *v_z, *v_nu, *v_lam;                                 // K v = g
    char *d_Q, *d_A, *d_G, *d_p, *d_lb, *d_ub;                // none: not wanted
};

// Work on one group: as many programs as there are lanes, the group's number times that of the lanes being the first.
struct Room;
typedef void (*Work)(const void* task, long group, Room& room);

// For so many programs side by side.
struct Width {
    int lanes;
    Work solve_double, solve_float, adjoint_double, adjoint_float;
};

struct Kernel {
    const char* name;
    Width together, alone;
    // Programs that go together, the last group perhaps not full; a few left over are quicker one by one.
    long groups(long batch) const {
        const long lanes = together.lanes, left = batch % lanes;
        return batch / lanes + (left > 1 && 3 * left >= lanes);
    }
};

// A thread's memory, kept from call to call.
struct Room {
    double* memory = nullptr;
    unsigned long size = 0;   // in doubles
    long call = -1;           // the call whose shared matrices have been factored here
    long current = 0;
    double* take(unsigned long doubles);
    ~Room();
};

}  // namespace implicit_layers

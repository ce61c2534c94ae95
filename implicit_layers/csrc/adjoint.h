// K v = g on the active set with the factors of the solve, refined once, and the gradients of the matrices and of p:
//
//     ∂Q = −½ (v_z zᵀ + z v_zᵀ),   ∂A = −(ν v_zᵀ + v_ν zᵀ),   ∂G = −(λ v_zᵀ + v_λ zᵀ),   ∂p = −v_z
//
// and ∂lb, ∂ub = v_bound, of the side that holds the unknown. Only active rows count: each lane's are moved together, so
// a row of E here is another constraint in every lane. Those of bounds, of the identity, come last and are not written
// down.

template <int W, class T>
class Backward {
    typedef Number<W> V;

   public:
    Backward(const Adjoint& task, long group, Room& room)
        : task(task), d(task.data), n(d.n), p(d.n_eq), g(d.n_ineq), m(g + (d.form == BOUNDED ? n : 0)), first(group * W) {
        used = d.batch - first < W ? int(d.batch - first) : W;
        index = reinterpret_cast<long long*>(room.take((m + 1) * W));
        long high = 0, low = 0;
        for (int l = 0; l < W; ++l) {
            const double* active = task.active + program(l) * (p + m) + p;
            long k = 0;
            for (long i = 0; i < g; ++i)
                if (active[i] > 0.0) index[k++ * W + l] = i;
            sizes[l] = k;
            for (long i = g; i < m; ++i)
                if (active[i] > 0.0) index[k++ * W + l] = i;
            held[l] = k - sizes[l];
            high = sizes[l] > high ? sizes[l] : high;
            low = held[l] > low ? held[l] : low;
        }
        written = high, count = high + low;
        rows = p + count;
        V* at = reinterpret_cast<V*>(index) + m + 1;
        const unsigned long total = 2 * n * n + (p + written) * n + p * p + p * count + count * count + 6 * n + 6 * rows + count;
        index = reinterpret_cast<long long*>(room.take((m + 1 + total) * W));  // may have moved: what it held moves along
        at = reinterpret_cast<V*>(index) + m + 1;
        auto part = [&](long size) {
            V* mine = at;
            at += size;
            return mine;
        };
        Q = part(n * n), L = part(n * n), E = part((p + written) * n), C = part(p * p), X = part(count * p), K = part(count * count);
        inv_q = part(n), r_z = part(n), u_z = part(n), left = part(n), work = part(n), spare_z = part(n);
        r_y = part(rows), u_y = part(rows), scale = part(rows), inv_eq = part(rows), right = part(rows), spare = part(rows);
        inv_k = part(count);
    }

    void run() {
        read();
        solve_once(r_z, r_y);
        for (long i = 0; i < n; ++i) u_z[i] = work[i];
        for (long i = 0; i < rows; ++i) u_y[i] = right[i];
        multiply(left, Q, n, n, n, u_z);
        pull(spare_z, u_y);
        for (long i = 0; i < n; ++i) left[i] = r_z[i] - left[i] - spare_z[i];
        show(spare, u_z);
        for (long i = 0; i < rows; ++i) r_y[i] -= spare[i];
        solve_once(left, r_y);
        for (long i = 0; i < n; ++i) u_z[i] += work[i];
        for (long i = 0; i < rows; ++i) u_y[i] += right[i];
        for (int l = 0; l < used; ++l) write(l);
    }

   private:
    const Adjoint& task;
    const Data& d;
    const long n, p, g, m, first;  // m: rows of G, and one for each unknown where there are bounds
    long count, written, rows;     // active rows, those of G first, which are written down
    long sizes[W], held[W];        // of each lane: active rows of G, and of bounds
    int used;
    long long* index;
    V *Q, *L, *E, *C, *X, *K, *inv_q, *r_z, *u_z, *left, *work, *spare_z;
    V *r_y, *u_y, *scale, *inv_eq, *right, *spare, *inv_k;

    // The active row in a place of all lanes: which of the lane's own it is, or -1.
    long own(long place, int lane) const {
        if (place < written) return place < sizes[lane] ? place : -1;
        return place - written < held[lane] ? sizes[lane] + place - written : -1;
    }
    long row(long place, int lane) const {
        const long a = own(place, lane);
        return a < 0 ? -1 : index[a * W + lane];
    }

    void show(V* to, const V* z_) const {  // E z
        multiply(to, E, n, p + written, n, z_);
        for (long a = written; a < count; ++a)
            for (int l = 0; l < W; ++l) {
                const long i = row(a, l);
                to[p + a][l] = i < 0 ? 0.0 : z_[i - g][l];
            }
    }

    void pull(V* to, const V* y) const {  // Eᵀ y
        multiply_transposed(to, E, n, p + written, n, y);
        for (long a = written; a < count; ++a)
            for (int l = 0; l < W; ++l) {
                const long i = row(a, l);
                if (i >= 0) to[i - g][l] += y[p + a][l];
            }
    }

    long program(int lane) const { return first + (lane < used ? lane : used - 1); }
    static void put(V* to, long at, int lane, double value) { reinterpret_cast<double*>(to)[at * W + lane] = value; }

    void read() {
        const T* in[W];
        for (int l = 0; l < W; ++l) in[l] = reinterpret_cast<const T*>(d.Q) + d.step_Q * program(l);
        load<W, T>(Q, in, n * n);
        for (long i = 0; i < n; ++i)
            for (long j = 0; j < i; ++j) Q[i * n + j] = Q[j * n + i] = 0.5 * Q[i * n + j] + 0.5 * Q[j * n + i];
        if (p) {
            for (int l = 0; l < W; ++l) in[l] = reinterpret_cast<const T*>(d.A) + d.step_A * program(l);
            load<W, T>(E, in, p * n);
        }
        for (int l = 0; l < W; ++l) {
            const long b = program(l);
            const double* chol_q = task.chol_q + b * task.step_chol_q;
            for (long i = 0; i < n; ++i)
                for (long j = 0; j <= i; ++j) put(L, i * n + j, l, chol_q[i * n + j]);
            const double* chol_eq = task.chol_eq + b * task.step_chol_eq;
            for (long i = 0; i < p; ++i)
                for (long j = 0; j <= i; ++j) put(C, i * p + j, l, chol_eq[i * p + j]);
            const double* own_scale = task.scale + b * task.step_scale;
            for (long i = 0; i < p; ++i) put(scale, i, l, own_scale[i]);
            const T* g_z = reinterpret_cast<const T*>(task.g_z);
            const T* g_nu = reinterpret_cast<const T*>(task.g_nu);
            const T* g_lam = reinterpret_cast<const T*>(task.g_lam);
            const T* g_bound = reinterpret_cast<const T*>(task.g_bound);
            for (long i = 0; i < n; ++i) put(r_z, i, l, g_z ? g_z[b * task.step_g_z + i] : 0.0);
            for (long i = 0; i < p; ++i) put(r_y, i, l, g_nu ? g_nu[b * task.step_g_nu + i] : 0.0);
            const T* G = reinterpret_cast<const T*>(d.G) + b * d.step_G;
            const double* chol_ineq = task.chol_ineq + b * d.hold * d.hold;
            const bool whole = d.hold == m;  // else the active rows have been moved to the front
            const double* across = task.across + b * task.step_across;
            for (long a = 0; a < count; ++a) {
                const long own_a = own(a, l), i = row(a, l);
                const bool there = i >= 0;
                const double* factor = !there ? nullptr : whole ? chol_ineq + i * m : chol_ineq + own_a * d.hold;
                put(scale, p + a, l, there ? own_scale[p + i] : 1.0);
                if (a < written) {
                    put(r_y, p + a, l, there && g_lam ? g_lam[b * task.step_g_lam + i] : 0.0);
                    for (long j = 0; j < n; ++j) put(E, (p + a) * n + j, l, there ? G[i * n + j] : 0.0);
                } else {
                    put(r_y, p + a, l, there && g_bound ? g_bound[b * task.step_g_bound + i - g] : 0.0);
                }
                for (long j = 0; j < p; ++j) put(X, a * p + j, l, there ? across[j * m + i] : 0.0);
                for (long c = 0; c <= a; ++c) {
                    const long own_c = own(c, l);
                    const bool both = there && own_c >= 0;
                    put(K, a * count + c, l, both ? factor[whole ? index[own_c * W + l] : own_c] : a == c ? 1.0 : 0.0);
                }
            }
        }
        for (long i = 0; i < n; ++i) inv_q[i] = 1.0 / L[i * n + i];
        for (long i = 0; i < p; ++i) inv_eq[i] = 1.0 / C[i * p + i];
        for (long i = 0; i < count; ++i) inv_k[i] = 1.0 / K[i * count + i];
    }

    // With the factors alone: (to_z, to_y) to `work` and `right`.
    void solve_once(const V* to_z, const V* to_y) {
        for (long i = 0; i < n; ++i) work[i] = to_z[i];
        forward(L, n, inv_q, n, work);
        for (long i = 0; i < n; ++i) spare_z[i] = work[i];
        backward(L, n, inv_q, n, spare_z);
        show(right, spare_z);
        for (long i = 0; i < rows; ++i) right[i] = scale[i] * (right[i] - to_y[i]);
        forward(C, p, inv_eq, p, right);
        if (p) {
            multiply(spare, X, p, count, p, right);
            for (long i = 0; i < count; ++i) right[p + i] -= spare[i];
        }
        forward(K, count, inv_k, count, right + p);
        backward(K, count, inv_k, count, right + p);
        if (p) {
            multiply_transposed(spare, X, p, count, p, right + p);
            for (long i = 0; i < p; ++i) right[i] -= spare[i];
            backward(C, p, inv_eq, p, right);
        }
        for (long i = 0; i < rows; ++i) right[i] *= scale[i];
        pull(spare_z, right);
        forward(L, n, inv_q, n, spare_z);
        for (long i = 0; i < n; ++i) work[i] -= spare_z[i];
        backward(L, n, inv_q, n, work);
    }

    // to = factor (left otherᵀ + right thisᵀ), a row at a time
    static void outer(T* to, long rows, long n, const T* left, const T* other, const T* right, const T* one, T factor) {
        for (long i = 0; i < rows; ++i) {
            const T a = factor * left[i], b = factor * right[i];
            T* row = to + i * n;
            if (a == 0 && b == 0) {
                for (long j = 0; j < n; ++j) row[j] = 0;
                continue;
            }
            for (long j = 0; j < n; ++j) row[j] = a * other[j] + b * one[j];
        }
    }

    void write_bounds(int l, T* to, T side) const {  // the side's: 1 the upper, 0 the lower
        if (!to) return;
        const T* pull_ub = reinterpret_cast<const T*>(task.pull_ub) + (first + l) * n;
        to += (first + l) * n;
        for (long i = 0; i < n; ++i) to[i] = 0;
        for (long a = written; a < written + held[l]; ++a) {
            const long i = row(a, l) - g;
            if (pull_ub[i] == side) to[i] = static_cast<T>(u_y[p + a][l]);
        }
    }

    void write(int l) {
        const long b = first + l;
        T* v_z = reinterpret_cast<T*>(task.v_z) + b * n;
        T* v_nu = reinterpret_cast<T*>(task.v_nu) + b * p;
        T* v_lam = reinterpret_cast<T*>(task.v_lam) + b * g;
        const T* z = reinterpret_cast<const T*>(task.z) + b * n;
        const T* nu = reinterpret_cast<const T*>(task.nu) + b * p;
        const T* lam = reinterpret_cast<const T*>(task.lam) + b * g;
        store<W, T>(v_z, u_z, l, n);
        store<W, T>(v_nu, u_y, l, p);
        for (long i = 0; i < g; ++i) v_lam[i] = 0;
        for (long a = 0; a < sizes[l]; ++a) v_lam[index[a * W + l]] = static_cast<T>(u_y[p + a][l]);
        write_bounds(l, reinterpret_cast<T*>(task.d_lb), 0);
        write_bounds(l, reinterpret_cast<T*>(task.d_ub), 1);
        if (task.d_p) {
            T* d_p = reinterpret_cast<T*>(task.d_p) + b * n;
            for (long i = 0; i < n; ++i) d_p[i] = -v_z[i];
        }
        if (task.d_Q) {
            T* d_Q = reinterpret_cast<T*>(task.d_Q) + b * n * n;
            outer(d_Q, n, n, v_z, z, z, v_z, T(-0.5));
            for (long i = 0; i < n; ++i)  // symmetric to the last bit
                for (long j = 0; j < i; ++j) d_Q[j * n + i] = d_Q[i * n + j];
        }
        if (task.d_A) outer(reinterpret_cast<T*>(task.d_A) + b * p * n, p, n, nu, v_z, v_nu, z, T(-1));
        if (task.d_G) outer(reinterpret_cast<T*>(task.d_G) + b * g * n, g, n, lam, v_z, v_lam, z, T(-1));
    }
};

template <int W, class T>
void adjoint(const void* task, long group, Room& room) {
    Backward<W, T>(*static_cast<const Adjoint*>(task), group, room).run();
}

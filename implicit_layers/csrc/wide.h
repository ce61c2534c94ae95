// The form for as many rows as unknowns, or few more: R is formed once, and an iteration factors R + Θ, of size m.

template <class V, class M>
class Wide {
   public:
    Wide() = default;
    Wide(long m, V* memory, V* K, V* inverse) : m(m), R(memory), K(K), inverse(inverse) {}
    static long size(long m) { return m * m; }

    void project(const V* S, long p, long rows) {  // the rows' products, less what the equality rows take
        for (long i = 0; i < m; ++i)
            for (long j = 0; j < m && j < i + 4; ++j) R[i * m + j] = S[(p + i) * rows + p + j];
        if (p) gram(R, m, S + p * rows, rows, m, p, true);
        for (long i = 0; i < m; ++i)
            for (long j = i + 1; j < m; ++j) R[i * m + j] = R[j * m + i];
    }

    M factor(const V* theta) {  // where all pivots are positive
        const V zero = all<V>(0.0);
        for (long i = 0; i < m; ++i) {
            for (long j = 0; j < i; ++j) K[i * m + j] = R[i * m + j];
            K[i * m + i] = R[i * m + i] + theta[i];
        }
        return factorise<V, M>(K, m, m, m, 0, inverse, &zero, 0);
    }

    void solve(V* x, V* between) {  // keeps L⁻¹ x
        forward(K, m, inverse, m, x);
        for (long i = 0; i < m; ++i) between[i] = x[i];
        backward(K, m, inverse, m, x);
    }

    void solve_sum(V* x, const V* between) {  // of x and what came before
        forward(K, m, inverse, m, x);
        for (long i = 0; i < m; ++i) x[i] += between[i];
        backward(K, m, inverse, m, x);
    }

    // One after the other, the duals λ ≥ 0 that make their own slack of s = R λ + w vanish, or as small as they can.
    void sweep(V* lam, V* s) const {
        for (long i = 0; i < m; ++i) {
            const V* row = R + i * m;
            const V step = row[i] > FLAT ? -s[i] / row[i] : all<V>(0.0);
            const V change = largest(step, -lam[i]);
            if (!any(change != 0.0)) continue;
            lam[i] += change;
            for (long j = 0; j < m; ++j) s[j] += row[j] * change;
        }
    }

    void image(V* to, const V* x) const { multiply(to, R, m, m, m, x); }

    // The lower triangle of R on the chosen rows of each lane, to K; places without a row get a unit row.
    template <int W>
    void choose(V* to, long ld, const long long* index, long count) const {
        const double* from = reinterpret_cast<const double*>(R);
        for (long a = 0; a < count; ++a)
            for (long b = 0; b <= a; ++b) {
                V entry = all<V>(a == b ? 1.0 : 0.0);
                for (int l = 0; l < W; ++l) {
                    const long long i = index[a * W + l];
                    if (i >= 0) entry[l] = from[(i * m + index[b * W + l]) * W + l];
                }
                to[a * ld + b] = entry;
            }
    }

   private:
    long m = 0;
    V *R = nullptr, *K = nullptr, *inverse = nullptr;
};

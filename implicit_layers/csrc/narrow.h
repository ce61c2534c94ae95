// The form for many more rows than unknowns. R = B Bᵀ is never formed: with Θ = diag(θ) > 0 and N = I + Bᵀ Θ⁻¹ B, of the
// size of the unknowns,
//
//     (R + Θ)⁻¹ v = Θ⁻¹ (v − B N⁻¹ Bᵀ Θ⁻¹ v)
//
// and B, the rows L⁻¹Gᵀ without their part along the equality rows, is of size m x n.

template <class V, int R, int C>
NOINLINE void weigh_block(V* c, long ldc, const V* a, const V* b, long ld, const V* weight, long depth, bool add) {
    V block[R][C];
    for (int i = 0; i < R; ++i)
        for (int j = 0; j < C; ++j) block[i][j] = add ? c[i * ldc + j] : all<V>(0.0);
    for (long t = 0; t < depth; ++t) {
        V left[R];
        for (int i = 0; i < R; ++i) left[i] = weight[t] * a[t * ld + i];
        for (int j = 0; j < C; ++j) {
            const V right = b[t * ld + j];
            for (int i = 0; i < R; ++i) block[i][j] += left[i] * right;
        }
    }
    for (int i = 0; i < R; ++i)
        for (int j = 0; j < C; ++j) c[i * ldc + j] = block[i][j];
}

template <class V, int C>
void weigh_column(V* c, long ldc, long columns, long j, const V* a, long ld, const V* weight, long depth, bool add) {
    long i = j;
    V* to = c + j;
    for (; i + ROWS <= columns; i += ROWS) weigh_block<V, ROWS, C>(to + i * ldc, ldc, a + i, a + j, ld, weight, depth, add);
    if (ROWS > 3 && columns - i == 3) weigh_block<V, 3, C>(to + i * ldc, ldc, a + i, a + j, ld, weight, depth, add);
    if (columns - i == 2) weigh_block<V, 2, C>(to + i * ldc, ldc, a + i, a + j, ld, weight, depth, add);
    if (columns - i == 1) weigh_block<V, 1, C>(to + i * ldc, ldc, a + i, a + j, ld, weight, depth, add);
}

// The lower triangle (in blocks of four) of aᵀ diag(weight) a, columns x columns; a stretch of rows that stays in the
// cache after the other.
template <class V>
void weighted_gram(V* c, long ldc, const V* a, long ld, long rows, long columns, const V* weight) {
    if constexpr (width<V> == 1)
        return single::weigh_columns<LANES>(plain(c), ldc, plain(a), ld, rows, columns, plain(weight), 0);
    const long fit = 24576 / (long(sizeof(V)) * (columns + 1)), stretch = fit > 16 ? fit : 16;
    for (long first = 0; first < rows; first += stretch) {
        const long depth = rows - first < stretch ? rows - first : stretch;
        const V *from = a + first * ld, *by = weight + first;
        for (long j = 0; j < columns; j += 4) {
            switch (columns - j < 4 ? columns - j : 4) {
                case 4: weigh_column<V, 4>(c, ldc, columns, j, from, ld, by, depth, first > 0); break;
                case 3: weigh_column<V, 3>(c, ldc, columns, j, from, ld, by, depth, first > 0); break;
                case 2: weigh_column<V, 2>(c, ldc, columns, j, from, ld, by, depth, first > 0); break;
                default: weigh_column<V, 1>(c, ldc, columns, j, from, ld, by, depth, first > 0);
            }
        }
    }
}

template <class V, class M>
class Narrow {
   public:
    Narrow() = default;
    // Without equality rows B is `rows` itself; else they are not read here.
    Narrow(long m, long n, long p, const V* rows, V* memory) : m(m), n(n) {
        N = memory, inverse = N + n * n, pull = inverse + n, weight = pull + n, pushed = weight + m, own = pushed + m;
        B = p ? own : rows;
    }
    static long size(long m, long n, long p) { return (p ? m * n : 0) + n * n + 2 * n + 2 * m; }

    // B from the rows H = (equality rows, others) of length 1 and the columns X = (C⁻¹ H_e) H_iᵀ, kept as Xᵀ with `p`
    // columns; C is the factor of H_e H_eᵀ.
    void project(const V* H, long p, const V* C, const V* inv_c, const V* X) {
        if (B != own) return;
        V* across = N;  // C⁻¹ H_e, p x n: at most n rows are independent
        const long count = p < n ? p : n;
        for (long i = 0; i < count; ++i)
            for (long j = 0; j < n; ++j) {
                V left = H[i * n + j];
                for (long k = 0; k < i; ++k) left -= C[i * p + k] * across[k * n + j];
                across[i * n + j] = left * inv_c[i];
            }
        for (long i = 0; i < m; ++i) {
            multiply_transposed(pull, across, n, count, n, X + i * p);
            for (long j = 0; j < n; ++j) own[i * n + j] = H[(p + i) * n + j] - pull[j];
        }
    }

    M factor(const V* inverse_theta) {  // where all pivots are positive
        const V zero = all<V>(0.0);
        for (long i = 0; i < m; ++i) weight[i] = inverse_theta[i];
        weighted_gram(N, n, B, n, m, n, weight);
        for (long j = 0; j < n; ++j) N[j * n + j] += 1.0;
        return factorise<V, M>(N, n, n, n, 0, inverse, &zero, 0);
    }

    void solve(V* x, V* between) {  // keeps x
        for (long i = 0; i < m; ++i) between[i] = x[i];
        solve(x);
    }

    void solve_sum(V* x, const V* between) {  // of x and what came before
        for (long i = 0; i < m; ++i) x[i] += between[i];
        solve(x);
    }

    void image(V* to, const V* x) {  // R x
        multiply_transposed(pull, B, n, m, n, x);
        multiply(to, B, n, m, n, pull);
    }

    // The lower triangle of R on the chosen rows of each lane, to K; places without a row get a unit row. N is spent.
    template <int W>
    void choose(V* K, long ld, const long long* index, long count) {
        double* to = reinterpret_cast<double*>(N);
        const double* from = reinterpret_cast<const double*>(B);
        for (long a = 0; a < count; ++a)
            for (int l = 0; l < W; ++l) {
                const long long i = index[a * W + l];
                for (long j = 0; j < n; ++j) to[(a * n + j) * W + l] = i >= 0 ? from[(i * n + j) * W + l] : 0.0;
            }
        gram(K, ld, N, n, count, n, false);
        for (long a = 0; a < count; ++a)
            for (int l = 0; l < W; ++l)
                if (index[a * W + l] < 0) K[a * ld + a][l] = 1.0;
    }

   private:
    long m = 0, n = 0;
    const V* B = nullptr;  // m x n
    V *own = nullptr, *N = nullptr, *inverse = nullptr, *pull = nullptr, *weight = nullptr, *pushed = nullptr;

    void solve(V* x) {
        for (long i = 0; i < m; ++i) pushed[i] = weight[i] * x[i];
        multiply_transposed(pull, B, n, m, n, pushed);
        forward(N, n, inverse, n, pull);
        backward(N, n, inverse, n, pull);
        multiply(pushed, B, n, m, n, pull);
        for (long i = 0; i < m; ++i) x[i] = weight[i] * (x[i] - pushed[i]);
    }
};

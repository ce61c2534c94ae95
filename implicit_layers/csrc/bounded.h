// The form for programs with bounds lb ≤ z ≤ ub, however many other rows there are. Bounds are rows of the identity,
// which no one writes down: with Θ⁻¹ the weights of the inequalities, E those that hold with D the lengths that scale them,
//
//     N = Q + Gᵀ Θ_G⁻¹ G + diag(θ_ub⁻¹ + θ_lb⁻¹),   M = N⁻¹ − N⁻¹ Aᵀ (A N⁻¹ Aᵀ)⁻¹ A N⁻¹,
//     (R + Θ)⁻¹ v = Θ⁻¹ (v − E M Eᵀ Θ⁻¹ v)
//
// so an iteration factors a matrix of the size of the unknowns, and one of the size of the equality rows. Where only
// rows count, upper and lower bound of an unknown are one; among the inequalities they are two, its sides.

struct Side {
    double sign;        // sign z ≤ sign bound
    long first, count;  // its place among the inequalities; none of them where the argument is missing
};

template <class V, class M>
class Bounded {
   public:
    Bounded() = default;
    // Rows E = (A, G) and their scales, those of the bounds behind; `open`: 1 where an inequality is none.
    Bounded(long n, long p, long g, const Side* sides, const V* Q, const V* E, const V* scale, const V* open, V* memory)
        : n(n), p(p), g(g), sides(sides), Q(Q), A(E), G(E + p * n), scale(scale), open(open) {
        const long m = g + sides[0].count + sides[1].count;
        N = memory, C = N + (n + p) * n, inverse = C + p * p, inverse_c = inverse + n, pulled = inverse_c + p;
        along = pulled + n, weight = along + p, pushed = weight + m, scaled = pushed + m;
    }
    static long size(long m, long n, long p, long g) { return (n + p) * n + p * p + 2 * n + 2 * p + 2 * m + g; }

    M factor(const V* inverse_theta) {  // where all pivots are positive
        const V zero = all<V>(0.0);
        for (long j = 0; j < g; ++j) {
            weight[j] = inverse_theta[j];
            scaled[j] = scale[p + j] * scale[p + j] * weight[j];
        }
        if (g) weighted_gram(N, n, G, n, g, n, scaled);
        for (long i = 0; i < n; ++i)
            for (long j = 0; j <= i; ++j) N[i * n + j] = g ? N[i * n + j] + Q[i * n + j] : Q[i * n + j];
        for (int k = 0; k < 2; ++k)
            for (long i = 0; i < sides[k].count; ++i) {
                const long j = sides[k].first + i;
                weight[j] = inverse_theta[j];
                N[i * n + i] += open[j] > 0.5 ? zero : scale[p + g + i] * scale[p + g + i] * weight[j];
            }
        for (long i = 0; i < p; ++i)
            for (long j = 0; j < n; ++j) N[(n + i) * n + j] = scale[i] * A[i * n + j];
        M positive = factorise<V, M>(N, n, n, n + p, 0, inverse, &zero, 0);
        if (p) {
            gram(C, p, N + n * n, n, p, n, false);
            positive &= factorise<V, M>(C, p, p, p, 0, inverse_c, &zero, 0);
        }
        return positive;
    }

    void solve(V* x, V* between) {  // keeps x
        const long m = g + sides[0].count + sides[1].count;
        for (long i = 0; i < m; ++i) between[i] = x[i];
        solve(x, m);
    }

    void solve_sum(V* x, const V* between) {  // of x and what came before
        const long m = g + sides[0].count + sides[1].count;
        for (long i = 0; i < m; ++i) x[i] += between[i];
        solve(x, m);
    }

    // The lower triangle of R on the chosen rows of each lane, to K; places without a row get a unit row. H are the rows
    // of length 1, X what they have along the equality rows, p columns. N is spent.
    template <int W>
    void choose(V* K, long ld, const long long* index, long count, const V* H, const V* X) {
        V* const across = N + count * n;
        pick<W>(N, H, n, index, count);
        gram(K, ld, N, n, count, n, false);
        if (p) {
            pick<W>(across, X, p, index, count);
            gram(K, ld, across, p, count, p, true);
        }
        for (long a = 0; a < count; ++a)
            for (int l = 0; l < W; ++l)
                if (index[a * W + l] < 0) K[a * ld + a][l] = 1.0;
    }

   private:
    long n = 0, p = 0, g = 0;
    const Side* sides = nullptr;
    const V *Q = nullptr, *A = nullptr, *G = nullptr, *scale = nullptr, *open = nullptr;
    V *N = nullptr, *C = nullptr, *inverse = nullptr, *inverse_c = nullptr, *pulled = nullptr, *along = nullptr;
    V *weight = nullptr, *pushed = nullptr, *scaled = nullptr;

    template <int W>
    static void pick(V* to_, const V* from_, long columns, const long long* index, long count) {
        double* to = reinterpret_cast<double*>(to_);
        const double* from = reinterpret_cast<const double*>(from_);
        for (long a = 0; a < count; ++a)
            for (int l = 0; l < W; ++l) {
                const long long i = index[a * W + l];
                for (long j = 0; j < columns; ++j) to[(a * columns + j) * W + l] = i >= 0 ? from[(i * columns + j) * W + l] : 0.0;
            }
    }

    void solve(V* x, long m) {
        const V zero = all<V>(0.0);
        for (long j = 0; j < m; ++j) pushed[j] = weight[j] * x[j];
        for (long j = 0; j < g; ++j) scaled[j] = scale[p + j] * pushed[j];
        if (g)
            multiply_transposed(pulled, G, n, g, n, scaled);
        else
            for (long i = 0; i < n; ++i) pulled[i] = zero;
        for (int k = 0; k < 2; ++k)
            for (long i = 0; i < sides[k].count; ++i) {
                const long j = sides[k].first + i;
                pulled[i] += open[j] > 0.5 ? zero : sides[k].sign * scale[p + g + i] * pushed[j];
            }
        forward(N, n, inverse, n, pulled);
        if (p) {
            const V* rows = N + n * n;
            multiply(along, rows, n, p, n, pulled);
            forward(C, p, inverse_c, p, along);
            backward(C, p, inverse_c, p, along);
            multiply_transposed(pushed, rows, n, p, n, along);
            for (long i = 0; i < n; ++i) pulled[i] -= pushed[i];
        }
        backward(N, n, inverse, n, pulled);
        if (g) multiply(scaled, G, n, g, n, pulled);
        for (long j = 0; j < g; ++j) x[j] = weight[j] * (x[j] - scale[p + j] * scaled[j]);
        for (int k = 0; k < 2; ++k)
            for (long i = 0; i < sides[k].count; ++i) {
                const long j = sides[k].first + i;
                const V own = sides[k].sign * scale[p + g + i] * pulled[i];
                x[j] = weight[j] * (open[j] > 0.5 ? x[j] : x[j] - own);
            }
    }
};

// The work of `factor.h` and `narrow.h` for one program alone: a register holds neighbours of one matrix instead of the
// same number of several. Blocks are as wide as a register, or narrower by halves where the matrix ends.

namespace single {

template <int C>
INLINE Number<C> near(const double* from) {  // C neighbours, wherever they begin
    typedef double Loose __attribute__((vector_size(C * 8), aligned(8), may_alias));
    return *reinterpret_cast<const Loose*>(from);
}

template <int C>
INLINE void put(double* to, Number<C> value) {
    typedef double Loose __attribute__((vector_size(C * 8), aligned(8), may_alias));
    *reinterpret_cast<Loose*>(to) = value;
}

template <int C>
INLINE Number<C / 2> folded(Number<C> a) {
    Number<C / 2> low, high;
    for (int l = 0; l < C / 2; ++l) low[l] = a[l], high[l] = a[C / 2 + l];
    return low + high;
}

template <int C>
INLINE double sum_of(Number<C> a) {
    if constexpr (C == 1) {
        return a[0];
    } else {
        return sum_of<C / 2>(folded<C>(a));
    }
}

// Four sums at once.
template <int C>
INLINE Number<4> sums_of(Number<C> a, Number<C> b, Number<C> c, Number<C> d) {
    if constexpr (C > 4) {
        return sums_of<C / 2>(folded<C>(a), folded<C>(b), folded<C>(c), folded<C>(d));
    } else if constexpr (C == 4) {
        const Number<4> ab = Number<4>{a[0], b[0], a[2], b[2]} + Number<4>{a[1], b[1], a[3], b[3]};
        const Number<4> cd = Number<4>{c[0], d[0], c[2], d[2]} + Number<4>{c[1], d[1], c[3], d[3]};
        return Number<4>{ab[0], ab[1], cd[0], cd[1]} + Number<4>{ab[2], ab[3], cd[2], cd[3]};
    } else {
        return Number<4>{sum_of<C>(a), sum_of<C>(b), sum_of<C>(c), sum_of<C>(d)};
    }
}

template <int R>
INLINE void sums(double (&to)[R], const Number<LANES> (&along)[R]) {
    int i = 0;
    for (; i + 4 <= R; i += 4) put<4>(to + i, sums_of<LANES>(along[i], along[i + 1], along[i + 2], along[i + 3]));
    for (; i < R; ++i) to[i] = sum_of<LANES>(along[i]);
}

// --- products ---

INLINE double inner(const double* a, const double* b, long count) {
    Number<LANES> even = all<Number<LANES>>(0.0), odd = even;
    long i = 0;
    for (; i + 2 * LANES <= count; i += 2 * LANES) {
        even += near<LANES>(a + i) * near<LANES>(b + i);
        odd += near<LANES>(a + i + LANES) * near<LANES>(b + i + LANES);
    }
    double sum = sum_of<LANES>(even + odd);
    for (; i < count; ++i) sum += a[i] * b[i];
    return sum;
}

template <int R>
INLINE void row_products(double (&sum)[R], const double* matrix, long ld, const double* x, long count) {  // matrix x
    Number<LANES> along[R] = {};
    long k = 0;
    for (; k + LANES <= count; k += LANES) {
        const Number<LANES> right = near<LANES>(x + k);
        for (int i = 0; i < R; ++i) along[i] += near<LANES>(matrix + i * ld + k) * right;
    }
    sums<R>(sum, along);
    for (; k < count; ++k)
        for (int i = 0; i < R; ++i) sum[i] += matrix[i * ld + k] * x[k];
}

template <int C>
INLINE Number<C> column_products(const double* matrix, long ld, const double* x, long count) {  // matrixᵀ x
    Number<C> sum[4];
    for (int i = 0; i < 4; ++i) sum[i] = all<Number<C>>(0.0);
    long k = 0;
    for (; k + 4 <= count; k += 4)
        for (int i = 0; i < 4; ++i) sum[i] += near<C>(matrix + (k + i) * ld) * x[k + i];
    for (; k < count; ++k) sum[0] += near<C>(matrix + k * ld) * x[k];
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

template <int R>
INLINE void multiply_block(double* y, const double* matrix, long ld, long columns, const double* x) {
    double sum[R];
    row_products<R>(sum, matrix, ld, x, columns);
    for (int i = 0; i < R; ++i) y[i] = sum[i];
}

inline NOINLINE void multiply(double* y, const double* matrix, long ld, long rows, long columns, const double* x) {
    long i = 0;
    for (; i + 8 <= rows; i += 8) multiply_block<8>(y + i, matrix + i * ld, ld, columns, x);
    for (; i + 4 <= rows; i += 4) multiply_block<4>(y + i, matrix + i * ld, ld, columns, x);
    for (; i < rows; ++i) multiply_block<1>(y + i, matrix + i * ld, ld, columns, x);
}

// Columns `first` … `count` in registers of C, C / 2, …
template <int C>
INLINE void multiply_columns(double* y, const double* matrix, long ld, long rows, long first, long count, const double* x) {
    for (; first + C <= count; first += C) put<C>(y + first, column_products<C>(matrix + first, ld, x, rows));
    if constexpr (C > 1) multiply_columns<C / 2>(y, matrix, ld, rows, first, count, x);
}

inline NOINLINE void multiply_transposed(double* y, const double* matrix, long ld, long rows, long columns, const double* x) {
    multiply_columns<LANES>(y, matrix, ld, rows, 0, columns, x);
}

template <int R, int C>
NOINLINE void gram_block(double* c, long ldc, const double* a, const double* b, long ld, long depth, bool take) {
    Number<LANES> along[R][C] = {};
    long t = 0;
    for (; t + LANES <= depth; t += LANES) {
        Number<LANES> left[R];
        for (int i = 0; i < R; ++i) left[i] = near<LANES>(a + i * ld + t);
        for (int j = 0; j < C; ++j) {
            const Number<LANES> right = near<LANES>(b + j * ld + t);
            for (int i = 0; i < R; ++i) along[i][j] += left[i] * right;
        }
    }
    for (int i = 0; i < R; ++i) {
        double sum[C];
        sums<C>(sum, along[i]);
        for (long k = t; k < depth; ++k)
            for (int j = 0; j < C; ++j) sum[j] += a[i * ld + k] * b[j * ld + k];
        for (int j = 0; j < C; ++j) c[i * ldc + j] = take ? c[i * ldc + j] - sum[j] : sum[j];
    }
}

template <int R, int C>
NOINLINE void weigh_block(double* c, long ldc, const double* a, const double* b, long ld, const double* weight, long depth) {
    Number<C> block[R];
    for (int i = 0; i < R; ++i) block[i] = all<Number<C>>(0.0);
    for (long t = 0; t < depth; ++t) {
        const Number<C> right = weight[t] * near<C>(b + t * ld);
        for (int i = 0; i < R; ++i) block[i] += a[t * ld + i] * right;
    }
    for (int i = 0; i < R; ++i) put<C>(c + i * ldc, block[i]);
}

// Of aᵀ diag(weight) a the columns from `j` on, as far down from the diagonal as there are rows.
template <int C>
void weigh_columns(double* c, long ldc, const double* a, long ld, long rows, long columns, const double* weight, long j) {
    for (; j + C <= columns; j += C) {
        long i = j;
        for (; i + 8 <= columns; i += 8) weigh_block<8, C>(c + i * ldc + j, ldc, a + i, a + j, ld, weight, rows);
        for (; i + 2 <= columns; i += 2) weigh_block<2, C>(c + i * ldc + j, ldc, a + i, a + j, ld, weight, rows);
        for (; i < columns; ++i) weigh_block<1, C>(c + i * ldc + j, ldc, a + i, a + j, ld, weight, rows);
    }
    if constexpr (C > 1) weigh_columns<C / 2>(c, ldc, a, ld, rows, columns, weight, j);
}

// --- triangular factors ---

// Rows i0 … i0 + R of columns j0 … j0 + C. Above the diagonal lies the transposed factor, so that C neighbours of a
// row there are the columns' entries. `pivots` holds the columns of the diagonal block, below the diagonal.
template <int R, int C>
NOINLINE void panel(double* matrix, long ld, long n, long i0, long j0, const double* inverse, const Number<C>* pivots) {
    Number<C> c[R];
    for (int i = 0; i < R; ++i) c[i] = near<C>(matrix + (i0 + i) * ld + j0);
    for (long t = 0; t < j0; ++t) {
        const Number<C> right = near<C>(matrix + t * ld + j0);
        for (int i = 0; i < R; ++i) c[i] -= matrix[(i0 + i) * ld + t] * right;
    }
    double x[R][C];
    for (int l = 0; l < C; ++l)
        for (int i = 0; i < R; ++i) {
            x[i][l] = c[i][l] * inverse[j0 + l];
            c[i] -= x[i][l] * pivots[l];
        }
    for (int i = 0; i < R; ++i)
        for (int l = 0; l < C; ++l) matrix[(i0 + i) * ld + j0 + l] = x[i][l];
    for (int i = 0; i < R && i0 + i < n; ++i)
        for (int l = 0; l < C; ++l) matrix[(j0 + l) * ld + i0 + i] = x[i][l];
}

template <int C>
NOINLINE bool corner(double* matrix, long ld, long j0, double* inverse, const double* floor, long floor_step) {
    Number<C> rows[C];
    for (int i = 0; i < C; ++i) rows[i] = near<C>(matrix + (j0 + i) * ld + j0);
    for (long t = 0; t < j0; ++t) {
        const Number<C> right = near<C>(matrix + t * ld + j0);
        for (int i = 0; i < C; ++i) rows[i] -= matrix[(j0 + i) * ld + t] * right;
    }
    double c[C][C];
    for (int i = 0; i < C; ++i) put<C>(c[i], rows[i]);
    bool positive = true;
    for (int j = 0; j < C; ++j) {
        const bool fit = c[j][j] > floor[(j0 + j) * floor_step];
        positive &= fit;
        const double pivot = __builtin_sqrt(fit ? c[j][j] : 1.0);
        inverse[j0 + j] = 1.0 / pivot;
        c[j][j] = pivot;
        for (int i = j + 1; i < C; ++i) c[i][j] *= inverse[j0 + j];
        for (int i = j + 1; i < C; ++i)
            for (int l = j + 1; l <= i; ++l) c[i][l] -= c[i][j] * c[l][j];
    }
    for (int i = 0; i < C; ++i)
        for (int j = 0; j <= i; ++j) matrix[(j0 + i) * ld + j0 + j] = c[i][j];
    return positive;
}

template <int C>
bool factor_columns(double* matrix, long ld, long n, long rows, long first, double* inverse, const double* floor,
                    long floor_step, long j) {
    bool positive = true;
    for (; j + C <= n; j += C) {
        if (first <= j) positive &= corner<C>(matrix, ld, j, inverse, floor, floor_step);
        Number<C> pivots[C];
        for (int l = 0; l < C; ++l)
            for (int i = 0; i < C; ++i) pivots[l][i] = i > l ? matrix[(j + i) * ld + j + l] : 0.0;
        long i = first > j + C ? first : j + C;
        for (; i + 8 <= rows; i += 8) panel<8, C>(matrix, ld, n, i, j, inverse, pivots);
        for (; i + 2 <= rows; i += 2) panel<2, C>(matrix, ld, n, i, j, inverse, pivots);
        for (; i < rows; ++i) panel<1, C>(matrix, ld, n, i, j, inverse, pivots);
    }
    if constexpr (C > 1)
        positive &= factor_columns<C / 2>(matrix, ld, n, rows, first, inverse, floor, floor_step, j);
    return positive;
}

template <int R>
INLINE void forward_block(const double* factor, long ld, const double* inverse, long i0, double* x) {
    double sum[R];
    row_products<R>(sum, factor + i0 * ld, ld, x, i0);
    for (int i = 0; i < R; ++i) {
        double left = x[i0 + i] - sum[i];
        for (int k = 0; k < i; ++k) left -= factor[(i0 + i) * ld + i0 + k] * x[i0 + k];
        x[i0 + i] = left * inverse[i0 + i];
    }
}

inline NOINLINE void forward(const double* factor, long ld, const double* inverse, long n, double* x) {
    long i = 0;
    for (; i + 8 <= n; i += 8) forward_block<8>(factor, ld, inverse, i, x);
    for (; i + 4 <= n; i += 4) forward_block<4>(factor, ld, inverse, i, x);
    for (; i < n; ++i) forward_block<1>(factor, ld, inverse, i, x);
}

template <int C>
INLINE void backward_columns(const double* factor, long ld, const double* inverse, long n, long j, double* x) {
    for (; j >= C; j -= C) {
        const long j0 = j - C;
        const Number<C> sum = column_products<C>(factor + j * ld + j0, ld, x + j, n - j);
        for (int l = C - 1; l >= 0; --l) {
            double left = x[j0 + l] - sum[l];
            for (int k = l + 1; k < C; ++k) left -= factor[(j0 + k) * ld + j0 + l] * x[j0 + k];
            x[j0 + l] = left * inverse[j0 + l];
        }
    }
    if constexpr (C > 1) backward_columns<C / 2>(factor, ld, inverse, n, j, x);
}

inline NOINLINE void backward(const double* factor, long ld, const double* inverse, long n, double* x) {
    backward_columns<LANES>(factor, ld, inverse, n, n, x);
}

}  // namespace single

// Cholesky factors, triangular solves and products of small matrices, one matrix a lane, row by row with `ld` columns.
// A factor keeps the reciprocals of its diagonal beside it: `inverse`.

// Rows of a block: so many that its sums, a row of one factor and an entry of the other stay in the registers, of which
// there are 32 or 16.
constexpr int ROWS = LANES == 8 ? 4 : 3;

template <class V, int R, int C>
INLINE void reduce_block(V (&c)[R][C], const V* a, long lda, const V* b, long ldb, long depth) {  // c -= a bᵀ
    for (long t = 0; t < depth; ++t) {
        V left[R];
        for (int i = 0; i < R; ++i) left[i] = a[i * lda + t];
        for (int j = 0; j < C; ++j) {
            const V right = b[j * ldb + t];
            for (int i = 0; i < R; ++i) c[i][j] -= left[i] * right;
        }
    }
}

// Rows i0 … i0 + R of columns j0 … j0 + C of a factor, those columns' diagonal block being there already.
template <class V, int R, int C>
NOINLINE void panel(V* matrix, long ld, long i0, long j0, const V* inverse) {
    V c[R][C];
    for (int i = 0; i < R; ++i)
        for (int j = 0; j < C; ++j) c[i][j] = matrix[(i0 + i) * ld + j0 + j];
    reduce_block<V, R, C>(c, matrix + i0 * ld, ld, matrix + j0 * ld, ld, j0);
    for (int j = 0; j < C; ++j) {
        for (int l = 0; l < j; ++l) {
            const V pivot = matrix[(j0 + j) * ld + j0 + l];
            for (int i = 0; i < R; ++i) c[i][j] -= c[i][l] * pivot;
        }
        for (int i = 0; i < R; ++i) c[i][j] *= inverse[j0 + j];
    }
    for (int i = 0; i < R; ++i)
        for (int j = 0; j < C; ++j) matrix[(i0 + i) * ld + j0 + j] = c[i][j];
}

// The diagonal block of columns j0 … j0 + C; where a pivot is not above its floor, `positive` ends and 1 takes its place.
template <class V, class M, int C>
NOINLINE void corner(V* matrix, long ld, long j0, V* inverse, const V* floor, long floor_step, M& positive) {
    V c[C][C];
    for (int i = 0; i < C; ++i)
        for (int j = 0; j < C; ++j) c[i][j] = matrix[(j0 + i) * ld + j0 + (j <= i ? j : i)];
    reduce_block<V, C, C>(c, matrix + j0 * ld, ld, matrix + j0 * ld, ld, j0);
    for (int j = 0; j < C; ++j) {
        const M fit = c[j][j] > floor[(j0 + j) * floor_step];
        positive &= fit;
        const V pivot = root<V>(fit ? c[j][j] : all<V>(1.0));
        inverse[j0 + j] = 1.0 / pivot;
        c[j][j] = pivot;
        for (int i = j + 1; i < C; ++i) c[i][j] *= inverse[j0 + j];
        for (int i = j + 1; i < C; ++i)
            for (int l = j + 1; l <= i; ++l) c[i][l] -= c[i][j] * c[l][j];
    }
    for (int i = 0; i < C; ++i)
        for (int j = 0; j <= i; ++j) matrix[(j0 + i) * ld + j0 + j] = c[i][j];
}

template <class V, int C>
void panels(V* matrix, long ld, long i0, long rows, long j0, const V* inverse) {
    long i = i0;
    for (; i + ROWS <= rows; i += ROWS) panel<V, ROWS, C>(matrix, ld, i, j0, inverse);
    if (ROWS > 3 && rows - i == 3) panel<V, 3, C>(matrix, ld, i, j0, inverse);
    if (rows - i == 2) panel<V, 2, C>(matrix, ld, i, j0, inverse);
    if (rows - i == 1) panel<V, 1, C>(matrix, ld, i, j0, inverse);
}

// Factor the first n rows, lower triangle, and divide the rows below by the factor: L and E L⁻ᵀ. Rows before `first`
// have been done. Returns where all pivots were above their floors.
template <class V, class M>
M factorise(V* matrix, long ld, long n, long rows, long first, V* inverse, const V* floor, long floor_step) {
    M positive = all<V>(0.0) == all<V>(0.0);
    if constexpr (width<V> == 1) {
        positive[0] = -single::factor_columns<LANES>(plain(matrix), ld, n, rows, first, plain(inverse), plain(floor), floor_step, 0);
        return positive;
    }
    for (long j = 0; j < n; j += 4) {
        const long columns = n - j < 4 ? n - j : 4;
        const long below = first > j + columns ? first : j + columns;
        switch (columns) {
            case 4:
                if (first <= j) corner<V, M, 4>(matrix, ld, j, inverse, floor, floor_step, positive);
                panels<V, 4>(matrix, ld, below, rows, j, inverse);
                break;
            case 3:
                if (first <= j) corner<V, M, 3>(matrix, ld, j, inverse, floor, floor_step, positive);
                panels<V, 3>(matrix, ld, below, rows, j, inverse);
                break;
            case 2:
                if (first <= j) corner<V, M, 2>(matrix, ld, j, inverse, floor, floor_step, positive);
                panels<V, 2>(matrix, ld, below, rows, j, inverse);
                break;
            default:
                if (first <= j) corner<V, M, 1>(matrix, ld, j, inverse, floor, floor_step, positive);
                panels<V, 1>(matrix, ld, below, rows, j, inverse);
        }
    }
    return positive;
}

template <class V, int R, int C>
NOINLINE void gram_block(V* c, long ldc, const V* a, const V* b, long ld, long depth, bool take) {
    if constexpr (width<V> == 1) return single::gram_block<R, C>(plain(c), ldc, plain(a), plain(b), ld, depth, take);
    V block[R][C];
    for (int i = 0; i < R; ++i)
        for (int j = 0; j < C; ++j) block[i][j] = take ? c[i * ldc + j] : all<V>(0.0);
    reduce_block<V, R, C>(block, a, ld, b, ld, depth);
    for (int i = 0; i < R; ++i)
        for (int j = 0; j < C; ++j) c[i * ldc + j] = take ? block[i][j] : -block[i][j];
}

template <class V, int C>
void gram_column(V* c, long ldc, long rows, long j, const V* a, long ld, long depth, bool take) {
    long i = j;
    const V* right = a + j * ld;
    for (; i + ROWS <= rows; i += ROWS) gram_block<V, ROWS, C>(c + i * ldc + j, ldc, a + i * ld, right, ld, depth, take);
    if (ROWS > 3 && rows - i == 3) gram_block<V, 3, C>(c + i * ldc + j, ldc, a + i * ld, right, ld, depth, take);
    if (rows - i == 2) gram_block<V, 2, C>(c + i * ldc + j, ldc, a + i * ld, right, ld, depth, take);
    if (rows - i == 1) gram_block<V, 1, C>(c + i * ldc + j, ldc, a + i * ld, right, ld, depth, take);
}

// The lower triangle (in blocks of four) of a aᵀ, rows x rows: put into c, or taken from it.
template <class V>
void gram(V* c, long ldc, const V* a, long ld, long rows, long depth, bool take) {
    for (long j = 0; j < rows; j += 4) {
        switch (rows - j < 4 ? rows - j : 4) {
            case 4: gram_column<V, 4>(c, ldc, rows, j, a, ld, depth, take); break;
            case 3: gram_column<V, 3>(c, ldc, rows, j, a, ld, depth, take); break;
            case 2: gram_column<V, 2>(c, ldc, rows, j, a, ld, depth, take); break;
            default: gram_column<V, 1>(c, ldc, rows, j, a, ld, depth, take);
        }
    }
}

template <class V, int R>
INLINE void row_products(V (&sum)[R], const V* matrix, long ld, const V* x, long count) {  // sum += matrix x
    for (long k = 0; k < count; ++k) {
        const V right = x[k];
        for (int i = 0; i < R; ++i) sum[i] += matrix[i * ld + k] * right;
    }
}

template <class V, int C>
INLINE void column_products(V (&sum)[C], const V* matrix, long ld, const V* x, long count) {  // sum += matrixᵀ x
    for (long k = 0; k < count; ++k) {
        const V right = x[k];
        for (int j = 0; j < C; ++j) sum[j] += matrix[k * ld + j] * right;
    }
}

template <class V, int R>
INLINE void forward_block(const V* factor, long ld, const V* inverse, long i0, V* x) {
    V sum[R] = {};
    row_products<V, R>(sum, factor + i0 * ld, ld, x, i0);
    for (int i = 0; i < R; ++i) {
        V left = x[i0 + i] - sum[i];
        for (int k = 0; k < i; ++k) left -= factor[(i0 + i) * ld + i0 + k] * x[i0 + k];
        x[i0 + i] = left * inverse[i0 + i];
    }
}

template <class V>
NOINLINE void forward(const V* factor, long ld, const V* inverse, long n, V* x) {  // x := L⁻¹ x
    if constexpr (width<V> == 1) return single::forward(plain(factor), ld, plain(inverse), n, plain(x));
    long i = 0;
    for (; i + 8 <= n; i += 8) forward_block<V, 8>(factor, ld, inverse, i, x);
    for (; i + 4 <= n; i += 4) forward_block<V, 4>(factor, ld, inverse, i, x);
    for (; i < n; ++i) forward_block<V, 1>(factor, ld, inverse, i, x);
}

template <class V, int C>
INLINE void backward_block(const V* factor, long ld, const V* inverse, long n, long j0, V* x) {
    V sum[C] = {};
    column_products<V, C>(sum, factor + (j0 + C) * ld + j0, ld, x + j0 + C, n - j0 - C);
    for (int j = C - 1; j >= 0; --j) {
        V left = x[j0 + j] - sum[j];
        for (int k = j + 1; k < C; ++k) left -= factor[(j0 + k) * ld + j0 + j] * x[j0 + k];
        x[j0 + j] = left * inverse[j0 + j];
    }
}

template <class V>
NOINLINE void backward(const V* factor, long ld, const V* inverse, long n, V* x) {  // x := L⁻ᵀ x
    if constexpr (width<V> == 1) return single::backward(plain(factor), ld, plain(inverse), n, plain(x));
    long j = n;
    for (; j >= 8; j -= 8) backward_block<V, 8>(factor, ld, inverse, n, j - 8, x);
    for (; j >= 4; j -= 4) backward_block<V, 4>(factor, ld, inverse, n, j - 4, x);
    for (; j >= 1; --j) backward_block<V, 1>(factor, ld, inverse, n, j - 1, x);
}

template <class V>
NOINLINE void multiply(V* y, const V* matrix, long ld, long rows, long columns, const V* x) {  // y := matrix x
    if constexpr (width<V> == 1) return single::multiply(plain(y), plain(matrix), ld, rows, columns, plain(x));
    long i = 0;
    for (; i + 8 <= rows; i += 8) {
        V sum[8] = {};
        row_products<V, 8>(sum, matrix + i * ld, ld, x, columns);
        for (int k = 0; k < 8; ++k) y[i + k] = sum[k];
    }
    for (; i + 4 <= rows; i += 4) {
        V sum[4] = {};
        row_products<V, 4>(sum, matrix + i * ld, ld, x, columns);
        for (int k = 0; k < 4; ++k) y[i + k] = sum[k];
    }
    for (; i < rows; ++i) {
        V sum[1] = {};
        row_products<V, 1>(sum, matrix + i * ld, ld, x, columns);
        y[i] = sum[0];
    }
}

template <class V>
NOINLINE void multiply_transposed(V* y, const V* matrix, long ld, long rows, long columns, const V* x) {
    if constexpr (width<V> == 1) return single::multiply_transposed(plain(y), plain(matrix), ld, rows, columns, plain(x));
    long j = 0;
    for (; j + 8 <= columns; j += 8) {
        V sum[8] = {};
        column_products<V, 8>(sum, matrix + j, ld, x, rows);
        for (int k = 0; k < 8; ++k) y[j + k] = sum[k];
    }
    for (; j + 4 <= columns; j += 4) {
        V sum[4] = {};
        column_products<V, 4>(sum, matrix + j, ld, x, rows);
        for (int k = 0; k < 4; ++k) y[j + k] = sum[k];
    }
    for (; j < columns; ++j) {
        V sum[1] = {};
        column_products<V, 1>(sum, matrix + j, ld, x, rows);
        y[j] = sum[0];
    }
}

template <class V>
INLINE V inner(const V* a, const V* b, long count) {
    if constexpr (width<V> == 1) return all<V>(single::inner(plain(a), plain(b), count));
    V sum = all<V>(0.0);
    for (long i = 0; i < count; ++i) sum += a[i] * b[i];
    return sum;
}

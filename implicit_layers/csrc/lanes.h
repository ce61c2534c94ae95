// One vector register holds the same number of as many programs as it has lanes: the code reads as if it were for one.
// Included once for every instruction set, inside a namespace of its own.

template <int W>
struct Lanes {
    typedef double Number __attribute__((vector_size(W * 8)));
    typedef long long Mask __attribute__((vector_size(W * 8)));  // -1 where true, 0 where not
};

template <int W>
using Number = typename Lanes<W>::Number;
template <int W>
using Mask = typename Lanes<W>::Mask;

template <class V>
constexpr int width = sizeof(V) / 8;

inline double* plain(Number<1>* numbers) { return reinterpret_cast<double*>(numbers); }
inline const double* plain(const Number<1>* numbers) { return reinterpret_cast<const double*>(numbers); }

template <class V>
INLINE V all(double value) {
    V result;
    for (int l = 0; l < width<V>; ++l) result[l] = value;
    return result;
}

template <class V>
INLINE V largest(V a, V b) {  // of a NaN and a number: b
    return a > b ? a : b;
}

template <class V>
INLINE V magnitude(V a) {
    return a < 0.0 ? -a : a;
}

template <class V>
INLINE V root(V a) {
#if defined(__AVX512F__)
    if constexpr (width<V> == 8) return (V)_mm512_sqrt_pd((__m512d)a);
#endif
#if defined(__AVX__)
    if constexpr (width<V> == 4) return (V)_mm256_sqrt_pd((__m256d)a);
#endif
#if defined(__SSE2__)
    if constexpr (width<V> == 2) return (V)_mm_sqrt_pd((__m128d)a);
#endif
    V result;
    for (int l = 0; l < width<V>; ++l) result[l] = __builtin_sqrt(a[l]);
    return result;
}

template <class M>
INLINE bool any(M mask) {
    long long found = 0;
    for (int l = 0; l < width<M>; ++l) found |= mask[l];
    return found != 0;
}

// As a float would keep it. With a cast lane by lane, GCC 12 leaves the rounding of two lanes out.
template <int W>
INLINE Number<W> rounded(Number<W> a) {
    typedef float Short __attribute__((vector_size(W * 4)));
    return __builtin_convertvector(__builtin_convertvector(a, Short), Number<W>);
}

// Four neighbours from memory, wherever they begin.
template <class T>
INLINE Number<4> four(const T* from) {
    typedef T Loose __attribute__((vector_size(4 * sizeof(T)), aligned(alignof(T)), may_alias));
    return __builtin_convertvector(*reinterpret_cast<const Loose*>(from), Number<4>);
}

// (count) numbers of each lane's program, one after the other in memory, to count vectors.
template <int W, class T>
void load(Number<W>* to, const T* const* from, long count, double factor = 1.0) {
    double* out = reinterpret_cast<double*>(to);
    constexpr long stretch = 64;  // what is written stays in the cache until every lane has been there
    for (long first = 0; first < count; first += stretch) {
        const long last = first + stretch < count ? first + stretch : count;
        for (int l = 0; l < W; ++l) {
            long i = first;
            if constexpr (W % 4 == 0) {  // four lanes at once, four numbers of each
                if (l % 4) continue;
                for (; i + 4 <= last; i += 4) {
                    const Number<4> a = four(from[l] + i), b = four(from[l + 1] + i);
                    const Number<4> c = four(from[l + 2] + i), d = four(from[l + 3] + i);
                    const Number<4> ab = {a[0], b[0], a[2], b[2]}, ab_next = {a[1], b[1], a[3], b[3]};
                    const Number<4> cd = {c[0], d[0], c[2], d[2]}, cd_next = {c[1], d[1], c[3], d[3]};
                    Number<4>* const block = reinterpret_cast<Number<4>*>(out + i * W + l);
                    block[0] = factor * Number<4>{ab[0], ab[1], cd[0], cd[1]};
                    block[W / 4] = factor * Number<4>{ab_next[0], ab_next[1], cd_next[0], cd_next[1]};
                    block[W / 2] = factor * Number<4>{ab[2], ab[3], cd[2], cd[3]};
                    block[3 * W / 4] = factor * Number<4>{ab_next[2], ab_next[3], cd_next[2], cd_next[3]};
                }
            }
            for (; i < last; ++i)
                for (int k = l; k < (W % 4 ? l + 1 : l + 4); ++k)
                    out[i * W + k] = factor * static_cast<double>(from[k][i]);
        }
    }
}

template <int W, class T>
void store(T* to, const Number<W>* from, int lane, long count) {
    const double* in = reinterpret_cast<const double*>(from);
    for (long i = 0; i < count; ++i) to[i] = static_cast<T>(in[i * W + lane]);
}

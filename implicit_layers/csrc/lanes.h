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

// (count) numbers of each lane's program, one after the other in memory, to count vectors.
template <int W, class T>
void load(Number<W>* to, const T* const* from, long count, double factor = 1.0) {
    double* out = reinterpret_cast<double*>(to);
    constexpr long stretch = 64;  // what is written stays in the cache until every lane has been there
    for (long first = 0; first < count; first += stretch) {
        const long last = first + stretch < count ? first + stretch : count;
        for (int l = 0; l < W; ++l) {
            const T* in = from[l];
            for (long i = first; i < last; ++i) out[i * W + l] = factor * static_cast<double>(in[i]);
        }
    }
}

template <int W, class T>
void store(T* to, const Number<W>* from, int lane, long count) {
    const double* in = reinterpret_cast<const double*>(from);
    for (long i = 0; i < count; ++i) to[i] = static_cast<T>(in[i * W + lane]);
}

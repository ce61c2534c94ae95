// Limits, the stages of a solve, and how sizes are compared.

constexpr double EPS = 2.220446049250313e-16;
constexpr double TINY = 2.2250738585072014e-308;
constexpr double BEST = 1e-12;    // a residual above it is not good enough here
constexpr double STEEP = 1e8;     // a condition above it costs digits that the residual does not show
constexpr long LONG_PATH = 20;    // iterations after which another form may do better
constexpr double ORDINARY = 1e100; // the largest length of a row, and the inverse of the smallest
constexpr double WEAK = 1e-11;
constexpr double NEAR = 1e-3;     // of the minimum without constraints: to which z is known well enough to call a row weak
constexpr double TO_BOUNDARY = 0.995;
constexpr double SHORTEST = 1e-8;
constexpr int SWEEPS = 4;         // of Gauss–Seidel, before the active rows are guessed
constexpr int ROUNDS = 6;         // corrections of that guess
constexpr double ASTRAY = 2.0;    // so many of which may find no fewer rows wrong than the best before
constexpr double SLIGHT = 1e-12;  // a violation, relative to the largest one, that is none
constexpr double FLAT = 1e-12;    // the square of what the equalities leave of a row of length 1, where it is rounding

// What `set_up` finds out of the matrices, kept beside them where the programs share them.
enum { DEFINITE, READABLE, INDEPENDENT, SPREAD_Q, SPREAD_EQ, KEPT };

struct Phase {
    double measure, sign_tol;
    int refine;
    bool balanced;
};
constexpr Phase PHASES[] = {{1e-3, 1e-14, 1, true}, {1e-6, 1e-14, 1, false}, {1e-9, 1e-13, 2, true}, {1e-12, 1e-12, 4, false}};

template <class V>
INLINE V ratio(V value, V size) {  // NaN stays NaN
    return value == 0.0 ? all<V>(0.0) : value / (size > TINY ? size : all<V>(TINY));
}

template <class V>
INLINE V worst(V a, V b) { return (a > b) | (a != a) ? a : b; }  // a NaN wins

template <class V>
void pivots(const V* factor, long ld, long count, V& high, V& low) {
    for (long i = 0; i < count; ++i) {
        const V pivot = factor[i * ld + i] * factor[i * ld + i];
        high = largest(pivot, high);
        low = pivot < low ? pivot : low;
    }
}

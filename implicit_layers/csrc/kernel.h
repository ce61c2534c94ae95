// The kernel for one instruction set: TARGET names its namespace, LANES the width of its registers.

#if defined(__GNUC__) || defined(__clang__)
#define INLINE inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))
#endif

namespace implicit_layers {
namespace TARGET {
#include "lanes.h"
#include "single.h"
#include "factor.h"
#include "measures.h"
#include "wide.h"
#include "narrow.h"
#include "bounded.h"
#include "solve.h"
#include "adjoint.h"

template <int W>
constexpr Width width_of() {
    return {W, solve<W, double>, solve<W, float>, adjoint<W, double>, adjoint<W, float>};
}

Kernel kernel(const char* name) { return {name, width_of<LANES>(), width_of<1>()}; }
}  // namespace TARGET
}  // namespace implicit_layers

#undef INLINE
#undef NOINLINE
#undef TARGET
#undef LANES

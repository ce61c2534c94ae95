// The kernel for one instruction set: TARGET names its namespace, LANES the width of its registers.

#if defined(__GNUC__) || defined(__clang__)
#define INLINE inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))
#endif

namespace implicit_layers {
namespace TARGET {
#include "lanes.h"
#include "factor.h"
#include "solve.h"
#include "adjoint.h"

Kernel kernel(const char* name) {
    return {name, LANES, solve<LANES, double>, solve<LANES, float>, adjoint<LANES, double>, adjoint<LANES, float>};
}
}  // namespace TARGET
}  // namespace implicit_layers

#undef INLINE
#undef NOINLINE
#undef TARGET
#undef LANES

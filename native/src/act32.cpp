// sigmoid, SiLU and GELU of float32 by arithmetic: exact, and faster to a few units of the last place. Every
// instruction set gives the same bits. Built once for each.
#include <stddef.h>

#include "isa.h"
#include "mode.h"
#include "parallel.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define RAREFY_FUSED  // every fma rounds once

namespace rarefy {
namespace RAREFY_ISA {
namespace {

#include "chunks-inl.h"
#include "engine/vec-inl.h"

namespace exact {
#include "act_exact-inl.h"
}

namespace fast {
#include "engine/activations-inl.h"

// minus infinity: a finite number gives its limit, -0
inline V silu_limited(V x) { return silu(larger(all(-200.0f), x)); }
}  // namespace fast

template <V f(V)>
void values(const float *x, float *y, int64_t n, const void *) {
    int64_t i = 0;
    for (; i + 2 * L <= n; i += 2 * L) {
        const V a = f(loadu(x + i)), b = f(loadu(x + i + L));
        storeu(y + i, a);
        storeu(y + i + L, b);
    }
    for (; i < n; i += L) {
        const uint32_t lanes = n - i < L ? (1u << (n - i)) - 1 : (1u << L) - 1;
        store_some(y + i, lanes, f(load_some(x + i, lanes)));
    }
}

}  // namespace

#define RAREFY_VALUES(name, f) RAREFY_KERNEL(name, (over_chunks<float, values<f>>))
extern const rarefy_kernel act32_kernels[] = {
    RAREFY_VALUES("act_sigmoid32", exact::sigmoid),     RAREFY_VALUES("act_silu32", exact::silu),
    RAREFY_VALUES("act_gelu32", exact::gelu),           RAREFY_VALUES("act_gelu_tanh32", exact::gelu_tanh),
    RAREFY_VALUES("act_sigmoid32_fast", fast::sigmoid), RAREFY_VALUES("act_silu32_fast", fast::silu_limited),
    RAREFY_VALUES("act_gelu32_fast", fast::gelu),
};
extern const int64_t act32_kernel_count = sizeof act32_kernels / sizeof *act32_kernels;

}  // namespace RAREFY_ISA
}  // namespace rarefy

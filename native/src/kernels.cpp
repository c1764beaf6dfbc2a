// The one table of kernels, and what this CPU can run. Dispatch, tests and benchmarks all read it.
#include <array>
#include <string_view>
#include <vector>

#include "rarefy.h"

#define RAREFY_DECLARE(isa)                                            \
    namespace rarefy::isa {                                            \
    extern const rarefy_kernel soft_threshold_kernels[];               \
    extern const int64_t soft_threshold_kernel_count;                  \
    }

#ifdef RAREFY_X86
RAREFY_DECLARE(avx512)
RAREFY_DECLARE(avx2)
#endif
RAREFY_DECLARE(portable)

namespace {

bool runs(std::string_view isa) {
#ifdef RAREFY_X86
    __builtin_cpu_init();
    if (isa == "avx2") return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (isa == "avx512" || isa == "avx512_vbmi2") {
        const bool base = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
        return base && (isa == "avx512" || (__builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2")));
    }
#endif
    return isa == "portable" || isa == "neon";
}

std::vector<rarefy_kernel> collect() {
    std::vector<rarefy_kernel> all;
    auto add = [&](const rarefy_kernel *kernels, int64_t count) {
        for (int64_t i = 0; i < count; ++i) {
            all.push_back(kernels[i]);
            all.back().supported = runs(kernels[i].isa);
        }
    };
#ifdef RAREFY_X86
    add(rarefy::avx512::soft_threshold_kernels, rarefy::avx512::soft_threshold_kernel_count);
    add(rarefy::avx2::soft_threshold_kernels, rarefy::avx2::soft_threshold_kernel_count);
#endif
    add(rarefy::portable::soft_threshold_kernels, rarefy::portable::soft_threshold_kernel_count);
    return all;
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) int64_t rarefy_kernels(const rarefy_kernel **table) {
    static const std::vector<rarefy_kernel> all = collect();
    *table = all.data();
    return static_cast<int64_t>(all.size());
}
}

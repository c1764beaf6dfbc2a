// The one table of kernels, and what this CPU can run. Dispatch, tests and benchmarks all read it.
#include <array>
#include <string_view>
#include <vector>

#include "rarefy.h"

#if defined(RAREFY_X86)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(RAREFY_NEON) && defined(__linux__)
#include <sys/auxv.h>
#endif

// Every source that holds kernels, and every instruction set they are built for, best first.
#define RAREFY_SOURCES(X, isa) \
    X(isa, thresholds) X(isa, act) X(isa, act32) X(isa, act_double) X(isa, gated) X(isa, peak)
#if defined(RAREFY_X86)
#define RAREFY_ENGINE_ISAS(X) X(avx512) X(avx2) X(portable)
#define RAREFY_ISAS(X) X(avx512_vbmi2) RAREFY_ENGINE_ISAS(X)
#if defined(RAREFY_AVX_VNNI)
#define RAREFY_INT8_ISAS(X) X(avx512_vbmi2) X(avx512) X(avx_vnni) X(avx2) X(portable)
#else
#define RAREFY_INT8_ISAS(X) RAREFY_ISAS(X)
#endif
#if defined(RAREFY_AMX)
#define RAREFY_CELL_ISAS(X) X(amx_bf16) RAREFY_ISAS(X)
#else
#define RAREFY_CELL_ISAS(X) RAREFY_ISAS(X)
#endif
#elif defined(RAREFY_NEON)
#define RAREFY_ENGINE_ISAS(X) X(neon) X(portable)
#define RAREFY_ISAS(X) RAREFY_ENGINE_ISAS(X)
#define RAREFY_CELL_ISAS(X) RAREFY_ISAS(X)
#define RAREFY_INT8_ISAS(X) X(neon_i8mm) X(neon_dotprod) RAREFY_ISAS(X)
#else
#define RAREFY_ENGINE_ISAS(X) X(portable)
#define RAREFY_ISAS(X) RAREFY_ENGINE_ISAS(X)
#define RAREFY_CELL_ISAS(X) RAREFY_ISAS(X)
#define RAREFY_INT8_ISAS(X) RAREFY_ISAS(X)
#endif

#define RAREFY_DECLARE(isa, source)                \
    namespace rarefy::isa {                        \
    extern const rarefy_kernel source##_kernels[]; \
    extern const int64_t source##_kernel_count;    \
    }
#define RAREFY_DECLARE_ISA(isa) RAREFY_SOURCES(RAREFY_DECLARE, isa)
#define RAREFY_DECLARE_ENGINE(isa) RAREFY_DECLARE(isa, engine) RAREFY_DECLARE(isa, training)
#define RAREFY_DECLARE_CELL(isa) RAREFY_DECLARE(isa, cell)
#define RAREFY_DECLARE_INT8(isa) RAREFY_DECLARE(isa, int8)
RAREFY_ISAS(RAREFY_DECLARE_ISA)
RAREFY_CELL_ISAS(RAREFY_DECLARE_CELL)
RAREFY_ENGINE_ISAS(RAREFY_DECLARE_ENGINE)
RAREFY_INT8_ISAS(RAREFY_DECLARE_INT8)

namespace {

#ifdef RAREFY_X86
// __builtin_cpu_supports knows it in new compilers alone.
bool has_avx_vnni() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}

// Tiles, products of bfloat16 in them, and the system's permission, which is the process's: threads save 8 KB more.
bool may_use_amx() {
#if defined(__linux__)
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;
    const long ask = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, ask, tile_data) == 0;
#else
    return false;
#endif
}
#endif

bool runs(std::string_view isa) {
#ifdef RAREFY_X86
    __builtin_cpu_init();
    if (isa == "avx2" || isa == "avx_vnni")
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && (isa == "avx2" || has_avx_vnni());
    if (isa == "amx_bf16") {
        static const bool allowed = runs("avx512_vbmi2") && may_use_amx();
        return allowed;
    }
    if (isa == "avx512" || isa == "avx512_vbmi2") {
        const bool base = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
        return base &&
               (isa == "avx512" || (__builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
                                    __builtin_cpu_supports("avx512vnni")));
    }
#elif defined(RAREFY_NEON) && defined(__linux__)
    // of HWCAP and HWCAP2, as Linux numbers them for aarch64
    const unsigned long dotprod = 1ul << 20, i8mm = 1ul << 13;
    if (isa == "neon_dotprod") return (getauxval(AT_HWCAP) & dotprod) != 0;
    if (isa == "neon_i8mm") return (getauxval(AT_HWCAP) & dotprod) && (getauxval(AT_HWCAP2) & i8mm);
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
#define RAREFY_ADD(isa, source) add(rarefy::isa::source##_kernels, rarefy::isa::source##_kernel_count);
#define RAREFY_ADD_ISA(isa) RAREFY_SOURCES(RAREFY_ADD, isa)
#define RAREFY_ADD_ENGINE(isa) RAREFY_ADD(isa, engine) RAREFY_ADD(isa, training)
#define RAREFY_ADD_CELL(isa) RAREFY_ADD(isa, cell)
#define RAREFY_ADD_INT8(isa) RAREFY_ADD(isa, int8)
    RAREFY_ISAS(RAREFY_ADD_ISA)
    RAREFY_CELL_ISAS(RAREFY_ADD_CELL)
    RAREFY_ENGINE_ISAS(RAREFY_ADD_ENGINE)
    RAREFY_INT8_ISAS(RAREFY_ADD_INT8)
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

// What a core can do at most: fused multiply-adds between registers and nothing else.
#include "isa.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(RAREFY_NEON_BUILD)
#include <arm_neon.h>
#endif

namespace rarefy {
namespace RAREFY_ISA {
namespace {

#if defined(__AVX512F__)
typedef __m512 Vector;
inline Vector all(float a) { return _mm512_set1_ps(a); }
inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
#elif defined(__AVX2__)
typedef __m256 Vector;
inline Vector all(float a) { return _mm256_set1_ps(a); }
inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
#elif defined(RAREFY_NEON_BUILD)
typedef float32x4_t Vector;
inline Vector all(float a) { return vdupq_n_f32(a); }
inline Vector multiply_add(Vector a, Vector b, Vector c) { return vfmaq_f32(c, a, b); }
#else
typedef float Vector __attribute__((vector_size(16)));
inline Vector all(float a) { return Vector{a, a, a, a}; }
inline Vector multiply_add(Vector a, Vector b, Vector c) { return a * b + c; }
#endif

// A multiply-add takes 4 cycles or so and two begin in each: so many must be under way.
constexpr int CHAINS = 12;
constexpr int64_t LANES = sizeof(Vector) / sizeof(float);

int64_t fma_peak(int64_t repeats) {
    volatile float seed = 1.0f;  // the compiler must not know what comes out
    const Vector factor = all(seed), term = all(seed - seed);
    Vector sum[CHAINS];
    for (int i = 0; i < CHAINS; ++i) sum[i] = all(seed);
    for (int64_t n = 0; n < repeats; ++n) {
#pragma GCC unroll 12
        for (int i = 0; i < CHAINS; ++i) sum[i] = multiply_add(sum[i], factor, term);
    }
    volatile Vector sink;
    for (int i = 0; i < CHAINS; ++i) sink = sum[i];
    (void)sink;
    return 2 * LANES * CHAINS * repeats;
}

}  // namespace

extern const rarefy_kernel peak_kernels[] = {RAREFY_KERNEL("fma_peak_f32", fma_peak)};
extern const int64_t peak_kernel_count = 1;

}  // namespace RAREFY_ISA
}  // namespace rarefy

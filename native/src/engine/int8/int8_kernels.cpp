// The int8 kernels, built once for each instruction set. See kernels.h for what they compute.
#include "engine/int8/kernels.h"

#include "isa.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace rarefy {
namespace RAREFY_ISA {
namespace {

using namespace int8;

#include "bytes-inl.h"

#define RAREFY_UNROLL _Pragma("GCC unroll 8")

// Tiles of T vectors of pixels.
template <int T>
void rows(const RowsCall *call) {
    const RowsCall c = *call;
    constexpr int WIDTH = QUAD * (PAIRS ? 2 : 1);
    for (int64_t r = 0; r < c.rows; ++r) {
        Sums s[T];
        RAREFY_UNROLL for (int t = 0; t < T; ++t) s[t] = sums_of(c.first[r]);
        const int32_t *o = c.offsets + c.starts[r] * QUAD, *end = c.offsets + c.starts[r + 1] * QUAD;
        const int8_t *w = c.weights + c.starts[r] * WIDTH;
        for (; o != end; o += QUAD, w += WIDTH) {
            const Weights weights(w);
            RAREFY_UNROLL for (int t = 0; t < T; ++t) add(s[t], c.x + t * B, o, weights);
        }
        RAREFY_UNROLL for (int t = 0; t < T; ++t) {
            Results result = results(s[t], c.multipliers[r], c.biases[r]);
            if (c.residual) add_bytes(result, c.residual + r * c.residual_stride + t * B, c.other);
            if (!c.y) {
                put_floats(result, c.low, c.high, c.floats + r * c.floats_stride + t * B);
                continue;
            }
            I v = rounded(result, c.low, c.high);
            if (c.mask) v = select(bytes(c.mask + t * B), v, byte(c.zero_point));
            put(c.y + r * c.y_stride + t * B, v);
        }
    }
}

#if defined(__AVX2__)
// In 16 bits, eight at a time: |w x + w x| < 2^31.
int32_t dot(const uint8_t *x, const int8_t *w, int64_t count) {
    __m256i a = _mm256_setzero_si256(), b = a;
    const auto part = [&](int64_t k, __m256i sum) {
        const __m256i left = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i *>(x + k)));
        const __m256i right = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i *>(w + k)));
        return _mm256_add_epi32(sum, _mm256_madd_epi16(left, right));
    };
    for (int64_t k = 0; k < count; k += 32) a = part(k, a), b = part(k + 16, b);
    a = _mm256_add_epi32(a, b);
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xB1)));
}
#else
int32_t dot(const uint8_t *x, const int8_t *w, int64_t count) {
    int32_t sum = 0;
    for (int64_t k = 0; k < count; ++k) sum += static_cast<int16_t>(w[k]) * static_cast<int16_t>(x[k]);
    return sum;
}
#endif

int32_t dot_sparse(const uint8_t *x, const int8_t *w, const uint16_t *index, int64_t count) {
    int32_t a[4] = {};
    int64_t k = 0;
    for (; k + 4 <= count; k += 4)
        for (int i = 0; i < 4; ++i) a[i] += w[k + i] * x[index[k + i]];
    for (; k < count; ++k) a[0] += w[k] * x[index[k]];
    return (a[0] + a[1]) + (a[2] + a[3]);
}

Kernels make() {
    Kernels k = {};
    k.pixels = B;
    k.pairs = PAIRS;
    k.rows[1] = rows<1>;
    k.rows[2] = rows<2>;
#if defined(__AVX512F__)  // 32 registers
    k.rows[4] = rows<4>;
#endif
    k.dot = dot;
    k.dot_sparse = dot_sparse;
    return k;
}

const Kernels *int8_functions() {
    static const Kernels kernels = make();
    return &kernels;
}

}  // namespace

extern const rarefy_kernel int8_kernels[] = {RAREFY_KERNEL("int8", int8_functions)};
extern const int64_t int8_kernel_count = sizeof int8_kernels / sizeof *int8_kernels;

}  // namespace RAREFY_ISA
}  // namespace rarefy

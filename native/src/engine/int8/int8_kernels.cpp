// The int8 kernels, built once for each instruction set. See kernels.h for what they compute.
#include "engine/int8/kernels.h"

#include "isa.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(RAREFY_NEON_BUILD)
#include <arm_neon.h>
#endif

namespace rarefy {
namespace RAREFY_ISA {
namespace {

using namespace int8;

#include "bytes-inl.h"

#define RAREFY_UNROLL _Pragma("GCC unroll 8")

// The sums of a row over any four weights at a time, whose pixels lie in planes of their own.
struct Any {
    static constexpr int OFFSETS = QUAD, WIDTH = QUAD * (PAIRS ? 2 : 1), SCALE = 1;
    template <int T>
    static inline __attribute__((always_inline)) void add(Sums (&s)[T], const uint8_t *x, const int32_t *o,
                                                          const int8_t *w) {
        const Weights weights(w);
        RAREFY_UNROLL for (int t = 0; t < T; ++t) RAREFY_ISA::add(s[t], x + t * B, o, weights);
    }
    static void order(Sums &) {}
};

#if !defined(RAREFY_NO_BLOCKS)
// The sums over blocks of four channels, whose pixels are interleaved.
struct Blocks {
    static constexpr int OFFSETS = 1, WIDTH = QUAD, SCALE = QUAD;
    template <int T>
    static inline __attribute__((always_inline)) void add(Sums (&s)[T], const uint8_t *x, const int32_t *o,
                                                          const int8_t *w) {
        const Block weights(w);
        RAREFY_UNROLL for (int t = 0; t < T; ++t) add_block(s[t], x + o[0] + t * B * SCALE, weights);
    }
    static void order(Sums &s) { reorder(s); }
};
#endif

// Tiles of T vectors of pixels.
template <class Quads, int T>
void rows(const RowsCall *call) {
    const RowsCall c = *call;
    for (int64_t r = 0; r < c.rows; ++r) {
        Sums s[T];
        RAREFY_UNROLL for (int t = 0; t < T; ++t) s[t] = sums_of(c.first[r]);
        const int32_t *o = c.offsets + c.starts[r] * Quads::OFFSETS,
                      *end = c.offsets + c.starts[r + 1] * Quads::OFFSETS;
        const int8_t *w = c.weights + c.starts[r] * Quads::WIDTH;
        for (; o != end; o += Quads::OFFSETS, w += Quads::WIDTH) Quads::template add<T>(s, c.x, o, w);
        RAREFY_UNROLL for (int t = 0; t < T; ++t) {
            Quads::order(s[t]);
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

void interleave(const uint8_t *const *planes, uint8_t *__restrict out, int64_t n) {
    const uint8_t *a = planes[0], *b = planes[1], *c = planes[2], *d = planes[3];
    for (int64_t i = 0; i < n; ++i) {
        out[4 * i] = a[i] ^ CENTRE;
        out[4 * i + 1] = b[i] ^ CENTRE;
        out[4 * i + 2] = c[i] ^ CENTRE;
        out[4 * i + 3] = d[i] ^ CENTRE;
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
#elif defined(RAREFY_NEON_BUILD)
int32_t dot(const uint8_t *x, const int8_t *w, int64_t count) {
    int32x4_t a = vdupq_n_s32(0), b = a;
    for (int64_t k = 0; k < count; k += 2 * B) {
        a = products(a, bytes(x + k), vld1q_s8(w + k));
        b = products(b, bytes(x + k + B), vld1q_s8(w + k + B));
    }
    return vaddvq_s32(vaddq_s32(a, b));
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

template <class Quads>
void put_tiles(Rows **tiles) {
    tiles[1] = rows<Quads, 1>;
    tiles[2] = rows<Quads, 2>;
#if defined(__AVX512F__) || defined(RAREFY_NEON_BUILD)  // 32 registers
    tiles[4] = rows<Quads, 4>;
#endif
}

Kernels make() {
    Kernels k = {};
    k.pixels = B;
    k.pairs = PAIRS;
    k.centre = CENTRE;
    put_tiles<Any>(k.rows[ANY]);
#if !defined(RAREFY_NO_BLOCKS)
    put_tiles<Blocks>(k.rows[BLOCKS]);
#endif
    k.interleave = interleave;
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

// The activation kernels: loops over rarefy_act.h, and plain C where an instruction set has no better. Built once for
// each.
#include <stddef.h>

#include "isa.h"
#include "mode.h"
#include "parallel.h"
#include "rarefy_act.h"

namespace rarefy {
namespace RAREFY_ISA {
namespace {

#include "chunks-inl.h"

// Several in flight: the load of one lookup does not wait for the store of another.
template <class T>
void lookup(const T *x, T *y, int64_t n, const void *table) {
    const T *values = static_cast<const T *>(table);
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        T some[8];
        for (int k = 0; k < 8; ++k) some[k] = values[x[i + k]];
        for (int k = 0; k < 8; ++k) y[i + k] = some[k];
    }
    for (; i < n; ++i) y[i] = values[x[i]];
}

#if defined(__AVX512BW__)

// N vectors at a time; T values a vector.
template <int N, class T, class F>
int64_t blocks(const T *x, T *y, int64_t n, const F &f) {
    constexpr int LANES = 64 / sizeof(T);
    int64_t at = 0;
    for (; at + N * LANES <= n; at += N * LANES) {
        __m512i v[N];
        RAREFY_EACH v[i] = load(x + at + i * LANES);
        f.apply(v);
        RAREFY_EACH _mm512_storeu_si512(y + at + i * LANES, v[i]);
    }
    return at;
}

template <int N, class F>
void map16(const uint16_t *x, uint16_t *y, int64_t n, const F &f) {
    for (int64_t i = blocks<N>(x, y, n, f); i < n; i += 32) {
        const __mmask32 some = n - i >= 32 ? ~__mmask32{0} : (__mmask32{1} << (n - i)) - 1;
        _mm512_mask_storeu_epi16(y + i, some, f(_mm512_maskz_loadu_epi16(some, x + i)));
    }
}

template <int N, class F>
void map32(const uint32_t *x, uint32_t *y, int64_t n, const F &f) {
    for (int64_t i = blocks<N>(x, y, n, f); i < n; i += 16) {
        const __mmask16 some = n - i >= 16 ? static_cast<__mmask16>(~0u) : static_cast<__mmask16>((1u << (n - i)) - 1);
        _mm512_mask_storeu_epi32(y + i, some, f(_mm512_maskz_loadu_epi32(some, x + i)));
    }
}

void shift32(const uint32_t *x, uint32_t *y, int64_t n, const void *table) {
    map32<4>(x, y, n, TanhShift32(*static_cast<const rarefy_shift32 *>(table)));
}

template <Gated KIND>
void gate(const uint16_t *x, uint16_t *y, int64_t n, const void *table) {
    map16<4>(x, y, n, Gate<KIND>(static_cast<const uint16_t *>(table)));
}

void tanh32(const uint32_t *x, uint32_t *y, int64_t n, const void *table) {
    map32<4>(x, y, n, TanhQuartic32(*static_cast<const rarefy_quartic32 *>(table)));
}

#elif defined(__AVX2__)

template <class F>
void map32(const uint32_t *x, uint32_t *y, int64_t n, const F &f) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(y + i),
                            f(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(x + i))));
    if (i < n) {
        const __m256i some =
            _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n - i)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
        const __m256i v = _mm256_maskload_epi32(reinterpret_cast<const int *>(x + i), some);
        _mm256_maskstore_epi32(reinterpret_cast<int *>(y + i), some, f(v));
    }
}

void shift32(const uint32_t *x, uint32_t *y, int64_t n, const void *table) {
    map32(x, y, n, TanhShift32(*static_cast<const rarefy_shift32 *>(table)));
}

void tanh32(const uint32_t *x, uint32_t *y, int64_t n, const void *table) {
    map32(x, y, n, TanhQuartic32(*static_cast<const rarefy_quartic32 *>(table)));
}

#else

void shift32(const uint32_t *x, uint32_t *y, int64_t n, const void *table) {
    const rarefy_shift32 &t = *static_cast<const rarefy_shift32 *>(table);
    for (int64_t i = 0; i < n; ++i) {
        const uint32_t u = x[i] & 0x7FFFFFFF, row = (u >> t.index_shift) & 31;
        uint32_t v = ((u & t.mantissa_mask) >> t.shift[row]) + t.base[row];
        v = u < t.identity_below ? u : v;
        v = u > t.saturate_above ? t.one : v;
        y[i] = (x[i] & 0x80000000) | (u > t.last ? u : v);
    }
}

inline float as_float(uint32_t bits) {
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint32_t as_bits(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    return bits;
}

#include "fused-inl.h"

void tanh32(const uint32_t *x, uint32_t *y, int64_t n, const void *table) {
    const rarefy_quartic32 &t = *static_cast<const rarefy_quartic32 *>(table);
    for (int64_t i = 0; i < n; ++i) {
        float a = as_float(x[i] & 0x7FFFFFFF);
        a = t.limit < a ? t.limit : a;
        const uint32_t row = (as_bits(a + 1.0f) >> 20) & 31;
        const float f = a - t.begin[row];
        float v = t.coefficient[4][row];
        for (int k = 3; k >= 0; --k) v = fused(v, f, t.coefficient[k][row]);
        y[i] = (x[i] & 0x80000000) | (as_bits(v) & 0x7FFFFFFF);
    }
}

#endif

#if defined(__AVX2__) && !defined(__AVX512BW__)

constexpr int LANES = 32;
inline Pair load_pair(const uint16_t *p) {
    const __m256i *q = reinterpret_cast<const __m256i *>(p);
    return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
inline void store_pair(uint16_t *p, Pair v) {
    __m256i *q = reinterpret_cast<__m256i *>(p);
    _mm256_storeu_si256(q, v.low);
    _mm256_storeu_si256(q + 1, v.high);
}

#elif defined(__aarch64__)

constexpr int LANES = 16;
inline Pair load_pair(const uint16_t *p) { return {vld1q_u16(p), vld1q_u16(p + 8)}; }
inline void store_pair(uint16_t *p, Pair v) {
    vst1q_u16(p, v.low);
    vst1q_u16(p + 8, v.high);
}

#endif

#if defined(__AVX512BW__) || defined(__AVX2__) || (defined(__aarch64__) && defined(RAREFY_NEON_BUILD))
#define RAREFY_VECTOR
#endif

#if defined(RAREFY_VECTOR) && !defined(__AVX512BW__)
template <int, class F>
void map16(const uint16_t *x, uint16_t *y, int64_t n, const F &f) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) store_pair(y + i, f(load_pair(x + i)));
    if (i < n) {
        uint16_t some[LANES] = {};
        __builtin_memcpy(some, x + i, sizeof(uint16_t) * static_cast<size_t>(n - i));
        store_pair(some, f(load_pair(some)));
        __builtin_memcpy(y + i, some, sizeof(uint16_t) * static_cast<size_t>(n - i));
    }
}
#endif

#ifdef RAREFY_VECTOR
void linear16(const uint16_t *x, uint16_t *y, int64_t n, const void *table) {
    map16<4>(x, y, n, TanhLinear(*static_cast<const rarefy_linear16 *>(table)));
}

void shift16(const uint16_t *x, uint16_t *y, int64_t n, const void *table) {
    map16<4>(x, y, n, TanhShift(*static_cast<const rarefy_shift16 *>(table)));
}

void hard16(const uint16_t *x, uint16_t *y, int64_t n, const void *table) {
    map16<4>(x, y, n, TanhHard(static_cast<const uint16_t *>(table)));
}
#endif

#ifdef __AVX512VBMI__
void lookup8(const uint8_t *x, uint8_t *y, int64_t n, const void *table) {
    const Lookup8 f(static_cast<const uint8_t *>(table));
    int64_t i = 0;
    for (; i + 128 <= n; i += 128) {
        const __m512i a = f(load(x + i)), b = f(load(x + i + 64));
        _mm512_storeu_si512(y + i, a);
        _mm512_storeu_si512(y + i + 64, b);
    }
    for (; i < n; i += 64) {
        const __mmask64 some = n - i >= 64 ? ~__mmask64{0} : (__mmask64{1} << (n - i)) - 1;
        _mm512_mask_storeu_epi8(y + i, some, f(_mm512_maskz_loadu_epi8(some, x + i)));
    }
}
#else
constexpr auto lookup8 = lookup<uint8_t>;
#endif

}  // namespace

extern const rarefy_kernel act_kernels[] = {
#ifdef RAREFY_VECTOR
    RAREFY_KERNEL("act_linear16", (over_chunks<uint16_t, linear16>)),
    RAREFY_KERNEL("act_shift16", (over_chunks<uint16_t, shift16>)),
    RAREFY_KERNEL("act_hard16", (over_chunks<uint16_t, hard16>)),
#endif
#ifdef __AVX512BW__
    RAREFY_KERNEL("act_sigmoid_bf16", (over_chunks<uint16_t, gate<Gated::sigmoid>>)),
    RAREFY_KERNEL("act_silu_bf16", (over_chunks<uint16_t, gate<Gated::silu>>)),
    RAREFY_KERNEL("act_gelu_bf16", (over_chunks<uint16_t, gate<Gated::gelu>>)),
    RAREFY_KERNEL("act_gelu_tanh_bf16", (over_chunks<uint16_t, gate<Gated::gelu_tanh>>)),
#endif
    RAREFY_KERNEL("act_lut16", (over_chunks<uint16_t, lookup<uint16_t>>)),
    RAREFY_KERNEL("act_lut8", (over_chunks<uint8_t, lookup8>)),
    RAREFY_KERNEL("act_shift32", (over_chunks<uint32_t, shift32>)),
    RAREFY_KERNEL("act_tanh32", (over_chunks<uint32_t, tanh32>)),
};
extern const int64_t act_kernel_count = sizeof act_kernels / sizeof *act_kernels;

}  // namespace RAREFY_ISA
}  // namespace rarefy

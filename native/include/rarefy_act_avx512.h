// AVX-512 (F, BW, VL, DQ; VBMI and VBMI2 where the file is built for them). Included by rarefy_act.h.
#pragma once

#include <immintrin.h>

namespace rarefy {
namespace {

inline __m512i all16(uint16_t value) { return _mm512_set1_epi16(static_cast<short>(value)); }
inline __m512i all32(uint32_t value) { return _mm512_set1_epi32(static_cast<int>(value)); }
inline __m512i load(const void *p) { return _mm512_loadu_si512(p); }

// Several vectors go through every step side by side: a scheduler sees work that is ready instead of one long chain.
#define RAREFY_EACH _Pragma("GCC unroll 8") for (int i = 0; i < N; ++i)

// A functor on one vector from its form on N.
#define RAREFY_ONE                        \
    __m512i operator()(__m512i x) const { \
        __m512i v[1] = {x};               \
        apply(v);                         \
        return v[0];                      \
    }

// The bits of a where mask is 1, else those of b.
inline __m512i select(__m512i mask, __m512i a, __m512i b) { return _mm512_ternarylogic_epi32(a, b, mask, 0xE4); }

// 32 lanes; exact: y = offset + (B + S d mod 2^16) / 64, d = clamp(u - start, 0, length), row d * factor >> 16.
struct TanhLinear {
    __m512i magnitude = all16(0x7FFF), sign = all16(0x8000);
    __m512i start, length, factor, offset, last, slope0, slope1, base0, base1;

    explicit TanhLinear(const rarefy_linear16 &t)
        : start(all16(t.start)), length(all16(t.length)), factor(all16(t.factor)),
#ifdef __AVX512VBMI2__
          offset(all16(static_cast<uint16_t>(t.offset >> 10))),
#else
          offset(all16(t.offset)),
#endif
          last(all16(t.last)), slope0(load(t.slope)), slope1(load(t.slope + 32)), base0(load(t.base)),
          base1(load(t.base + 32)) {
    }

    template <int N>
    void apply(__m512i (&x)[N]) const {
        __m512i u[N], d[N], t[N], y[N];
        RAREFY_EACH u[i] = _mm512_and_si512(x[i], magnitude);
        RAREFY_EACH d[i] = _mm512_min_epu16(_mm512_subs_epu16(u[i], start), length);
        RAREFY_EACH t[i] = _mm512_mulhi_epu16(d[i], factor);
        RAREFY_EACH y[i] = _mm512_mullo_epi16(_mm512_permutex2var_epi16(slope0, t[i], slope1), d[i]);
        RAREFY_EACH y[i] = _mm512_add_epi16(y[i], _mm512_permutex2var_epi16(base0, t[i], base1));
#ifdef __AVX512VBMI2__
        RAREFY_EACH y[i] = _mm512_shldi_epi16(offset, y[i], 10);
#else
        RAREFY_EACH y[i] = _mm512_add_epi16(_mm512_srli_epi16(y[i], 6), offset);
#endif
        // tanh(x) <= x, so the minimum is the identity below start; a masked minimum leaves a NaN alone
        RAREFY_EACH y[i] = _mm512_mask_min_epu16(u[i], _mm512_cmple_epu16_mask(u[i], last), u[i], y[i]);
        RAREFY_EACH x[i] = select(sign, x[i], y[i]);
    }
    RAREFY_ONE
};

// 32 lanes; K-TanH, algorithm 1: y = E << m plus (M >> r) + b between T1 and T2, x below, 1 above.
struct TanhShift {
    __m512i magnitude = all16(0x7FFF), sign = all16(0x8000);
    __m512i index_shift, mantissa, low, range, one, last, shift, base;

    explicit TanhShift(const rarefy_shift16 &t)
        : index_shift(all16(t.index_shift)), mantissa(all16(t.mantissa_mask)), low(all16(t.identity_below)),
          range(all16(static_cast<uint16_t>(t.saturate_above - t.identity_below))), one(all16(t.one)),
          last(all16(t.last)), shift(load(t.shift)), base(load(t.base)) {}

    template <int N>
    void apply(__m512i (&x)[N]) const {
        __m512i u[N], t[N], y[N], outside[N];
        RAREFY_EACH u[i] = _mm512_and_si512(x[i], magnitude);
        RAREFY_EACH t[i] = _mm512_srlv_epi16(u[i], index_shift);  // the permutes read its low 5 bits
        RAREFY_EACH y[i] = _mm512_srlv_epi16(_mm512_and_si512(u[i], mantissa), _mm512_permutexvar_epi16(t[i], shift));
        // outside the rows: x below T1 (which is below 1), 1 above T2, a NaN itself
        RAREFY_EACH outside[i] = _mm512_mask_min_epu16(u[i], _mm512_cmple_epu16_mask(u[i], last), u[i], one);
        RAREFY_EACH {
            const __mmask32 inside = _mm512_cmple_epu16_mask(_mm512_sub_epi16(u[i], low), range);
            y[i] = _mm512_mask_add_epi16(outside[i], inside, y[i], _mm512_permutexvar_epi16(t[i], base));
        }
        RAREFY_EACH x[i] = select(sign, x[i], y[i]);
    }
    RAREFY_ONE
};

// 32 lanes; HardTanh: min(|x|, 1) with the sign of x.
struct TanhHard {
    __m512i magnitude = all16(0x7FFF), sign = all16(0x8000), one, last;

    explicit TanhHard(const uint16_t *table) : one(all16(table[0])), last(all16(table[1])) {}

    template <int N>
    void apply(__m512i (&x)[N]) const {
        __m512i u[N];
        RAREFY_EACH u[i] = _mm512_and_si512(x[i], magnitude);
        RAREFY_EACH u[i] = _mm512_mask_min_epu16(u[i], _mm512_cmple_epu16_mask(u[i], last), u[i], one);
        RAREFY_EACH x[i] = select(sign, x[i], u[i]);
    }
    RAREFY_ONE
};

// 16 lanes of float32; K-TanH as TanhShift.
struct TanhShift32 {
    __m512i magnitude = all32(0x7FFFFFFF), sign = all32(0x80000000);
    __m512i index_shift, mantissa, low, range, one, last, shift0, shift1, base0, base1;

    explicit TanhShift32(const rarefy_shift32 &t)
        : index_shift(all32(t.index_shift)), mantissa(all32(t.mantissa_mask)), low(all32(t.identity_below)),
          range(all32(t.saturate_above - t.identity_below)), one(all32(t.one)), last(all32(t.last)),
          shift0(load(t.shift)), shift1(load(t.shift + 16)), base0(load(t.base)), base1(load(t.base + 16)) {}

    template <int N>
    void apply(__m512i (&x)[N]) const {
        __m512i u[N], t[N], y[N], outside[N];
        RAREFY_EACH u[i] = _mm512_and_si512(x[i], magnitude);
        RAREFY_EACH t[i] = _mm512_srlv_epi32(u[i], index_shift);
        RAREFY_EACH y[i] =
            _mm512_srlv_epi32(_mm512_and_si512(u[i], mantissa), _mm512_permutex2var_epi32(shift0, t[i], shift1));
        RAREFY_EACH outside[i] = _mm512_mask_min_epu32(u[i], _mm512_cmple_epu32_mask(u[i], last), u[i], one);
        RAREFY_EACH {
            const __mmask16 inside = _mm512_cmple_epu32_mask(_mm512_sub_epi32(u[i], low), range);
            y[i] = _mm512_mask_add_epi32(outside[i], inside, y[i], _mm512_permutex2var_epi32(base0, t[i], base1));
        }
        RAREFY_EACH x[i] = select(sign, x[i], y[i]);
    }
    RAREFY_ONE
};

// 16 lanes of float32; a quartic a segment, by fused multiply-adds: every machine gives the same bits.
struct TanhQuartic32 {
    __m512i magnitude = all32(0x7FFFFFFF), sign = all32(0x80000000);
    __m512 one = _mm512_set1_ps(1.0f), limit, begin0, begin1;
    __m512 low[5], high[5];

    explicit TanhQuartic32(const rarefy_quartic32 &t)
        : limit(_mm512_set1_ps(t.limit)), begin0(_mm512_loadu_ps(t.begin)), begin1(_mm512_loadu_ps(t.begin + 16)) {
        for (int i = 0; i < 5; ++i) {
            low[i] = _mm512_loadu_ps(t.coefficient[i]);
            high[i] = _mm512_loadu_ps(t.coefficient[i] + 16);
        }
    }

    template <int N>
    void apply(__m512i (&x)[N]) const {
        __m512 f[N], y[N];
        __m512i w[N];
        // the minimum gives its second operand back when that is NaN
        RAREFY_EACH f[i] = _mm512_min_ps(limit, _mm512_castsi512_ps(_mm512_and_si512(x[i], magnitude)));
        RAREFY_EACH w[i] = _mm512_srli_epi32(_mm512_castps_si512(_mm512_add_ps(f[i], one)), 20);
        RAREFY_EACH f[i] = _mm512_sub_ps(f[i], _mm512_permutex2var_ps(begin0, w[i], begin1));
        RAREFY_EACH y[i] = _mm512_permutex2var_ps(low[4], w[i], high[4]);
        _Pragma("GCC unroll 4") for (int k = 3; k >= 0; --k) RAREFY_EACH y[i] =
            _mm512_fmadd_ps(y[i], f[i], _mm512_permutex2var_ps(low[k], w[i], high[k]));
        RAREFY_EACH x[i] = select(sign, x[i], _mm512_castps_si512(y[i]));
    }
    RAREFY_ONE
};

#ifdef __AVX512VBMI__
// 64 lanes of an 8-bit format: its 256 values, 128 a permute.
struct Lookup8 {
    __m512i t0, t1, t2, t3;

    explicit Lookup8(const uint8_t *table)
        : t0(load(table)), t1(load(table + 64)), t2(load(table + 128)), t3(load(table + 192)) {}

    __m512i operator()(__m512i x) const {
        return _mm512_mask_blend_epi8(_mm512_movepi8_mask(x), _mm512_permutex2var_epi8(t0, x, t1),
                                      _mm512_permutex2var_epi8(t2, x, t3));
    }
};
#endif

}  // namespace
}  // namespace rarefy

// NEON of aarch64. 16-bit functions take 16 lanes in two registers. Included by rarefy_act.h.
#pragma once

#include <arm_neon.h>

namespace rarefy {
namespace {

struct Pair {
    uint16x8_t low, high;
};

// bytes 0 or 1 of 16-bit entries
template <int N>
inline void split(const uint16_t *entries, int byte, uint8_t *out) {
    for (int i = 0; i < N; ++i) out[i] = static_cast<uint8_t>(entries[i] >> (8 * byte));
}

inline uint8x16x4_t table64(const uint16_t *entries, int byte) {
    uint8_t some[64];
    split<64>(entries, byte, some);
    return vld1q_u8_x4(some);
}

inline uint8x16x2_t table32(const uint16_t *entries, int byte) {
    uint8_t some[32];
    split<32>(entries, byte, some);
    return vld1q_u8_x2(some);
}

inline uint16x8_t widen_low(uint8x16_t low, uint8x16_t high) { return vreinterpretq_u16_u8(vzip1q_u8(low, high)); }
inline uint16x8_t widen_high(uint8x16_t low, uint8x16_t high) { return vreinterpretq_u16_u8(vzip2q_u8(low, high)); }

// As the AVX-512 form.
struct TanhLinear {
    uint16x8_t magnitude = vdupq_n_u16(0x7FFF), start, length, offset, last;
    uint16x4_t factor;
    uint8x16x4_t slope, base_low, base_high;

    explicit TanhLinear(const rarefy_linear16 &t)
        : start(vdupq_n_u16(t.start)), length(vdupq_n_u16(t.length)), offset(vdupq_n_u16(t.offset)),
          last(vdupq_n_u16(t.last)), factor(vdup_n_u16(t.factor)), slope(table64(t.slope, 0)),
          base_low(table64(t.base, 0)), base_high(table64(t.base, 1)) {}

    uint8x8_t row(uint16x8_t d) const {
        const uint16x4_t low = vshrn_n_u32(vmull_u16(vget_low_u16(d), factor), 16);
        const uint16x4_t high = vshrn_n_u32(vmull_u16(vget_high_u16(d), factor), 16);
        return vmovn_u16(vcombine_u16(low, high));
    }

    uint16x8_t finish(uint16x8_t x, uint16x8_t u, uint16x8_t d, uint16x8_t s, uint16x8_t b) const {
        const uint16x8_t y = vaddq_u16(vshrq_n_u16(vmlaq_u16(b, s, d), 6), offset);
        return vbslq_u16(magnitude, vbslq_u16(vcleq_u16(u, last), vminq_u16(u, y), u), x);
    }

    Pair operator()(Pair x) const {
        const uint16x8_t u0 = vandq_u16(x.low, magnitude), u1 = vandq_u16(x.high, magnitude);
        const uint16x8_t d0 = vminq_u16(vqsubq_u16(u0, start), length), d1 = vminq_u16(vqsubq_u16(u1, start), length);
        const uint8x16_t t = vcombine_u8(row(d0), row(d1));
        const uint8x16_t s = vqtbl4q_u8(slope, t), low = vqtbl4q_u8(base_low, t), high = vqtbl4q_u8(base_high, t);
        const uint8x16_t zero = vdupq_n_u8(0);
        return {finish(x.low, u0, d0, widen_low(s, zero), widen_low(low, high)),
                finish(x.high, u1, d1, widen_high(s, zero), widen_high(low, high))};
    }
};

// As the AVX-512 form.
struct TanhShift {
    uint16x8_t magnitude = vdupq_n_u16(0x7FFF), mantissa, low, range, one, last;
    int16x8_t index_shift;
    uint8x16x2_t shift, base_low, base_high;

    explicit TanhShift(const rarefy_shift16 &t)
        : mantissa(vdupq_n_u16(t.mantissa_mask)), low(vdupq_n_u16(t.identity_below)),
          range(vdupq_n_u16(static_cast<uint16_t>(t.saturate_above - t.identity_below))), one(vdupq_n_u16(t.one)),
          last(vdupq_n_u16(t.last)), index_shift(vdupq_n_s16(static_cast<int16_t>(-t.index_shift))),
          shift(table32(t.shift, 0)), base_low(table32(t.base, 0)), base_high(table32(t.base, 1)) {}

    uint8x8_t row(uint16x8_t u) const { return vmovn_u16(vandq_u16(vshlq_u16(u, index_shift), vdupq_n_u16(31))); }

    uint16x8_t finish(uint16x8_t x, uint16x8_t u, uint16x8_t r, uint16x8_t b) const {
        const int16x8_t right = vnegq_s16(vreinterpretq_s16_u16(r));
        const uint16x8_t y = vaddq_u16(vshlq_u16(vandq_u16(u, mantissa), right), b);
        const uint16x8_t outside = vbslq_u16(vcleq_u16(u, last), vminq_u16(u, one), u);
        return vbslq_u16(magnitude, vbslq_u16(vcleq_u16(vsubq_u16(u, low), range), y, outside), x);
    }

    Pair operator()(Pair x) const {
        const uint16x8_t u0 = vandq_u16(x.low, magnitude), u1 = vandq_u16(x.high, magnitude);
        const uint8x16_t t = vcombine_u8(row(u0), row(u1));
        const uint8x16_t r = vqtbl2q_u8(shift, t), bl = vqtbl2q_u8(base_low, t), bh = vqtbl2q_u8(base_high, t);
        const uint8x16_t zero = vdupq_n_u8(0);
        return {finish(x.low, u0, widen_low(r, zero), widen_low(bl, bh)),
                finish(x.high, u1, widen_high(r, zero), widen_high(bl, bh))};
    }
};

struct TanhHard {
    uint16x8_t magnitude = vdupq_n_u16(0x7FFF), one, last;

    explicit TanhHard(const uint16_t *table) : one(vdupq_n_u16(table[0])), last(vdupq_n_u16(table[1])) {}

    uint16x8_t finish(uint16x8_t x) const {
        const uint16x8_t u = vandq_u16(x, magnitude);
        return vbslq_u16(magnitude, vbslq_u16(vcleq_u16(u, last), vminq_u16(u, one), u), x);
    }

    Pair operator()(Pair x) const { return {finish(x.low), finish(x.high)}; }
};

}  // namespace
}  // namespace rarefy

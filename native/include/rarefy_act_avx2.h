// AVX2. 16-bit functions take 32 lanes in two registers, since the tables are looked up by bytes. Included by
// rarefy_act.h.
#pragma once

#include <immintrin.h>

namespace rarefy {
namespace {

struct Pair {
    __m256i low, high;
};

inline __m256i all16(uint16_t value) { return _mm256_set1_epi16(static_cast<short>(value)); }
inline __m256i all8(uint8_t value) { return _mm256_set1_epi8(static_cast<char>(value)); }
inline __m256i twice(const uint8_t *p) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
}

// A table of 16 K bytes: look up bytes below 16 K.
template <int K>
struct Bytes {
    __m256i part[K];

    // byte 0 or 1 of each 16-bit entry
    void set(const uint16_t *entries, int byte) {
        uint8_t some[16];
        for (int k = 0; k < K; ++k) {
            for (int i = 0; i < 16; ++i) some[i] = static_cast<uint8_t>(entries[16 * k + i] >> (8 * byte));
            part[k] = twice(some);
        }
    }
};

// For each part the index of its own bytes, with bit 7 set (which shuffles in zero) for those of other parts.
template <int K>
struct ByteIndex {
    __m256i part[K];

    explicit ByteIndex(__m256i index) {
        for (int k = 0; k < K; ++k)
            part[k] = _mm256_adds_epu8(_mm256_xor_si256(index, all8(static_cast<uint8_t>(16 * k))), all8(0x70));
    }

    __m256i find(const Bytes<K> &table) const {
        __m256i found = _mm256_shuffle_epi8(table.part[0], part[0]);
        for (int k = 1; k < K; ++k) found = _mm256_or_si256(found, _mm256_shuffle_epi8(table.part[k], part[k]));
        return found;
    }
};

inline __m256i at_most(__m256i a, __m256i bound) { return _mm256_cmpeq_epi16(_mm256_min_epu16(a, bound), a); }

// As the AVX-512 form.
struct TanhLinear {
    __m256i magnitude = all16(0x7FFF), start, length, factor, offset, last;
    Bytes<4> slope, base_low, base_high;

    explicit TanhLinear(const rarefy_linear16 &t)
        : start(all16(t.start)), length(all16(t.length)), factor(all16(t.factor)), offset(all16(t.offset)),
          last(all16(t.last)) {
        slope.set(t.slope, 0);
        base_low.set(t.base, 0);
        base_high.set(t.base, 1);
    }

    __m256i finish(__m256i x, __m256i u, __m256i d, __m256i s, __m256i b) const {
        const __m256i w = _mm256_add_epi16(_mm256_mullo_epi16(s, d), b);
        const __m256i y = _mm256_add_epi16(_mm256_srli_epi16(w, 6), offset);
        const __m256i m = _mm256_blendv_epi8(u, _mm256_min_epu16(u, y), at_most(u, last));
        return _mm256_or_si256(m, _mm256_andnot_si256(magnitude, x));
    }

    Pair operator()(Pair x) const {
        const __m256i u0 = _mm256_and_si256(x.low, magnitude), u1 = _mm256_and_si256(x.high, magnitude);
        const __m256i d0 = _mm256_min_epu16(_mm256_subs_epu16(u0, start), length);
        const __m256i d1 = _mm256_min_epu16(_mm256_subs_epu16(u1, start), length);
        // packing and unpacking permute the lanes the same way
        const ByteIndex<4> t(_mm256_packus_epi16(_mm256_mulhi_epu16(d0, factor), _mm256_mulhi_epu16(d1, factor)));
        const __m256i s = t.find(slope), low = t.find(base_low), high = t.find(base_high),
                      zero = _mm256_setzero_si256();
        return {finish(x.low, u0, d0, _mm256_unpacklo_epi8(s, zero), _mm256_unpacklo_epi8(low, high)),
                finish(x.high, u1, d1, _mm256_unpackhi_epi8(s, zero), _mm256_unpackhi_epi8(low, high))};
    }
};

// As the AVX-512 form; M >> r is the high half of 2M * 2^(15 - r).
struct TanhShift {
    __m256i magnitude = all16(0x7FFF), mantissa, low, range, one, last;
    __m128i index_shift;
    Bytes<2> factor_low, factor_high, base_low, base_high;

    explicit TanhShift(const rarefy_shift16 &t)
        : mantissa(all16(t.mantissa_mask)), low(all16(t.identity_below)),
          range(all16(static_cast<uint16_t>(t.saturate_above - t.identity_below))), one(all16(t.one)),
          last(all16(t.last)), index_shift(_mm_cvtsi32_si128(t.index_shift)) {
        uint16_t factor[32];
        for (int i = 0; i < 32; ++i) factor[i] = static_cast<uint16_t>(1u << (15 - t.shift[i]));
        factor_low.set(factor, 0);
        factor_high.set(factor, 1);
        base_low.set(t.base, 0);
        base_high.set(t.base, 1);
    }

    __m256i finish(__m256i x, __m256i u, __m256i factor, __m256i base) const {
        const __m256i m = _mm256_and_si256(u, mantissa);
        const __m256i y = _mm256_add_epi16(_mm256_mulhi_epu16(_mm256_add_epi16(m, m), factor), base);
        const __m256i outside = _mm256_blendv_epi8(u, _mm256_min_epu16(u, one), at_most(u, last));
        const __m256i inside = at_most(_mm256_sub_epi16(u, low), range);
        return _mm256_or_si256(_mm256_blendv_epi8(outside, y, inside), _mm256_andnot_si256(magnitude, x));
    }

    Pair operator()(Pair x) const {
        const __m256i u0 = _mm256_and_si256(x.low, magnitude), u1 = _mm256_and_si256(x.high, magnitude);
        const __m256i row = all16(31);
        const __m256i t0 = _mm256_and_si256(_mm256_srl_epi16(u0, index_shift), row);
        const __m256i t1 = _mm256_and_si256(_mm256_srl_epi16(u1, index_shift), row);
        const ByteIndex<2> t(_mm256_packus_epi16(t0, t1));
        const __m256i fl = t.find(factor_low), fh = t.find(factor_high), bl = t.find(base_low), bh = t.find(base_high);
        return {finish(x.low, u0, _mm256_unpacklo_epi8(fl, fh), _mm256_unpacklo_epi8(bl, bh)),
                finish(x.high, u1, _mm256_unpackhi_epi8(fl, fh), _mm256_unpackhi_epi8(bl, bh))};
    }
};

struct TanhHard {
    __m256i magnitude = all16(0x7FFF), one, last;

    explicit TanhHard(const uint16_t *table) : one(all16(table[0])), last(all16(table[1])) {}

    __m256i finish(__m256i x) const {
        const __m256i u = _mm256_and_si256(x, magnitude);
        const __m256i y = _mm256_blendv_epi8(u, _mm256_min_epu16(u, one), at_most(u, last));
        return _mm256_or_si256(y, _mm256_andnot_si256(magnitude, x));
    }

    Pair operator()(Pair x) const { return {finish(x.low), finish(x.high)}; }
};

// The entry of a table of 32 that the low five bits of `row` tell.
inline __m256 entry(const float *table, __m256i row) {
    const __m256 third = _mm256_castsi256_ps(_mm256_slli_epi32(row, 28));
    const __m256 fourth = _mm256_castsi256_ps(_mm256_slli_epi32(row, 27));
    const __m256 low = _mm256_blendv_ps(_mm256_permutevar8x32_ps(_mm256_loadu_ps(table), row),
                                        _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), row), third);
    const __m256 high = _mm256_blendv_ps(_mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 16), row),
                                         _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 24), row), third);
    return _mm256_blendv_ps(low, high, fourth);
}
inline __m256i entry(const uint32_t *table, __m256i row) {
    return _mm256_castps_si256(entry(reinterpret_cast<const float *>(table), row));
}
inline __m256i all32(uint32_t value) { return _mm256_set1_epi32(static_cast<int>(value)); }

// 8 lanes of float32; the table must stay. As the AVX-512 form.
struct TanhShift32 {
    const rarefy_shift32 &table;
    __m256i magnitude = all32(0x7FFFFFFF), mantissa, low, high, one, last;
    __m128i index_shift;

    explicit TanhShift32(const rarefy_shift32 &t)
        : table(t), mantissa(all32(t.mantissa_mask)), low(all32(t.identity_below)), high(all32(t.saturate_above)),
          one(all32(t.one)), last(all32(t.last)), index_shift(_mm_cvtsi32_si128(static_cast<int>(t.index_shift))) {}

    __m256i operator()(__m256i x) const {
        const __m256i u = _mm256_and_si256(x, magnitude), row = _mm256_srl_epi32(u, index_shift);
        __m256i y = _mm256_srlv_epi32(_mm256_and_si256(u, mantissa), entry(table.shift, row));
        y = _mm256_add_epi32(y, entry(table.base, row));
        y = _mm256_blendv_epi8(y, u, _mm256_cmpgt_epi32(low, u));
        y = _mm256_blendv_epi8(y, one, _mm256_cmpgt_epi32(u, high));
        y = _mm256_blendv_epi8(y, u, _mm256_cmpgt_epi32(u, last));
        return _mm256_or_si256(y, _mm256_andnot_si256(magnitude, x));
    }
};

// 8 lanes of float32; the table must stay. As the AVX-512 form.
struct TanhQuartic32 {
    const rarefy_quartic32 &table;
    __m256 sign = _mm256_set1_ps(-0.0f), one = _mm256_set1_ps(1.0f), limit;

    explicit TanhQuartic32(const rarefy_quartic32 &t) : table(t), limit(_mm256_set1_ps(t.limit)) {}

    __m256i operator()(__m256i x) const {
        const __m256 value = _mm256_castsi256_ps(x), a = _mm256_min_ps(limit, _mm256_andnot_ps(sign, value));
        const __m256i row = _mm256_srli_epi32(_mm256_castps_si256(_mm256_add_ps(a, one)), 20);
        const __m256 f = _mm256_sub_ps(a, entry(table.begin, row));
        __m256 y = entry(table.coefficient[4], row);
        for (int k = 3; k >= 0; --k) y = _mm256_fmadd_ps(y, f, entry(table.coefficient[k], row));
        return _mm256_castps_si256(_mm256_or_ps(_mm256_andnot_ps(sign, y), _mm256_and_ps(sign, value)));
    }
};

}  // namespace
}  // namespace rarefy

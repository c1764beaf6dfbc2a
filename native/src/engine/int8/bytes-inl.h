// One vector of B bytes for each instruction set, and the sums of its pixels. Included by int8_kernels.cpp only, in an
// unnamed namespace.
//
// Unpacking interleaves within 128 bits, so the four vectors of int32 sums of B pixels hold, of every 16 pixels in
// turn, pixels 0 to 3, 4 to 7, 8 to 11 and 12 to 15; packing them in the end brings the pixels back in order. NEON's
// vectors have 16 pixels, so theirs are in order throughout.
#pragma once

#if defined(__AVX512BW__) || defined(__AVX2__)

#if defined(__AVX512BW__)
typedef __m512i I;
typedef __m512 F;
#define RAREFY_V(op) _mm512_##op
#define RAREFY_W(op) _mm512_##op##_si512
#else
typedef __m256i I;
typedef __m256 F;
#define RAREFY_V(op) _mm256_##op
#define RAREFY_W(op) _mm256_##op##_si256
#endif
constexpr int B = sizeof(I), CENTRE = 0;
inline I bytes(const void *p) { return RAREFY_W(loadu)(reinterpret_cast<const I *>(p)); }
inline void put(void *p, I v) { RAREFY_W(storeu)(reinterpret_cast<I *>(p), v); }
inline I word(int32_t a) { return RAREFY_V(set1_epi32)(a); }
inline I byte(uint8_t a) { return RAREFY_V(set1_epi8)(static_cast<char>(a)); }
inline I larger(I a, I b) { return RAREFY_V(max_epu8)(a, b); }
#if defined(__AVX512BW__)
inline I select(I mask, I a, I b) { return RAREFY_W(or)(RAREFY_W (and)(mask, a), RAREFY_W(andnot)(mask, b)); }
#else
inline I select(I mask, I a, I b) { return _mm256_blendv_epi8(b, a, mask); }
#endif

// The same in a register: the compiler would rather load twice what is used twice.
template <class V>
inline __attribute__((always_inline)) V kept(V v) {
#if defined(__GNUC__)
    __asm__("" : "+v"(v));
#endif
    return v;
}

// Sums of B pixels of one row.
struct Sums {
    I a[4];
};
inline Sums sums_of(int32_t first) {
    const I v = word(first);
    return {{v, v, v, v}};
}

// Four weights for all pixels.
struct Weights {
    I quad;
    explicit Weights(const int8_t *w) {
        int32_t four;
        __builtin_memcpy(&four, w, 4);
        quad = word(four);
    }
};

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
constexpr int PAIRS = 0, BLOCKS_AT_ONCE = 1;
#if defined(__AVX512VNNI__)
inline I dot(I sum, I x, I w) { return _mm512_dpbusd_epi32(sum, x, w); }
#else
inline I dot(I sum, I x, I w) { return _mm256_dpbusd_avx_epi32(sum, x, w); }
#endif
struct Block : Weights {
    using Weights::Weights;
};
struct Pixels {
    I x;
    Pixels(const uint8_t *from, const int32_t *o) : x(bytes(from + o[0])) {}
};
inline I add_blocks(I sum, const Pixels &p, const Block &w) { return dot(sum, p.x, w.quad); }
#else
constexpr int PAIRS = 1, BLOCKS_AT_ONCE = 2;
inline I widened(I sum, I pairs) {
    return RAREFY_V(add_epi32)(sum, RAREFY_V(madd_epi16)(pairs, RAREFY_V(set1_epi16)(1)));
}
inline I dot(I sum, I x, I w) { return widened(sum, RAREFY_V(maddubs_epi16)(x, w)); }
struct Block {
    Weights first, second;
    explicit Block(const int8_t *w) : first(w), second(w + QUAD) {}
};
struct Pixels {
    I first, second;
    Pixels(const uint8_t *from, const int32_t *o) : first(bytes(from + o[0])), second(bytes(from + o[1])) {}
};
inline I add_blocks(I sum, const Pixels &p, const Block &w) {
    return widened(sum, RAREFY_V(add_epi16)(RAREFY_V(maddubs_epi16)(p.first, w.first.quad),
                                            RAREFY_V(maddubs_epi16)(p.second, w.second.quad)));
}
#endif

inline __attribute__((always_inline)) void add(Sums &s, const uint8_t *x, const int32_t *o, const Weights &w) {
    const I x0 = kept(bytes(x + o[0])), x1 = kept(bytes(x + o[1]));
    const I x2 = kept(bytes(x + o[2])), x3 = kept(bytes(x + o[3]));
    const I l01 = RAREFY_V(unpacklo_epi8)(x0, x1), h01 = RAREFY_V(unpackhi_epi8)(x0, x1);
    const I l23 = RAREFY_V(unpacklo_epi8)(x2, x3), h23 = RAREFY_V(unpackhi_epi8)(x2, x3);
    s.a[0] = dot(s.a[0], RAREFY_V(unpacklo_epi16)(l01, l23), w.quad);
    s.a[1] = dot(s.a[1], RAREFY_V(unpackhi_epi16)(l01, l23), w.quad);
    s.a[2] = dot(s.a[2], RAREFY_V(unpacklo_epi16)(h01, h23), w.quad);
    s.a[3] = dot(s.a[3], RAREFY_V(unpackhi_epi16)(h01, h23), w.quad);
}

#if defined(__AVX512VNNI__)
inline __m256i half_dot(__m256i sum, __m256i x, __m256i w) { return _mm256_dpbusd_epi32(sum, x, w); }
#elif defined(__AVX512BW__)
inline __m256i half_dot(__m256i sum, __m256i x, __m256i w) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(x, w), _mm256_set1_epi16(1)));
}
#endif
#if defined(__AVX512BW__)
// The same of the first B / 2 pixels.
inline __attribute__((always_inline)) void add_half(Sums &s, const uint8_t *x, const int32_t *o, const Weights &w) {
    const auto half = [=](int k) { return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(x + o[k])); };
    const auto add = [&](I &sum, __m256i pixels) {
        sum = _mm512_castsi256_si512(half_dot(_mm512_castsi512_si256(sum), pixels, _mm512_castsi512_si256(w.quad)));
    };
    const __m256i x0 = kept(half(0)), x1 = kept(half(1)), x2 = kept(half(2)), x3 = kept(half(3));
    const __m256i l01 = _mm256_unpacklo_epi8(x0, x1), h01 = _mm256_unpackhi_epi8(x0, x1);
    const __m256i l23 = _mm256_unpacklo_epi8(x2, x3), h23 = _mm256_unpackhi_epi8(x2, x3);
    add(s.a[0], _mm256_unpacklo_epi16(l01, l23));
    add(s.a[1], _mm256_unpackhi_epi16(l01, l23));
    add(s.a[2], _mm256_unpacklo_epi16(h01, h23));
    add(s.a[3], _mm256_unpackhi_epi16(h01, h23));
}
#endif

// 4 B bytes, the pixels of four planes in turn.
inline void put_interleaved(uint8_t *out, I a, I b, I c, I d) {
    const I low_ab = RAREFY_V(unpacklo_epi8)(a, b), high_ab = RAREFY_V(unpackhi_epi8)(a, b);
    const I low_cd = RAREFY_V(unpacklo_epi8)(c, d), high_cd = RAREFY_V(unpackhi_epi8)(c, d);
    const I v[4] = {RAREFY_V(unpacklo_epi16)(low_ab, low_cd), RAREFY_V(unpackhi_epi16)(low_ab, low_cd),
                    RAREFY_V(unpacklo_epi16)(high_ab, high_cd), RAREFY_V(unpackhi_epi16)(high_ab, high_cd)};
#if defined(__AVX512BW__)
    const I even01 = _mm512_shuffle_i32x4(v[0], v[1], 0x88), odd01 = _mm512_shuffle_i32x4(v[0], v[1], 0xDD);
    const I even23 = _mm512_shuffle_i32x4(v[2], v[3], 0x88), odd23 = _mm512_shuffle_i32x4(v[2], v[3], 0xDD);
    put(out, _mm512_shuffle_i32x4(even01, even23, 0x88));
    put(out + B, _mm512_shuffle_i32x4(odd01, odd23, 0x88));
    put(out + 2 * B, _mm512_shuffle_i32x4(even01, even23, 0xDD));
    put(out + 3 * B, _mm512_shuffle_i32x4(odd01, odd23, 0xDD));
#else
    for (int i = 0; i < 2; ++i) {
        put(out + i * B, _mm256_permute2x128_si256(v[2 * i], v[2 * i + 1], 0x20));
        put(out + (2 + i) * B, _mm256_permute2x128_si256(v[2 * i], v[2 * i + 1], 0x31));
    }
#endif
}
// Every second byte of 2 B.
inline void alternate(const uint8_t *x, uint8_t *out) {
    const I low = RAREFY_V(set1_epi16)(0xFF);
    const I a = RAREFY_W (and)(bytes(x), low), b = RAREFY_W (and)(bytes(x + B), low);
#if defined(__AVX512BW__)
    put(out, _mm512_permutexvar_epi64(_mm512_set_epi64(7, 5, 3, 1, 6, 4, 2, 0), _mm512_packus_epi16(a, b)));
#else
    put(out, _mm256_permute4x64_epi64(_mm256_packus_epi16(a, b), 0xD8));
#endif
}
// The same of 16.
inline void alternate_eight(const uint8_t *x, uint8_t *out) {
    const __m128i v = _mm_and_si128(_mm_loadu_si128(reinterpret_cast<const __m128i *>(x)), _mm_set1_epi16(0xFF));
    _mm_storel_epi64(reinterpret_cast<__m128i *>(out), _mm_packus_epi16(v, v));
}

// A byte for each byte.
#if defined(__AVX512VBMI__)
class Table {
 public:
    explicit Table(const uint8_t *t) {
        for (int i = 0; i < 4; ++i) t_[i] = bytes(t + i * B);
    }
    I operator[](I x) const {  // the index is the low seven bits
        const I low = _mm512_permutex2var_epi8(t_[0], x, t_[1]), high = _mm512_permutex2var_epi8(t_[2], x, t_[3]);
        return _mm512_mask_blend_epi8(_mm512_movepi8_mask(x), low, high);
    }

 private:
    I t_[4];
};
#else
class Table {
 public:
    explicit Table(const uint8_t *t) : t_(t) {}
    // Sixteen at a time, of which the shuffle takes those that x, less where they begin, is an index of: with 112 more,
    // all others have the highest bit.
    I operator[](I x) const {
        I found = RAREFY_W(setzero)();
        for (int i = 0; i < 16; ++i, x = RAREFY_V(sub_epi8)(x, byte(16)))
            found = RAREFY_W(or)(found, RAREFY_V(shuffle_epi8)(part(i), RAREFY_V(adds_epu8)(x, byte(112))));
        return found;
    }

 private:
    I part(int i) const {
        const __m128i sixteen = _mm_loadu_si128(reinterpret_cast<const __m128i *>(t_ + 16 * i));
#if defined(__AVX512BW__)
        return _mm512_broadcast_i32x4(sixteen);
#else
        return _mm256_broadcastsi128_si256(sixteen);
#endif
    }

    const uint8_t *t_;
};
#endif

// Between which numbers results are, and bytes.
struct Ends {
    float low, high;
    I least, most;
};
// The results of B pixels before they are rounded, in the order of the sums.
struct Results {
    F t[4];
};
inline F all(float a) { return RAREFY_V(set1_ps)(a); }
inline F number(I v) { return RAREFY_V(cvtepi32_ps)(v); }
inline __attribute__((always_inline)) Results results(const Sums &s, float multiplier, float bias) {
    Results r;
    for (int i = 0; i < 4; ++i) r.t[i] = RAREFY_V(add_ps)(RAREFY_V(mul_ps)(number(s.a[i]), all(multiplier)), all(bias));
    return r;
}
// IN_LINE: the sums' vectors are B / 4 pixels after one another.
template <bool IN_LINE>
inline __attribute__((always_inline)) void add_bytes(Results &r, const uint8_t *from, float factor) {
    if (IN_LINE) {
        for (int i = 0; i < 4; ++i) {
#if defined(__AVX512BW__)
            const I x = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from + i * B / 4)));
#else
            const I x = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(from + i * B / 4)));
#endif
            r.t[i] = RAREFY_V(add_ps)(r.t[i], RAREFY_V(mul_ps)(number(x), all(factor)));
        }
        return;
    }
    const I zero = RAREFY_W(setzero)(), v = bytes(from);
    const I low = RAREFY_V(unpacklo_epi8)(v, zero), high = RAREFY_V(unpackhi_epi8)(v, zero);
    const I x[4] = {RAREFY_V(unpacklo_epi16)(low, zero), RAREFY_V(unpackhi_epi16)(low, zero),
                    RAREFY_V(unpacklo_epi16)(high, zero), RAREFY_V(unpackhi_epi16)(high, zero)};
    for (int i = 0; i < 4; ++i) r.t[i] = RAREFY_V(add_ps)(r.t[i], RAREFY_V(mul_ps)(number(x[i]), all(factor)));
}
inline F clamped(F t, float low, float high) { return RAREFY_V(min_ps)(RAREFY_V(max_ps)(t, all(low)), all(high)); }
template <bool IN_LINE>
inline __attribute__((always_inline)) I rounded(const Results &r, const Ends &ends, bool bounded) {
    I i[4];
    // what is below all numbers becomes 0, and so would what is above them
    for (int k = 0; k < 4; ++k)
        i[k] = RAREFY_V(cvtps_epi32)(bounded ? r.t[k] : RAREFY_V(min_ps)(r.t[k], all(ends.high)));
    I v = RAREFY_V(packus_epi16)(RAREFY_V(packs_epi32)(i[0], i[1]), RAREFY_V(packs_epi32)(i[2], i[3]));
#if defined(__AVX512BW__)
    const I order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    if (IN_LINE) v = _mm512_permutexvar_epi32(order, v);
#else
    if (IN_LINE) v = _mm256_permutevar8x32_epi32(v, _mm256_set_epi32(7, 3, 6, 2, 5, 1, 4, 0));
#endif
    return larger(RAREFY_V(min_epu8)(v, ends.most), ends.least);
}
template <bool IN_LINE>
inline void put_floats(const Results &r, float low, float high, float *out) {
    if (IN_LINE) {
        for (int k = 0; k < 4; ++k) RAREFY_V(storeu_ps)(out + k * B / 4, clamped(r.t[k], low, high));
        return;
    }
    alignas(64) float lanes[4][B / 4];
    for (int k = 0; k < 4; ++k) RAREFY_V(store_ps)(lanes[k], clamped(r.t[k], low, high));
    for (int i = 0; i < B; ++i) out[i] = lanes[i / 4 % 4][i / 16 * 4 + i % 4];
}

#undef RAREFY_V
#undef RAREFY_W

#elif defined(RAREFY_NEON_BUILD)

constexpr int B = 16, PAIRS = 0;
typedef uint8x16_t I;
inline I bytes(const void *p) { return vld1q_u8(static_cast<const uint8_t *>(p)); }
inline void put(void *p, I v) { vst1q_u8(static_cast<uint8_t *>(p), v); }
inline I byte(uint8_t a) { return vdupq_n_u8(a); }
inline I larger(I a, I b) { return vmaxq_u8(a, b); }
inline I select(I mask, I a, I b) { return vbslq_u8(mask, a, b); }
inline uint16x8_t low_half(I x) { return vmovl_u8(vget_low_u8(x)); }
inline uint16x8_t high_half(I x) { return vmovl_high_u8(x); }

struct Sums {
    int32x4_t a[4];
};
inline Sums sums_of(int32_t first) {
    const int32x4_t v = vdupq_n_s32(first);
    return {{v, v, v, v}};
}
inline int32_t quad_of(const int8_t *w) {
    int32_t four;
    __builtin_memcpy(&four, w, 4);
    return four;
}

#if defined(__ARM_FEATURE_DOTPROD)
#if defined(__ARM_FEATURE_MATMUL_INT8)
constexpr int CENTRE = 0;
inline I centred(I x) { return x; }
inline int32x4_t times(int32x4_t sum, I x, int8x16_t w) { return vusdotq_s32(sum, x, w); }
#else
// There is signed by signed only: a pixel with its first bit turned is one less 128.
constexpr int CENTRE = 128;
inline I centred(I x) { return veorq_u8(x, byte(CENTRE)); }
inline int32x4_t times(int32x4_t sum, I x, int8x16_t w) { return vdotq_s32(sum, vreinterpretq_s8_u8(x), w); }
#endif
struct Weights {
    int8x16_t quad;
    explicit Weights(const int8_t *w) : quad(vreinterpretq_s8_s32(vdupq_n_s32(quad_of(w)))) {}
};
inline __attribute__((always_inline)) void add(Sums &s, const uint8_t *x, const int32_t *o, const Weights &w) {
    const I x0 = centred(bytes(x + o[0])), x1 = centred(bytes(x + o[1]));
    const I x2 = centred(bytes(x + o[2])), x3 = centred(bytes(x + o[3]));
    const uint16x8_t l01 = vreinterpretq_u16_u8(vzip1q_u8(x0, x1)), h01 = vreinterpretq_u16_u8(vzip2q_u8(x0, x1));
    const uint16x8_t l23 = vreinterpretq_u16_u8(vzip1q_u8(x2, x3)), h23 = vreinterpretq_u16_u8(vzip2q_u8(x2, x3));
    s.a[0] = times(s.a[0], vreinterpretq_u8_u16(vzip1q_u16(l01, l23)), w.quad);
    s.a[1] = times(s.a[1], vreinterpretq_u8_u16(vzip2q_u16(l01, l23)), w.quad);
    s.a[2] = times(s.a[2], vreinterpretq_u8_u16(vzip1q_u16(h01, h23)), w.quad);
    s.a[3] = times(s.a[3], vreinterpretq_u8_u16(vzip2q_u16(h01, h23)), w.quad);
}
// What is interleaved is centred already.
typedef Weights Block;
constexpr int BLOCKS_AT_ONCE = 1;
struct Pixels {
    I x;
    Pixels(const uint8_t *from, const int32_t *o) : x(bytes(from + o[0])) {}
};
inline int32x4_t add_blocks(int32x4_t sum, const Pixels &p, const Block &w) { return times(sum, p.x, w.quad); }
// For 16 more of what is added up in four lanes.
inline int32x4_t products(int32x4_t sum, I x, int8x16_t w) { return times(sum, centred(x), w); }
#else
// In 16 bits each; nothing is gained by pixels that are interleaved.
#define RAREFY_NO_BLOCKS
constexpr int CENTRE = 0;
inline I centred(I x) { return x; }
struct Weights {
    int16x4_t quad;
    explicit Weights(const int8_t *w) : quad(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(quad_of(w)))))) {}
};
template <int K>
inline __attribute__((always_inline)) void add_plane(Sums &s, I x, const Weights &w) {
    const int16x8_t low = vreinterpretq_s16_u16(low_half(x)), high = vreinterpretq_s16_u16(high_half(x));
    s.a[0] = vmlal_lane_s16(s.a[0], vget_low_s16(low), w.quad, K);
    s.a[1] = vmlal_high_lane_s16(s.a[1], low, w.quad, K);
    s.a[2] = vmlal_lane_s16(s.a[2], vget_low_s16(high), w.quad, K);
    s.a[3] = vmlal_high_lane_s16(s.a[3], high, w.quad, K);
}
inline __attribute__((always_inline)) void add(Sums &s, const uint8_t *x, const int32_t *o, const Weights &w) {
    add_plane<0>(s, bytes(x + o[0]), w);
    add_plane<1>(s, bytes(x + o[1]), w);
    add_plane<2>(s, bytes(x + o[2]), w);
    add_plane<3>(s, bytes(x + o[3]), w);
}
inline int32x4_t products(int32x4_t sum, I x, int8x16_t w) {
    const int16x8_t low = vreinterpretq_s16_u16(low_half(x)), high = vreinterpretq_s16_u16(high_half(x));
    const int16x8_t w_low = vmovl_s8(vget_low_s8(w)), w_high = vmovl_high_s8(w);
    sum = vmlal_high_s16(vmlal_s16(sum, vget_low_s16(low), vget_low_s16(w_low)), low, w_low);
    return vmlal_high_s16(vmlal_s16(sum, vget_low_s16(high), vget_low_s16(w_high)), high, w_high);
}
#endif
inline void put_interleaved(uint8_t *out, I a, I b, I c, I d) {
    const uint8x16x4_t all = {{centred(a), centred(b), centred(c), centred(d)}};
    vst4q_u8(out, all);
}
inline void alternate(const uint8_t *x, uint8_t *out) { put(out, vld2q_u8(x).val[0]); }
inline void alternate_eight(const uint8_t *x, uint8_t *out) { vst1_u8(out, vld2_u8(x).val[0]); }

// A byte for each byte, by four tables of 64, of which those that x is no index of give 0.
class Table {
 public:
    explicit Table(const uint8_t *t) {
        for (int i = 0; i < 4; ++i) t_[i] = vld1q_u8_x4(t + 64 * i);
    }
    I operator[](I x) const {
        I found = vqtbl4q_u8(t_[0], x);
        for (int i = 1; i < 4; ++i) found = vorrq_u8(found, vqtbl4q_u8(t_[i], vsubq_u8(x, byte(64 * i))));
        return found;
    }

 private:
    uint8x16x4_t t_[4];
};

// Between which numbers results are, and bytes.
struct Ends {
    float low, high;
    I least, most;
};
struct Results {
    float32x4_t t[4];
};
inline __attribute__((always_inline)) Results results(const Sums &s, float multiplier, float bias) {
    Results r;
    for (int i = 0; i < 4; ++i)
        r.t[i] = vaddq_f32(vmulq_f32(vcvtq_f32_s32(s.a[i]), vdupq_n_f32(multiplier)), vdupq_n_f32(bias));
    return r;
}
template <bool>
inline __attribute__((always_inline)) void add_bytes(Results &r, const uint8_t *from, float factor) {
    const I v = bytes(from);
    const uint16x8_t low = low_half(v), high = high_half(v);
    const uint32x4_t x[4] = {vmovl_u16(vget_low_u16(low)), vmovl_high_u16(low), vmovl_u16(vget_low_u16(high)),
                             vmovl_high_u16(high)};
    for (int i = 0; i < 4; ++i) r.t[i] = vaddq_f32(r.t[i], vmulq_f32(vcvtq_f32_u32(x[i]), vdupq_n_f32(factor)));
}
// Not vmaxq and vminq, which order the zeros and keep NaN.
inline float32x4_t clamped(float32x4_t t, float low, float high) {
    const float32x4_t least = vdupq_n_f32(low), most = vdupq_n_f32(high);
    const float32x4_t above = vbslq_f32(vcgtq_f32(t, least), t, least);
    return vbslq_f32(vcltq_f32(above, most), above, most);
}
template <bool>
inline __attribute__((always_inline)) I rounded(const Results &r, const Ends &ends, bool) {
    int16x8_t half[2];
    for (int i = 0; i < 2; ++i)
        half[i] = vuzp1q_s16(vreinterpretq_s16_s32(vcvtnq_s32_f32(clamped(r.t[2 * i], ends.low, ends.high))),
                             vreinterpretq_s16_s32(vcvtnq_s32_f32(clamped(r.t[2 * i + 1], ends.low, ends.high))));
    return vuzp1q_u8(vreinterpretq_u8_s16(half[0]), vreinterpretq_u8_s16(half[1]));
}
template <bool>
inline void put_floats(const Results &r, float low, float high, float *out) {
    for (int i = 0; i < 4; ++i) vst1q_f32(out + 4 * i, clamped(r.t[i], low, high));
}

#else

// Plain loops: the compiler makes of them what the machine has.
constexpr int B = 32, PAIRS = 0, CENTRE = 0;
struct I {
    uint8_t x[B];
};
inline I bytes(const void *p) {
    I v;
    __builtin_memcpy(v.x, p, B);
    return v;
}
inline void put(void *p, const I &v) { __builtin_memcpy(p, v.x, B); }
inline I byte(uint8_t a) {
    I v;
    __builtin_memset(v.x, a, B);
    return v;
}
inline I larger(const I &a, const I &b) {
    I v;
    for (int i = 0; i < B; ++i) v.x[i] = a.x[i] > b.x[i] ? a.x[i] : b.x[i];
    return v;
}
inline I select(const I &mask, const I &a, const I &b) {
    I v;
    for (int i = 0; i < B; ++i) v.x[i] = static_cast<uint8_t>((mask.x[i] & a.x[i]) | (~mask.x[i] & b.x[i]));
    return v;
}
struct Sums {
    int32_t a[B];
};
inline Sums sums_of(int32_t first) {
    Sums s;
    for (int i = 0; i < B; ++i) s.a[i] = first;
    return s;
}
struct Weights {
    int16_t w[QUAD];
    explicit Weights(const int8_t *from) {
        for (int k = 0; k < QUAD; ++k) w[k] = from[k];
    }
};
inline void add(Sums &s, const uint8_t *x, const int32_t *o, const Weights &w) {
    // 127 * 255 < 2^15
    for (int k = 0; k < QUAD; ++k) {
        const uint8_t *p = x + o[k];
        for (int i = 0; i < B; ++i) s.a[i] += static_cast<int16_t>(w.w[k] * static_cast<int16_t>(p[i]));
    }
}
typedef Weights Block;
constexpr int BLOCKS_AT_ONCE = 1;
template <int N>
inline void add_blocks(Sums &s, const uint8_t *x, const int32_t *o, const Block &w) {
    for (int i = 0; i < N * B / QUARTERS; ++i)
        for (int k = 0; k < QUAD; ++k) s.a[i] += w.w[k] * x[o[0] + QUAD * i + k];
}
template <int N, int R>
inline void add_together(Sums (&s)[R], const uint8_t *x, const int32_t *o, const int8_t *w) {
    for (int r = 0; r < R; ++r) add_blocks<N>(s[r], x, o, Block(w + r * QUAD));
}
inline void put_interleaved(uint8_t *out, const I &a, const I &b, const I &c, const I &d) {
    for (int i = 0; i < B; ++i) {
        out[4 * i] = a.x[i];
        out[4 * i + 1] = b.x[i];
        out[4 * i + 2] = c.x[i];
        out[4 * i + 3] = d.x[i];
    }
}
inline void alternate(const uint8_t *__restrict x, uint8_t *__restrict out) {
    for (int i = 0; i < B; ++i) out[i] = x[2 * i];
}
inline void alternate_eight(const uint8_t *__restrict x, uint8_t *__restrict out) {
    for (int i = 0; i < 8; ++i) out[i] = x[2 * i];
}
struct Table {
    const uint8_t *t;
    explicit Table(const uint8_t *from) : t(from) {}
    I operator[](const I &x) const {
        I v;
        for (int i = 0; i < B; ++i) v.x[i] = t[x.x[i]];
        return v;
    }
};
// Between which numbers results are, and bytes.
struct Ends {
    float low, high;
    I least, most;
};
struct Results {
    float t[B];
};
inline Results results(const Sums &s, float multiplier, float bias) {
    Results r;
    for (int i = 0; i < B; ++i) r.t[i] = static_cast<float>(s.a[i]) * multiplier + bias;
    return r;
}
template <bool>
inline void add_bytes(Results &r, const uint8_t *from, float factor) {
    for (int i = 0; i < B; ++i) r.t[i] = r.t[i] + static_cast<float>(from[i]) * factor;
}
inline float clamped(float t, float low, float high) {
    const float above = t > low ? t : low;
    return above < high ? above : high;
}
template <bool>
inline I rounded(const Results &r, const Ends &ends, bool) {
    I v;
    for (int i = 0; i < B; ++i) {
        // the last bits of 1.5 * 2^23 + t are the whole number nearest to t
        const float t = clamped(r.t[i], ends.low, ends.high) + 12582912.0f;
        uint32_t bits;
        __builtin_memcpy(&bits, &t, 4);
        v.x[i] = static_cast<uint8_t>(bits);
    }
    return v;
}
template <bool>
inline void put_floats(const Results &r, float low, float high, float *out) {
    for (int i = 0; i < B; ++i) out[i] = clamped(r.t[i], low, high);
}

#endif

#if !defined(RAREFY_NO_BLOCKS) && (defined(__AVX2__) || defined(RAREFY_NEON_BUILD))
// N quarters of the pixels, which are interleaved: the sums' vectors are B / 4 pixels after one another.
template <int N>
inline __attribute__((always_inline)) void add_blocks(Sums &s, const uint8_t *x, const int32_t *o, const Block &w) {
    for (int i = 0; i < N; ++i) s.a[i] = add_blocks(s.a[i], Pixels(x + i * B, o), w);
}
// The same with blocks of R rows, each row's in turn, which share their pixels.
template <int N, int R>
inline __attribute__((always_inline)) void add_together(Sums (&s)[R], const uint8_t *x, const int32_t *o,
                                                        const int8_t *w) {
    for (int i = 0; i < N; ++i) {
        const Pixels pixels(x + i * B, o);
        for (int r = 0; r < R; ++r) s[r].a[i] = add_blocks(s[r].a[i], pixels, Block(w + r * QUAD * BLOCKS_AT_ONCE));
    }
}
#endif

// One vector of L float32 lanes, for each instruction set. Included by sources of kernels only, in an
// unnamed namespace. With RAREFY_FUSED an fma rounds once everywhere: the same bits on every machine, at a price where
// there is no instruction for it.
#pragma once

// L: float32 lanes of a vector, and V its type. ACCUMULATORS: vectors of sums that a kernel keeps in registers at most,
// of the 32 of AVX-512 and the 16 of AVX2; the others hold a weight and what it is multiplied with.
#if defined(__AVX512F__)

constexpr int L = 16, ACCUMULATORS = 28;
typedef __m512 V;
inline V load(const float *p) { return _mm512_load_ps(p); }
inline V loadu(const float *p) { return _mm512_loadu_ps(p); }
inline V load_some(const float *p, uint32_t lanes) { return _mm512_maskz_loadu_ps(static_cast<__mmask16>(lanes), p); }
typedef __mmask16 Mask;
inline Mask mask_of(uint32_t lanes) { return static_cast<Mask>(lanes); }
inline V load_masked(const float *p, Mask mask) { return _mm512_maskz_loadu_ps(mask, p); }
inline void store_masked(float *p, Mask mask, V v) { _mm512_mask_storeu_ps(p, mask, v); }
inline void store(float *p, V v) { _mm512_store_ps(p, v); }
inline void storeu(float *p, V v) { _mm512_storeu_ps(p, v); }
inline void store_some(float *p, uint32_t lanes, V v) { _mm512_mask_storeu_ps(p, static_cast<__mmask16>(lanes), v); }
inline V all(float a) { return _mm512_set1_ps(a); }
inline V all_bits(uint32_t a) { return _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(a))); }
inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
inline V fms(V a, V b, V c) { return _mm512_fmsub_ps(a, b, c); }    // a b - c
inline V fnma(V a, V b, V c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a b
inline V add(V a, V b) { return _mm512_add_ps(a, b); }
inline V sub(V a, V b) { return _mm512_sub_ps(a, b); }
inline V mul(V a, V b) { return _mm512_mul_ps(a, b); }
inline V div(V a, V b) { return _mm512_div_ps(a, b); }
inline V root(V a) { return _mm512_sqrt_ps(a); }
inline V negative(V a) { return -a; }
inline V absolute(V a) { return _mm512_abs_ps(a); }
// The size of the one with the sign of the other.
inline V with_sign(V size, V sign) { return _mm512_or_ps(absolute(size), _mm512_and_ps(sign, _mm512_set1_ps(-0.0f))); }
// a where x < y, else b.
inline V where_less(V x, V y, V a, V b) { return _mm512_mask_mov_ps(b, _mm512_cmp_ps_mask(x, y, _CMP_LT_OQ), a); }
// The float whose sign and exponent are the low nine bits of a's.
inline V exponent(V a) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(a), 23)); }
// The smaller and the larger one; where one is NaN, b.
inline V smaller(V a, V b) { return _mm512_min_ps(a, b); }
inline V larger(V a, V b) { return _mm512_max_ps(a, b); }
// The larger one; NaN where either is NaN.
inline V maximum(V a, V b) {
    return _mm512_mask_mov_ps(_mm512_max_ps(a, b), _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), a);
}
inline V blend(uint32_t lanes, V a, V b) { return _mm512_mask_mov_ps(b, static_cast<__mmask16>(lanes), a); }
inline V high_half(const uint32_t *p) {
    return _mm512_castsi512_ps(
        _mm512_and_si512(_mm512_set1_epi32(static_cast<int>(*p)), _mm512_set1_epi32(static_cast<int>(0xFFFF0000u))));
}
inline V gather(const float *p, const uint16_t *index) {
    const __m512i i = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(index)));
    return _mm512_i32gather_ps(i, p, 4);
}
inline V widen(const uint16_t *p) {
    const __m512i i = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(i, 16));
}
inline float total(V v) { return _mm512_reduce_add_ps(v); }
// The entry of a table that the low three bits of v shifted right tell.
inline V pick(const float *table, V v, int shift) {
    const __m512i row = _mm512_srli_epi32(_mm512_castps_si512(v), static_cast<unsigned>(shift));
    return _mm512_permutexvar_ps(row, _mm512_broadcast_f32x8(_mm256_loadu_ps(table)));
}

#elif defined(__AVX2__)

constexpr int L = 8, ACCUMULATORS = 14;
typedef __m256 V;
typedef __m256i Mask;
inline Mask mask_of(uint32_t lanes) {
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(lanes)), bit), bit);
}
inline V load(const float *p) { return _mm256_load_ps(p); }
inline V loadu(const float *p) { return _mm256_loadu_ps(p); }
inline V load_some(const float *p, uint32_t lanes) { return _mm256_maskload_ps(p, mask_of(lanes)); }
inline V load_masked(const float *p, Mask mask) { return _mm256_maskload_ps(p, mask); }
inline void store_masked(float *p, Mask mask, V v) { _mm256_maskstore_ps(p, mask, v); }
inline void store(float *p, V v) { _mm256_store_ps(p, v); }
inline void storeu(float *p, V v) { _mm256_storeu_ps(p, v); }
inline void store_some(float *p, uint32_t lanes, V v) {
    if (lanes == 255) _mm256_storeu_ps(p, v);
    else _mm256_maskstore_ps(p, mask_of(lanes), v);
}
inline V all(float a) { return _mm256_set1_ps(a); }
inline V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
inline V fms(V a, V b, V c) { return _mm256_fmsub_ps(a, b, c); }
inline V fnma(V a, V b, V c) { return _mm256_fnmadd_ps(a, b, c); }
inline V add(V a, V b) { return _mm256_add_ps(a, b); }
inline V sub(V a, V b) { return _mm256_sub_ps(a, b); }
inline V mul(V a, V b) { return _mm256_mul_ps(a, b); }
inline V div(V a, V b) { return _mm256_div_ps(a, b); }
inline V root(V a) { return _mm256_sqrt_ps(a); }
inline V negative(V a) { return -a; }
inline V absolute(V a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
inline V with_sign(V size, V sign) { return _mm256_or_ps(absolute(size), _mm256_and_ps(sign, _mm256_set1_ps(-0.0f))); }
inline V where_less(V x, V y, V a, V b) { return _mm256_blendv_ps(b, a, _mm256_cmp_ps(x, y, _CMP_LT_OQ)); }
inline V exponent(V a) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a), 23)); }
inline V smaller(V a, V b) { return _mm256_min_ps(a, b); }
inline V larger(V a, V b) { return _mm256_max_ps(a, b); }
inline V maximum(V a, V b) { return _mm256_blendv_ps(_mm256_max_ps(a, b), a, _mm256_cmp_ps(a, a, _CMP_UNORD_Q)); }
inline V blend(uint32_t lanes, V a, V b) { return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(mask_of(lanes))); }
inline V all_bits(uint32_t a) { return _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(a))); }
inline V high_half(const uint32_t *p) {
    return _mm256_castsi256_ps(
        _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(*p)), _mm256_set1_epi32(static_cast<int>(0xFFFF0000u))));
}
inline V gather(const float *p, const uint16_t *index) {
    return _mm256_i32gather_ps(p, _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(index))), 4);
}
inline V widen(const uint16_t *p) {
    const __m256i i = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(i, 16));
}
inline float total(V v) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline V pick(const float *table, V v, int shift) {
    return _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), _mm256_srli_epi32(_mm256_castps_si256(v), shift));
}

#else

// Vectors of the compiler: it makes of them what the machine has.
constexpr int L = 4, ACCUMULATORS = 14;
typedef float V __attribute__((vector_size(16), aligned(4), may_alias));
typedef uint32_t Bits __attribute__((vector_size(16)));
inline V load(const float *p) { return *reinterpret_cast<const V *>(p); }
inline V loadu(const float *p) { return *reinterpret_cast<const V *>(p); }
inline void store(float *p, V v) { *reinterpret_cast<V *>(p) = v; }
inline void storeu(float *p, V v) { *reinterpret_cast<V *>(p) = v; }
inline V all(float a) { return V{a, a, a, a}; }
inline V load_some(const float *p, uint32_t lanes) {
    V v = all(0.0f);
    for (int i = 0; i < L; ++i)
        if (lanes >> i & 1) v[i] = p[i];
    return v;
}
inline void store_some(float *p, uint32_t lanes, V v) {
    if (lanes == 15) return storeu(p, v);
    for (int i = 0; i < L; ++i)
        if (lanes >> i & 1) p[i] = v[i];
}
typedef uint32_t Mask;
inline Mask mask_of(uint32_t lanes) { return lanes; }
inline V load_masked(const float *p, Mask mask) { return mask == 15 ? loadu(p) : load_some(p, mask); }
inline void store_masked(float *p, Mask mask, V v) { store_some(p, mask, v); }
#if !defined(RAREFY_FUSED)
inline V fma(V a, V b, V c) { return a * b + c; }
#elif defined(__aarch64__)
inline V fma(V a, V b, V c) { return vfmaq_f32(c, a, b); }
#else
#include "../fused-inl.h"
__attribute__((noinline, cold)) V fma_by_lanes(V a, V b, V c) {
    for (int i = 0; i < L; ++i) c[i] = fused(a[i], b[i], c[i]);
    return c;
}
inline V fma(V a, V b, V c) {
    typedef double Wide __attribute__((vector_size(32)));
    typedef uint64_t Words __attribute__((vector_size(32)));
    const Wide s =
        __builtin_convertvector(a, Wide) * __builtin_convertvector(b, Wide) + __builtin_convertvector(c, Wide);
    // Two roundings are one where the first did not make a tie of the second; below 2^-126 there are other ties.
    const Words bits = reinterpret_cast<Words>(s), one = {1, 1, 1, 1};
    const auto tie = ((bits & 0x1FFFFFFF) == 0x10000000) | ((bits & 0x7FF0000000000000) - one < 0x380FFFFFFFFFFFFF);
    if (__builtin_expect((tie[0] | tie[1] | tie[2] | tie[3]) != 0, 0)) return fma_by_lanes(a, b, c);
    return __builtin_convertvector(s, V);
}
#endif
inline V fms(V a, V b, V c) { return fma(a, b, -c); }
inline V fnma(V a, V b, V c) { return fma(-a, b, c); }
inline V add(V a, V b) { return a + b; }
inline V sub(V a, V b) { return a - b; }
inline V mul(V a, V b) { return a * b; }
inline V div(V a, V b) { return a / b; }
inline V root(V a) {
    for (int i = 0; i < L; ++i) a[i] = __builtin_sqrtf(a[i]);
    return a;
}
inline V negative(V a) { return -a; }
inline V absolute(V a) { return reinterpret_cast<V>(reinterpret_cast<Bits>(a) & 0x7FFFFFFFu); }
inline V with_sign(V size, V sign) {
    return reinterpret_cast<V>((reinterpret_cast<Bits>(size) & 0x7FFFFFFFu) |
                               (reinterpret_cast<Bits>(sign) & 0x80000000u));
}
inline V where_less(V x, V y, V a, V b) { return x < y ? a : b; }
inline V exponent(V a) { return reinterpret_cast<V>(reinterpret_cast<Bits>(a) << 23); }
inline V smaller(V a, V b) { return a < b ? a : b; }
inline V larger(V a, V b) { return a > b ? a : b; }
inline V maximum(V a, V b) {
    const V m = a > b ? a : b;
    return a == a ? m : a;
}
inline V blend(uint32_t lanes, V a, V b) {
    for (int i = 0; i < L; ++i)
        if (lanes >> i & 1) b[i] = a[i];
    return b;
}
inline V all_bits(uint32_t a) {
    float f;
    __builtin_memcpy(&f, &a, sizeof f);
    return all(f);
}
inline V high_half(const uint32_t *p) { return all_bits(*p & 0xFFFF0000u); }
inline V gather(const float *p, const uint16_t *index) {
    V v;
    for (int i = 0; i < L; ++i) v[i] = p[index[i]];
    return v;
}
inline V widen(const uint16_t *p) {
    V v;
    for (int i = 0; i < L; ++i) {
        const uint32_t bits = static_cast<uint32_t>(p[i]) << 16;
        float f;
        __builtin_memcpy(&f, &bits, sizeof f);
        v[i] = f;
    }
    return v;
}
inline float total(V v) { return (v[0] + v[2]) + (v[1] + v[3]); }
inline V pick(const float *table, V v, int shift) {
    const Bits row = reinterpret_cast<Bits>(v) >> shift & 7;
    return V{table[row[0]], table[row[1]], table[row[2]], table[row[3]]};
}

#endif

// Lanes 0 to n - 1.
inline uint32_t low_lanes(int64_t n) { return (1u << n) - 1; }

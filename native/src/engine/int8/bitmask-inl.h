// Sums over weights behind a bitmask (kernels.h). Included by int8_kernels.cpp only, in an unnamed namespace.
#pragma once

inline uint64_t mask_at(const int8_t *p) {
    uint64_t mask;
    __builtin_memcpy(&mask, p, sizeof mask);
    return mask;
}

#if defined(__AVX512VBMI2__) && defined(__AVX512VNNI__)

template <int IMAGES>
inline __attribute__((always_inline)) void bitmask_of(const uint8_t *const *x, const int8_t *p, int64_t groups,
                                                      int32_t *sums) {
    constexpr int64_t AHEAD = 2048;
    __m512i a[IMAGES][2];  // two, since a sum has to wait for the one before it
    for (int i = 0; i < IMAGES; ++i) a[i][0] = a[i][1] = _mm512_setzero_si512();
    for (int64_t group = 0; group < groups; ++group) {
        const int8_t *masks = p;
        p += MASK_BYTES;
        RAREFY_UNROLL for (int quad = 0; quad < MASK_QUADS; ++quad) {
            _mm_prefetch(reinterpret_cast<const char *>(p) + AHEAD, _MM_HINT_T0);
            const uint64_t mask = mask_at(masks + 8 * quad);
            const __m512i w = _mm512_maskz_expand_epi8(mask, _mm512_loadu_si512(p));
            p += __builtin_popcountll(mask);
            for (int i = 0; i < IMAGES; ++i) {
                int32_t pixels;
                __builtin_memcpy(&pixels, x[i] + QUAD * (MASK_QUADS * group + quad), sizeof pixels);
                a[i][quad % 2] = _mm512_dpbusd_epi32(a[i][quad % 2], _mm512_set1_epi32(pixels), w);
            }
        }
    }
    for (int i = 0; i < IMAGES; ++i) _mm512_storeu_si512(sums + MASK_ROWS * i, _mm512_add_epi32(a[i][0], a[i][1]));
}

void bitmask(const uint8_t *const *x, int64_t images, const int8_t *from, int64_t groups, int32_t *sums) {
    switch (images) {
        case 1: return bitmask_of<1>(x, from, groups, sums);
        case 2: return bitmask_of<2>(x, from, groups, sums);
        case 3: return bitmask_of<3>(x, from, groups, sums);
        default: return bitmask_of<MOST_IMAGES>(x, from, groups, sums);
    }
}

#else

void bitmask(const uint8_t *const *x, int64_t images, const int8_t *p, int64_t groups, int32_t *sums) {
    for (int64_t i = 0; i < images * MASK_ROWS; ++i) sums[i] = 0;
    for (int64_t group = 0; group < groups; ++group) {
        const int8_t *masks = p;
        p += MASK_BYTES;
        for (int quad = 0; quad < MASK_QUADS; ++quad)
            for (uint64_t left = mask_at(masks + 8 * quad); left; left &= left - 1, ++p) {
                const int bit = __builtin_ctzll(left);
                const int64_t column = QUAD * (MASK_QUADS * group + quad) + bit % QUAD;
                for (int64_t i = 0; i < images; ++i) sums[MASK_ROWS * i + bit / QUAD] += *p * x[i][column];
            }
    }
}

#endif

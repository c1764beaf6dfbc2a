// Sums over weights in windows (kernels.h). Included by int8_kernels.cpp only, in an unnamed namespace.
#pragma once

#if defined(__AVX2__)

template <int IMAGES>
inline __attribute__((always_inline)) void windows_of(const int8_t *const *x, const int8_t *from, const int8_t *to,
                                                      int32_t *sums) {
    // half as far was slower, twice as far no faster, on an AMD EPYC
    constexpr int64_t AHEAD = 2048, LINE = 64;
    const __m256i two_bits = _mm256_set1_epi8(3), high_bits = _mm256_set1_epi32(12), ones = _mm256_set1_epi16(1);
    const __m256i at_least = _mm256_set1_epi32(0x03020100);
    __m256i prefix = _mm256_set1_epi32(0x01010101);
    asm("" : "+x"(prefix));  // a compiler that knows it makes six instructions of the product
    __m256i a[IMAGES];
    for (int i = 0; i < IMAGES; ++i) a[i] = _mm256_setzero_si256();
    int64_t column = 0;
    for (const int8_t *p = from; p != to; p += WINDOW_BYTES) {
        for (int64_t line = 0; line < WINDOW_BYTES; line += LINE)
            _mm_prefetch(reinterpret_cast<const char *>(p) + AHEAD + line, _MM_HINT_T0);
        const __m256i gaps = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
        const __m256i firsts = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p + FIRSTS_AT)));
        RAREFY_UNROLL for (int step = 0; step < WINDOW_STEPS; ++step) {
            column += static_cast<uint8_t>(p[MOVES_AT + step]);
            // bytes of a row: the first place, and how far each other one is less one; their sums are all places
            const __m256i high = step ? _mm256_srli_epi32(firsts, 2 * step - 2) : _mm256_slli_epi32(firsts, 2);
            const __m256i far = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi32(gaps, 2 * step), two_bits),
                                                _mm256_and_si256(high, high_bits));
            const __m256i places = _mm256_add_epi8(_mm256_mullo_epi32(far, prefix), at_least);
            const __m256i w =
                _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p + WEIGHTS_AT + step * WINDOW_ROWS * QUAD));
            for (int i = 0; i < IMAGES; ++i) {
                const __m256i pixels = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(sixteen(x[i] + column)), places);
                const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(pixels), _mm256_sign_epi8(w, pixels));
                a[i] = _mm256_add_epi32(a[i], _mm256_madd_epi16(pairs, ones));
            }
        }
    }
    for (int i = 0; i < IMAGES; ++i) _mm256_storeu_si256(reinterpret_cast<__m256i *>(sums + WINDOW_ROWS * i), a[i]);
}

void windows(const int8_t *const *x, int64_t images, const int8_t *from, const int8_t *to, int32_t *sums) {
    switch (images) {
        case 1: return windows_of<1>(x, from, to, sums);
        case 2: return windows_of<2>(x, from, to, sums);
        case 3: return windows_of<3>(x, from, to, sums);
        default: return windows_of<MOST_IMAGES>(x, from, to, sums);
    }
}

#else

void windows(const int8_t *const *x, int64_t images, const int8_t *from, const int8_t *to, int32_t *sums) {
    for (int64_t i = 0; i < images * WINDOW_ROWS; ++i) sums[i] = 0;
    int64_t column = 0;
    for (const int8_t *p = from; p != to; p += WINDOW_BYTES)
        for (int step = 0; step < WINDOW_STEPS; ++step) {
            column += static_cast<uint8_t>(p[MOVES_AT + step]);
            const int8_t *w = p + WEIGHTS_AT + step * WINDOW_ROWS * QUAD;
            for (int r = 0; r < WINDOW_ROWS; ++r) {
                int64_t place = column + (static_cast<uint8_t>(p[FIRSTS_AT + r]) >> 2 * step & 3) * 4 - 1;
                for (int k = 0; k < QUAD; ++k) {
                    place += 1 + (static_cast<uint8_t>(p[QUAD * r + k]) >> 2 * step & 3);
                    for (int64_t i = 0; i < images; ++i) sums[WINDOW_ROWS * i + r] += w[QUAD * r + k] * x[i][place];
                }
            }
        }
}

#endif

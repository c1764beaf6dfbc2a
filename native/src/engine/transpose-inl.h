// Rows as columns. Included by engine_kernels.cpp and training.cpp, after vec-inl.h.
#pragma once

// A square of L rows and columns: from(i) is where row i begins, to(j) where column j goes.
template <class From, class To>
inline __attribute__((always_inline)) void transpose_square(const From &from, const To &to) {
#if defined(__AVX512F__)
    __m512 a[16], b[16];
    RAREFY_UNROLL for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(from(i));
    // pairs, fours, eights and sixteens of rows
    RAREFY_UNROLL for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
    RAREFY_UNROLL for (int i = 0; i < 16; i += 4) {
        RAREFY_UNROLL for (int j = 0; j < 2; ++j) {
            const __m512d p = _mm512_castps_pd(b[i + j]), q = _mm512_castps_pd(b[i + j + 2]);
            a[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(p, q));
            a[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(p, q));
        }
    }
    RAREFY_UNROLL for (int i = 0; i < 16; i += 8) {
        RAREFY_UNROLL for (int j = 0; j < 4; ++j) {
            b[i + j] = _mm512_shuffle_f32x4(a[i + j], a[i + j + 4], 0x88);
            b[i + j + 4] = _mm512_shuffle_f32x4(a[i + j], a[i + j + 4], 0xdd);
        }
    }
    RAREFY_UNROLL for (int j = 0; j < 8; ++j) {
        _mm512_storeu_ps(to(j), _mm512_shuffle_f32x4(b[j], b[j + 8], 0x88));
        _mm512_storeu_ps(to(j + 8), _mm512_shuffle_f32x4(b[j], b[j + 8], 0xdd));
    }
#elif defined(__AVX2__)
    // the halves of rows i and i + 4 side by side as they are read: half of the shuffles
    const auto halves = [&](int i, int j) __attribute__((always_inline)) {
        return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(from(i) + j)), _mm_loadu_ps(from(i + 4) + j),
                                    1);
    };
    RAREFY_UNROLL for (int j = 0; j < 8; j += 4) {
        const __m256 a = halves(0, j), b = halves(1, j), c = halves(2, j), d = halves(3, j);
        const __m256 ab = _mm256_unpacklo_ps(a, b), cd = _mm256_unpacklo_ps(c, d);
        const __m256 high_ab = _mm256_unpackhi_ps(a, b), high_cd = _mm256_unpackhi_ps(c, d);
        _mm256_storeu_ps(to(j), _mm256_shuffle_ps(ab, cd, 0x44));
        _mm256_storeu_ps(to(j + 1), _mm256_shuffle_ps(ab, cd, 0xEE));
        _mm256_storeu_ps(to(j + 2), _mm256_shuffle_ps(high_ab, high_cd, 0x44));
        _mm256_storeu_ps(to(j + 3), _mm256_shuffle_ps(high_ab, high_cd, 0xEE));
    }
#else
    for (int i = 0; i < L; ++i)
        for (int j = 0; j < L; ++j) to(j)[i] = from(i)[j];
#endif
}

inline void transpose(const float *x, int64_t x_stride, int64_t rows, int64_t columns, float *y, int64_t y_stride) {
    for (int64_t r = 0; r < rows; r += L)
        for (int64_t c = 0; c < columns; c += L) {
            const float *from = x + r * x_stride + c;
            float *to = y + c * y_stride + r;
            if (r + L <= rows && c + L <= columns) {
                transpose_square([=](int i) { return from + i * x_stride; }, [=](int j) { return to + j * y_stride; });
                continue;
            }
            for (int64_t i = 0; i < (rows - r < L ? rows - r : L); ++i)
                for (int64_t j = 0; j < (columns - c < L ? columns - c : L); ++j)
                    to[j * y_stride + i] = from[i * x_stride + j];
        }
}

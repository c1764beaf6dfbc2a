// Rows as columns. Included by engine_kernels.cpp, after vec-inl.h.
#pragma once

// Of a square of L rows and columns.
#if defined(__AVX512F__)
inline void transpose_square(const float *x, int64_t x_stride, float *y, int64_t y_stride) {
    __m512 a[16], b[16];
    RAREFY_UNROLL for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(x + i * x_stride);
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
        _mm512_storeu_ps(y + j * y_stride, _mm512_shuffle_f32x4(b[j], b[j + 8], 0x88));
        _mm512_storeu_ps(y + (j + 8) * y_stride, _mm512_shuffle_f32x4(b[j], b[j + 8], 0xdd));
    }
}
#elif defined(__AVX2__)
inline void transpose_square(const float *x, int64_t x_stride, float *y, int64_t y_stride) {
    __m256 a[8], b[8];
    RAREFY_UNROLL for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_ps(x + i * x_stride);
    RAREFY_UNROLL for (int i = 0; i < 8; i += 2) {
        b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
    }
    RAREFY_UNROLL for (int i = 0; i < 8; i += 4) {
        RAREFY_UNROLL for (int j = 0; j < 2; ++j) {
            const __m256d p = _mm256_castps_pd(b[i + j]), q = _mm256_castps_pd(b[i + j + 2]);
            a[i + 2 * j] = _mm256_castpd_ps(_mm256_unpacklo_pd(p, q));
            a[i + 2 * j + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(p, q));
        }
    }
    RAREFY_UNROLL for (int j = 0; j < 4; ++j) {
        _mm256_storeu_ps(y + j * y_stride, _mm256_permute2f128_ps(a[j], a[j + 4], 0x20));
        _mm256_storeu_ps(y + (j + 4) * y_stride, _mm256_permute2f128_ps(a[j], a[j + 4], 0x31));
    }
}
#else
inline void transpose_square(const float *x, int64_t x_stride, float *y, int64_t y_stride) {
    for (int i = 0; i < L; ++i)
        for (int j = 0; j < L; ++j) y[j * y_stride + i] = x[i * x_stride + j];
}
#endif

void transpose(const float *x, int64_t x_stride, int64_t rows, int64_t columns, float *y, int64_t y_stride) {
    for (int64_t r = 0; r < rows; r += L)
        for (int64_t c = 0; c < columns; c += L) {
            const float *from = x + r * x_stride + c;
            float *to = y + c * y_stride + r;
            if (r + L <= rows && c + L <= columns) {
                transpose_square(from, x_stride, to, y_stride);
                continue;
            }
            for (int64_t i = 0; i < (rows - r < L ? rows - r : L); ++i)
                for (int64_t j = 0; j < (columns - c < L ? columns - c : L); ++j)
                    to[j * y_stride + i] = from[i * x_stride + j];
        }
}

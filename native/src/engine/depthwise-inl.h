// One channel of a depthwise convolution, straight from the input's plane. Included by engine_kernels.cpp only, in an
// unnamed namespace, after vec-inl.h.
#pragma once

// The lanes of a vector from column `at` on that lie in a row of `width`.
inline uint32_t columns_inside(int64_t at, int64_t width) {
    const auto low = [](int64_t n) { return (uint32_t{1} << (n < 0 ? 0 : n > L ? L : n)) - 1; };
    return low(width - at) & ~low(-at);
}

// Every second float of two vectors, from the first or from the second one on.
template <bool ODD>
inline V halved(V a, V b) {
#ifdef __AVX512F__
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    return _mm512_permutex2var_ps(a, ODD ? _mm512_or_si512(even, _mm512_set1_epi32(1)) : even, b);
#elif defined(__AVX2__)
    const __m256 mixed = _mm256_shuffle_ps(a, b, ODD ? 0xDD : 0x88);  // a0 a2 b0 b2 a4 a6 b4 b6
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(mixed), 0xD8));
#else
    return ODD ? V{a[1], a[3], b[1], b[3]} : V{a[0], a[2], b[0], b[2]};
#endif
}

// Every second float from the first one of a and from the second one of b on.
inline V halves(V a, V b) {
#ifdef __AVX512F__
    const __m512i index = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 17, 19, 21, 23, 25, 27, 29, 31);
    return _mm512_permutex2var_ps(a, index, b);
#elif defined(__AVX2__)
    const __m256 mixed = _mm256_shuffle_ps(a, b, 0xD8);  // a0 a2 b1 b3 a4 a6 b5 b7
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(mixed), 0xD8));
#else
    return V{a[0], a[2], b[1], b[3]};
#endif
}

// Which of the pixels that a tap's L results meet lie in the row; S columns apart they come from S vectors.
template <int S>
struct Inside {
    Mask masks[S];
    Inside() = default;
    Inside(int64_t at, int64_t width) {
        for (int s = 0; s < S; ++s) masks[s] = mask_of(columns_inside(at + s * L, width));
    }
};

// L pixels from p on, or from p + 1 on if ODD, S apart; those outside the row are 0.
template <int S, bool ODD = false>
inline V pixels(const float *p, const Inside<S> &inside) {
    const V a = load_masked(p, inside.masks[0]);
    if constexpr (S == 1) return a;
    else return halved<ODD>(a, load_masked(p + L, inside.masks[1]));
}

// Up to L columns of results.
struct Columns {
    int64_t at;
    Mask mask;
    bool whole;
    Columns(const DepthwiseCall &c, int64_t column)
        : at(column), mask(mask_of(columns_inside(column, c.out_w))), whole(column + L <= c.out_w) {}
};

// The first column of the last vector of a row.
inline int64_t last_columns(const DepthwiseCall &c) { return (c.out_w - 1) / L * L; }

inline void finish(const DepthwiseCall &c, V v, int64_t row, const Columns &columns) {
    const int64_t at = row * c.out_w + columns.at;
    if (c.residual) v = add(v, columns.whole ? loadu(c.residual + at) : load_masked(c.residual + at, columns.mask));
    v = smaller(all(c.high), larger(all(c.low), v));
    // Stores by a mask are slow on some processors. What comes after a row's last column is computed later: the columns
    // are gone through from the last one to the first, the rows downwards.
    if (columns.whole || (!c.residual && at + L <= c.last_row * c.out_w)) storeu(c.y + at, v);
    else store_masked(c.y + at, columns.mask, v);
}

// ROWS rows of results: K x K taps, S apart both ways. A row of the input is loaded once for all of them.
template <int K, int S, int ROWS>
inline void square_rows(const DepthwiseCall &c, const V (&weight)[K * K], const Inside<S> (&inside)[K], int64_t row,
                        const Columns &columns) {
    V a[ROWS];
    RAREFY_UNROLL for (int o = 0; o < ROWS; ++o) a[o] = all(c.bias);
    const int64_t top = row * S - c.top;
    const float *from = c.x + top * c.in_w + columns.at * S - c.left;
    RAREFY_UNROLL for (int j = 0; j < (ROWS - 1) * S + K; ++j, from += c.in_w) {
        if (top + j < 0 || top + j >= c.in_h) continue;
        V x[K];
        // columns 2 apart: taps 2 k and 2 k + 1 are the halves of the same vectors
        RAREFY_UNROLL for (int k = 0; k < K; k += S) {
            x[k] = pixels<S>(from + k, inside[k]);
            if (S == 2 && k + 1 < K) x[k + 1] = pixels<S, true>(from + k, inside[k]);
        }
        RAREFY_UNROLL for (int o = 0; o < ROWS; ++o) {
            const int ky = j - o * S;
            if (ky < 0 || ky >= K) continue;
            RAREFY_UNROLL for (int k = 0; k < K; ++k) a[o] = fma(weight[ky * K + k], x[k], a[o]);
        }
    }
    RAREFY_UNROLL for (int o = 0; o < ROWS; ++o) finish(c, a[o], row + o, columns);
}

template <int K, int S>
void square(const DepthwiseCall &c) {
    constexpr int ROWS = K * S == 3 ? 4 : 2;  // at once, their sums in registers; not measured apart
    V weight[K * K];
    RAREFY_UNROLL for (int k = 0; k < K * K; ++k) weight[k] = all(c.weight[k]);
    for (int64_t column = last_columns(c); column >= 0; column -= L) {
        const Columns columns(c, column);
        const int64_t left = column * S - c.left;
        Inside<S> inside[K];
        RAREFY_UNROLL for (int k = 0; k < K; k += S) inside[k] = Inside<S>(left + k, c.in_w);
        int64_t row = c.first_row;
        for (; row + ROWS <= c.last_row; row += ROWS) square_rows<K, S, ROWS>(c, weight, inside, row, columns);
        for (; row < c.last_row; ++row) square_rows<K, S, 1>(c, weight, inside, row, columns);
    }
}

// Any kernel, rows and taps any distances apart, columns S.
template <int S>
void oblong(const DepthwiseCall &c) {
    for (int64_t column = last_columns(c); column >= 0; column -= L) {
        const Columns columns(c, column);
        for (int64_t row = c.first_row; row < c.last_row; ++row) {
            V a = all(c.bias);
            for (int64_t ky = 0; ky < c.kernel[0]; ++ky) {
                const int64_t y = row * c.stride[0] + ky * c.dilation[0] - c.top;
                if (y < 0 || y >= c.in_h) continue;
                for (int64_t kx = 0; kx < c.kernel[1]; ++kx) {
                    const int64_t at = column * S + kx * c.dilation[1] - c.left;
                    a = fma(all(c.weight[ky * c.kernel[1] + kx]),
                            pixels<S>(c.x + y * c.in_w + at, Inside<S>(at, c.in_w)), a);
                }
            }
            finish(c, a, row, columns);
        }
    }
}

void depthwise(const DepthwiseCall *call) {
    const DepthwiseCall &c = *call;
    const bool even =
        c.kernel[0] == c.kernel[1] && c.stride[0] == c.stride[1] && c.dilation[0] == 1 && c.dilation[1] == 1;
    const bool one = c.stride[1] == 1;
    if (even && c.kernel[0] == 3) return one ? square<3, 1>(c) : square<3, 2>(c);
    if (even && c.kernel[0] == 5) return one ? square<5, 1>(c) : square<5, 2>(c);
    return one ? oblong<1>(c) : oblong<2>(c);
}

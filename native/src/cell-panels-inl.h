// Products of a cell by vectors of floats: panels of the weights, as wide as some vectors, are packed one after
// another. Included by cell.cpp; see cell-tiles-inl.h for what both define.
#pragma once

typedef float Factor;  // what products take
struct Unit {};        // what computes them

constexpr int64_t ROWS = 64;    // of a batch that go over the weights together
constexpr int64_t GROUP = 1;    // of them that are computed together, there or not
constexpr int64_t DEPTH = 128;  // of a product at a time: its weights stay in the first cache
constexpr int WIDTH = 4;        // vectors a panel of the backward product
constexpr int64_t PANEL = WIDTH * L;

// From a row of so many factors to the next.
inline int64_t width(int64_t depth) { return depth; }

// out[r][v] += sum over k of a[r][k] * b[k][v], one product after another; strides in floats.
template <int R, int N>
inline void block(const float *a, int64_t a_row, const float *b, int64_t depth, float *out, int64_t out_row,
                  int64_t out_vector) {
    V sum[R][N];
    RAREFY_UNROLL for (int r = 0; r < R; ++r) {
        RAREFY_UNROLL for (int v = 0; v < N; ++v) sum[r][v] = loadu(out + r * out_row + v * out_vector);
    }
    for (int64_t k = 0; k < depth; ++k) {
        V w[N];
        RAREFY_UNROLL for (int v = 0; v < N; ++v) w[v] = loadu(b + (k * N + v) * L);
        RAREFY_UNROLL for (int r = 0; r < R; ++r) {
            const V x = all(a[r * a_row + k]);
            RAREFY_UNROLL for (int v = 0; v < N; ++v) sum[r][v] = fma(x, w[v], sum[r][v]);
        }
    }
    RAREFY_UNROLL for (int r = 0; r < R; ++r) {
        RAREFY_UNROLL for (int v = 0; v < N; ++v) storeu(out + r * out_row + v * out_vector, sum[r][v]);
    }
}

template <int R, int N>
inline void last_rows(int64_t rows, const float *a, int64_t a_row, const float *b, int64_t depth, float *out,
                      int64_t out_row, int64_t out_vector) {
    if constexpr (R > 0) {
        if (rows == R) return block<R, N>(a, a_row, b, depth, out, out_row, out_vector);
        last_rows<R - 1, N>(rows, a, a_row, b, depth, out, out_row, out_vector);
    }
}

template <int N>
void product(int64_t rows, const float *a, int64_t a_row, const float *b, int64_t depth, float *out, int64_t out_row,
             int64_t out_vector) {
    constexpr int R = ACCUMULATORS / N;
    for (int64_t k = 0; k < depth; k += DEPTH) {
        const int64_t some = least(DEPTH, depth - k);
        int64_t r = 0;
        for (; r + R <= rows; r += R)
            block<R, N>(a + r * a_row + k, a_row, b + k * N * L, some, out + r * out_row, out_row, out_vector);
        last_rows<R - 1, N>(rows - r, a + r * a_row + k, a_row, b + k * N * L, some, out + r * out_row, out_row,
                            out_vector);
    }
}

// Panels of L units: packed[unit / L][k][gate's place][unit % L]; in the lanes beyond the last unit it comes again.
template <class S, int G>
void pack_forward(const rarefy_recurrent &op, float *packed) {
    const int64_t H = op.hidden;
    const S *weights = static_cast<const S *>(op.weights);
    for (int64_t u = 0; u < H; u += L)
        for (int64_t gate = 0; gate < G; ++gate) {
            float *out = packed + (u * H * G) + place<G>(gate) * L;
            for (int64_t k = 0; k < H; k += 16)
                for (int64_t lane = 0; lane < L; ++lane) {
                    const int64_t unit = least(u + lane, H - 1), end = least(k + 16, H);
                    const S *row = weights + (gate * H + unit) * H;
                    for (int64_t i = k; i < end; ++i) out[i * G * L + lane] = wide(row[i]);
                }
        }
}

// packed[unit / PANEL][k][unit % PANEL], units beyond the last 0.
template <class S, int G>
void pack_backward(const rarefy_recurrent &op, float *packed) {
    const int64_t H = op.hidden;
    const S *weights = static_cast<const S *>(op.weights);
    for (int64_t u = 0; u < H; u += PANEL)
        for (int64_t k = 0; k < G * H; ++k) {
            float *out = packed + (u * G * H) + k * PANEL;
            const int64_t units = least(PANEL, H - u);
            for (int64_t i = 0; i < units; ++i) out[i] = wide(weights[k * H + u + i]);
            for (int64_t i = units; i < PANEL; ++i) out[i] = 0.0f;
        }
}

// out[gate's place][row][unit] += sum over k of h[row][k] * W[gate][unit][k] for the units from `first` on, whole
// vectors of them; `stride` floats from one row of out to the next, `gap` from one gate to the next.
template <int G>
void forward_product(int64_t H, int64_t rows, const float *h, const float *packed, int64_t first, int64_t stride,
                     float *out, int64_t gap) {
    for (int64_t u = 0; u < stride; u += L)
        product<G>(rows, h, H, packed + (first + u) * H * G, H, out + u, stride, gap);
}

// out[row][unit] += sum over k of d[row][k] * W[k][unit], for `units` of them, whole panels.
inline void backward_product(int64_t rows, const float *d, int64_t depth, const float *packed, int64_t units,
                             float *out) {
    for (int64_t u = 0; u < units; u += PANEL)
        product<WIDTH>(rows, d, depth, packed + u * depth, depth, out + u, units, L);
}

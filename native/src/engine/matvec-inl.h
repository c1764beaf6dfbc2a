// Products of one vector: the rows of the weights lie in the lanes. Included by engine_kernels.cpp, after vec-inl.h.
#pragma once

inline V weights_at(const float *w) { return loadu(w); }
inline V weights_at(const uint16_t *w) { return widen(w); }

// The sums of a panel's rows, residual, clamp, store.
inline void finish_panel(const VectorCall &c, int32_t panel, V sums) {
    const V low = all(c.low), high = all(c.high);
    if (!c.rows && c.y_stride == 1 && (!c.residual || c.residual_stride == 1)) {
        const int32_t row = c.first_row + panel * L;
        const uint32_t lanes = low_lanes(c.last_row - row < L ? c.last_row - row : L);
        V v = add(sums, load_some(c.bias + row, lanes));
        if (c.residual) v = add(v, load_some(c.residual + row, lanes));
        store_some(c.y + row, lanes, smaller(high, larger(low, v)));
        return;
    }
    alignas(64) float lane[L];
    store(lane, sums);
    for (int32_t i = 0; i < L; ++i) {
        const int32_t row = c.rows ? c.rows[int64_t{panel} * L + i] : c.first_row + panel * L + i;
        if (row < 0 || (!c.rows && row >= c.last_row)) continue;
        float y = lane[i] + c.bias[row];
        if (c.residual) y += c.residual[row * c.residual_stride];
        y = y < c.low ? c.low : y;
        c.y[row * c.y_stride] = y > c.high ? c.high : y;
    }
}

// Terms that are added one after the other: the error of one sum grows with them (weights.cpp).
enum { SPAN_TERMS = 256 };

// N panels at once, in whose sums two columns go on in turn.
template <int N, class W>
inline void dense_panels(const VectorCall &c, int32_t panel) {
    const int64_t each = int64_t{c.columns} * L;
    const W *w = static_cast<const W *>(c.weights) + c.starts[panel];
    V whole[N];
    RAREFY_UNROLL for (int n = 0; n < N; ++n) whole[n] = all(0.0f);
    for (int32_t from = 0; from < c.columns; from += SPAN_TERMS) {
        const int32_t end = c.columns - from < SPAN_TERMS ? c.columns : from + SPAN_TERMS;
        V a[N], b[N];
        RAREFY_UNROLL for (int n = 0; n < N; ++n) a[n] = b[n] = all(0.0f);
        int32_t k = from;
        for (; k + 2 <= end; k += 2) {
            const V x = all(c.x[k]), next = all(c.x[k + 1]);
            RAREFY_UNROLL for (int n = 0; n < N; ++n) {
                a[n] = fma(weights_at(w + n * each + int64_t{k} * L), x, a[n]);
                b[n] = fma(weights_at(w + n * each + int64_t{k} * L + L), next, b[n]);
            }
        }
        if (k < end) {
            const V x = all(c.x[k]);
            RAREFY_UNROLL for (int n = 0; n < N; ++n) a[n] = fma(weights_at(w + n * each + int64_t{k} * L), x, a[n]);
        }
        RAREFY_UNROLL for (int n = 0; n < N; ++n) whole[n] = add(whole[n], add(a[n], b[n]));
    }
    RAREFY_UNROLL for (int n = 0; n < N; ++n) finish_panel(c, panel + n, whole[n]);
}

template <class W>
void dense_vector(const VectorCall &c) {
    constexpr int32_t N = 4;
    const int32_t whole = c.panels / N;
    for (int32_t i = 0; i < whole; ++i) dense_panels<N, W>(c, (c.backwards ? whole - 1 - i : i) * N);
    for (int32_t panel = whole * N; panel < c.panels; ++panel) dense_panels<1, W>(c, panel);
}

template <class W>
void sparse_vector(const VectorCall &c) {
    for (int32_t i = 0; i < c.panels; ++i) {
        const int32_t panel = c.backwards ? c.panels - 1 - i : i;
        V whole = all(0.0f);
        for (int64_t from = c.starts[panel], stop = c.starts[panel + 1]; from < stop; from += SPAN_TERMS * L) {
            const int64_t end = stop - from < SPAN_TERMS * L ? stop : from + SPAN_TERMS * L;
            const W *w = static_cast<const W *>(c.weights);
            V a = all(0.0f), b = all(0.0f);
            int64_t k = from;
            for (; k + 2 * L <= end; k += 2 * L) {
                a = fma(weights_at(w + k), gather(c.x, c.index + k), a);
                b = fma(weights_at(w + k + L), gather(c.x, c.index + k + L), b);
            }
            if (k < end) a = fma(weights_at(w + k), gather(c.x, c.index + k), a);
            whole = add(whole, add(a, b));
        }
        finish_panel(c, panel, whole);
    }
}

void vector(const VectorCall *call, int32_t bf16) {
    if (call->rows) bf16 ? sparse_vector<uint16_t>(*call) : sparse_vector<float>(*call);
    else bf16 ? dense_vector<uint16_t>(*call) : dense_vector<float>(*call);
}

// Normalisation over channels, and the sums that a norm over groups needs. Included by engine_kernels.cpp, after
// elementwise-inl.h.
#pragma once

// The mean over channels of N vectors of pixels of `term`, in sums of some channels each.
template <int N, class F>
inline void mean_of(int64_t channels, V (&mean)[N], const F &term) {
    constexpr int64_t SOME = 64;
    RAREFY_UNROLL for (int t = 0; t < N; ++t) mean[t] = all(0.0f);
    for (int64_t first = 0; first < channels; first += SOME) {
        V part[N];
        RAREFY_UNROLL for (int t = 0; t < N; ++t) part[t] = all(0.0f);
        for (int64_t c = first; c < (first + SOME < channels ? first + SOME : channels); ++c)
            RAREFY_UNROLL for (int t = 0; t < N; ++t) part[t] = term(c, t, part[t]);
        RAREFY_UNROLL for (int t = 0; t < N; ++t) mean[t] = add(mean[t], part[t]);
    }
    const V one_each = all(1.0f / static_cast<float>(channels));
    RAREFY_UNROLL for (int t = 0; t < N; ++t) mean[t] = mul(mean[t], one_each);
}

// Sums of more channels than this round so much that a second pass, of what is left, is worth its time.
constexpr int64_t LONG_SUM = 2048;

template <int N, class At, class Put>
inline void norm_pixels(const NormCall &call, const At &at, const Put &put) {
    V mean[N], factor[N];
    RAREFY_UNROLL for (int t = 0; t < N; ++t) mean[t] = all(0.0f);
    if (call.centred) mean_of(call.channels, mean, [&](int64_t c, int t, V sum) { return add(sum, at(c, t)); });
    if (call.centred && call.channels > LONG_SUM) {
        V left[N];
        mean_of(call.channels, left, [&](int64_t c, int t, V sum) { return add(sum, sub(at(c, t), mean[t])); });
        RAREFY_UNROLL for (int t = 0; t < N; ++t) mean[t] = add(mean[t], left[t]);
    }
    mean_of(call.channels, factor, [&](int64_t c, int t, V sum) {
        const V d = sub(at(c, t), mean[t]);
        return fma(d, d, sum);
    });
    RAREFY_UNROLL for (int t = 0; t < N; ++t) factor[t] = div(all(1.0f), root(add(factor[t], all(call.eps))));
    for (int64_t c = 0; c < call.channels; ++c) {
        const V scale = all(call.scale[c]), shift = all(call.shift[c]);
        RAREFY_UNROLL for (int t = 0; t < N; ++t) put(c, t, fma(mul(sub(at(c, t), mean[t]), factor[t]), scale, shift));
    }
}

// The last pixels: N vectors, of whose last one `some` lanes are pixels.
template <int N>
void norm_rest(const NormCall &call, const float *x, float *y, Mask some) {
    norm_pixels<N>(
        call,
        [=](int64_t c, int t) {
            const float *from = x + c * call.x_stride + t * L;
            return t == N - 1 ? load_masked(from, some) : loadu(from);
        },
        [=](int64_t c, int t, V v) {
            float *to = y + c * call.y_stride + t * L;
            t == N - 1 ? store_masked(to, some, v) : storeu(to, v);
        });
}

// The sum of f(i, lanes) over vectors of n numbers, in sums of some hundred numbers each.
template <class F>
inline float sum_of(int64_t n, const F &f) {
    constexpr int64_t SOME = 64 * L;
    V sum = all(0.0f);
    for (int64_t from = 0; from < n; from += SOME) {
        const int64_t end = n - from < SOME ? n : from + SOME;
        V part[4];
        RAREFY_UNROLL for (int t = 0; t < 4; ++t) part[t] = all(0.0f);
        int64_t i = from;
        for (; i + 4 * L <= end; i += 4 * L)
            RAREFY_UNROLL for (int t = 0; t < 4; ++t) part[t] = f(i + t * L, low_lanes(L), part[t]);
        for (; i < end; i += L) part[0] = f(i, low_lanes(end - i < L ? end - i : L), part[0]);
        sum = add(sum, add(add(part[0], part[1]), add(part[2], part[3])));
    }
    return total(sum);
}

float sum(const float *x, int64_t n) {
    return sum_of(n, [=](int64_t i, uint32_t lanes, V sum) { return add(sum, load_some(x + i, lanes)); });
}

// The sum of x - mean.
float deviations(const float *x, float mean, int64_t n) {
    const V middle = all(mean);
    return sum_of(n, [=](int64_t i, uint32_t lanes, V sum) {
        return add(sum, blend(lanes, sub(load_some(x + i, lanes), middle), all(0.0f)));
    });
}

float squares(const float *x, float mean, int64_t n) {
    const V middle = all(mean);
    return sum_of(n, [=](int64_t i, uint32_t lanes, V sum) {
        const V d = lanes == low_lanes(L) ? sub(loadu(x + i), middle)
                                          : blend(lanes, sub(load_some(x + i, lanes), middle), all(0.0f));
        return fma(d, d, sum);
    });
}

// One pixel whose channels lie one after another.
void norm_vector(const NormCall &call) {
    const int64_t n = call.channels;
    const float one_each = 1.0f / static_cast<float>(n);
    float mean = call.centred ? sum(call.x, n) * one_each : 0.0f;
    if (call.centred && n > LONG_SUM) mean += deviations(call.x, mean, n) * one_each;
    const V factor = div(all(1.0f), root(all(squares(call.x, mean, n) * one_each + call.eps))), middle = all(mean);
    over(n, [=](int64_t i, uint32_t lanes) {
        const V d = mul(sub(load_some(call.x + i, lanes), middle), factor);
        store_some(call.y + i, lanes, fma(d, load_some(call.scale + i, lanes), load_some(call.shift + i, lanes)));
    });
}

void norm(const NormCall *call) {
    const float *x = call->x;
    float *y = call->y;
    if (call->pixels == 1 && call->x_stride == 1 && call->y_stride == 1) return norm_vector(*call);
    int64_t p = 0;
    for (; p + 4 * L <= call->pixels; p += 4 * L)
        norm_pixels<4>(
            *call, [=](int64_t c, int t) { return loadu(x + c * call->x_stride + p + t * L); },
            [=](int64_t c, int t, V v) { storeu(y + c * call->y_stride + p + t * L, v); });
    const int64_t rest = call->pixels - p, vectors = (rest + L - 1) / L;
    if (rest == 0) return;
    const Mask some = mask_of(low_lanes(rest - (vectors - 1) * L));
    switch (vectors) {
        case 1: return norm_rest<1>(*call, x + p, y + p, some);
        case 2: return norm_rest<2>(*call, x + p, y + p, some);
        case 3: return norm_rest<3>(*call, x + p, y + p, some);
        default: return norm_rest<4>(*call, x + p, y + p, some);
    }
}

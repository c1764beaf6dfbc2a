// Functions of numbers one by one: sums and products, affine maps, activations. Included by engine_kernels.cpp, after
// modes-inl.h.
#pragma once

// ---- elementwise

template <class F>
inline void over(int64_t n, const F &f) {
    int64_t i = 0;
    for (; i + L <= n; i += L) f(i, low_lanes(L));
    if (i < n) f(i, low_lanes(n - i));
}

void add_rows(const float *x, const float *y, float *out, int64_t n, float low, float high) {
    const V lo = all(low), hi = all(high);
    over(n, [=](int64_t i, uint32_t lanes) {
        store_some(out + i, lanes, smaller(hi, larger(lo, add(load_some(x + i, lanes), load_some(y + i, lanes)))));
    });
}

void multiply_rows(const float *x, const float *y, float *out, int64_t n, float low, float high) {
    const V lo = all(low), hi = all(high);
    over(n, [=](int64_t i, uint32_t lanes) {
        store_some(out + i, lanes, smaller(hi, larger(lo, mul(load_some(x + i, lanes), load_some(y + i, lanes)))));
    });
}

void affine(const float *x, float scale, float shift, float *out, int64_t n, float low, float high) {
    const V lo = all(low), hi = all(high), a = all(scale), b = all(shift);
    over(n, [=](int64_t i, uint32_t lanes) {
        store_some(out + i, lanes, smaller(hi, larger(lo, fma(a, load_some(x + i, lanes), b))));
    });
}

void affine_each(const float *x, const float *scale, const float *shift, float *out, int64_t n, float low, float high) {
    const V lo = all(low), hi = all(high);
    over(n, [=](int64_t i, uint32_t lanes) {
        const V y = fma(load_some(scale + i, lanes), load_some(x + i, lanes), load_some(shift + i, lanes));
        store_some(out + i, lanes, smaller(hi, larger(lo, y)));
    });
}

// ---- activations

template <class F>
inline void map(const float *x, float *out, int64_t n, const F &f) {
    over(n, [=](int64_t i, uint32_t lanes) { store_some(out + i, lanes, f(load_some(x + i, lanes))); });
}

template <class M>
void activate_by(const M &by, int32_t activation, const float *x, float *out, int64_t n) {
    switch (activation) {
        case RAREFY_SILU: return map(x, out, n, [&](V v) { return by.silu_of(v); });
        case RAREFY_GELU: return map(x, out, n, [&](V v) { return by.gelu_of(v); });
        case RAREFY_GELU_TANH: return map(x, out, n, [&](V v) { return by.gelu_tanh_of(v); });
        case RAREFY_TANH: return map(x, out, n, [&](V v) { return by.tanh_of(v); });
        default: return map(x, out, n, [&](V v) { return by.sigmoid_of(v); });
    }
}

void activate(int32_t activation, const Mode &mode, const float *x, float *out, int64_t n) {
    switch (activation) {
        case RAREFY_SILU:
        case RAREFY_GELU:
        case RAREFY_GELU_TANH:
        case RAREFY_TANH:
        case RAREFY_SIGMOID: return with_mode(mode, [&](const auto &by) { activate_by(by, activation, x, out, n); });
        case RAREFY_HARDSWISH: return map(x, out, n, [](V v) { return hardswish(v); });
        case RAREFY_HARDSIGMOID: return map(x, out, n, [](V v) { return hardsigmoid(v); });
        case RAREFY_LEAKY_RELU: return map(x, out, n, [](V v) { return leaky_relu(v); });
        default: return map(x, out, n, [](V v) { return v; });
    }
}

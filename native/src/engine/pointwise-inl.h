// Steps of expressions over rows, and the gates of recurrent cells. Included by engine_kernels.cpp, after
// elementwise-inl.h.
#pragma once

// ---- expressions

template <bool STEP>
inline V term(const float *x, int64_t i, uint32_t lanes) {
    if constexpr (STEP) return load_some(x + i, lanes);
    else return all(*x);
}

template <bool A, class F>
void rows_of_one(const PointwiseCall &c, const F &f) {
    for (int64_t row = 0; row < c.rows; ++row) {
        const float *x = c.x[0] + row * c.x_row[0];
        float *y = c.y + row * c.y_row;
        over(c.n, [=](int64_t i, uint32_t lanes) { store_some(y + i, lanes, f(term<A>(x, i, lanes))); });
    }
}

template <bool A, bool B, class F>
void rows_of_two(const PointwiseCall &c, const F &f) {
    for (int64_t row = 0; row < c.rows; ++row) {
        const float *x0 = c.x[0] + row * c.x_row[0], *x1 = c.x[1] + row * c.x_row[1];
        float *y = c.y + row * c.y_row;
        over(c.n, [=](int64_t i, uint32_t lanes) {
            store_some(y + i, lanes, f(term<A>(x0, i, lanes), term<B>(x1, i, lanes)));
        });
    }
}

template <class F>
inline void each_of_one(const PointwiseCall &c, const F &f) {
    c.step[0] ? rows_of_one<true>(c, f) : rows_of_one<false>(c, f);
}

template <class F>
inline void each_of_two(const PointwiseCall &c, const F &f) {
    if (c.step[0]) c.step[1] ? rows_of_two<true, true>(c, f) : rows_of_two<true, false>(c, f);
    else c.step[1] ? rows_of_two<false, true>(c, f) : rows_of_two<false, false>(c, f);
}

void pointwise(const PointwiseCall *call) {
    const PointwiseCall &c = *call;
    switch (c.operation) {
        case RAREFY_OP_ADD: return each_of_two(c, [](V x, V y) { return add(x, y); });
        case RAREFY_OP_SUB: return each_of_two(c, [](V x, V y) { return sub(x, y); });
        case RAREFY_OP_MUL: return each_of_two(c, [](V x, V y) { return mul(x, y); });
        case RAREFY_OP_DIV: return each_of_two(c, [](V x, V y) { return div(x, y); });
        case RAREFY_OP_MIN: return each_of_two(c, [](V x, V y) { return negative(maximum(negative(x), negative(y))); });
        case RAREFY_OP_MAX: return each_of_two(c, [](V x, V y) { return maximum(x, y); });
        case RAREFY_OP_LEAKY: return each_of_two(c, [](V x, V y) { return where_less(x, all(0.0f), mul(x, y), x); });
        case RAREFY_OP_ELU: return each_of_two(c, [](V x, V y) { return elu(x, y); });
        case RAREFY_OP_NEG: return each_of_one(c, [](V x) { return negative(x); });
        case RAREFY_OP_ABS: return each_of_one(c, [](V x) { return absolute(x); });
        case RAREFY_OP_SQRT: return each_of_one(c, [](V x) { return root(x); });
        case RAREFY_OP_RSQRT: return each_of_one(c, [](V x) { return div(all(1.0f), root(x)); });
        case RAREFY_OP_EXP: return each_of_one(c, [](V x) { return exponential(x); });
        case RAREFY_OP_LOG: return each_of_one(c, [](V x) { return logarithm(x); });
        case RAREFY_OP_SOFTPLUS: return each_of_one(c, [](V x) { return softplus(x); });
        case RAREFY_OP_MISH: return each_of_one(c, [](V x) { return mul(x, tanh(softplus(x))); });
        case RAREFY_OP_ACTIVATION + RAREFY_RELU: return each_of_one(c, [](V x) { return larger(all(0.0f), x); });
        case RAREFY_OP_ACTIVATION + RAREFY_RELU6:
            return each_of_one(c, [](V x) { return smaller(all(6.0f), larger(all(0.0f), x)); });
        default: break;
    }
    // one number a row is as many as there are: a span of them
    alignas(64) float some[64];
    for (int64_t row = 0; row < c.rows; ++row) {
        const float *x = c.x[0] + row * c.x_row[0];
        float *y = c.y + row * c.y_row;
        const int32_t activation = c.operation - RAREFY_OP_ACTIVATION;
        if (c.step[0]) {
            activate(activation, {}, x, y, c.n);
            continue;
        }
        activate(activation, {}, x, some, 1);
        for (int64_t i = 0; i < c.n; ++i) y[i] = some[0];
    }
}

// ---- gates

// Products and sums are rounded one after another, as PyTorch's operators do it: a table has steps.

void lstm_cell(const Mode &mode, const float *i, const float *f, const float *g, const float *c, float *out,
               int64_t n) {
    with_mode(mode, [&](const auto &by) {
        over(n, [&](int64_t k, uint32_t lanes) {
            const auto at = [=](const float *p) { return load_some(p + k, lanes); };
            const V kept = mul(by.sigmoid_of(at(f)), at(c)), taken = mul(by.sigmoid_of(at(i)), by.tanh_of(at(g)));
            store_some(out + k, lanes, add(kept, taken));
        });
    });
}

void lstm_hidden(const Mode &mode, const float *o, const float *c, float *out, int64_t n) {
    with_mode(mode, [&](const auto &by) {
        over(n, [&](int64_t k, uint32_t lanes) {
            const V gate = by.sigmoid_of(load_some(o + k, lanes)), value = by.tanh_of(load_some(c + k, lanes));
            store_some(out + k, lanes, mul(gate, value));
        });
    });
}

void gru(const Mode &mode, const float *const x[3], const float *const h[3], const float *state, float *out,
         int64_t n) {
    with_mode(mode, [&](const auto &by) {
        over(n, [&](int64_t k, uint32_t lanes) {
            const auto at = [=](const float *p) { return load_some(p + k, lanes); };
            const V r = by.sigmoid_of(add(at(x[0]), at(h[0]))), z = by.sigmoid_of(add(at(x[1]), at(h[1])));
            const V fresh = by.tanh_of(add(at(x[2]), mul(r, at(h[2]))));
            store_some(out + k, lanes, add(mul(sub(at(state), fresh), z), fresh));
        });
    });
}

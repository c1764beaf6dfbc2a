// The scores of additive attention. Included by engine_kernels.cpp, after modes-inl.h.
#pragma once

// scores[b][t] = sum over h of vector[h] tanh(keys[b][t][h] + queries[b][h])
struct Additive {
    const float *keys, *queries, *vector;
    float *scores;
    int64_t tokens, width;
    Mode mode;
};

// Of N tokens at once: a tanh alone would wait for itself.
template <int N, class M>
inline void additive_tokens(const Additive &a, const M &by, int64_t row, int64_t token) {
    const float *keys = a.keys + (row * a.tokens + token) * a.width, *query = a.queries + row * a.width;
    V sum[N];
    RAREFY_UNROLL for (int t = 0; t < N; ++t) sum[t] = all(0.0f);
    const auto add_span = [&](int64_t i, const auto &at) {
        const V q = at(query + i), v = at(a.vector + i);
        RAREFY_UNROLL for (int t = 0; t < N; ++t) sum[t] =
            fma(v, by.tanh_of(add(at(keys + t * a.width + i), q)), sum[t]);
    };
    int64_t i = 0;
    for (; i + L <= a.width; i += L) add_span(i, [](const float *p) { return loadu(p); });
    if (i < a.width) add_span(i, [&](const float *p) { return load_some(p, low_lanes(a.width - i)); });
    RAREFY_UNROLL for (int t = 0; t < N; ++t) a.scores[row * a.tokens + token + t] = total(sum[t]);
}

void additive_row(void *context, int64_t row) {
    const Additive &a = *static_cast<const Additive *>(context);
    with_mode(a.mode, [&](const auto &by) {
        int64_t token = 0;
        for (; token + 4 <= a.tokens; token += 4) additive_tokens<4>(a, by, row, token);
        for (; token < a.tokens; ++token) additive_tokens<1>(a, by, row, token);
    });
}

void additive_scores(const float *keys, const float *queries, const float *vector, float *scores, int64_t rows,
                     int64_t tokens, int64_t width, int32_t mode, const rarefy_shift32 *table, int32_t threads) {
    Additive call{keys, queries, vector, scores, tokens, width, {mode, table}};
    constexpr int64_t SERIAL = 1 << 16;  // numbers up to which one thread is enough: not measured apart
    parallel_for(rows * tokens * width < SERIAL ? 1 : threads, rows, additive_row, &call);
}

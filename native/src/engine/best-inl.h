// The largest numbers of rows, and what log-softmax takes off them: what a search needs of logits.
// Included by engine_kernels.cpp, after activations-inl.h.
#pragma once

struct Best {
    const float *x;
    int64_t width, count;
    float *values;    // rows * count, falling
    int64_t *places;  // in the row; of equal numbers the first ones
    float *totals;    // rows: the logarithm of the sum of e^(x - the largest)
};

// e^(x - most) of n numbers, added up; most is the largest.
inline float sum_below(const float *x, int64_t n, float most) {
    const V top = all(most);
    const auto term = [=](V v) { return scaled(power(smaller(all(104.0f), sub(top, v)), all(-1.0f))); };
    return sum_of(n, [=](int64_t i, uint32_t lanes, V sum) {
        const V e = lanes == low_lanes(L) ? term(loadu(x + i)) : blend(lanes, term(load_some(x + i, lanes)), all(0.0f));
        return add(sum, mul(e, all(1.0f / SCALE)));
    });
}

void best_row(void *context, int64_t row) {
    const Best &b = *static_cast<const Best *>(context);
    const float *x = b.x + row * b.width;
    float *values = b.values + row * b.count;
    int64_t *places = b.places + row * b.count;
    for (int64_t k = 0; k < b.count; ++k) values[k] = -__builtin_inff(), places[k] = 0;
    const auto insert = [&](float value, int64_t place) {
        int64_t k = b.count - 1;
        for (; k > 0 && values[k - 1] < value; --k) values[k] = values[k - 1], places[k] = places[k - 1];
        values[k] = value, places[k] = place;
    };
    // most spans hold nothing that is large enough: one comparison for each
    constexpr int64_t SPAN = 8 * L;
    for (int64_t from = 0; from < b.width; from += SPAN) {
        const int64_t end = b.width - from < SPAN ? b.width : from + SPAN;
        if (end - from == SPAN) {
            V most = loadu(x + from);
            RAREFY_UNROLL for (int i = 1; i < 8; ++i) most = larger(loadu(x + from + i * L), most);
            alignas(64) float lane[L];
            store(lane, most);
            bool any = false;
            for (int i = 0; i < L; ++i) any |= lane[i] > values[b.count - 1];
            if (!any) continue;
        }
        for (int64_t i = from; i < end; ++i)
            if (x[i] > values[b.count - 1]) insert(x[i], i);
    }
    alignas(64) float sum[L] = {};
    sum[0] = sum_below(x, b.width, values[0]);
    store(sum, logarithm(load(sum)));
    b.totals[row] = sum[0];
}

// values and places: rows * count; totals: rows. count is from 1 to width.
void best_of_rows(const float *x, int64_t rows, int64_t width, int64_t count, float *values, int64_t *places,
                  float *totals, int32_t threads) {
    Best call{x, width, count, values, places, totals};
    constexpr int64_t SERIAL = 1 << 16;  // numbers up to which one thread is enough: not measured apart
    parallel_for(rows * width < SERIAL ? 1 : threads, rows, best_row, &call);
}

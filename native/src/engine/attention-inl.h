// Products of two values, softmax and attention, in blocks of T vectors: T * L columns of a product, or queries, side
// by side. Included by engine_kernels.cpp.
#pragma once

template <int N>
struct Number {
    static constexpr int value = N;
};

// Lanes of T vectors that are there.
template <int T>
struct Lanes {
    int64_t count;
    Mask mask[T];
    explicit Lanes(int64_t n) : count(n) {
        RAREFY_UNROLL for (int t = 0; t < T; ++t) {
            const int64_t left = n - t * L;
            mask[t] = mask_of(low_lanes(left < 0 ? 0 : left < L ? left : L));
        }
    }
    // Vector t of numbers that lie `step` apart; 0 in lanes that are not there.
    V at(const float *x, int64_t step, int t) const {
        if (step == 1) return load_masked(x + t * L, mask[t]);
        if (step == 0) return all(*x);
        alignas(64) float lane[L] = {};
        for (int64_t i = 0, first = t * L; i < L && first + i < count; ++i) lane[i] = x[(first + i) * step];
        return load(lane);
    }
    void put(float *y, int64_t step, int t, V v) const {
        if (step == 1) return store_masked(y + t * L, mask[t], v);
        alignas(64) float lane[L];
        store(lane, v);
        for (int64_t i = 0, first = t * L; i < L && first + i < count; ++i) y[(first + i) * step] = lane[i];
    }
};

// Rows of T vectors, from numbers that lie apart, times a factor; and back.
template <int T>
inline void gather_rows(float *to, const float *from, const int64_t (&step)[2], int64_t rows, const Lanes<T> &lanes,
                        float factor) {
    const V times = all(factor);
    for (int64_t r = 0; r < rows; ++r, to += T * L)
        RAREFY_UNROLL for (int t = 0; t < T; ++t)
            store(to + t * L, mul(lanes.at(from + r * step[1], step[0], t), times));
}

template <int T>
inline void scatter_rows(float *to, const float *from, const int64_t (&step)[2], int64_t rows, const Lanes<T> &lanes,
                         const V (&times)[T]) {
    for (int64_t r = 0; r < rows; ++r, from += T * L)
        RAREFY_UNROLL for (int t = 0; t < T; ++t)
            lanes.put(to + r * step[1], step[0], t, mul(load(from + t * L), times[t]));
}

// y[r] = sum_k a[r row + k step] b[k], or that added to y[r]; b and y are rows of T vectors.
template <int R, int T>
inline void product_rows(const float *a, int64_t row, int64_t step, int64_t count, const float *b, float *y,
                         bool more) {
    V s[R][T];
    RAREFY_UNROLL for (int r = 0; r < R; ++r) RAREFY_UNROLL for (int t = 0; t < T; ++t) s[r][t] =
        more ? load(y + (r * T + t) * L) : all(0.0f);
    for (int64_t k = 0; k < count; ++k, a += step, b += T * L) {
        V x[T];
        RAREFY_UNROLL for (int t = 0; t < T; ++t) x[t] = load(b + t * L);
        RAREFY_UNROLL for (int r = 0; r < R; ++r) {
            const V weight = all(a[r * row]);
            RAREFY_UNROLL for (int t = 0; t < T; ++t) s[r][t] = fma(weight, x[t], s[r][t]);
        }
    }
    RAREFY_UNROLL for (int r = 0; r < R; ++r) RAREFY_UNROLL for (int t = 0; t < T; ++t)
        store(y + (r * T + t) * L, s[r][t]);
}

template <int T>
void product(const float *a, int64_t row, int64_t step, int64_t rows, int64_t count, const float *b, float *y,
             bool more) {
    constexpr int R = ACCUMULATORS >= 8 * T ? 8 : ACCUMULATORS >= 6 * T ? 6 : 4;
    int64_t r = 0;
    const auto some = [&](auto n) {
        constexpr int N = decltype(n)::value;
        for (; r + N <= rows; r += N) product_rows<N, T>(a + r * row, row, step, count, b, y + r * (T * L), more);
    };
    some(Number<R>());
    some(Number<4>());
    some(Number<1>());
}

// The largest of the rows and these.
template <int T>
inline void largest_of(const float *x, int64_t rows, V (&largest)[T]) {
    for (int64_t r = 0; r < rows; ++r, x += T * L)
        RAREFY_UNROLL for (int t = 0; t < T; ++t) largest[t] = larger(largest[t], load(x + t * L));
}

// e^(x - largest) in the place of x, added up in sum. What is below the smallest normal number is 0.
template <int T>
inline void exponentials(float *x, int64_t rows, const V (&largest)[T], V (&sum)[T]) {
    V part[T];
    RAREFY_UNROLL for (int t = 0; t < T; ++t) part[t] = all(0.0f);
    for (int64_t r = 0; r < rows; ++r, x += T * L) RAREFY_UNROLL for (int t = 0; t < T; ++t) {
            const V less = sub(load(x + t * L), largest[t]);
            const V e = where_less(less, all(-87.0f), all(0.0f), scaled(power(less, all(1.0f), 0)));
            store(x + t * L, e);
            part[t] = add(part[t], e);
        }
    RAREFY_UNROLL for (int t = 0; t < T; ++t) sum[t] = add(sum[t], part[t]);
}

constexpr float INFINITE = __builtin_inff();
// Rows that are dealt with at a time: with three vectors each, less than a near cache.
constexpr int64_t NEAR_ROWS = 64 * 16 / L;

// Adds the mask to scores, a row a key from `key` on: minus infinity for those after a query where it is causal.
template <int T>
inline void add_mask(const AttendCall &c, float *scores, int64_t key, int64_t rows, const Lanes<T> &lanes) {
    V query[T];
    alignas(64) float number[T * L];
    for (int64_t i = 0; i < T * L; ++i) number[i] = static_cast<float>(c.first + i);
    RAREFY_UNROLL for (int t = 0; t < T; ++t) query[t] = load(number + t * L);
    for (int64_t r = 0; r < rows; ++r, scores += T * L) RAREFY_UNROLL for (int t = 0; t < T; ++t) {
            V s = load(scores + t * L);
            if (c.mask) s = add(s, lanes.at(c.mask + (key + r) * c.mask_step[1], c.mask_step[0], t));
            if (c.causal) s = where_less(query[t], all(static_cast<float>(key + r)), all(-INFINITE), s);
            store(scores + t * L, s);
        }
}

template <int T>
void attend_vectors(const AttendCall &c) {
    const Lanes<T> lanes(c.queries);
    const int64_t keys = c.causal && c.first + c.queries < c.keys ? c.first + c.queries : c.keys;
    float *query = c.scratch, *scores = query + c.features * (T * L), *sums = scores + keys * (T * L);
    gather_rows<T>(query, c.q, c.q_step, c.features, lanes, c.scale);
    V largest[T], sum[T];
    RAREFY_UNROLL for (int t = 0; t < T; ++t) largest[t] = all(-INFINITE), sum[t] = all(0.0f);
    const auto over_keys = [&](const auto &some) {
        for (int64_t key = 0; key < keys; key += NEAR_ROWS)
            some(key, keys - key < NEAR_ROWS ? keys - key : NEAR_ROWS, scores + key * (T * L));
    };
    over_keys([&](int64_t key, int64_t n, float *at) {
        product<T>(c.k + key * c.k_step[0], c.k_step[0], c.k_step[1], n, c.features, query, at, false);
        if (c.mask || (c.causal && key + n > c.first)) add_mask<T>(c, at, key, n, lanes);
        largest_of<T>(at, n, largest);
    });
    // of a query that sees no key, minus infinity less itself would be NaN
    if (c.empty_is_zero)
        RAREFY_UNROLL for (int t = 0; t < T; ++t) largest[t] =
            where_less(largest[t], all(-3.40282347e38f), all(0.0f), largest[t]);
    over_keys([&](int64_t key, int64_t n, float *at) {
        exponentials<T>(at, n, largest, sum);
        product<T>(c.v + key * c.v_step[0], c.v_step[1], c.v_step[0], c.results, n, at, sums, key > 0);
    });
    V times[T];  // a sum is at least 1, or 0 where no key is seen
    RAREFY_UNROLL for (int t = 0; t < T; ++t) times[t] =
        where_less(sum[t], all(0.5f), all(0.0f), div(all(1.0f), sum[t]));
    scatter_rows<T>(c.y, sums, c.y_step, c.results, lanes, times);
}

template <int T>
void matmul_vectors(const MatmulCall &c) {
    const Lanes<T> lanes(c.columns);
    float *b = c.scratch, *sums = b + c.count * (T * L);
    gather_rows<T>(b, c.b, c.b_step, c.count, lanes, 1.0f);
    product<T>(c.a, c.a_step[0], c.a_step[1], c.rows, c.count, b, sums, false);
    V times[T];
    RAREFY_UNROLL for (int t = 0; t < T; ++t) times[t] = all(c.scale);
    scatter_rows<T>(c.y, sums, c.y_step, c.rows, lanes, times);
}

template <int T>
void softmax_vectors(const SoftmaxCall &c) {
    const Lanes<T> lanes(c.columns);
    gather_rows<T>(c.scratch, c.x, c.x_step, c.count, lanes, 1.0f);
    V largest[T], sum[T];
    RAREFY_UNROLL for (int t = 0; t < T; ++t) largest[t] = all(-INFINITE), sum[t] = all(0.0f);
    largest_of<T>(c.scratch, c.count, largest);
    for (int64_t row = 0; row < c.count; row += NEAR_ROWS)
        exponentials<T>(c.scratch + row * (T * L), c.count - row < NEAR_ROWS ? c.count - row : NEAR_ROWS, largest, sum);
    RAREFY_UNROLL for (int t = 0; t < T; ++t) sum[t] = div(all(1.0f), sum[t]);
    scatter_rows<T>(c.y, c.scratch, c.y_step, c.count, lanes, sum);
}

void attend(const AttendCall *c) {
    if (c->queries > 2 * L) return attend_vectors<3>(*c);
    if (c->queries > L) return attend_vectors<2>(*c);
    attend_vectors<1>(*c);
}

void matmul(const MatmulCall *c) {
    if (c->columns > 2 * L) return matmul_vectors<3>(*c);
    if (c->columns > L) return matmul_vectors<2>(*c);
    matmul_vectors<1>(*c);
}

void softmax(const SoftmaxCall *c) {
    if (c->columns > 2 * L) return softmax_vectors<3>(*c);
    if (c->columns > L) return softmax_vectors<2>(*c);
    softmax_vectors<1>(*c);
}

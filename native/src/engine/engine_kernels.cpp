// The engine's kernels, built once for each instruction set. See kernels.h for what they compute.
#include "engine/kernels.h"

#include <stddef.h>

#include "isa.h"
#include "parallel.h"
#include "rarefy_engine.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace rarefy {
namespace RAREFY_ISA {
namespace {

using namespace engine;

#include "vec-inl.h"

#include "activations-inl.h"

#define RAREFY_UNROLL _Pragma("GCC unroll 32")

#include "depthwise-inl.h"

// ---- packing

// out[c * out_stride] = f(plane of channel c), for every channel.
template <class F>
inline void over_channels(const float *x, int64_t x_stride, int64_t channels, float *out, int64_t out_stride,
                          const F &f) {
    for (int64_t c = 0; c < channels; ++c) store(out + c * out_stride, f(x + c * x_stride));
}

void pack_vector(const float *x, int64_t x_stride, int64_t channels, float *out, int64_t out_stride, const Pack &op,
                 const int32_t *tables, int64_t ahead, V padding) {
    const auto each = [&](auto f) { over_channels(x + op.a, x_stride, channels, out, out_stride, f); };
    const uint32_t lanes = op.lanes;
    switch (op.kind) {
        case PACK_FULL:
            return each([=](const float *p) {
                __builtin_prefetch(p + ahead);
                return loadu(p);
            });
        case PACK_COPY: return each([=](const float *p) { return blend(lanes, load_some(p, lanes), padding); });
#ifdef __AVX512F__
        case PACK_ONE: {
            const __m512i index = _mm512_loadu_si512(tables + op.table);
            const uint32_t load_a = op.load_a;
            return each([=](const float *p) {
                return blend(lanes, _mm512_permutexvar_ps(index, load_some(p, load_a)), padding);
            });
        }
        case PACK_TWO: {
            const __m512i index = _mm512_loadu_si512(tables + op.table);
            const int64_t between = op.b - op.a;
            const uint32_t load_a = op.load_a, load_b = op.load_b;
            return each([=](const float *p) {
                return blend(lanes, _mm512_permutex2var_ps(load_some(p, load_a), index, load_some(p + between, load_b)),
                             padding);
            });
        }
#endif
        case PACK_HALF: {
            if (lanes == (1u << L) - 1) return each([](const float *p) { return halves(loadu(p), loadu(p + L - 1)); });
            const Mask load_a = mask_of(op.load_a), load_b = mask_of(op.load_b);
            return each([=](const float *p) {
                return blend(lanes, halves(load_masked(p, load_a), load_masked(p + L - 1, load_b)), padding);
            });
        }
        case PACK_PADDING: return each([=](const float *) { return padding; });
        default: {
            const int32_t *index = tables + op.table;
            return each([=](const float *p) {
                alignas(64) float lane[L];
                store(lane, padding);
                for (int i = 0; i < L; ++i)
                    if (lanes >> i & 1) lane[i] = p[index[i]];
                return load(lane);
            });
        }
    }
}

void pack(const float *x, int64_t x_stride, int64_t channels, float *out, int64_t out_stride, const Pack *ops,
          int64_t count, const int32_t *tables, int64_t ahead) {
    // a few channels at a time: what to do is decided once for all of them, and their pages and lines stay at hand
    // (how many was not measured apart)
    constexpr int64_t SOME = 8;
    const V zero = all(0.0f);
    for (int64_t c = 0; c < channels; c += SOME) {
        const int64_t n = channels - c < SOME ? channels - c : SOME;
        for (int64_t i = 0; i < count; ++i)
            pack_vector(x + c * x_stride, x_stride, n, out + c * out_stride + i * L, out_stride, ops[i], tables, ahead,
                        zero);
    }
}

// ---- blocks

// The lanes that are pixels, moved to the front; and back.
#ifdef __AVX512F__
inline V compress(V v, const Store &s) { return _mm512_maskz_compress_ps(s.lanes, v); }
inline V expand(V v, const Store &s) { return _mm512_maskz_expand_ps(s.lanes, v); }
#else
__attribute__((noinline)) V compress(V v, const Store &s) {
    alignas(64) float from[L], to[L] = {};
    store(from, v);
    for (int i = 0, n = 0; i < L; ++i)
        if (s.lanes >> i & 1) to[n++] = from[i];
    return load(to);
}
__attribute__((noinline)) V expand(V v, const Store &s) {
    alignas(64) float from[L], to[L] = {};
    store(from, v);
    for (int i = 0, n = 0; i < L; ++i)
        if (s.lanes >> i & 1) to[i] = from[n++];
    return load(to);
}
#endif

// What is kept of a row between its groups.
template <int T>
inline float *kept(const BlockCall &call, float *sums, int32_t row) {
    return row < 0 ? call.discard : sums + static_cast<int64_t>(row) * (T * L);
}

template <int R, int T>
inline __attribute__((always_inline)) void begin(const BlockCall &call, const Group &group, const int32_t *rows,
                                                 V (&a)[R][T]) {
    RAREFY_UNROLL for (int r = 0; r < R; ++r) {
        if (group.flags & (GROUP_FIRST | GROUP_FRESH)) {
            const V start = all(group.flags & GROUP_FRESH || rows[r] < 0 ? 0.0f : call.bias[rows[r]]);
            RAREFY_UNROLL for (int t = 0; t < T; ++t) a[r][t] = start;
        } else {
            const float *sums = kept<T>(call, call.sums, rows[r]);
            RAREFY_UNROLL for (int t = 0; t < T; ++t) a[r][t] = load(sums + t * L);
        }
    }
}

// The end of one row of a tile that is not plain: residual, clamp, store.
template <int T, bool PREFIX>
inline __attribute__((always_inline)) void finish_vectors(const BlockCall &call, float *to, const float *from,
                                                          const float *sums) {
    const V low = all(call.low), high = all(call.high);
    const Store *stores = call.stores;
    RAREFY_UNROLL for (int t = 0; t < T; ++t) {
        const Store s = stores[t];
        V v = load(sums + t * L);
        if (from) {
            const V r = load_some(from + s.at, s.dense);
            v = add(v, PREFIX ? r : expand(r, s));
        }
        v = smaller(high, larger(low, v));
        store_some(to + s.at, s.dense, PREFIX ? v : compress(v, s));
    }
}

template <int T>
__attribute__((noinline)) void finish_row(const BlockCall &call, int32_t row, const float *sums) {
    float *to = call.y + row * call.y_stride;
    const float *from = call.residual ? call.residual + row * call.residual_stride : nullptr;
    if (call.shape == STORE_PREFIX) finish_vectors<T, true>(call, to, from, sums);
    else finish_vectors<T, false>(call, to, from, sums);
}

template <int R, int T>
inline __attribute__((always_inline)) void end(const BlockCall &call, const Group &group, const int32_t *rows,
                                               V (&a)[R][T]) {
    const bool last = group.flags & GROUP_LAST, plain = call.shape == STORE_PLAIN;
    if (group.flags & GROUP_ADDS) {
        RAREFY_UNROLL for (int r = 0; r < R; ++r) {
            const float *totals = kept<T>(call, call.totals, rows[r]);
            RAREFY_UNROLL for (int t = 0; t < T; ++t) a[r][t] = add(a[r][t], load(totals + t * L));
        }
    }
    if (!last || !plain) {
        float *const sums_or_totals = group.flags & GROUP_KEEPS ? call.totals : call.sums;
        RAREFY_UNROLL for (int r = 0; r < R; ++r) {
            float *sums = last ? call.discard : kept<T>(call, sums_or_totals, rows[r]);
            RAREFY_UNROLL for (int t = 0; t < T; ++t) store(sums + t * L, a[r][t]);
            if (last && rows[r] >= 0) finish_row<T>(call, rows[r], sums);
        }
        return;
    }
    const V low = all(call.low), high = all(call.high);
    float *const y = call.y;
    const float *const residual = call.residual;
    const int64_t y_stride = call.y_stride, residual_stride = call.residual_stride;
    RAREFY_UNROLL for (int r = 0; r < R; ++r) {
        if (rows[r] < 0) continue;
        float *to = y + rows[r] * y_stride;
        // planes are far apart: nothing else fetches what the next tile needs of them
        if (residual) {
            const float *from = residual + rows[r] * residual_stride;
            RAREFY_UNROLL for (int t = 0; t < T; ++t) a[r][t] = add(a[r][t], loadu(from + t * L));
            RAREFY_UNROLL for (int t = 0; t < T; ++t) __builtin_prefetch(from + (T + t) * L);
        } else {
            RAREFY_UNROLL for (int t = 0; t < T; ++t) __builtin_prefetch(to + (T + t) * L, 1);
        }
        RAREFY_UNROLL for (int t = 0; t < T; ++t) storeu(to + t * L, smaller(high, larger(low, a[r][t])));
    }
}

// Where the pixels of a weight are.
struct PackedPixels {
    const float *packed;
    explicit PackedPixels(const BlockCall &call) : packed(call.packed) {}
    const float *operator[](uint32_t offset) const { return packed + offset; }
};
struct DirectPixels {
    const float *const *planes;
    explicit DirectPixels(const BlockCall &call) : planes(call.planes) {}
    const float *operator[](uint32_t plane) const { return planes[plane]; }
};

// a[r] += w[r,k] x[off[r,k]]: one weight for every row, each with pixels of its own.
template <int R, int T, class Pixels>
void sparse_f32(const BlockCall *call) {
    const Pixels pixels(*call);
    const int32_t *rows = call->rows;
    for (const Group *group = call->groups, *last = group + call->count; group != last; ++group, rows += R) {
        V a[R][T];
        begin<R, T>(*call, *group, rows, a);
        const float *w = static_cast<const float *>(call->weights) + group->weight;
        const uint16_t *offset = call->offsets + group->offset;
        for (const float *stop = w + static_cast<int64_t>(group->length) * R; w != stop; w += R, offset += R) {
            RAREFY_UNROLL for (int r = 0; r < R; ++r) {
                const V weight = all(w[r]);
                const float *x = pixels[offset[r]];
                RAREFY_UNROLL for (int t = 0; t < T; ++t) a[r][t] = fma(weight, loadu(x + t * L), a[r][t]);
            }
        }
        end<R, T>(*call, *group, rows, a);
    }
}

// The same with a bf16 weight and its offset in one word.
template <int R, int T, class Pixels>
void sparse_bf16(const BlockCall *call) {
    const Pixels pixels(*call);
    const int32_t *rows = call->rows;
    for (const Group *group = call->groups, *last = group + call->count; group != last; ++group, rows += R) {
        V a[R][T];
        begin<R, T>(*call, *group, rows, a);
        const uint32_t *w = static_cast<const uint32_t *>(call->weights) + group->weight;
        for (const uint32_t *stop = w + static_cast<int64_t>(group->length) * R; w != stop; w += R) {
            RAREFY_UNROLL for (int r = 0; r < R; ++r) {
                const V weight = high_half(w + r);
                const float *x = pixels[w[r] & 0xFFFFu];
                RAREFY_UNROLL for (int t = 0; t < T; ++t) a[r][t] = fma(weight, loadu(x + t * L), a[r][t]);
            }
        }
        end<R, T>(*call, *group, rows, a);
    }
}

inline V widened(const float *w) { return all(*w); }
inline V widened(const uint16_t *w) { return all_bits(static_cast<uint32_t>(*w) << 16); }

// a[r] += w[r,k] x[off[k]]: the same pixels for all rows.
template <int R, int T, class W>
void dense(const BlockCall *call) {
    const float *packed = call->packed;
    const int32_t *rows = call->rows;
    for (const Group *group = call->groups, *last = group + call->count; group != last; ++group, rows += R) {
        V a[R][T];
        begin<R, T>(*call, *group, rows, a);
        const W *w = static_cast<const W *>(call->weights) + group->weight;
        const uint16_t *offset = call->offsets + group->offset;
        for (const uint16_t *stop = offset + group->length; offset != stop; ++offset, w += R) {
            const float *p = packed + *offset;
            V x[T];
            RAREFY_UNROLL for (int t = 0; t < T; ++t) x[t] = loadu(p + t * L);
            RAREFY_UNROLL for (int r = 0; r < R; ++r) {
                const V weight = widened(w + r);
                RAREFY_UNROLL for (int t = 0; t < T; ++t) a[r][t] = fma(weight, x[t], a[r][t]);
            }
        }
        end<R, T>(*call, *group, rows, a);
    }
}

// ---- windows

inline V strided(const float *p, int64_t stride) {
    if (stride == 1) return loadu(p);
    if (stride == 2) return halved<false>(loadu(p), loadu(p + L));
    alignas(64) float lane[L];
    for (int64_t i = 0; i < L; ++i) lane[i] = p[i * stride];
    return load(lane);
}

void window(const WindowCall *call) {
    const WindowCall &w = *call;
    // down the columns into the line, then along it
    for (int64_t i = 0; i < w.width; i += L) {
        const uint32_t lanes = w.width - i < L ? (1u << (w.width - i)) - 1 : (1u << L) - 1;
        V v = load_some(w.rows[0] + i, lanes);
        for (int64_t k = 1; k < w.row_count; ++k) {
            const V next = load_some(w.rows[k] + i, lanes);
            v = w.average ? add(v, next) : maximum(next, v);
        }
        store_some(w.line + i, lanes, v);
    }
    for (int64_t i = 0; i < w.out_width; i += L) {
        const float *from = w.line - w.left + i * w.stride;
        V v = strided(from, w.stride);
        for (int64_t k = 1; k < w.taps; ++k) {
            const V next = strided(from + k * w.dilation, w.stride);
            v = w.average ? add(v, next) : maximum(next, v);
        }
        if (w.average) v = mul(v, mul(all(w.row_scale), loadu(w.scale + i)));
        store_some(w.y + i, w.out_width - i < L ? (1u << (w.out_width - i)) - 1 : (1u << L) - 1, v);
    }
}

// ---- vectors

inline V weights_at(const float *w) { return loadu(w); }
inline V weights_at(const uint16_t *w) { return widen(w); }

template <class W>
void vector_rows(const VectorCall &c) {
    const W *w = static_cast<const W *>(c.weights);
    for (int32_t row = 0; row < c.rows; ++row) {
        const int64_t from = c.starts[row], to = c.starts[row + 1];
        V a = all(0.0f), b = all(0.0f);
        int64_t k = from;
        if (c.index) {
            for (; k + 2 * L <= to; k += 2 * L) {
                a = fma(weights_at(w + k), gather(c.x, c.index + k), a);
                b = fma(weights_at(w + k + L), gather(c.x, c.index + k + L), b);
            }
            if (k < to) a = fma(weights_at(w + k), gather(c.x, c.index + k), a);
        } else {
            const float *x = c.x - from;
            for (; k + 2 * L <= to; k += 2 * L) {
                a = fma(weights_at(w + k), loadu(x + k), a);
                b = fma(weights_at(w + k + L), loadu(x + k + L), b);
            }
            if (k < to) a = fma(weights_at(w + k), loadu(x + k), a);
        }
        float y = total(add(a, b)) + c.bias[row];
        if (c.residual) y += c.residual[row * c.residual_stride];
        y = y < c.low ? c.low : y;
        c.y[row * c.y_stride] = y > c.high ? c.high : y;
    }
}

void vector(const VectorCall *call, int32_t bf16) {
    if (bf16) vector_rows<uint16_t>(*call);
    else vector_rows<float>(*call);
}

// ---- elementwise

inline uint32_t low_lanes(int64_t n) { return (1u << n) - 1; }

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

float sum(const float *x, int64_t n) {
    // halves: the error of one sum grows with its terms
    constexpr int N = 4;
    if (n > 256 * L) {
        const int64_t half = n / (2 * N * L) * (N * L);
        return sum(x, half) + sum(x + half, n - half);
    }
    V a[N];
    RAREFY_UNROLL for (int k = 0; k < N; ++k) a[k] = all(0.0f);
    int64_t i = 0;
    for (; i + N * L <= n; i += N * L) RAREFY_UNROLL for (int k = 0; k < N; ++k) a[k] = add(a[k], loadu(x + i + k * L));
    for (; i < n; i += L) a[0] = add(a[0], load_some(x + i, low_lanes(n - i < L ? n - i : L)));
    return total(add(add(a[0], a[1]), add(a[2], a[3])));
}

// ---- activations

template <class F>
inline void map(const float *x, float *out, int64_t n, const F &f) {
    over(n, [=](int64_t i, uint32_t lanes) { store_some(out + i, lanes, f(load_some(x + i, lanes))); });
}

void activate(int32_t activation, const float *x, float *out, int64_t n) {
    switch (activation) {
        case RAREFY_SILU: return map(x, out, n, [](V v) { return silu(v); });
        case RAREFY_GELU: return map(x, out, n, [](V v) { return gelu(v); });
        case RAREFY_GELU_TANH: return map(x, out, n, [](V v) { return gelu_tanh(v); });
        case RAREFY_TANH: return map(x, out, n, [](V v) { return tanh(v); });
        case RAREFY_SIGMOID: return map(x, out, n, [](V v) { return sigmoid(v); });
        case RAREFY_HARDSWISH: return map(x, out, n, [](V v) { return hardswish(v); });
        case RAREFY_HARDSIGMOID: return map(x, out, n, [](V v) { return hardsigmoid(v); });
        case RAREFY_LEAKY_RELU: return map(x, out, n, [](V v) { return leaky_relu(v); });
        default: return map(x, out, n, [](V v) { return v; });
    }
}

// ---- gates

void lstm_cell(const float *i, const float *f, const float *g, const float *c, float *out, int64_t n) {
    over(n, [=](int64_t k, uint32_t lanes) {
        const auto at = [=](const float *p) { return load_some(p + k, lanes); };
        store_some(out + k, lanes, fma(sigmoid(at(f)), at(c), mul(sigmoid(at(i)), tanh(at(g)))));
    });
}

void lstm_hidden(const float *o, const float *c, float *out, int64_t n) {
    over(n, [=](int64_t k, uint32_t lanes) {
        store_some(out + k, lanes, mul(sigmoid(load_some(o + k, lanes)), tanh(load_some(c + k, lanes))));
    });
}

void gru(const float *const x[3], const float *const h[3], const float *state, float *out, int64_t n) {
    over(n, [=](int64_t k, uint32_t lanes) {
        const auto at = [=](const float *p) { return load_some(p + k, lanes); };
        const V r = sigmoid(add(at(x[0]), at(h[0]))), z = sigmoid(add(at(x[1]), at(h[1])));
        const V fresh = tanh(fma(r, at(h[2]), at(x[2])));
        store_some(out + k, lanes, fma(sub(at(state), fresh), z, fresh));
    });
}

// ---- additive attention

// scores[b][t] = sum over h of vector[h] tanh(keys[b][t][h] + queries[b][h])
struct Additive {
    const float *keys, *queries, *vector;
    float *scores;
    int64_t tokens, width;
};

// Of N tokens at once: a tanh alone would wait for itself.
template <int N>
inline void additive_tokens(const Additive &a, int64_t row, int64_t token) {
    const float *keys = a.keys + (row * a.tokens + token) * a.width, *query = a.queries + row * a.width;
    V sum[N];
    RAREFY_UNROLL for (int t = 0; t < N; ++t) sum[t] = all(0.0f);
    const auto add_span = [&](int64_t i, const auto &at) {
        const V q = at(query + i), v = at(a.vector + i);
        RAREFY_UNROLL for (int t = 0; t < N; ++t) sum[t] = fma(v, tanh(add(at(keys + t * a.width + i), q)), sum[t]);
    };
    int64_t i = 0;
    for (; i + L <= a.width; i += L) add_span(i, [](const float *p) { return loadu(p); });
    if (i < a.width) add_span(i, [&](const float *p) { return load_some(p, low_lanes(a.width - i)); });
    RAREFY_UNROLL for (int t = 0; t < N; ++t) a.scores[row * a.tokens + token + t] = total(sum[t]);
}

void additive_row(void *context, int64_t row) {
    const Additive &a = *static_cast<const Additive *>(context);
    int64_t token = 0;
    for (; token + 4 <= a.tokens; token += 4) additive_tokens<4>(a, row, token);
    for (; token < a.tokens; ++token) additive_tokens<1>(a, row, token);
}

void additive_scores(const float *keys, const float *queries, const float *vector, float *scores, int64_t rows,
                     int64_t tokens, int64_t width, int32_t threads) {
    Additive call{keys, queries, vector, scores, tokens, width};
    constexpr int64_t SERIAL = 1 << 16;  // numbers up to which one thread is enough: not measured apart
    parallel_for(rows * tokens * width < SERIAL ? 1 : threads, rows, additive_row, &call);
}

// ---- the table

template <int R, int T>
void fill(Kernels &k) {
    if constexpr (R * T <= ACCUMULATORS) {
        k.block[SPARSE_F32][R][T] = sparse_f32<R, T, PackedPixels>;
        k.block[SPARSE_BF16][R][T] = sparse_bf16<R, T, PackedPixels>;
        k.direct[SPARSE_F32][R][T] = sparse_f32<R, T, DirectPixels>;
        k.direct[SPARSE_BF16][R][T] = sparse_bf16<R, T, DirectPixels>;
        if constexpr (T * (R + 1) <= ACCUMULATORS + 2) {
            k.block[DENSE_F32][R][T] = dense<R, T, float>;
            k.block[DENSE_BF16][R][T] = dense<R, T, uint16_t>;
        }
    }
    if constexpr (T < MAX_VECTORS) fill<R, T + 1>(k);
}

Kernels make() {
    Kernels k = {};
    k.lanes = L;
#ifdef __AVX512F__
    k.permutes = 1;
#endif
    fill<1, 1>(k);
    fill<2, 1>(k);
    fill<3, 1>(k);
    fill<4, 1>(k);
    fill<6, 1>(k);
    fill<8, 1>(k);
    k.pack = pack;
    k.window = window;
    k.depthwise = depthwise;
    k.vector = vector;
    k.add = add_rows;
    k.multiply = multiply_rows;
    k.affine = affine;
    k.sum = sum;
    k.lstm_cell = lstm_cell;
    k.lstm_hidden = lstm_hidden;
    k.gru = gru;
    k.activate = activate;
    return k;
}

const Kernels *engine_functions() {
    static const Kernels kernels = make();
    return &kernels;
}

}  // namespace

extern const rarefy_kernel engine_kernels[] = {RAREFY_KERNEL("engine", engine_functions),
                                               RAREFY_KERNEL("additive_scores", additive_scores)};
extern const int64_t engine_kernel_count = sizeof engine_kernels / sizeof *engine_kernels;

}  // namespace RAREFY_ISA
}  // namespace rarefy

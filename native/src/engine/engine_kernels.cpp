// The engine's kernels, built once for each instruction set. See kernels.h for what they compute.
#include "engine/kernels.h"

#include <stddef.h>

#include "isa.h"
#include "parallel.h"
#include "rarefy_act.h"
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
#include "modes-inl.h"

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

inline uint32_t low_lanes(int64_t n) { return (1u << n) - 1; }

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

// ---- norms

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

// ---- attention

template <int N>
struct Number {
    static constexpr int value = N;
};

#include "attention-inl.h"

// ---- images of another size

void spread(const float *x, const int64_t *place, const float *share, float *y, int64_t width, int64_t n) {
    const int64_t last = width - 1;
    for (int64_t i = 0; i < n; ++i) {
        const int64_t from = place[i], next = from < last ? from + 1 : last;
        y[i] = (1.0f - share[i]) * x[from] + share[i] * x[next];
    }
}

void between(const float *a, const float *b, float share, float *y, int64_t n) {
    const V first = all(1.0f - share), second = all(share);
    over(n, [=](int64_t i, uint32_t lanes) {
        store_some(y + i, lanes, fma(first, load_some(a + i, lanes), mul(second, load_some(b + i, lanes))));
    });
}

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

// ---- rows as columns

// Of a square of L rows and columns.
#if defined(__AVX512F__)
inline void transpose_square(const float *x, int64_t x_stride, float *y, int64_t y_stride) {
    __m512 a[16], b[16];
    RAREFY_UNROLL for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(x + i * x_stride);
    // pairs, fours, eights and sixteens of rows
    RAREFY_UNROLL for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
    RAREFY_UNROLL for (int i = 0; i < 16; i += 4) {
        RAREFY_UNROLL for (int j = 0; j < 2; ++j) {
            const __m512d p = _mm512_castps_pd(b[i + j]), q = _mm512_castps_pd(b[i + j + 2]);
            a[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(p, q));
            a[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(p, q));
        }
    }
    RAREFY_UNROLL for (int i = 0; i < 16; i += 8) {
        RAREFY_UNROLL for (int j = 0; j < 4; ++j) {
            b[i + j] = _mm512_shuffle_f32x4(a[i + j], a[i + j + 4], 0x88);
            b[i + j + 4] = _mm512_shuffle_f32x4(a[i + j], a[i + j + 4], 0xdd);
        }
    }
    RAREFY_UNROLL for (int j = 0; j < 8; ++j) {
        _mm512_storeu_ps(y + j * y_stride, _mm512_shuffle_f32x4(b[j], b[j + 8], 0x88));
        _mm512_storeu_ps(y + (j + 8) * y_stride, _mm512_shuffle_f32x4(b[j], b[j + 8], 0xdd));
    }
}
#elif defined(__AVX2__)
inline void transpose_square(const float *x, int64_t x_stride, float *y, int64_t y_stride) {
    __m256 a[8], b[8];
    RAREFY_UNROLL for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_ps(x + i * x_stride);
    RAREFY_UNROLL for (int i = 0; i < 8; i += 2) {
        b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
    }
    RAREFY_UNROLL for (int i = 0; i < 8; i += 4) {
        RAREFY_UNROLL for (int j = 0; j < 2; ++j) {
            const __m256d p = _mm256_castps_pd(b[i + j]), q = _mm256_castps_pd(b[i + j + 2]);
            a[i + 2 * j] = _mm256_castpd_ps(_mm256_unpacklo_pd(p, q));
            a[i + 2 * j + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(p, q));
        }
    }
    RAREFY_UNROLL for (int j = 0; j < 4; ++j) {
        _mm256_storeu_ps(y + j * y_stride, _mm256_permute2f128_ps(a[j], a[j + 4], 0x20));
        _mm256_storeu_ps(y + (j + 4) * y_stride, _mm256_permute2f128_ps(a[j], a[j + 4], 0x31));
    }
}
#else
inline void transpose_square(const float *x, int64_t x_stride, float *y, int64_t y_stride) {
    for (int i = 0; i < L; ++i)
        for (int j = 0; j < L; ++j) y[j * y_stride + i] = x[i * x_stride + j];
}
#endif

void transpose(const float *x, int64_t x_stride, int64_t rows, int64_t columns, float *y, int64_t y_stride) {
    for (int64_t r = 0; r < rows; r += L)
        for (int64_t c = 0; c < columns; c += L) {
            const float *from = x + r * x_stride + c;
            float *to = y + c * y_stride + r;
            if (r + L <= rows && c + L <= columns) {
                transpose_square(from, x_stride, to, y_stride);
                continue;
            }
            for (int64_t i = 0; i < (rows - r < L ? rows - r : L); ++i)
                for (int64_t j = 0; j < (columns - c < L ? columns - c : L); ++j)
                    to[j * y_stride + i] = from[i * x_stride + j];
        }
}

// ---- additive attention

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

// ---- search

#include "best-inl.h"

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
    k.affine_each = affine_each;
    k.sum = sum;
    k.squares = squares;
    k.lstm_cell = lstm_cell;
    k.lstm_hidden = lstm_hidden;
    k.gru = gru;
    k.transpose = transpose;
    k.norm = norm;
    k.matmul = matmul;
    k.softmax = softmax;
    k.attend = attend;
    k.spread = spread;
    k.between = between;
    k.pointwise = pointwise;
    k.activate = activate;
    return k;
}

const Kernels *engine_functions() {
    static const Kernels kernels = make();
    return &kernels;
}

}  // namespace

extern const rarefy_kernel engine_kernels[] = {RAREFY_KERNEL("engine", engine_functions),
                                               RAREFY_KERNEL("additive_scores", additive_scores),
                                               RAREFY_KERNEL("best_of_rows", best_of_rows)};
extern const int64_t engine_kernel_count = sizeof engine_kernels / sizeof *engine_kernels;

}  // namespace RAREFY_ISA
}  // namespace rarefy

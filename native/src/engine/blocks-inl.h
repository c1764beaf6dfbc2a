// Products of a block: R rows of weights, dense or sparse, and T vectors of pixels. Included by engine_kernels.cpp,
// after vec-inl.h.
#pragma once

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

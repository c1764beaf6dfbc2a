// The pixels under a filter, packed plane by plane. Included by engine_kernels.cpp, after vec-inl.h.
#pragma once

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

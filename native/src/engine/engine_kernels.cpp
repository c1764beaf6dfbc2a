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

// in an order in which each has what it takes
#include "depthwise-inl.h"
#include "pack-inl.h"
#include "blocks-inl.h"
#include "matvec-inl.h"
#include "elementwise-inl.h"
#include "pointwise-inl.h"
#include "norms-inl.h"
#include "attention-inl.h"
#include "additive-inl.h"
#include "transpose-inl.h"
#include "best-inl.h"

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

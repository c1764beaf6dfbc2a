// LSTM and GRU over a whole sequence: the product with the hidden state, the gates and the new state of every step in
// one call, and their gradients. Built once for each instruction set.
//
// Rows of a batch do not meet in the recurrence: each thread takes some of them through all steps. Products with the
// weights are those of cell-panels-inl.h, and in the build for AMX, which is of use to bfloat16 alone, of
// cell-tiles-inl.h.
#include <stddef.h>

#include "isa.h"
#include "mode.h"
#include "parallel.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace rarefy {
namespace RAREFY_ISA {
namespace {

#include "engine/vec-inl.h"

#define RAREFY_UNROLL _Pragma("GCC unroll 32")

constexpr int64_t FEW = 4;  // steps times rows up to which packing the weights costs more than it saves

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t rounded_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

// ---- numbers as they are stored: float, or bfloat16 as its bits

inline float wide(float a) { return a; }
inline float wide(uint16_t a) {
    const uint32_t bits = static_cast<uint32_t>(a) << 16;
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}

template <class S>
inline S narrow(float a);
template <>
inline float narrow<float>(float a) {
    return a;
}
template <>
inline uint16_t narrow<uint16_t>(float a) {  // to the nearest, ties to even; a NaN stays one
    uint32_t bits;
    __builtin_memcpy(&bits, &a, sizeof bits);
    const uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    return static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? bits >> 16 | 0x40 : rounded);
}

// L numbers as float.
inline V values(const float *p) { return loadu(p); }
inline V values(const uint16_t *p) { return widen(p); }

// Where the gates lie in a tile: those of sigmoid first, so that one call computes them. LSTM: i, f, o, g.
template <int G>
inline int64_t place(int64_t gate) {
    return G == 4 && gate >= 2 ? 5 - gate : gate;
}

#if defined(__AMX_BF16__)
#include "cell-tiles-inl.h"
#else
#include "cell-panels-inl.h"
#endif

constexpr int64_t TILE = 32 * ROWS;  // rows times units whose gates are computed together

// Numbers as a product takes them.
inline void as_factors(const uint16_t *from, uint16_t *to, int64_t n) {
    __builtin_memcpy(to, from, sizeof(uint16_t) * static_cast<size_t>(n));
}
inline void as_factors(const uint16_t *from, float *to, int64_t n) {
    for (int64_t i = 0; i < n; ++i) to[i] = wide(from[i]);
}

// ---- activations, in place

template <class S>
void entry(const rarefy_gate &f, S *x, int64_t n) {
    if constexpr (sizeof(S) == 2) {
        reinterpret_cast<rarefy_act16 *>(f.entry)(x, x, n, f.table, 1);
    } else {
        uint32_t *bits = reinterpret_cast<uint32_t *>(x);
        reinterpret_cast<rarefy_act32 *>(f.entry)(bits, bits, n, f.table, 1);
    }
}

template <class S>
void apply(const rarefy_gate &f, S *x, int64_t n) {
    if constexpr (sizeof(S) == 4) {
        if (f.kind == RAREFY_GATE_OF_TANH) {
            for (int64_t i = 0; i < n; ++i) x[i] *= 0.5f;
            entry(f, x, n);
            for (int64_t i = 0; i < n; ++i) x[i] = 0.5f + 0.5f * x[i];
            return;
        }
        if (f.kind == RAREFY_GATE_CLAMP) {  // comparisons that are false keep a NaN
            for (int64_t i = 0; i < n; ++i) {
                const float y = x[i] < -1.0f ? -1.0f : x[i];
                x[i] = y > 1.0f ? 1.0f : y;
            }
            return;
        }
        if (f.kind == RAREFY_GATE_CLAMP_SIXTH) {
            for (int64_t i = 0; i < n; ++i) {
                const float z = x[i] + 3.0f, y = z < 0.0f ? 0.0f : z;
                x[i] = (y > 6.0f ? 6.0f : y) / 6.0f;
            }
            return;
        }
    }
    entry(f, x, n);
}

// ---- forward

// The same products from the weights as they are: out[gate][row][unit] += sum over k of weights * h.
template <class S, int G>
void dots(const rarefy_recurrent &op, int64_t rows, const Factor *h, int64_t first, int64_t units, int64_t stride,
          float *out, int64_t gap) {
    const int64_t H = op.hidden;
    const S *weights = static_cast<const S *>(op.weights);
    for (int64_t u = 0; u < units; ++u)
        for (int64_t row = 0; row < rows; ++row) {
            const Factor *x = h + row * width(H);
            const S *w[G];
            V sum[G];
            RAREFY_UNROLL for (int g = 0; g < G; ++g) {
                w[g] = weights + (g * H + first + u) * H;
                sum[g] = all(0.0f);
            }
            int64_t k = 0;
            for (; k + L <= H; k += L) {
                const V v = values(x + k);
                RAREFY_UNROLL for (int g = 0; g < G; ++g) sum[g] = fma(v, values(w[g] + k), sum[g]);
            }
            RAREFY_UNROLL for (int g = 0; g < G; ++g) {
                float rest = total(sum[g]);
                for (int64_t i = k; i < H; ++i) rest += wide(x[i]) * wide(w[g][i]);
                out[place<G>(g) * gap + row * stride + u] += rest;
            }
        }
}

// A tile of `rows` rows from `row` of this step and `units` units from `first`; `stride` floats a row of `tile`.
struct Part {
    int64_t row, rows, first, units, stride;
    int64_t at;   // the part's first row among those of all steps
    int64_t gap;  // floats of `tile` from one gate to the next
};

// Gates of a tile, rounded, without gaps.
template <class S>
void narrowed(const Part &part, const float *tile, int64_t gates, S *out) {
    const int64_t n = part.rows * part.stride;
    for (int64_t gate = 0; gate < gates; ++gate)
        for (int64_t i = 0; i < n; ++i) out[gate * n + i] = narrow<S>(tile[gate * part.gap + i]);
}

template <class S>
void keep(const rarefy_recurrent &op, const Part &part, int64_t gate, const S *values) {
    if (op.gates == nullptr) return;
    S *out = static_cast<S *>(op.gates) + (part.at * 4 + gate) * op.hidden + part.first;
    for (int64_t r = 0; r < part.rows; ++r)
        __builtin_memcpy(out + r * 4 * op.hidden, values + r * part.stride, sizeof(S) * part.units);
}

// c' = f c + i g,   h' = o tanh(c'): each rounded as it is stored.
template <class S>
void lstm_part(const rarefy_recurrent &op, const Part &part, float *tile) {
    const int64_t H = op.hidden, n = part.rows * part.stride;
    alignas(64) S gates[4 * TILE], c[TILE], t[TILE];
    narrowed(part, tile, 4, gates);
    apply(op.sigmoid, gates, 3 * n);
    apply(op.tanh, gates + 3 * n, n);
    const S *i = gates, *f = gates + n, *o = gates + 2 * n, *g = gates + 3 * n;
    S *state = static_cast<S *>(op.c) + part.row * H + part.first;
    for (int64_t r = 0; r < part.rows; ++r) {
        const int64_t a = r * part.stride;
        const S *before = state + r * H;
        for (int64_t u = 0; u < part.units; ++u)
            c[a + u] = narrow<S>(wide(f[a + u]) * wide(before[u]) + wide(i[a + u]) * wide(g[a + u]));
        for (int64_t u = part.units; u < part.stride; ++u) c[a + u] = 0;
    }
    __builtin_memcpy(t, c, sizeof(S) * static_cast<size_t>(n));
    apply(op.tanh, t, n);
    S *y = static_cast<S *>(op.y) + part.at * H + part.first;
    S *cells = static_cast<S *>(op.cells);
    for (int64_t r = 0; r < part.rows; ++r) {
        const int64_t a = r * part.stride;
        for (int64_t u = 0; u < part.units; ++u) y[r * H + u] = narrow<S>(wide(o[a + u]) * wide(t[a + u]));
        __builtin_memcpy(state + r * H, c + a, sizeof(S) * part.units);
        if (cells != nullptr) {
            S *out = cells + (part.at + r) * 2 * H + part.first;
            __builtin_memcpy(out, c + a, sizeof(S) * part.units);
            __builtin_memcpy(out + H, t + a, sizeof(S) * part.units);
        }
    }
    keep(op, part, 0, i), keep(op, part, 1, f), keep(op, part, 2, g), keep(op, part, 3, o);
}

// n = tanh(x + r (h W + b)),   h' = (h - n) z + n
template <class S>
void gru_part(const rarefy_recurrent &op, const Part &part, float *tile) {
    const int64_t H = op.hidden, n = part.rows * part.stride;
    alignas(64) S gates[2 * TILE], fresh[TILE], inner[TILE];
    narrowed(part, tile, 2, gates);
    apply(op.sigmoid, gates, 2 * n);
    const S *reset = gates, *z = gates + n;
    const float *product = tile + 2 * part.gap, *x = tile + 3 * part.gap;
    for (int64_t r = 0; r < part.rows; ++r) {
        const int64_t a = r * part.stride;
        for (int64_t u = 0; u < part.units; ++u)
            fresh[a + u] = narrow<S>(x[a + u] + wide(reset[a + u]) * product[a + u]);
        for (int64_t u = part.units; u < part.stride; ++u) fresh[a + u] = 0;
    }
    if (op.gates != nullptr) narrowed(part, product, 1, inner);
    apply(op.tanh, fresh, n);
    const S *state = static_cast<const S *>(op.h) + part.row * H + part.first;
    S *y = static_cast<S *>(op.y) + part.at * H + part.first;
    for (int64_t r = 0; r < part.rows; ++r) {
        const int64_t a = r * part.stride;
        for (int64_t u = 0; u < part.units; ++u) {
            const float m = wide(fresh[a + u]);
            y[r * H + u] = narrow<S>((wide(state[r * H + u]) - m) * wide(z[a + u]) + m);
        }
    }
    keep(op, part, 0, reset), keep(op, part, 1, z), keep(op, part, 2, static_cast<const S *>(fresh)),
        keep(op, part, 3, static_cast<const S *>(inner));
}

// A tile before the products with h: those of x. A GRU's third gate has its bias there, and x beside it.
template <class P, int G>
void begin_tile(const rarefy_recurrent &op, const Part &part, float *tile) {
    const int64_t H = op.hidden;
    const P *products = static_cast<const P *>(op.products) + part.at * G * H + part.first;
    for (int64_t gate = 0; gate < G; ++gate)
        for (int64_t r = 0; r < part.rows; ++r) {
            const bool apart = G == 3 && gate == 2;
            const P *from = products + (r * G + gate) * H;
            float *to = tile + (apart ? 3 : place<G>(gate)) * part.gap + r * part.stride;
            for (int64_t u = 0; u < part.units; ++u) to[u] = wide(from[u]);
            for (int64_t u = part.units; u < part.stride; ++u) to[u] = 0.0f;
            if (!apart) continue;
            float *inner = tile + 2 * part.gap + r * part.stride;
            for (int64_t u = 0; u < part.stride; ++u)
                inner[u] = op.bias != nullptr && u < part.units ? op.bias[part.first + u] : 0.0f;
        }
}

template <class S>
struct Job {
    const rarefy_recurrent &op;
    const rarefy_recurrent_gradients *gradients;
    const Factor *packed;  // null: the products come from the weights as they are
    Factor *factors;       // forward h [batch, width], backward the rows of a product [batch, width]
    float *carry;          // backward, [batch, units]
    int64_t share;         // rows of a range

    int64_t offset(int64_t step) const { return op.offsets == nullptr ? step * op.batch : op.offsets[step]; }
    int64_t size(int64_t step) const { return offset(step + 1) - offset(step); }
    int64_t order(int64_t step) const { return op.reverse ? op.steps - 1 - step : step; }
};

template <class S, int G>
void forward_rows(const Job<S> &job, int64_t begin, int64_t end) {
    const rarefy_recurrent &op = job.op;
    const int64_t H = op.hidden, K = width(H);
    S *state = static_cast<S *>(op.h);
    Factor *h = job.factors;
    if constexpr (sizeof(S) == 4) h = state;
    else
        for (int64_t r = begin; r < end; ++r) {
            as_factors(state + r * H, h + r * K, H);
            for (int64_t k = H; k < K; ++k) h[r * K + k] = 0;
        }
    alignas(64) float tile[4 * TILE];
    for (int64_t s = 0; s < op.steps; ++s) {
        const int64_t step = job.order(s), stop = least(end, job.size(step)), at = job.offset(step);
        for (int64_t row = begin; row < stop; row += ROWS) {
            Part part;
            part.row = row, part.rows = least(ROWS, stop - row), part.at = at + row;
            const int64_t rows = rounded_up(part.rows, GROUP), units = TILE / rows / L * L;
            for (part.first = 0; part.first < H; part.first += units) {
                part.units = least(units, H - part.first), part.stride = rounded_up(part.units, L);
                part.gap = rows * part.stride;
                if (op.narrow) begin_tile<S, G>(op, part, tile);
                else begin_tile<float, G>(op, part, tile);
                if (job.packed == nullptr)
                    dots<S, G>(op, part.rows, h + row * K, part.first, part.units, part.stride, tile, part.gap);
                else forward_product<G>(H, part.rows, h + row * K, job.packed, part.first, part.stride, tile, part.gap);
                if constexpr (G == 4) lstm_part<S>(op, part, tile);
                else gru_part<S>(op, part, tile);
            }
        }
        if (begin >= stop) continue;
        const S *y = static_cast<const S *>(op.y) + (at + begin) * H;
        __builtin_memcpy(state + begin * H, y, sizeof(S) * static_cast<size_t>((stop - begin) * H));
        if constexpr (sizeof(S) == 2)
            for (int64_t r = begin; r < stop; ++r) as_factors(state + r * H, h + r * K, H);
    }
}

// ---- backward

// The slopes of the activations by their results: y (1 - y) and 1 - y^2; of the clamped ones 1/6 and 1 inside.
template <bool HARD>
inline float sigmoid_slope(float y) {
    return HARD ? (y > 0.0f && y < 1.0f ? 1.0f / 6.0f : 0.0f) : y * (1.0f - y);
}
template <bool HARD>
inline float tanh_slope(float y) {
    return HARD ? (y > -1.0f && y < 1.0f ? 1.0f : 0.0f) : 1.0f - y * y;
}

// One row of one step. carry: the gradient that h has from the steps after; it comes back as what goes on to h before
// but for the product with the weights. `before` is the state before the step: c of an LSTM, h of a GRU.
template <class S, bool HARD>
void lstm_row(int64_t H, const S *gates, const S *cells, const S *before, const S *dy, float *__restrict carry,
              float *__restrict dc, S *__restrict out) {
    const S *i = gates, *f = gates + H, *g = gates + 2 * H, *o = gates + 3 * H, *t = cells + H;
    for (int64_t u = 0; u < H; ++u) {
        const float dh = carry[u] + (dy == nullptr ? 0.0f : wide(dy[u])), tc = wide(t[u]);
        const float iu = wide(i[u]), fu = wide(f[u]), gu = wide(g[u]), ou = wide(o[u]);
        const float d = dc[u] + dh * ou * tanh_slope<HARD>(tc);
        out[u] = narrow<S>(d * gu * sigmoid_slope<HARD>(iu));
        out[H + u] = narrow<S>(d * wide(before[u]) * sigmoid_slope<HARD>(fu));
        out[2 * H + u] = narrow<S>(d * iu * tanh_slope<HARD>(gu));
        out[3 * H + u] = narrow<S>(dh * tc * sigmoid_slope<HARD>(ou));
        dc[u] = d * fu;
        carry[u] = 0.0f;
    }
}

template <class S, bool HARD>
void gru_row(int64_t H, const S *gates, const S *before, const S *dy, float *__restrict carry, S *__restrict out,
             S *__restrict hidden) {
    const S *reset = gates, *z = gates + H, *fresh = gates + 2 * H, *inner = gates + 3 * H;
    for (int64_t u = 0; u < H; ++u) {
        const float dh = carry[u] + (dy == nullptr ? 0.0f : wide(dy[u]));
        const float ru = wide(reset[u]), zu = wide(z[u]), nu = wide(fresh[u]);
        const float dn = dh * (1.0f - zu) * tanh_slope<HARD>(nu);
        const float dr = dn * wide(inner[u]) * sigmoid_slope<HARD>(ru);
        const float dz = dh * (wide(before[u]) - nu) * sigmoid_slope<HARD>(zu);
        out[u] = hidden[u] = narrow<S>(dr), out[H + u] = hidden[H + u] = narrow<S>(dz);
        out[2 * H + u] = narrow<S>(dn), hidden[2 * H + u] = narrow<S>(dn * ru);
        carry[u] = dh * zu;
    }
}

template <class S, int G, bool HARD>
void backward_rows(const Job<S> &job, int64_t begin, int64_t end) {
    const rarefy_recurrent &op = job.op;
    const rarefy_recurrent_gradients &to = *job.gradients;
    const int64_t H = op.hidden, units = rounded_up(H, PANEL), K = width(G * H);
    float *carry = job.carry;
    for (int64_t r = begin; r < end; ++r)
        for (int64_t u = 0; u < units; ++u)
            carry[r * units + u] = u < H && to.h_n != nullptr ? wide(static_cast<const S *>(to.h_n)[r * H + u]) : 0.0f;
    const S *gates = static_cast<const S *>(op.gates), *cells = static_cast<const S *>(op.cells);
    const S *first = static_cast<const S *>(G == 4 ? op.c : op.h), *dy = static_cast<const S *>(to.y);
    S *products = static_cast<S *>(to.products), *hidden = static_cast<S *>(to.hidden);
    const S *through = G == 4 ? products : hidden;  // what the product with the weights takes
    for (int64_t s = op.steps - 1; s >= 0; --s) {
        const int64_t step = job.order(s), stop = least(end, job.size(step)), at = job.offset(step);
        const int64_t earlier = s > 0 ? job.order(s - 1) : -1;
        const int64_t known = s > 0 ? job.size(earlier) : 0, from = s > 0 ? job.offset(earlier) : 0;
        for (int64_t block = begin; block < stop; block += ROWS) {
            const int64_t rows = least(ROWS, stop - block);
            Factor *factors = job.factors + begin * K;
            for (int64_t r = block; r < block + rows; ++r) {
                const int64_t row = at + r;
                const S *up = dy == nullptr ? nullptr : dy + row * H, *before = first + r * H;
                if constexpr (G == 4) {
                    if (r < known) before = cells + (from + r) * 2 * H;
                    lstm_row<S, HARD>(H, gates + row * 4 * H, cells + row * 2 * H, before, up, carry + r * units,
                                      to.c + r * H, products + row * G * H);
                } else {
                    if (r < known) before = static_cast<const S *>(op.y) + (from + r) * H;
                    gru_row<S, HARD>(H, gates + row * 4 * H, before, up, carry + r * units, products + row * G * H,
                                     hidden + row * G * H);
                }
                if constexpr (sizeof(S) == 2) {
                    Factor *factor = factors + (r - block) * K;
                    as_factors(through + row * G * H, factor, G * H);
                    for (int64_t k = G * H; k < K; ++k) factor[k] = 0;
                }
            }
            // rows that are not there add nothing to others
            for (int64_t i = rows * K; i < rounded_up(rows, GROUP) * K; ++i) factors[i] = 0;
            const Factor *d = factors;
            if constexpr (sizeof(S) == 4) d = through + (at + block) * G * H;
            backward_product(rows, d, G * H, job.packed, units, carry + block * units);
        }
    }
    for (int64_t r = begin; r < end; ++r)
        __builtin_memcpy(to.h + r * H, carry + r * units, sizeof(float) * static_cast<size_t>(H));
}

// ---- calls

// Runs `body` over ranges of rows on all threads: two a thread where they are long, so that no thread waits long for
// one that started late.
template <class S, void body(const Job<S> &, int64_t, int64_t)>
void over_rows(Job<S> &job) {
    const int64_t batch = job.op.batch, threads = job.op.threads < 1 ? 1 : job.op.threads;
    if (batch == 0) return;
    const int64_t ranges = threads > 1 && batch >= 32 * threads ? 2 * threads : threads;
    job.share = rounded_up((batch + ranges - 1) / ranges, GROUP);
    auto range = [](void *context, int64_t index) {
        const Job<S> &j = *static_cast<const Job<S> *>(context);
        const DefaultMode mode;
        [[maybe_unused]] const Unit unit{};
        body(j, index * j.share, least((index + 1) * j.share, j.op.batch));
    };
    parallel_for(static_cast<int32_t>(threads), (batch + job.share - 1) / job.share, range, &job);
}

template <class S, int G>
void forward(const rarefy_recurrent *op) {
    Factor *factors = reinterpret_cast<Factor *>(op->scratch);
    Job<S> job{*op, nullptr, nullptr, factors, nullptr, 0};
    if (op->steps * op->batch > FEW) {
        pack_forward<S, G>(*op, factors);
        job.packed = factors, job.factors += rounded_up(op->hidden, L) * G * width(op->hidden);
    }
    over_rows<S, forward_rows<S, G>>(job);
}

template <class S, int G>
void backward(const rarefy_recurrent *op, const rarefy_recurrent_gradients *to) {
    const int64_t units = rounded_up(op->hidden, PANEL);
    float *carry = op->scratch;
    Factor *packed = reinterpret_cast<Factor *>(carry + rounded_up(op->batch, GROUP) * units);
    pack_backward<S, G>(*op, packed);
    Job<S> job{*op, to, packed, packed + units * width(G * op->hidden), carry, 0};
    if (to->hard) over_rows<S, backward_rows<S, G, true>>(job);
    else over_rows<S, backward_rows<S, G, false>>(job);
}

}  // namespace

extern const rarefy_kernel cell_kernels[] = {
#if !defined(__AMX_BF16__)
    RAREFY_KERNEL("lstm_f32", (forward<float, 4>)),
    RAREFY_KERNEL("gru_f32", (forward<float, 3>)),
    RAREFY_KERNEL("lstm_backward_f32", (backward<float, 4>)),
    RAREFY_KERNEL("gru_backward_f32", (backward<float, 3>)),
#endif
    RAREFY_KERNEL("lstm_bf16", (forward<uint16_t, 4>)),
    RAREFY_KERNEL("gru_bf16", (forward<uint16_t, 3>)),
    RAREFY_KERNEL("lstm_backward_bf16", (backward<uint16_t, 4>)),
    RAREFY_KERNEL("gru_backward_bf16", (backward<uint16_t, 3>)),
};
extern const int64_t cell_kernel_count = sizeof cell_kernels / sizeof *cell_kernels;

}  // namespace RAREFY_ISA
}  // namespace rarefy

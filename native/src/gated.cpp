// Gated units, act(gate) * up, and their gradients, in one pass: the activation's own kernel fills a buffer in the
// first cache, and what is multiplied by it comes from memory and goes there. Built once for each instruction set.
#include <stddef.h>

#include "isa.h"
#include "mode.h"
#include "parallel.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace rarefy {
namespace RAREFY_ISA {
namespace {

constexpr int64_t BLOCK = 1024;      // values at a time: all buffers stay in the first cache
constexpr int64_t CHUNK = 1 << 16;   // values a unit of work
constexpr int64_t SERIAL = 1 << 18;  // below this many values a thread costs more than it saves

inline uint32_t as_bits(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float as_float(uint32_t bits) {
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}

struct Bfloat16 {
    typedef uint16_t Bits;
    static float load(uint16_t x) { return as_float(static_cast<uint32_t>(x) << 16); }
    static uint16_t store(float y) {
        const uint32_t bits = as_bits(y), even = bits + 0x7FFF + (bits >> 16 & 1);
        return static_cast<uint16_t>(y == y ? even >> 16 : bits >> 16 | 0x40);
    }
};

struct Float16 {
    typedef uint16_t Bits;
    static float load(uint16_t x) {
        const uint32_t u = x & 0x7FFFu, sign = static_cast<uint32_t>(x & 0x8000u) << 16;
        // the exponent's bias grows by 112; subnormal numbers become normal ones
        const uint32_t bits = as_bits(as_float(u << 13) * 0x1p112f);
        return as_float(sign | (u < 0x7C00 ? bits : bits | 0x7F800000));
    }
    static uint16_t store(float y) {
        const uint32_t bits = as_bits(y), u = bits & 0x7FFFFFFF, sign = bits >> 16 & 0x8000;
        const uint32_t normal = (u - (112u << 23) + 0xFFF + (u >> 13 & 1)) >> 13;
        // one unit of the last place of 1/2 is the least number
        const uint32_t small = as_bits(as_float(u) + 0.5f) - 0x3F000000;
        uint32_t v = u < 0x38800000 ? small : normal;
        v = u < 0x47800000 ? v : 0x7C00;
        return static_cast<uint16_t>(sign | (u <= 0x7F800000 ? v : 0x7E00));
    }
};

struct Float32 {
    typedef uint32_t Bits;
    static float load(uint32_t x) { return as_float(x); }
    static uint32_t store(float y) { return as_bits(y); }
};

template <class Bits>
using Act = void(const Bits *, Bits *, int64_t, const void *, int32_t);
template <class Bits>
using Slope = void(const Bits *, float *, int64_t, const void *, int32_t);

// Copies a buffer to where nobody reads it soon: past the caches, so that no line is fetched only to be overwritten.
template <class Bits>
inline void put(Bits *to, const Bits *from, int64_t n, bool stream) {
#if defined(__AVX2__)
    if (stream) {
        int64_t i = 0;
        for (; i < n && (reinterpret_cast<uintptr_t>(to + i) & 31) != 0; ++i) to[i] = from[i];
        for (constexpr int64_t LANES = 32 / sizeof(Bits); i + LANES <= n; i += LANES)
            _mm256_stream_si256(reinterpret_cast<__m256i *>(to + i),
                                _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from + i)));
        for (; i < n; ++i) to[i] = from[i];
        return;
    }
#else
    (void)stream;
#endif
    __builtin_memcpy(to, from, sizeof(Bits) * static_cast<size_t>(n));
}

inline void fence(bool stream) {
#if defined(__AVX2__)
    if (stream) _mm_sfence();
#else
    (void)stream;
#endif
}

template <class F>
struct Forward {
    typedef typename F::Bits Bits;
    const Bits *gate, *up;
    Bits *out;
    int64_t columns, gate_stride, up_stride;
    Act<Bits> *act;
    const void *table;
    bool stream;

    void operator()(int64_t row, int64_t begin, int64_t n) const {
        const Bits *g = gate + row * gate_stride + begin, *u = up + row * up_stride + begin;
        alignas(64) Bits h[BLOCK];
        act(g, h, n, table, 1);
        for (int64_t i = 0; i < n; ++i) h[i] = F::store(F::load(h[i]) * F::load(u[i]));
        put(out + row * columns + begin, h, n, stream);
    }
};

template <class F>
struct Backward {
    typedef typename F::Bits Bits;
    const Bits *upstream, *gate, *up;
    Bits *of_gate, *of_up;
    int64_t columns, gate_stride, up_stride, of_gate_stride, of_up_stride;
    Act<Bits> *act;
    const void *table;
    Slope<Bits> *slope;
    const void *slopes;
    bool stream;

    void operator()(int64_t row, int64_t begin, int64_t n) const {
        const Bits *g = gate + row * gate_stride + begin, *u = up + row * up_stride + begin;
        const Bits *d = upstream + row * columns + begin;
        alignas(64) Bits h[BLOCK], dg[BLOCK];
        alignas(64) float s[BLOCK];
        act(g, h, n, table, 1);
        slope(g, s, n, slopes, 1);
        for (int64_t i = 0; i < n; ++i) {
            const float wide = F::load(d[i]);
            dg[i] = F::store(wide * F::load(u[i]) * s[i]);
            h[i] = F::store(wide * F::load(h[i]));
        }
        put(of_gate + row * of_gate_stride + begin, dg, n, stream);
        put(of_up + row * of_up_stride + begin, h, n, stream);
    }
};

template <class J>
struct Job {
    J part;
    int64_t rows, columns, rows_each, columns_each, parts;
};

// Goes over all blocks of rows * columns values, several threads each over rows, or over parts of wide rows.
template <class J>
void over(const J &part, int64_t rows, int64_t columns, int32_t threads) {
    if (rows == 0 || columns == 0) return;
    const bool wide = columns >= CHUNK;
    Job<J> job{part,
               rows,
               columns,
               wide ? 1 : CHUNK / columns,
               wide ? CHUNK : columns,
               wide ? (columns + CHUNK - 1) / CHUNK : 1};
    auto chunk = [](void *context, int64_t index) {
        const Job<J> &j = *static_cast<const Job<J> *>(context);
        const DefaultMode mode;
        const int64_t row = index / j.parts * j.rows_each, from = index % j.parts * j.columns_each;
        const int64_t last = row + j.rows_each < j.rows ? row + j.rows_each : j.rows;
        const int64_t to = from + j.columns_each < j.columns ? from + j.columns_each : j.columns;
        for (int64_t r = row; r < last; ++r)
            for (int64_t at = from; at < to; at += BLOCK) j.part(r, at, to - at < BLOCK ? to - at : BLOCK);
        fence(j.part.stream);
    };
    const int64_t count = (rows + job.rows_each - 1) / job.rows_each * job.parts;
    parallel_for(rows * columns < SERIAL ? 1 : threads, count, chunk, &job);
}

// From so many bytes of results on, the next reader finds them in memory anyway.
constexpr int64_t STREAM = 16 << 20;

template <class F>
void gated(const typename F::Bits *gate, const typename F::Bits *up, typename F::Bits *out, int64_t rows,
           int64_t columns, int64_t gate_stride, int64_t up_stride, Act<typename F::Bits> *act, const void *table,
           int32_t threads) {
    const bool stream = rows * columns * static_cast<int64_t>(sizeof *out) >= STREAM;
    over(Forward<F>{gate, up, out, columns, gate_stride, up_stride, act, table, stream}, rows, columns, threads);
}

template <class F>
void gated_backward(const typename F::Bits *upstream, const typename F::Bits *gate, const typename F::Bits *up,
                    typename F::Bits *of_gate, typename F::Bits *of_up, int64_t rows, int64_t columns,
                    int64_t gate_stride, int64_t up_stride, int64_t of_gate_stride, int64_t of_up_stride,
                    Act<typename F::Bits> *act, const void *table, Slope<typename F::Bits> *slope, const void *slopes,
                    int32_t threads) {
    const bool stream = 2 * rows * columns * static_cast<int64_t>(sizeof *of_up) >= STREAM;
    over(Backward<F>{upstream, gate, up, of_gate, of_up, columns, gate_stride, up_stride, of_gate_stride, of_up_stride,
                     act, table, slope, slopes, stream},
         rows, columns, threads);
}

void slope16(const uint16_t *x, float *y, int64_t n, const void *table, int32_t) {
    const float *values = static_cast<const float *>(table);
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        float some[8];
        for (int k = 0; k < 8; ++k) some[k] = values[x[i + k]];
        for (int k = 0; k < 8; ++k) y[i + k] = some[k];
    }
    for (; i < n; ++i) y[i] = values[x[i]];
}

inline float clamped(float x, float limit) {
    x = x < -limit ? -limit : x;
    return x > limit ? limit : x;
}

// e^-a for 0 <= a < 88:  2^-n e^r,  n = round(a / log 2), log 2 in two parts, the first of few bits; the polynomial is
// that of Cephes' expf. Adding 1.5 * 2^23 rounds to a whole number.
inline float exp_minus(float a) {
    const float t = a * 1.44269504f + 12582912.0f, n = t - 12582912.0f;
    const float r = (n * 0.693359375f - a) - n * 2.12194440e-4f;
    float p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return (p * (r * r) + r + 1.0f) * as_float((127u - (as_bits(t) - 0x4B400000u)) << 23);
}

enum class Unit { silu, gelu, gelu_tanh };

// The derivative of x Phi(x) or of x sigmoid(z), as rarefy.act.kernels.slopes has it.
template <Unit UNIT>
inline float slope_value(float x) {
    constexpr float A = 1.5957691216057308f, B = 0.07135481627260025f, B3 = 0.21406444881780073f;
    if (UNIT == Unit::gelu) {
        x = clamped(x, 13.0f);
        const float a = x < 0.0f ? -x : x, phi = exp_minus(0.5f * (a * a)) * 0.3989422804f;
        // Phi(-a) = phi(a) t P(t): Abramowitz and Stegun, 26.2.17
        const float t = 1.0f / (1.0f + 0.2316419f * a);
        float p = t * 1.330274429f + -1.821255978f;
        p = p * t + 1.781477937f;
        p = p * t + -0.356563782f;
        p = p * t + 0.319381530f;
        const float tail = phi * (p * t);
        return (x < 0.0f ? tail : 1.0f - tail) + x * phi;
    }
    x = clamped(x, UNIT == Unit::silu ? 87.0f : 10.0f);
    const float square = x * x, z = UNIT == Unit::silu ? x : x * (square * B + A);
    const float e = exp_minus(z < 0.0f ? -z : z), large = 1.0f / (1.0f + e), small = e * large;
    const float bend = x * (large * small);
    return (z < 0.0f ? small : large) + (UNIT == Unit::silu ? bend : bend * (square * B3 + A));
}

template <Unit UNIT>
void slope32(const uint32_t *x, float *y, int64_t n, const void *, int32_t) {
    for (int64_t i = 0; i < n; ++i) {
        const float value = as_float(x[i]);
        y[i] = value == value ? slope_value<UNIT>(value) : value;
    }
}

}  // namespace

extern const rarefy_kernel gated_kernels[] = {
    RAREFY_KERNEL("gated_bf16", gated<Bfloat16>),
    RAREFY_KERNEL("gated_fp16", gated<Float16>),
    RAREFY_KERNEL("gated_fp32", gated<Float32>),
    RAREFY_KERNEL("gated_backward_bf16", gated_backward<Bfloat16>),
    RAREFY_KERNEL("gated_backward_fp16", gated_backward<Float16>),
    RAREFY_KERNEL("gated_backward_fp32", gated_backward<Float32>),
    RAREFY_KERNEL("slope16", slope16),
    RAREFY_KERNEL("slope_silu32", slope32<Unit::silu>),
    RAREFY_KERNEL("slope_gelu32", slope32<Unit::gelu>),
    RAREFY_KERNEL("slope_gelu_tanh32", slope32<Unit::gelu_tanh>),
};
extern const int64_t gated_kernel_count = sizeof gated_kernels / sizeof *gated_kernels;

}  // namespace RAREFY_ISA
}  // namespace rarefy

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

#include "engine/vec-inl.h"

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

#if defined(__AVX2__)
#define RAREFY_PAIRS

// 2 L numbers, in an order that is the format's own.
struct Pair {
    V a, b;
};

inline Pair operator*(Pair x, Pair y) { return {mul(x.a, y.a), mul(x.b, y.b)}; }
inline Pair in_order(const float *x) { return {load(x), load(x + L)}; }
#endif

// A format: `load` and `store` of one number; and on x86 of 2 L numbers, with the slopes that belong to them. Elsewhere
// the compiler makes vectors of the former.
struct Bfloat16 {
    typedef uint16_t Bits;
    static float load(uint16_t x) { return as_float(static_cast<uint32_t>(x) << 16); }
    static uint16_t store(float y) {
        const uint32_t bits = as_bits(y), even = bits + 0x7FFF + (bits >> 16 & 1);
        return static_cast<uint16_t>(y == y ? even >> 16 : bits >> 16 | 0x40);
    }
// The pair is the numbers at even and at odd places: a shift and a mask.
#if defined(__AVX512BW__)
    static Pair pair(const uint16_t *x) {
        const __m512i v = _mm512_loadu_si512(x);
        return {_mm512_castsi512_ps(_mm512_slli_epi32(v, 16)),
                _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(static_cast<int>(0xFFFF0000u))))};
    }
    static Pair slopes(const float *x) {
        const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        const __m512 low = _mm512_load_ps(x), high = _mm512_load_ps(x + L);
        return {_mm512_permutex2var_ps(low, even, high),
                _mm512_permutex2var_ps(low, _mm512_add_epi32(even, _mm512_set1_epi32(1)), high)};
    }
    static __m512i rounded(V y) {
        const __m512i bits = _mm512_castps_si512(y),
                      odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        return _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
    }
    static void store(uint16_t *to, Pair y) {
        const __m512i both = _mm512_mask_blend_epi16(0xAAAAAAAA, _mm512_srli_epi32(rounded(y.a), 16), rounded(y.b));
        _mm512_store_si512(to, both);
        const __mmask16 a = _mm512_cmp_ps_mask(y.a, y.a, _CMP_UNORD_Q), b = _mm512_cmp_ps_mask(y.b, y.b, _CMP_UNORD_Q);
        if (__builtin_expect((a | b) != 0, 0)) some_nan(to, y);
    }
#elif defined(__AVX2__)
    static Pair pair(const uint16_t *x) {
        const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(x));
        return {_mm256_castsi256_ps(_mm256_slli_epi32(v, 16)),
                _mm256_castsi256_ps(_mm256_and_si256(v, _mm256_set1_epi32(static_cast<int>(0xFFFF0000u))))};
    }
    static V ordered(V v) { return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(v), 0xD8)); }
    static Pair slopes(const float *x) {
        const V low = RAREFY_ISA::load(x), high = RAREFY_ISA::load(x + L);
        return {ordered(_mm256_shuffle_ps(low, high, 0x88)), ordered(_mm256_shuffle_ps(low, high, 0xDD))};
    }
    static __m256i rounded(V y) {
        const __m256i bits = _mm256_castps_si256(y),
                      odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        return _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
    }
    static void store(uint16_t *to, Pair y) {
        const __m256i both = _mm256_blend_epi16(_mm256_srli_epi32(rounded(y.a), 16), rounded(y.b), 0xAA);
        _mm256_store_si256(reinterpret_cast<__m256i *>(to), both);
        const V nan = _mm256_or_ps(_mm256_cmp_ps(y.a, y.a, _CMP_UNORD_Q), _mm256_cmp_ps(y.b, y.b, _CMP_UNORD_Q));
        if (__builtin_expect(_mm256_movemask_ps(nan) != 0, 0)) some_nan(to, y);
    }
#endif
#ifdef RAREFY_PAIRS
    static void some_nan(uint16_t *to, Pair y) {
        for (int i = 0; i < L; ++i) {
            to[2 * i] = store(y.a[i]);
            to[2 * i + 1] = store(y.b[i]);
        }
    }
#endif
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
#if defined(__AVX512BW__)
    static V half(const uint16_t *x) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(x)));
    }
    static void store(uint16_t *to, Pair y) {
        __m256i *q = reinterpret_cast<__m256i *>(to);
        _mm256_store_si256(q, _mm512_cvtps_ph(y.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
        _mm256_store_si256(q + 1, _mm512_cvtps_ph(y.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
#elif defined(__AVX2__)
    static V half(const uint16_t *x) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(x))); }
    static void store(uint16_t *to, Pair y) {
        __m128i *q = reinterpret_cast<__m128i *>(to);
        _mm_store_si128(q, _mm256_cvtps_ph(y.a, _MM_FROUND_TO_NEAREST_INT));
        _mm_store_si128(q + 1, _mm256_cvtps_ph(y.b, _MM_FROUND_TO_NEAREST_INT));
    }
#endif
#ifdef RAREFY_PAIRS
    static Pair pair(const uint16_t *x) { return {half(x), half(x + L)}; }
    static Pair slopes(const float *x) { return in_order(x); }
#endif
};

struct Float32 {
    typedef uint32_t Bits;
    static float load(uint32_t x) { return as_float(x); }
    static uint32_t store(float y) { return as_bits(y); }
#ifdef RAREFY_PAIRS
    static Pair pair(const uint32_t *x) {
        const float *p = reinterpret_cast<const float *>(x);
        return {loadu(p), loadu(p + L)};
    }
    static Pair slopes(const float *x) { return in_order(x); }
    static void store(uint32_t *to, Pair y) {
        RAREFY_ISA::store(reinterpret_cast<float *>(to), y.a);
        RAREFY_ISA::store(reinterpret_cast<float *>(to) + L, y.b);
    }
#endif
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
        int64_t i = 0;
#ifdef RAREFY_PAIRS
        for (; i + 2 * L <= n; i += 2 * L) F::store(h + i, F::pair(h + i) * F::pair(u + i));
#endif
        for (; i < n; ++i) h[i] = F::store(F::load(h[i]) * F::load(u[i]));
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
        int64_t i = 0;
#ifdef RAREFY_PAIRS
        for (; i + 2 * L <= n; i += 2 * L) {
            const Pair wide = F::pair(d + i);
            F::store(dg + i, wide * F::pair(u + i) * F::slopes(s + i));
            F::store(h + i, wide * F::pair(h + i));
        }
#endif
        for (; i < n; ++i) {
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

// e^-a for 0 <= a < 88:  2^-n e^r,  n = round(a / log 2), log 2 in two parts, the first of few bits; the polynomial is
// that of Cephes' expf. Adding 1.5 * 2^23 rounds to a whole number. Products and sums are rounded one after another.
inline V exp_minus(V a) {
    const V n = sub(add(mul(a, all(1.44269504f)), all(12582912.0f)), all(12582912.0f));
    const V r = sub(sub(mul(n, all(0.693359375f)), a), mul(n, all(2.12194440e-4f)));
    V p = add(mul(r, all(1.9875691500e-4f)), all(1.3981999507e-3f));
    p = add(mul(p, r), all(8.3334519073e-3f));
    p = add(mul(p, r), all(4.1665795894e-2f));
    p = add(mul(p, r), all(1.6666665459e-1f));
    p = add(mul(p, r), all(5.0000001201e-1f));
    // the field of the exponent is 127 - n, here in the low bits of a number from 2^23 on
    const V scale = exponent(add(sub(all(127.0f), n), all(8388608.0f)));
    return mul(add(add(mul(p, mul(r, r)), r), all(1.0f)), scale);
}

enum class Unit { silu, gelu, gelu_tanh };

// The derivative of x Phi(x) or of x sigmoid(z), as rarefy.act.kernels.slopes has it.
template <Unit UNIT>
inline V slope_value(V x) {
    const V zero = all(0.0f), one = all(1.0f),
            limit = all(UNIT == Unit::silu   ? 87.0f
                        : UNIT == Unit::gelu ? 13.0f
                                             : 10.0f);
    x = smaller(limit, larger(sub(zero, limit), x));  // in this order NaN stays
    if (UNIT == Unit::gelu) {
        const V a = absolute(x), phi = mul(exp_minus(mul(all(0.5f), mul(a, a))), all(0.3989422804f));
        // Phi(-a) = phi(a) t P(t): Abramowitz and Stegun, 26.2.17
        const V t = div(one, add(one, mul(all(0.2316419f), a)));
        V p = add(mul(t, all(1.330274429f)), all(-1.821255978f));
        p = add(mul(p, t), all(1.781477937f));
        p = add(mul(p, t), all(-0.356563782f));
        p = add(mul(p, t), all(0.319381530f));
        const V tail = mul(phi, mul(p, t));
        return add(where_less(x, zero, tail, sub(one, tail)), mul(x, phi));
    }
    const V square = mul(x, x);
    V z = x;
    if (UNIT == Unit::gelu_tanh) z = mul(x, add(mul(square, all(0.07135481627260025f)), all(1.5957691216057308f)));
    const V e = exp_minus(absolute(z)), large = div(one, add(one, e)), small = mul(e, large);
    V bend = mul(x, mul(large, small));
    if (UNIT == Unit::gelu_tanh)
        bend = mul(bend, add(mul(square, all(0.21406444881780073f)), all(1.5957691216057308f)));
    return add(where_less(z, zero, small, large), bend);
}

template <Unit UNIT>
void slope32(const uint32_t *x, float *y, int64_t n, const void *, int32_t) {
    const float *from = reinterpret_cast<const float *>(x);
    int64_t i = 0;
    for (; i + L <= n; i += L) storeu(y + i, slope_value<UNIT>(loadu(from + i)));
    if (i < n) {
        const uint32_t lanes = (1u << (n - i)) - 1;
        store_some(y + i, lanes, slope_value<UNIT>(load_some(from + i, lanes)));
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

// The int8 kernels, built once for each instruction set. See kernels.h for what they compute.
#include "engine/int8/kernels.h"

#include <stddef.h>
#include <stdint.h>

#include <type_traits>
#include <utility>

#include "isa.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(RAREFY_NEON_BUILD)
#include <arm_neon.h>
#endif

namespace rarefy {
namespace RAREFY_ISA {
namespace {

using namespace int8;

#include "bytes-inl.h"

#define RAREFY_UNROLL _Pragma("GCC unroll 8")

// The sums of a row over any four weights at a time, whose pixels lie in planes of their own. FAR: whether weights are
// fetched ahead; blocks, of which there are fewer, took 1.02 times as long with it on an AMD EPYC with AVX-512.
struct Any {
    static constexpr int OFFSETS = QUAD, WIDTH = QUAD;
    static constexpr bool IN_LINE = false, FAR = true;
    template <int N, int T>
    static inline __attribute__((always_inline)) void add(Sums (&s)[T], const uint8_t *x, const int32_t *o,
                                                          const int8_t *w) {
        constexpr int WHOLE = N / QUARTERS;
        const Weights weights(w);
        RAREFY_UNROLL for (int t = 0; t < WHOLE; ++t) RAREFY_ISA::add(s[t], x + t * B, o, weights);
        if constexpr (WHOLE < T) add_half(s[WHOLE], x + WHOLE * B, o, weights);
    }
};

#if !defined(RAREFY_NO_BLOCKS)
// The sums over blocks of four channels, whose pixels are interleaved.
struct Blocks {
    static constexpr int OFFSETS = BLOCKS_AT_ONCE, WIDTH = QUAD * BLOCKS_AT_ONCE;
    static constexpr bool IN_LINE = true, FAR = false;
    template <int N, int T>
    static inline __attribute__((always_inline)) void add(Sums (&s)[T], const uint8_t *x, const int32_t *o,
                                                          const int8_t *w) {
        constexpr int LAST = T - 1;
        const Block weights(w);
        RAREFY_UNROLL for (int t = 0; t < LAST; ++t) add_blocks<QUARTERS>(s[t], x + t * B * QUAD, o, weights);
        add_blocks<N - QUARTERS * LAST>(s[LAST], x + LAST * B * QUAD, o, weights);
    }
};
#endif

inline Ends ends_of(const RowsCall &c) {
    const bool bytes = c.y != nullptr;  // low and high are then from 0 to 255
    return {c.low, c.high, byte(bytes ? static_cast<uint8_t>(c.low) : 0),
            byte(bytes ? static_cast<uint8_t>(c.high) : 0)};
}

// Makes bytes or floats of the sums of row r, for a vector of the tile's pixels from `at` on.
template <bool IN_LINE>
inline __attribute__((always_inline)) void finish(const RowsCall &c, const Ends &ends, int64_t r, int64_t at,
                                                  const Sums &s) {
    Results result = results(s, c.multipliers[r], c.biases[r]);
    if (c.residual) add_bytes<IN_LINE>(result, c.residual + r * c.residual_stride + at, c.other);
    if (!c.y) return put_floats<IN_LINE>(result, c.low, c.high, c.floats + r * c.floats_stride + at);
    I v = rounded<IN_LINE>(result, ends, c.bounded);
    if (c.mask) v = select(bytes(c.mask + at), v, byte(c.zero_point));
    put(c.y + r * c.y_stride + at, v);
}

// Weights are read once a run, from far away: so many quads before they are used.
constexpr int AHEAD = 128;

// Tiles of N quarters of vectors of pixels, R rows at once: the sums of few pixels wait for one another.
template <class Quads, int N, int R>
void rows(const RowsCall *call) {
    constexpr int T = (N + QUARTERS - 1) / QUARTERS;
    const RowsCall &c = *call;
    const Ends ends = ends_of(c);
    const auto some = [&](int64_t row, auto many) {
        constexpr int M = decltype(many)::value;
        Sums s[M][T];
        const int32_t *o[M];
        const int8_t *w[M];
        int64_t left[M], common = INT64_MAX;
        RAREFY_UNROLL for (int r = 0; r < M; ++r) {
            RAREFY_UNROLL for (int t = 0; t < T; ++t) s[r][t] = sums_of(c.first[row + r]);
            const int64_t start = c.starts[row + r];
            o[r] = c.offsets + start * Quads::OFFSETS;
            w[r] = c.weights + start * Quads::WIDTH;
            left[r] = c.starts[row + r + 1] - start;
            common = left[r] < common ? left[r] : common;
        }
        const auto next = [&](int r) {
            if (Quads::FAR) {
                __builtin_prefetch(o[r] + AHEAD * Quads::OFFSETS);
                __builtin_prefetch(w[r] + AHEAD * Quads::WIDTH);
            }
            Quads::template add<N>(s[r], c.x, o[r], w[r]);
            o[r] += Quads::OFFSETS, w[r] += Quads::WIDTH;
        };
        for (int64_t i = 0; i < common; ++i) RAREFY_UNROLL for (int r = 0; r < M; ++r) next(r);
        RAREFY_UNROLL for (int r = 0; r < M; ++r) for (int64_t i = common; i < left[r]; ++i) next(r);
        RAREFY_UNROLL for (int r = 0; r < M; ++r) RAREFY_UNROLL for (int t = 0; t < T; ++t)
            finish<Quads::IN_LINE>(c, ends, row + r, t * B, s[r][t]);
    };
    int64_t row = 0;
    for (; row + R <= c.rows; row += R) some(row, std::integral_constant<int, R>());
    for (; row < c.rows; ++row) some(row, std::integral_constant<int, 1>());
}

#if !defined(RAREFY_NO_BLOCKS)
// As many rows of sums at once as there are registers for.
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int TOGETHER = 3;
#else
constexpr int TOGETHER = 4;
#endif

// The same of N quarters of one vector, some rows at once.
template <int N>
void dense_rows(const RowsCall *call) {
    const RowsCall &c = *call;
    const Ends ends = ends_of(c);
    const int64_t *start = c.shared_starts;
    for (int64_t row = -c.skipped; row < c.rows; row += TOGETHER, ++start) {
        Sums s[TOGETHER], all[TOGETHER];
        RAREFY_UNROLL for (int r = 0; r < TOGETHER; ++r) {
            const int64_t there = row + r < 0 ? 0 : row + r < c.rows ? row + r : c.rows - 1;
            s[r] = sums_of(c.first[there]);
        }
        const int32_t *o = c.shared_offsets + start[0] * BLOCKS_AT_ONCE,
                      *end = c.shared_offsets + start[1] * BLOCKS_AT_ONCE;
        const int8_t *w = c.shared + start[0] * Blocks::WIDTH * TOGETHER;
        for (; o != end; o += BLOCKS_AT_ONCE, w += Blocks::WIDTH * TOGETHER) {
            __builtin_prefetch(w + AHEAD * Blocks::WIDTH * TOGETHER);
            add_together<N>(s, c.x, o, w);
        }
        RAREFY_UNROLL for (int r = 0; r < TOGETHER; ++r) all[r] = s[r];
        const int64_t last = c.rows - row < TOGETHER ? c.rows - row : TOGETHER;
        for (int64_t r = row < 0 ? -row : 0; r < last; ++r) {
            Sums own[1] = {all[r]};
            if (c.starts) {
                o = c.offsets + c.starts[row + r] * BLOCKS_AT_ONCE;
                end = c.offsets + c.starts[row + r + 1] * BLOCKS_AT_ONCE;
                w = c.weights + c.starts[row + r] * Blocks::WIDTH;
                for (; o != end; o += BLOCKS_AT_ONCE, w += Blocks::WIDTH) Blocks::add<N>(own, c.x, o, w);
            }
            finish<Blocks::IN_LINE>(c, ends, row + r, 0, own[0]);
        }
    }
}
#endif

void interleave(const uint8_t *const *planes, uint8_t *__restrict out, int64_t n) {
    const uint8_t *a = planes[0], *b = planes[1], *c = planes[2], *d = planes[3];
    const auto some = [=](int64_t i) {
        put_interleaved(out + 4 * i, bytes(a + i), bytes(b + i), bytes(c + i), bytes(d + i));
    };
    for (int64_t i = 0; i + B <= n; i += B) some(i);
    if (n >= B) return n % B ? some(n - B) : void();
    for (int64_t i = 0; i < n; ++i) {
        out[4 * i] = a[i] ^ CENTRE;
        out[4 * i + 1] = b[i] ^ CENTRE;
        out[4 * i + 2] = c[i] ^ CENTRE;
        out[4 * i + 3] = d[i] ^ CENTRE;
    }
}

#if defined(__AVX512BW__)
// Every second pixel, half a vector of them at once.
bool every_second(const uint8_t *x, int64_t x_line, uint8_t *out, int64_t out_line, int64_t n, int64_t lines) {
    constexpr int64_t SOME = B / 2;
    const __mmask32 all = ~__mmask32{0}, last = n % SOME ? all >> (SOME - n % SOME) : all;
    for (int64_t r = 0; r < lines; ++r, x += x_line, out += out_line)
        for (int64_t i = 0; i < n; i += SOME) {
            const __mmask32 there = i + SOME < n ? all : last;
            const __m512i both = _mm512_maskz_loadu_epi16(there, x + 2 * i);
            _mm256_mask_storeu_epi8(out + i, there, _mm512_cvtepi16_epi8(both));
        }
    return true;
}
#else
// Lines of at least SOME pixels, every second of which `take` takes, SOME of the result at once.
template <int64_t SOME, void (*take)(const uint8_t *, uint8_t *)>
void second(const uint8_t *x, int64_t x_line, uint8_t *out, int64_t out_line, int64_t n, int64_t lines) {
    for (int64_t r = 0; r < lines; ++r, x += x_line, out += out_line) {
        for (int64_t i = 0; i + SOME <= n; i += SOME) take(x + 2 * i, out + i);
        if (n % SOME) take(x + 2 * (n - SOME), out + n - SOME);
    }
}

// Every second byte of 4 to 7 pixels.
void alternate_some(const uint8_t *x, uint8_t *out, int64_t n) {
    uint8_t all[8];
    alternate_eight(x, all);
    __builtin_memcpy(out, all, 4);
    __builtin_memcpy(out + n - 4, all + n - 4, 4);
}

bool every_second(const uint8_t *x, int64_t x_line, uint8_t *out, int64_t out_line, int64_t n, int64_t lines) {
    if (n >= B) second<B, alternate>(x, x_line, out, out_line, n, lines);
    else if (n >= 8) second<8, alternate_eight>(x, x_line, out, out_line, n, lines);
    else if (n >= 4)
        for (int64_t r = 0; r < lines; ++r) alternate_some(x + r * x_line, out + r * out_line, n);
    return n >= 4;
}
#endif

void every(const uint8_t *x, int64_t x_line, int64_t step, uint8_t *out, int64_t out_line, int64_t n, int64_t lines) {
    if (step == 2 && every_second(x, x_line, out, out_line, n, lines)) return;
    for (int64_t r = 0; r < lines; ++r, x += x_line, out += out_line) {
        if (step == 1) __builtin_memcpy(out, x, static_cast<size_t>(n));
        else
            for (int64_t i = 0; i < n; ++i) out[i] = x[step * i];
    }
}

// The sum of n pixels of so many lines.
int64_t total(const uint8_t *x, int64_t x_line, int64_t n, int64_t lines) {
#if defined(__AVX512BW__)
    const __mmask64 all = ~__mmask64{0}, last = n % B ? all >> (B - n % B) : all;
    I sum = _mm512_setzero_si512();
    for (int64_t r = 0; r < lines; ++r, x += x_line)
        for (int64_t i = 0; i < n; i += B) {
            const I pixels = _mm512_maskz_loadu_epi8(i + B < n ? all : last, x + i);
            sum = _mm512_add_epi64(sum, _mm512_sad_epu8(pixels, _mm512_setzero_si512()));
        }
    return _mm512_reduce_add_epi64(sum);
#else
    int64_t sum = 0;
    for (int64_t r = 0; r < lines; ++r, x += x_line)
        for (int64_t i = 0; i < n; ++i) sum += x[i];
    return sum;
#endif
}

void largest(const uint8_t *const *from, int64_t count, uint8_t *__restrict to, int64_t n) {
    const auto some = [=](int64_t i) {
        I most = bytes(from[0] + i);
        for (int64_t k = 1; k < count; ++k) most = larger(most, bytes(from[k] + i));
        put(to + i, most);
    };
    for (int64_t i = 0; i + B <= n; i += B) some(i);
    if (n >= B) return n % B ? some(n - B) : void();
    for (int64_t i = 0; i < n; ++i) {
        to[i] = from[0][i];
        for (int64_t k = 1; k < count; ++k) to[i] = to[i] > from[k][i] ? to[i] : from[k][i];
    }
}

// The whole number nearest to t between low and high, which are from 0 to 255: the last bits of 1.5 * 2^23 + t.
inline uint8_t nearest(float t, float low, float high) {
    t = t > low ? t : low;
    t = t < high ? t : high;
    t = t + 12582912.0f;
    uint32_t bits;
    __builtin_memcpy(&bits, &t, sizeof bits);
    return static_cast<uint8_t>(bits);
}

void quantize(const float *__restrict x, uint8_t *__restrict out, int64_t n, const Factors *factors) {
    const Factors f = *factors;
    for (int64_t i = 0; i < n; ++i) {
        float t = x[i] * f.multiplier;
        t = t + f.bias;
        out[i] = nearest(t == t ? t : f.nan, f.low, f.high);
    }
}

void add(const uint8_t *__restrict x, const uint8_t *__restrict y, uint8_t *__restrict out, int64_t n,
         const Combination *how) {
    const Combination c = *how;
    for (int64_t i = 0; i < n; ++i) {
        float t = static_cast<float>(x[i]) * c.multiplier;
        t = t + c.bias;
        const float second = static_cast<float>(y[i]) * c.other;
        out[i] = nearest(t + second, c.low, c.high);
    }
}

void multiply(const uint8_t *__restrict x, const uint8_t *__restrict y, uint8_t *__restrict out, int64_t n,
              const Combination *how) {
    const Combination c = *how;
    for (int64_t i = 0; i < n; ++i) {
        const float t = static_cast<float>((x[i] - c.zero_x) * (y[i] - c.zero_y)) * c.multiplier;
        out[i] = nearest(t + c.bias, c.low, c.high);
    }
}

void look_up(const uint8_t *x, const uint8_t *table, uint8_t *out, int64_t n) {
    const Table all(table);
    int64_t i = 0;
    for (; i + B <= n; i += B) put(out + i, all[bytes(x + i)]);
    for (; i < n; ++i) out[i] = table[x[i]];
}

#if defined(__AVX2__)
// In 16 bits, sixteen at a time: |w x + w x| < 2^31.
inline __m256i add_sixteen(__m256i sum, __m128i x, __m128i w) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_cvtepu8_epi16(x), _mm256_cvtepi8_epi16(w)));
}
inline __m128i sixteen(const void *p) { return _mm_loadu_si128(reinterpret_cast<const __m128i *>(p)); }
inline int32_t total(__m256i a) {
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xB1)));
}

void dots(const uint8_t *x, const int8_t *w, int64_t count, int32_t *sums) {
    __m256i a[ROWS] = {};
    for (int64_t k = 0; k < count; k += PART, w += ROWS * PART) {
        _mm_prefetch(reinterpret_cast<const char *>(w) + 2048, _MM_HINT_T0);
        const __m256i pixels = _mm256_cvtepu8_epi16(sixteen(x + k));
        RAREFY_UNROLL for (int r = 0; r < ROWS; ++r) {
            const __m256i weights = _mm256_cvtepi8_epi16(sixteen(w + PART * r));
            a[r] = _mm256_add_epi32(a[r], _mm256_madd_epi16(pixels, weights));
        }
    }
    for (int r = 0; r < ROWS; ++r) sums[r] = total(a[r]);
}

// The pixels of four blocks; loads one by one take less than half of a gather's time on an AMD EPYC.
inline __m128i four_blocks(const uint8_t *x, const uint16_t *index) {
    __m128 four[4];
    for (int k = 0; k < 4; ++k) four[k] = _mm_load_ss(reinterpret_cast<const float *>(x + QUAD * index[k]));
    return _mm_castps_si128(_mm_movelh_ps(_mm_unpacklo_ps(four[0], four[1]), _mm_unpacklo_ps(four[2], four[3])));
}

int32_t dot_blocks(const uint8_t *x, const int8_t *w, const uint16_t *index, int64_t count) {
    __m256i a = _mm256_setzero_si256(), b = a;
    for (int64_t k = 0; k < count; k += 32, index += 8) {
        a = add_sixteen(a, four_blocks(x, index), sixteen(w + k));
        b = add_sixteen(b, four_blocks(x, index + 4), sixteen(w + k + 16));
    }
    return total(_mm256_add_epi32(a, b));
}

template <int K>
inline __m128i pixels(__m128i v, const uint8_t *x, const uint16_t *index) {
    v = _mm_insert_epi8(v, x[index[K]], K);
    if constexpr (K + 1 < 16) v = pixels<K + 1>(v, x, index);
    return v;
}

int32_t dot_sparse(const uint8_t *x, const int8_t *w, const uint16_t *index, int64_t count) {
    __m256i sum = _mm256_setzero_si256();
    for (int64_t k = 0; k < count; k += 16)
        sum = add_sixteen(sum, pixels<0>(_mm_setzero_si128(), x, index + k), sixteen(w + k));
    return total(sum);
}
#else
#if defined(RAREFY_NEON_BUILD)
void dots(const uint8_t *x, const int8_t *w, int64_t count, int32_t *sums) {
    int32x4_t a[ROWS] = {vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0)};
    for (int64_t k = 0; k < count; k += PART, w += ROWS * PART)
        for (int r = 0; r < ROWS; ++r) a[r] = products(a[r], bytes(x + k), vld1q_s8(w + PART * r));
    for (int r = 0; r < ROWS; ++r) sums[r] = vaddvq_s32(a[r]);
}
#else
void dots(const uint8_t *x, const int8_t *w, int64_t count, int32_t *sums) {
    for (int r = 0; r < ROWS; ++r) sums[r] = 0;
    for (int64_t k = 0; k < count; k += PART)
        for (int r = 0; r < ROWS; ++r, w += PART)
            for (int i = 0; i < PART; ++i) sums[r] += static_cast<int16_t>(w[i]) * static_cast<int16_t>(x[k + i]);
}
#endif

int32_t dot_blocks(const uint8_t *x, const int8_t *w, const uint16_t *index, int64_t count) {
    int32_t sum = 0;
    for (int64_t k = 0; k < count; k += QUAD) {
        const uint8_t *four = x + QUAD * index[k / QUAD];
        for (int64_t i = 0; i < QUAD; ++i) sum += w[k + i] * four[i];
    }
    return sum;
}

int32_t dot_sparse(const uint8_t *x, const int8_t *w, const uint16_t *index, int64_t count) {
    int32_t a[4] = {};
    for (int64_t k = 0; k < count; k += 4)
        for (int i = 0; i < 4; ++i) a[i] += w[k + i] * x[index[k + i]];
    return (a[0] + a[1]) + (a[2] + a[3]);
}
#endif

#include "bitmask-inl.h"
#include "windows-inl.h"

#if defined(__AVX512F__) || defined(RAREFY_NEON_BUILD)
constexpr bool MANY_REGISTERS = true;  // 32
#else
constexpr bool MANY_REGISTERS = false;
#endif
// Rows at once of tiles of so many quarters.
constexpr int rows_of(int quarters) { return MANY_REGISTERS && quarters <= 2 * QUARTERS ? 2 : 1; }

template <class Quads, int... N>
void put_rows(Kernels &k, Layout layout, std::integer_sequence<int, N...>) {
    ((k.rows[layout][N] = rows<Quads, N, rows_of(N)>), ...);
}

#if !defined(RAREFY_NO_BLOCKS)
template <int... N>
void put_quarters(Kernels &k, std::integer_sequence<int, N...>) {
    ((k.rows[BLOCKS][N + 1] = rows<Blocks, N + 1, 1>), ...);
    ((k.rows[DENSE][N % QUARTERS + 1] = dense_rows<N % QUARTERS + 1>), ...);
}
#endif

Kernels make() {
    Kernels k = {};
    k.pixels = B;
    k.pairs = PAIRS;
    k.centre = CENTRE;
#if defined(__AVX2__)
    k.shuffles = 1;
#endif
#if defined(__AVX512VBMI2__) && defined(__AVX512VNNI__)
    k.spreads = 1;
#endif
    put_rows<Any>(k, ANY, std::integer_sequence<int, QUARTERS, 2 * QUARTERS>());
    if constexpr (MANY_REGISTERS) put_rows<Any>(k, ANY, std::integer_sequence<int, 4 * QUARTERS>());
#if defined(__AVX512BW__)
    put_rows<Any>(k, ANY, std::integer_sequence<int, 2, 6, 10, 12, 14>());
#endif
#if !defined(RAREFY_NO_BLOCKS)
    put_quarters(k, std::make_integer_sequence<int, 2 * QUARTERS>());
    if constexpr (MANY_REGISTERS) put_rows<Blocks>(k, BLOCKS, std::integer_sequence<int, 4 * QUARTERS>());
    k.together = TOGETHER;
#endif
    k.interleave = interleave;
    k.every = every;
    k.total = RAREFY_ISA::total;
    k.largest = largest;
    k.quantize = quantize;
    k.add = rarefy::RAREFY_ISA::add;
    k.multiply = multiply;
    k.look_up = look_up;
    k.dots = dots;
    k.dot_sparse = dot_sparse;
    k.dot_blocks = dot_blocks;
    k.windows = windows;
    k.bitmask = bitmask;
    return k;
}

const Kernels *int8_functions() {
    static const Kernels kernels = make();
    return &kernels;
}

}  // namespace

extern const rarefy_kernel int8_kernels[] = {RAREFY_KERNEL("int8", int8_functions)};
extern const int64_t int8_kernel_count = sizeof int8_kernels / sizeof *int8_kernels;

}  // namespace RAREFY_ISA
}  // namespace rarefy

// sigmoid, SiLU and GELU of bf16 on AVX-512, correctly rounded: x * 1 / (1 + 2^z) in float32, rounded to bf16.
//
// No result lies near enough to a tie for the float32 errors to matter, for inputs up to the limit of each function;
// this was decided by trying all of them. Beyond the limit, and for NaN, the answer is read from the table of all
// answers: a branch, which random data may take by surprise, so one for all vectors at a time, and limits that are far
// out.
#pragma once

#include "rarefy_act_avx512.h"

namespace rarefy {
namespace {

// 2^(i/32) as bits, less i << 18: the exponent is added as (32 n + i) << 18, which brings i along.
struct ExpTable {
    uint32_t bits[32];
};

alignas(64) constexpr ExpTable EXP2 = {
    {0x3F800000, 0x3F7ECD87, 0x3F7DAAC3, 0x3F7C980F, 0x3F7B95C2, 0x3F7AA43A, 0x3F79C3D3, 0x3F78F4F0,
     0x3F7837F0, 0x3F778D3A, 0x3F76F532, 0x3F767043, 0x3F75FED7, 0x3F75A15B, 0x3F75583F, 0x3F7523F6,
     0x3F7504F3, 0x3F74FBAF, 0x3F7508A4, 0x3F752C4D, 0x3F75672A, 0x3F75B9BE, 0x3F76248C, 0x3F76A81E,
     0x3F7744FD, 0x3F77FBB8, 0x3F78CCDF, 0x3F79B907, 0x3F7AC0C7, 0x3F7BE4BA, 0x3F7D257D, 0x3F7E83B3}};

enum class Gated { sigmoid, silu, gelu, gelu_tanh };

// The largest |x|, as bf16 bits, whose result float32 decides: 2^z neither over- nor underflows, and z is precise.
constexpr uint16_t limit_of(Gated kind) {
    return kind == Gated::gelu ? 0x40D0 : kind == Gated::gelu_tanh ? 0x411E : 0x42AE;
}

template <Gated KIND>
struct Gate {
    const uint16_t *answers;  // for all 65536 inputs
    __m512i magnitude = all16(0x7FFF), sign = all16(0x8000), limit = all16(limit_of(KIND));
    __m512i high = all32(0xFFFF0000), half = all32(0x8000);
    // the high halves of two vectors of float32, interleaved
    __m512i pack =
        _mm512_add_epi16(_mm512_set1_epi32(0x00210001),
                         _mm512_mullo_epi32(_mm512_set1_epi32(0x00020002),
                                            _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0)));
    __m512 exp0 = _mm512_loadu_ps(reinterpret_cast<const float *>(EXP2.bits));
    __m512 exp1 = _mm512_loadu_ps(reinterpret_cast<const float *>(EXP2.bits + 16));

    explicit Gate(const uint16_t *table) : answers(table) {}

    static __m512 all(float value) { return _mm512_set1_ps(value); }

    template <int N>
    void apply(__m512i (&x)[N]) const {
        __m512 y[2 * N];
        for (int i = 0; i < N; ++i) {
            y[2 * i] = _mm512_castsi512_ps(_mm512_slli_epi32(x[i], 16));
            y[2 * i + 1] = _mm512_castsi512_ps(_mm512_and_si512(x[i], high));
        }
        wide(y);
        __mmask32 outside[N], any = 0;
        __m512i result[N];
        for (int i = 0; i < N; ++i) {
            const __m512i even = _mm512_add_epi32(_mm512_castps_si512(y[2 * i]), half);
            const __m512i odd = _mm512_add_epi32(_mm512_castps_si512(y[2 * i + 1]), half);
            __m512i r = _mm512_permutex2var_epi16(even, pack, odd);
            if (KIND != Gated::sigmoid) r = select(sign, x[i], r);
            if (KIND == Gated::gelu) {  // x itself above the limit, NaN included
                outside[i] = _mm512_cmpgt_epu16_mask(x[i], all16(static_cast<uint16_t>(0x8000 + limit_of(KIND))));
                r = _mm512_mask_mov_epi16(r, _mm512_cmpgt_epi16_mask(x[i], limit), x[i]);
            } else {
                outside[i] = _mm512_cmpgt_epu16_mask(_mm512_and_si512(x[i], magnitude), limit);
            }
            // here the true result is nearer to a tie than float32 can tell
            if (KIND == Gated::sigmoid || KIND == Gated::silu)
                outside[i] |= _mm512_cmpeq_epi16_mask(x[i], all16(0x3C00));
            if (KIND == Gated::sigmoid) outside[i] |= _mm512_cmpeq_epi16_mask(x[i], all16(0x3E69));
            any |= outside[i];
            result[i] = r;
        }
        if (__builtin_expect(any != 0, 0)) {
            for (int i = 0; i < N; ++i) result[i] = look_up(x[i], result[i], outside[i]);
        }
        for (int i = 0; i < N; ++i) x[i] = result[i];
    }
    RAREFY_ONE

    __attribute__((noinline)) __m512i look_up(__m512i x, __m512i y, __mmask32 outside) const {
        alignas(64) uint16_t from[32], to[32];
        _mm512_store_si512(from, x);
        _mm512_store_si512(to, y);
        for (uint32_t rest = outside; rest; rest &= rest - 1) {
            const int lane = __builtin_ctz(rest);
            to[lane] = answers[from[lane]];
        }
        return _mm512_load_si512(to);
    }

    // 32 lanes of float32 in vectors: the function, in place.
    template <int N>
    void wide(__m512 (&x)[N]) const {
        const __m512 magic = all(1.5f * (1 << 18));  // adding it leaves multiples of 1/32 in the low bits
        __m512 t[N], f[N], y[N];
        if (KIND == Gated::sigmoid || KIND == Gated::silu) {
            const __m512 k = all(-1.44269504f);
            RAREFY_EACH t[i] = _mm512_fmadd_ps(x[i], k, magic);
            RAREFY_EACH f[i] = _mm512_fmsub_ps(x[i], k, _mm512_sub_ps(t[i], magic));
        } else {
            RAREFY_EACH y[i] = _mm512_mul_ps(x[i], x[i]);
            if (KIND == Gated::gelu_tanh) {
                // z = -2 log2(e) sqrt(2/pi) (x + 0.044715 x^3)
                RAREFY_EACH y[i] = _mm512_fmadd_ps(y[i], all(-0.102943240f), all(-2.30220819f));
            } else {
                // z = -log2(Phi(x) / Phi(-x)) = x P(x^2)
                constexpr float P[] = {-2.3022377490997314f,    -0.10475478321313858f,   2.9396600439213216e-05f,
                                       0.00018221413483843207f, -1.547751708130818e-05f, 7.711315674896468e-07f,
                                       -2.547687572018731e-08f, 5.628076338304311e-10f,  -7.995158354812126e-12f,
                                       6.603264891260827e-14f,  -2.4087822368855307e-16f};
                constexpr int DEGREE = sizeof P / sizeof *P - 1;
                RAREFY_EACH f[i] = all(P[DEGREE]);
                _Pragma("GCC unroll 16") for (int k = DEGREE - 1; k >= 0; --k) RAREFY_EACH f[i] =
                    _mm512_fmadd_ps(f[i], y[i], all(P[k]));
                RAREFY_EACH y[i] = f[i];
            }
            RAREFY_EACH t[i] = _mm512_fmadd_ps(x[i], y[i], magic);
            RAREFY_EACH f[i] = _mm512_fmsub_ps(x[i], y[i], _mm512_sub_ps(t[i], magic));
        }
        // 2^z = 2^n 2^(i/32) (1 + f (c1 + f c2)),  |f| <= 1/64; c1 takes up most of the cubic term
        RAREFY_EACH y[i] =
            _mm512_fmadd_ps(_mm512_fmadd_ps(all(0.240226507f), f[i], all(0.693155500f)), f[i], all(1.0f));
        RAREFY_EACH {
            const __m512i bits = _mm512_castps_si512(t[i]);
            const __m512i root = _mm512_castps_si512(_mm512_permutex2var_ps(exp0, bits, exp1));
            const __m512 power = _mm512_castsi512_ps(_mm512_add_epi32(root, _mm512_slli_epi32(bits, 18)));
            y[i] = _mm512_fmadd_ps(y[i], power, all(1.0f));  // 1 + 2^z
        }
        // x / y: an estimate of 1/y and a step of Newton
        RAREFY_EACH f[i] = _mm512_rcp14_ps(y[i]);
        RAREFY_EACH y[i] = _mm512_fnmadd_ps(y[i], f[i], all(2.0f));
        if (KIND == Gated::sigmoid) {
            RAREFY_EACH x[i] = _mm512_mul_ps(f[i], y[i]);
        } else {
            // the least subnormal added: x/2 + x^2/4 of a subnormal x is above x/2, which may be a tie
            RAREFY_EACH x[i] = _mm512_fmadd_ps(_mm512_mul_ps(x[i], f[i]), y[i], all(1.40129846e-45f));
        }
    }
};

}  // namespace
}  // namespace rarefy

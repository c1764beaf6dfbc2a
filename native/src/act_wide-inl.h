// sigmoid, SiLU and GELU of float32, computed in double and rounded once: within 0.51 units of the last place.
//
// Plain C that compilers turn into vectors; e^-a is good to 1e-11, which moves the rounding of one result in some
// millions. Included by act.cpp.
#pragma once

enum class Wide { sigmoid, silu, gelu, gelu_tanh };

inline double positive_bits(int64_t bits) {
    double value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}

inline int64_t double_bits(double value) {
    int64_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    return bits;
}

// e^-a for a >= 0; below 1e-300 it stays there.
inline double exp_minus(double a) {
    a = a < 690.0 ? a : 690.0;
    // e^-a = 2^n e^r,  n = round(-a / log 2), |r| <= log(2) / 2; adding 1.5 * 2^52 leaves n in the low bits
    const double magic = 6755399441055744.0, t = a * -1.4426950408889634 + magic, n = t - magic;
    const double r = (-a - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10;
    double p = 1.0 / 3628800;
    p = p * r + 1.0 / 362880;
    p = p * r + 1.0 / 40320;
    p = p * r + 1.0 / 5040;
    p = p * r + 1.0 / 720;
    p = p * r + 1.0 / 120;
    p = p * r + 1.0 / 24;
    p = p * r + 1.0 / 6;
    p = p * r + 0.5;
    p = p * r + 1.0;
    p = p * r + 1.0;
    return positive_bits(double_bits(p) + static_cast<int64_t>(static_cast<uint64_t>(double_bits(t)) << 52));
}

// Phi(-a) = erfc(z) / 2 for a >= 0, z = a / sqrt 2:  erfc(z) = t e^(-z^2 + P(t)),  t = 1 / (1 + z / 2); P interpolates
// at Chebyshev nodes of t in [1/7, 1], to 3e-11. Smaller t, z above 12, underflows whatever P says.
inline double normal_tail(double a) {
    constexpr double P[] = {-0.57487630161613,       0.58560210505031,       0.019323643488389056,
                            -0.03190743191119737,    -0.0017648133604631821, 0.004319919601974832,
                            -0.00020530687348825638, -0.0007047612834722094, 0.0001647629295146515,
                            0.00010088432153106273,  -5.441423160614242e-05, -8.69637313950795e-06,
                            1.178517494810079e-05,   -4.958619524137654e-09, -1.3699864756678088e-06};
    a = a < 40.0 ? a : 40.0;
    const double z = a * 0.70710678118654752440, t = 1.0 / (1.0 + 0.5 * z);
    const double v = (t - 0.5714285714285714) * 2.3333333333333335;
    double p = P[14];
    for (int k = 13; k >= 0; --k) p = p * v + P[k];
    return 0.5 * t * exp_minus(z * z - p);
}

template <Wide KIND>
inline float wide_value(float narrow) {
    // minus infinity: a finite number gives its limit, -0
    const double x = narrow < -1000.0f ? -1000.0 : static_cast<double>(narrow);
    double y;
    if (KIND == Wide::gelu) {
        const double tail = normal_tail(x < 0.0 ? -x : x);
        y = x * (x < 0.0 ? tail : 1.0 - tail);
    } else {
        // 2 sqrt(2/pi) (x + 0.044715 x^3) for gelu_tanh
        const double cubed = 1.5957691216057307118 * (x + 0.044715 * (x * x * x));
        const double z = KIND == Wide::gelu_tanh ? cubed : x;
        const double e = exp_minus(z < 0.0 ? -z : z), gate = (z < 0.0 ? e : 1.0) / (1.0 + e);
        y = KIND == Wide::sigmoid ? gate : x * gate;
    }
    const float rounded = static_cast<float>(y);
    return narrow == narrow ? rounded : narrow;
}

template <Wide KIND>
void wide(const uint32_t *x, uint32_t *y, int64_t n, const void *) {
    // through a small buffer: vectors may then be read and written whole, in place too
    constexpr int BLOCK = 64;
    for (int64_t at = 0; at < n; at += BLOCK) {
        const int64_t size = n - at < BLOCK ? n - at : BLOCK;
        float in[BLOCK] = {}, out[BLOCK];
        __builtin_memcpy(in, x + at, sizeof(float) * static_cast<size_t>(size));
        for (int i = 0; i < BLOCK; ++i) out[i] = wide_value<KIND>(in[i]);
        __builtin_memcpy(y + at, out, sizeof(float) * static_cast<size_t>(size));
    }
}

// QuickGELU, Mish, softplus, hardswish, ELU and exp of float32, computed in double and rounded once: within 0.51 units
// of the last place. Built once for each instruction set.
//
// Plain C that compilers turn into vectors; e^-a is good to 1e-11, which moves the rounding of one result in some
// millions.
#include <stddef.h>

#include "isa.h"
#include "mode.h"
#include "parallel.h"

namespace rarefy {
namespace RAREFY_ISA {
namespace {

constexpr int64_t CHUNK = 1 << 16;   // values a unit of work
constexpr int64_t SERIAL = 1 << 18;  // below this many values a thread costs more than it saves

inline double from_bits(int64_t bits) {
    double value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}

inline int64_t bits_of(double value) {
    int64_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    return bits;
}

// e^-a = power (1 + less_one) for a >= 0; below 1e-300 it stays there.
struct Exponential {
    double less_one, power;
    double value() const { return (less_one + 1.0) * power; }
};

inline Exponential exp_minus(double a) {
    a = a < 690.0 ? a : 690.0;
    // e^-a = 2^-n e^r,  n = round(a / log 2), |r| <= log(2) / 2; adding 1.5 * 2^52 leaves n in the low bits
    const double magic = 6755399441055744.0, t = a * 1.4426950408889634 + magic, n = t - magic;
    const double r = (n * 0.693147180369123816490 - a) + n * 1.90821492927058770002e-10;
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
    // the field of the exponent is 1023 - n
    return {p * r, from_bits(static_cast<int64_t>((1023u - static_cast<uint64_t>(bits_of(t))) << 52))};
}

// log(1 + e) = s (2 + 2/3 s^2 + 2/5 s^4 ...),  s = e / (2 + e), for 0 <= e <= 1.
inline double log1p_of(double e) {
    const double s = e / (2.0 + e), square = s * s;
    double p = 2.0 / 25;
    p = p * square + 2.0 / 23;
    p = p * square + 2.0 / 21;
    p = p * square + 2.0 / 19;
    p = p * square + 2.0 / 17;
    p = p * square + 2.0 / 15;
    p = p * square + 2.0 / 13;
    p = p * square + 2.0 / 11;
    p = p * square + 2.0 / 9;
    p = p * square + 2.0 / 7;
    p = p * square + 2.0 / 5;
    p = p * square + 2.0 / 3;
    p = p * square + 2.0;
    return s * p;
}

enum class Wide { quick_gelu, mish, softplus, hardswish, elu, exp };

template <Wide KIND>
inline float wide_value(float narrow) {
    // minus infinity: a finite number gives its limit
    const double x = narrow < -1000.0f ? -1000.0 : static_cast<double>(narrow);
    double y;
    if (KIND == Wide::hardswish) {
        double inside = x + 3.0;
        inside = inside < 0.0 ? 0.0 : inside;
        y = x * (inside > 6.0 ? 6.0 : inside) / 6.0;
    } else {
        const double z = KIND == Wide::quick_gelu ? 1.702 * x : x;
        const bool positive = z >= 0.0;
        const Exponential part = exp_minus(z < 0.0 ? -z : z);
        const double e = part.value();
        if (KIND == Wide::quick_gelu) {
            y = x * ((positive ? 1.0 : e) / (1.0 + e));
        } else if (KIND == Wide::mish) {
            // tanh(log(1 + e^x)) = w / (w + 2),  w = e^x (e^x + 2); over e^2x for positive x
            const double w = positive ? 1.0 + 2.0 * e : e * (e + 2.0);
            y = x * (w / (w + 2.0 * (positive ? e * e : 1.0)));
        } else if (KIND == Wide::softplus) {
            y = (x < 0.0 ? 0.0 : x) + log1p_of(e);
        } else if (KIND == Wide::elu) {
            // e^-a - 1 = 2^-n (e^r - 1) + (2^-n - 1); zero keeps its sign
            const double below = part.less_one * part.power + (part.power - 1.0);
            y = x >= 0.0 ? x : below;
        } else {
            y = positive ? 1.0 / e : e;
        }
    }
    const float rounded = static_cast<float>(y);
    return narrow == narrow ? rounded : narrow;
}

template <Wide KIND>
void block(const uint32_t *x, uint32_t *y, int64_t n) {
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

struct Job {
    const uint32_t *x;
    uint32_t *y;
    int64_t n;
};

template <Wide KIND>
void wide(const uint32_t *x, uint32_t *y, int64_t n, const void *, int32_t threads) {
    Job job{x, y, n};
    auto chunk = [](void *context, int64_t index) {
        const Job &j = *static_cast<const Job *>(context);
        const DefaultMode mode;
        const int64_t begin = index * CHUNK;
        block<KIND>(j.x + begin, j.y + begin, j.n - begin < CHUNK ? j.n - begin : CHUNK);
    };
    parallel_for(n < SERIAL ? 1 : threads, (n + CHUNK - 1) / CHUNK, chunk, &job);
}

}  // namespace

extern const rarefy_kernel act_double_kernels[] = {
    RAREFY_KERNEL("act_quick_gelu32", wide<Wide::quick_gelu>),
    RAREFY_KERNEL("act_mish32", wide<Wide::mish>),
    RAREFY_KERNEL("act_softplus32", wide<Wide::softplus>),
    RAREFY_KERNEL("act_hardswish32", wide<Wide::hardswish>),
    RAREFY_KERNEL("act_elu32", wide<Wide::elu>),
    RAREFY_KERNEL("act_exp32", wide<Wide::exp>),
};
extern const int64_t act_double_kernel_count = sizeof act_double_kernels / sizeof *act_double_kernels;

}  // namespace RAREFY_ISA
}  // namespace rarefy

// Activation functions of vectors of float32, to a few units of the last place (ulp).
//
// Largest errors in ulp of the result (of 2^-126 where that is smaller), against double at every seventh float32; in
// brackets without fused multiply-adds, where these differ:
//     sigmoid, tanh  2.6
//     silu           3.2 from -88 on; below, its gate is denormal: off by 1.2e-43 at most
//     gelu           5.5 (7.2) from -3 on, 6 (21) from -8 on, 10.2 (72) below, where it is less than 5e-15
//     gelu_tanh      2.8 (3) from -1 on, 11 (16) from -3 on, 18 (36) from -5 on, 64 (122) from -8 on, 153 (210) below
// NaN stays NaN; x times a gate is NaN at minus infinity, as in PyTorch, but gelu is -0. Included by engine_kernels.cpp
// and act32.cpp, after vec-inl.h.
#pragma once

// e^x comes multiplied by this: no x of interest underflows, and a quotient of such numbers is rounded once, also where
// it is denormal.
constexpr float SCALE = 0x1p64f;

struct Power {
    V two;       // SCALE 2^n
    V less_one;  // e^r - 1
};

// e^(a b) = 2^n e^r,  n = round(a b / log 2), |r| <= log(2) / 2, for -131 <= a b <= 0. A fused a b is not rounded. It
// comes multiplied by 2^up: without, -87 <= a b.
inline Power power(V a, V b, int up = 64) {
    // added to n, this leaves n + up and a float's bias of exponents in the low bits
    const V magic = all(12582912.0f + 127.0f + static_cast<float>(up));
    const V shifted = fma(mul(a, b), all(1.44269504f), magic), n = sub(shifted, magic);
    V r = fma(a, b, mul(n, all(-0.693359375f)));
    r = fma(n, all(2.12194440e-4f), r);
    // e^r = 1 + r + r^2 S(r), S minimax by linear programming: e^r - 1 to 0.3 * 2^-24 of itself
    V s = fma(all(1.3882530620321631e-3f), r, all(8.366520516574383e-3f));
    s = fma(s, r, all(4.166720062494278e-2f));
    s = fma(s, r, all(0.1666654348373413f));
    s = fma(s, r, all(0.4999999701976776f));
    return {exponent(shifted), fma(mul(r, r), s, r)};
}

inline V scaled(const Power &p) { return fma(p.two, p.less_one, p.two); }

// 1 / (1 + e^-|z|) where x >= 0, e^-|z| / (1 + e^-|z|) where x < 0, of e^-|z| scaled
inline V gate(V x, V e) { return div(where_less(x, all(0.0f), e, all(SCALE)), add(all(SCALE), e)); }

inline V sigmoid(V x) { return gate(x, scaled(power(smaller(all(104.0f), absolute(x)), all(-1.0f)))); }

inline V silu(V x) { return mul(x, sigmoid(x)); }

// x sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3))
inline V gelu_tanh(V x) {
    const V a = smaller(all(11.0f), absolute(x));
    return mul(x, gate(x, scaled(power(a, fma(mul(a, a), all(-0.0713548162726009f), all(-1.5957691216057307f))))));
}

// x Phi(x) = max(x, 0) - |x| Phi(-|x|),  Phi(-a) = e^(-a^2/2) P(a) / Q(a) for a >= 0. P/Q minimax by Remez's exchange
// on [0, 14.5], in 50 digits: with the coefficients rounded to float32, 0.31 * 2^-24 of itself. Beyond, Phi(-a) is 0 in
// float32.
inline V gelu(V x) {
    const V a = smaller(all(14.5f), absolute(x));
    V p = fma(all(0.0041165836f), a, all(0.040635083f));
    p = fma(p, a, all(0.18324064f));
    p = fma(p, a, all(0.43830237f));
    p = fma(p, a, all(0.5f));
    V q = fma(all(SCALE * 0.010318626f), a, all(SCALE * 0.10186349f));
    q = fma(q, a, all(SCALE * 0.46948513f));
    q = fma(q, a, all(SCALE * 1.202526f));
    q = fma(q, a, all(SCALE * 1.6744897f));
    q = fma(q, a, all(SCALE));
    const Power e = power(a, mul(a, all(-0.5f)));
    const V tail = div(mul(e.two, fma(p, e.less_one, p)), q);
    return fnma(a, tail, larger(all(-0.0f), x));
}

// tanh |x| = -m / (2 + m),  m = e^(-2 |x|) - 1, which does not cancel near 0
inline V tanh(V x) {
    const Power p = power(smaller(all(10.0f), absolute(x)), all(-2.0f));
    const V m = fma(p.two, p.less_one, sub(p.two, all(SCALE)));
    return with_sign(div(m, add(all(2.0f * SCALE), m)), x);
}

inline V hardsigmoid(V x) { return div(smaller(all(6.0f), larger(all(0.0f), add(x, all(3.0f)))), all(6.0f)); }

inline V hardswish(V x) { return mul(x, hardsigmoid(x)); }

inline V leaky_relu(V x) { return where_less(x, all(0.0f), mul(all(0.01f), x), x); }

// e^x: 2.6 ulp; it overflows and becomes denormal where it should.
inline V exponential(V x) {
    const V e = scaled(power(smaller(all(131.0f), absolute(x)), all(-1.0f)));
    return where_less(x, all(0.0f), mul(e, all(1.0f / SCALE)), div(all(SCALE), e));
}

// y (e^x - 1) where x < 0
inline V elu(V x, V y) {
    const Power p = power(smaller(all(104.0f), absolute(x)), all(-1.0f));
    const V less_one = mul(fma(p.two, p.less_one, sub(p.two, all(SCALE))), all(1.0f / SCALE));
    return where_less(x, all(0.0f), mul(y, less_one), x);
}

// log x: x = 2^n m, m in [sqrt(1/2), sqrt(2)). The polynomial is that of Cephes' logf (S. L. Moshier): 1 ulp or so.
inline V logarithm(V x) {
    typedef int32_t I __attribute__((vector_size(sizeof(V)), may_alias));
    typedef float F __attribute__((vector_size(sizeof(V)), may_alias));
    const V small = all(0x1p-126f);
    const V given = where_less(x, small, mul(x, all(0x1p23f)), x);
    const I bits = reinterpret_cast<const I &>(given), from = bits - 0x3F3504F3, exponents = from >> 23;
    const I mantissa = bits - exponents * (1 << 23);
    const F counts = __builtin_convertvector(exponents, F);
    const V n = add(reinterpret_cast<const V &>(counts), where_less(x, small, all(-23.0f), all(0.0f)));
    const V f = sub(reinterpret_cast<const V &>(mantissa), all(1.0f)), square = mul(f, f);
    V p = fma(all(7.0376836292e-2f), f, all(-1.1514610310e-1f));
    p = fma(p, f, all(1.1676998740e-1f));
    p = fma(p, f, all(-1.2420140846e-1f));
    p = fma(p, f, all(1.4249322787e-1f));
    p = fma(p, f, all(-1.6668057665e-1f));
    p = fma(p, f, all(2.0000714765e-1f));
    p = fma(p, f, all(-2.4999993993e-1f));
    p = fma(p, f, all(3.3333331174e-1f));
    V y = fma(n, all(-2.12194440e-4f), mul(mul(p, f), square));
    y = fma(square, all(-0.5f), y);
    y = fma(n, all(0.693359375f), add(f, y));
    const V infinity = all(__builtin_inff()), none = all(__builtin_nanf(""));
    // zero, what is less, what is no number or infinite
    y = where_less(x, infinity, y, x);
    y = where_less(absolute(x), all(0x1p-149f), negative(infinity), y);
    return where_less(x, all(0.0f), none, y);
}

// log(1 + e^x) = max(x, 0) + log(1 + t), t = e^-|x|; what rounding took of 1 + t is given back
inline V softplus(V x) {
    const V t = exponential(negative(absolute(x))), u = add(all(1.0f), t);
    const V left = div(sub(t, sub(u, all(1.0f))), u);
    return add(larger(all(0.0f), x), add(logarithm(u), left));
}

// sigmoid, SiLU and GELU of vectors of float32 within one unit of the last place: sums of two floats carry what one
// would lose. Included by act32.cpp, after vec-inl.h.
#pragma once

// e^z = power (1 + high + low + square series)
struct Exponential {
    V power, high, low, square, series;
};

// e^(z + less) of z, or of -z where MINUS; power comes multiplied by 2^SCALE, so that it is a normal number.
template <int SCALE, bool MINUS = false>
inline Exponential exponential(V z, V less) {
    // n = round(z / log 2); added to magic, its low bits are those of the power's exponent
    const V shifted = fma(z, all(MINUS ? -1.44269504f : 1.44269504f), all(12582912.0f + 127.0f + SCALE));
    const V n = sub(shifted, all(12582912.0f + 127.0f + SCALE));
    // z - n log 2, not rounded: below 0.35, and a multiple of 2^-25 where n is not 0; low has the rest of log 2
    const V high = fma(n, all(-0.693147182f), MINUS ? negative(z) : z), low = fma(n, all(1.90465421e-9f), less);
    // e^r = 1 + r + r^2 S(r), S minimax: e^r to 2^-28 of itself
    const V r = add(high, low);
    V s = fma(all(0.00138211693f), r, all(0.00836866535f));
    s = fma(s, r, all(0.0416682586f));
    s = fma(s, r, all(0.166665211f));
    s = fma(s, r, all(0.49999994f));
    return {exponent(shifted), high, low, mul(r, r), s};
}

// -2^64 / (1 + e^z) = gate (1 + more), for -25 <= z <= 120
struct Gate {
    V gate, more;
};

inline Gate gate_of(Exponential e) {
    const V r = fma(e.square, e.series, e.high), high = add(all(1.0f), r);
    const V low = add(add(sub(all(1.0f), high), r), e.low);
    const V power = mul(e.power, high), one = all(0x1p-64f);
    const V large = larger(power, one), small = smaller(power, one), sum = add(large, small);
    const V left = fma(e.power, low, add(sub(large, sum), small));
    const V gate = div(all(-1.0f), sum);
    return {gate, fma(gate, left, fma(gate, sum, all(1.0f)))};
}

inline V between(float least, float most, V x) { return smaller(all(most), larger(all(least), x)); }

inline V sigmoid(V x) {
    const Gate g = gate_of(exponential<-64, true>(between(-120.0f, 25.0f, x), all(0.0f)));
    return mul(fma(g.gate, g.more, g.gate), all(-0x1p-64f));
}

// x gate; x itself above most
inline V gated(V x, V inside, float most, Gate g) {
    const V y = fma(inside, g.gate, mul(inside, mul(g.gate, g.more)));
    return where_less(all(most), x, x, mul(y, all(-0x1p-64f)));
}

inline V silu(V x) {
    const V inside = between(-120.0f, 25.0f, x);
    return gated(x, inside, 25.0f, gate_of(exponential<-64, true>(inside, all(0.0f))));
}

// x sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3))
inline V gelu_tanh(V x) {
    const V inside = between(-11.0f, 6.0f, x);
    // a = -2 sqrt(2/pi), b = 0.044715 a, as sums of two; a has 20 bits after the point, so that a - factor is a float
    const V square = mul(inside, inside), less = fms(inside, inside, square);
    const V a = all(-1.59576893f), b = all(-0.0713548139f), factor = fma(b, square, a);
    const V rest = fma(b, less, fma(all(-2.39883247e-09f), square, all(-1.93077895e-07f)));
    const V more = add(fma(b, square, sub(a, factor)), rest), z = mul(inside, factor);
    return gated(x, inside, 6.0f, gate_of(exponential<-64>(z, fma(inside, more, fms(inside, factor, z)))));
}

// Phi(-a) e^(a^2/2) for 0 <= a <= 14.4 as polynomials in a - centre, two for each doubling of a + 1; row 6 begins at 0.
// The centres are where the values are floats, nearly.
constexpr float TAIL_CENTRE[8] = {1.51953125f, 2.4921875f,  3.921875f,    5.9375f,
                                  9.125f,      12.9406252f, 0.228515625f, 0.740234375f};
constexpr float TAIL[9][8] = {
    {0.204030886f, 0.141688526f, 0.0961032584f, 0.0654272363f, 0.0432125069f, 0.0306477789f, 0.420458674f, 0.30193755f},
    {-0.0889109746f, -0.0458279103f, -0.0220373143f, -0.0104680657f, -0.00462815398f, -0.00234086206f, -0.302860916f,
     -0.175437734f},
    {0.0344639383f, 0.0137383696f, 0.00483783195f, 0.00163654843f, 0.000490297971f, 0.000177779541f, 0.175625384f,
     0.0860363916f},
    {-0.0121806273f, -0.00386305759f, -0.00102132803f, -0.000250351004f, -5.13957639e-05f, -1.34264728e-05f,
     -0.0875744969f, -0.0372494608f},
    {0.00398886763f, 0.00102801458f, 0.000208076744f, 3.75201744e-05f, 5.3329909e-06f, 1.00879765e-06f, 0.0388868898f,
     0.0146072544f},
    {-0.00122368638f, -0.000260521105f, -4.09824825e-05f, -5.51597486e-06f, -5.46125705e-07f, -7.52903873e-08f,
     -0.0157842673f, -0.005309714f},
    {0.000353974901f, 6.16109974e-05f, 7.88777743e-06f, 7.97794996e-07f, 5.51833317e-08f, 5.45191847e-09f,
     0.00625709398f, 0.00197553565f},
    {-0.000100537305f, -1.46579187e-05f, -1.55467069e-06f, -1.15030289e-07f, -6.13266415e-09f, -4.28751673e-10f,
     -0.0016078949f, -0.000357340119f},
    {2.83348363e-05f, 5.94433504e-06f, 2.52348769e-07f, 1.43696521e-08f, 6.69748978e-10f, 5.05881691e-11f,
     -0.0022397663f, -0.00129962456f}};

inline V gelu(V x) {
    const V a = smaller(all(14.4f), absolute(x)), half = mul(a, all(-0.5f)), z = mul(a, half);
    const Exponential e = exponential<24>(z, fms(a, half, z));
    const V row = add(a, all(1.0f)), d = sub(a, pick(TAIL_CENTRE, row, 22));
    V p = pick(TAIL[8], row, 22);
    for (int k = 7; k >= 1; --k) p = fma(p, d, pick(TAIL[k], row, 22));
    const V first = pick(TAIL[0], row, 22), t = fma(p, d, first), t_less = fnma(p, d, sub(t, first));
    // Phi(-a) = power (high - low)
    const V high = fma(e.high, t, t), lost = add(fnma(e.high, t, sub(high, t)), fma(e.high, t_less, t_less));
    const V low = fnma(fma(e.square, e.series, e.low), t, lost);
    // 2^24 (max(x, 0) - a Phi(-a)), and what that rounds away
    const V factor = mul(a, e.power), most = mul(larger(all(-0.0f), x), all(0x1p24f)), y = fnma(factor, high, most);
    const V less = fnma(factor, low, fms(factor, high, sub(most, y)));
    return where_less(all(14.0f), x, x, mul(sub(y, less), all(0x1p-24f)));
}

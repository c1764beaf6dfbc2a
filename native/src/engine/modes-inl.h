// The activations of every mode of rarefy.act on vectors of float32: tanh, sigmoid, SiLU and GELU, operation for
// operation as rarefy.act.spec.reference has them. Included by engine_kernels.cpp, after activations-inl.h.
#pragma once

// At minus infinity, where a product is NaN, the limit: -0.
inline V limited(V x, V y) { return where_less(x, all(-3.40282347e+38f), all(-0.0f), y); }

struct PlainMode {
    V tanh_of(V x) const { return tanh(x); }
    V sigmoid_of(V x) const { return sigmoid(x); }
    V silu_of(V x) const { return silu(x); }
    V gelu_of(V x) const { return gelu(x); }
    V gelu_tanh_of(V x) const { return gelu_tanh(x); }
};

struct ExactMode : PlainMode {
    V silu_of(V x) const { return limited(x, silu(x)); }
    V gelu_tanh_of(V x) const { return limited(x, gelu_tanh(x)); }
};

// min(max(x, -1), 1), relu6(x + 3) / 6, x (relu6(x + 3) / 6), x (relu6(1.702 x + 3) / 6)
struct HardMode {
    V tanh_of(V x) const { return smaller(all(1.0f), larger(all(-1.0f), x)); }
    V sigmoid_of(V x) const { return hardsigmoid(x); }
    V silu_of(V x) const { return limited(x, mul(x, hardsigmoid(x))); }
    V gelu_of(V x) const { return limited(x, mul(x, hardsigmoid(mul(all(1.702f), x)))); }
    V gelu_tanh_of(V x) const { return gelu_of(x); }
};

// t is the table's tanh:  1/2 + 1/2 t(x/2),  x/2 (1 + t(x/2)),  x/2 (1 + t(x (A + B x^2)))
struct KtanhMode {
#if defined(__AVX512BW__) || defined(__AVX2__)
    const TanhShift32 table;
    explicit KtanhMode(const rarefy_shift32 &t) : table(t) {}
#if defined(__AVX512BW__)
    V tanh_of(V x) const { return _mm512_castsi512_ps(table(_mm512_castps_si512(x))); }
#else
    V tanh_of(V x) const { return _mm256_castsi256_ps(table(_mm256_castps_si256(x))); }
#endif
#else
    const rarefy_shift32 &table;
    explicit KtanhMode(const rarefy_shift32 &t) : table(t) {}
    static Bits each(uint32_t a) { return Bits{a, a, a, a}; }
    V tanh_of(V x) const {
        const rarefy_shift32 &t = table;
        const Bits bits = reinterpret_cast<Bits>(x), u = bits & 0x7FFFFFFFu, row = u >> t.index_shift & 31u;
        const Bits shift = {t.shift[row[0]], t.shift[row[1]], t.shift[row[2]], t.shift[row[3]]};
        const Bits base = {t.base[row[0]], t.base[row[1]], t.base[row[2]], t.base[row[3]]};
        Bits y = ((u & t.mantissa_mask) >> shift) + base;
        y = u < each(t.identity_below) ? u : y;
        y = u > each(t.saturate_above) ? each(t.one) : y;
        y = u > each(t.last) ? u : y;
        return reinterpret_cast<V>((bits & 0x80000000u) | y);
    }
#endif
    V gate(V half, V z) const { return mul(half, add(all(1.0f), tanh_of(z))); }
    V sigmoid_of(V x) const { return add(all(0.5f), mul(all(0.5f), tanh_of(mul(x, all(0.5f))))); }
    V silu_of(V x) const {
        const V half = mul(x, all(0.5f));
        return limited(x, gate(half, half));
    }
    V gelu_of(V x) const {
        const V z = mul(x, add(all(0.797884583f), mul(all(0.0356774069f), mul(x, x))));
        return limited(x, gate(mul(x, all(0.5f)), z));
    }
    V gelu_tanh_of(V x) const { return gelu_of(x); }
};

// Calls f with the functions of a mode.
template <class F>
inline void with_mode(const Mode &mode, const F &f) {
    if (mode.kind == RAREFY_KTANH) f(KtanhMode(*mode.table));
    else if (mode.kind == RAREFY_HARD) f(HardMode());
    else if (mode.kind == RAREFY_EXACT) f(ExactMode());
    else f(PlainMode());
}

// a * b + c rounded once: the bits of the instruction, where there is none. Included in unnamed namespaces.
#pragma once

inline float fused(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__)
    return __builtin_fmaf(a, b, c);
#else
    // The product is exact in double. The sum is rounded to odd: then rounding it to float is the only rounding.
    const double p = static_cast<double>(a) * static_cast<double>(b), d = static_cast<double>(c);
    const double s = p + d, back = s - p, error = (p - (s - back)) + (d - back);
    int64_t bits;
    __builtin_memcpy(&bits, &s, sizeof bits);
    if (error != 0.0 && !(bits & 1)) bits += (error > 0.0) == (s > 0.0) ? 1 : -1;
    double odd;
    __builtin_memcpy(&odd, &bits, sizeof odd);
    return static_cast<float>(odd);
#endif
}

// The C ABI of librarefy: one table of kernels, nothing else is exported.
//
// A kernel is a plain function; its signature is the typedef named beside its name below. Kernels keep no state, allocate
// nothing that outlives the call, and use at most the number of threads that the caller passes.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    const char *name;      // what it computes, for example "soft_threshold_f32"
    const char *isa;       // "portable", "avx2", "avx512", "avx512_vbmi2" or "neon"
    int32_t supported;     // 1 when this CPU can run it
    void *entry;           // the function
} rarefy_kernel;

// The kernels of this library, best instruction set first for every name; returns how many there are.
int64_t rarefy_kernels(const rarefy_kernel **table);

// "soft_threshold_f32": out = sign(w) * max(|w| - threshold, 0), row by row; NaN weights stay NaN.
// w and out hold rows * cols values; threshold holds one value, or one a row when per_row is 1.
typedef void rarefy_soft_threshold_f32(
    const float *w, const float *threshold, float *out, int64_t rows, int64_t cols, int32_t per_row, int32_t threads);

// "soft_threshold_backward_f32": with factor = 1 where |w| > threshold, alpha where lower <= |w| <= threshold, else 0 (lower may be null: then 0),
//   grad_w = grad * factor,   grad_threshold = -sum(grad * factor * sign(w))  (over everything, or a row when per_row is 1).
// The sum is taken in a fixed order, in double over blocks of 256: the same bits for every instruction set and number of threads.
// partial is scratch for rows * ceil(cols / RAREFY_CHUNK) doubles.
typedef void rarefy_soft_threshold_backward_f32(
    const float *grad, const float *w, const float *threshold, const float *lower, float alpha, float *grad_w,
    float *grad_threshold, double *partial, int64_t rows, int64_t cols, int32_t per_row, int32_t threads);

// How many values of a row go into one partial sum.
enum { RAREFY_CHUNK = 1 << 15 };

// "count_above_f32": the number of |w| > threshold; rows, cols and per_row as above. One thread.
typedef int64_t rarefy_count_above_f32(
    const float *w, const float *threshold, int64_t rows, int64_t cols, int32_t per_row);

#ifdef __cplusplus
}
#endif

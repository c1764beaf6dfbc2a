// The soft threshold of STR and AutoSparse and its backward, one pass each. Built once for each instruction set.
#include "isa.h"
#include "parallel.h"

namespace rarefy {
namespace RAREFY_ISA {
namespace {

constexpr int64_t CHUNK = RAREFY_CHUNK;  // a unit of work: partial sums are per chunk, whatever the threads
constexpr int64_t SERIAL = 1 << 20;      // below this many values a thread costs more than it saves
constexpr int LANES = 16;                // fixed, so that every instruction set adds in the same order

inline float magnitude(float x) { return __builtin_fabsf(x); }

inline int64_t chunks_a_row(int64_t cols) { return (cols + CHUNK - 1) / CHUNK; }

struct Span {
    int64_t row, begin, size;
};

inline Span span(int64_t index, int64_t cols) {
    const int64_t chunks = chunks_a_row(cols), row = index / chunks, offset = (index % chunks) * CHUNK;
    return {row, row * cols + offset, cols - offset < CHUNK ? cols - offset : CHUNK};
}

inline int32_t useful(int32_t threads, int64_t values) { return values < SERIAL ? 1 : threads; }

struct Forward {
    const float *w, *threshold;
    float *out;
    int64_t cols;
    int32_t per_row;
};

void forward_chunk(void *context, int64_t index) {
    const Forward &c = *static_cast<const Forward *>(context);
    const Span s = span(index, c.cols);
    const float t = c.threshold[c.per_row ? s.row : 0];
    const float *__restrict w = c.w + s.begin;
    float *__restrict out = c.out + s.begin;
    // W^ = sign(W) * max(|W| - T, 0); written as "not below" so that NaN passes through
    for (int64_t i = 0; i < s.size; ++i)
        out[i] = magnitude(w[i]) <= t ? 0.0f : w[i] - __builtin_copysignf(t, w[i]);
}

void soft_threshold(
    const float *w, const float *threshold, float *out, int64_t rows, int64_t cols, int32_t per_row, int32_t threads) {
    Forward context{w, threshold, out, cols, per_row};
    parallel_for(useful(threads, rows * cols), rows * chunks_a_row(cols), forward_chunk, &context);
}

struct Backward {
    const float *grad, *w, *threshold, *lower;
    float alpha;
    float *grad_w;
    double *partial;
    int64_t cols;
    int32_t per_row;
};

void backward_chunk(void *context, int64_t index) {
    const Backward &c = *static_cast<const Backward *>(context);
    const Span s = span(index, c.cols);
    const float t = c.threshold[c.per_row ? s.row : 0], low = c.lower[c.per_row ? s.row : 0], alpha = c.alpha;
    const float *__restrict grad = c.grad + s.begin, *__restrict w = c.w + s.begin;
    float *__restrict grad_w = c.grad_w + s.begin;
    double sums[LANES] = {};
    auto one = [&](int64_t i, int lane) __attribute__((always_inline)) {
        const float a = magnitude(w[i]);
        // h'(|W| - T) = 1 if |W| > T, alpha if not; 0 below the sparse backward's bound
        const float masked = grad[i] * alpha;
        const float g = a <= t ? (a < low ? 0.0f : masked) : grad[i];
        grad_w[i] = g;
        // dL/dT = -sum g * sign(W), with sign(0) = 0
        sums[lane] += static_cast<double>(a > 0.0f ? (w[i] < 0.0f ? -g : g) : 0.0f);
    };
    int64_t i = 0;
    for (; i + LANES <= s.size; i += LANES)
        for (int lane = 0; lane < LANES; ++lane) one(i + lane, lane);
    for (int lane = 0; i < s.size; ++i, ++lane) one(i, lane);
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int lane = 0; lane < width; ++lane) sums[lane] += sums[lane + width];
    c.partial[index] = sums[0];
}

void soft_threshold_backward(
    const float *grad, const float *w, const float *threshold, const float *lower, float alpha, float *grad_w,
    float *grad_threshold, double *partial, int64_t rows, int64_t cols, int32_t per_row, int32_t threads) {
    Backward context{grad, w, threshold, lower, alpha, grad_w, partial, cols, per_row};
    const int64_t chunks = chunks_a_row(cols);
    parallel_for(useful(threads, rows * cols), rows * chunks, backward_chunk, &context);
    double total = 0.0;
    for (int64_t row = 0; row < rows; ++row) {
        double sum = 0.0;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += partial[row * chunks + chunk];
        if (per_row) grad_threshold[row] = static_cast<float>(-sum);
        total += sum;
    }
    if (!per_row) grad_threshold[0] = static_cast<float>(-total);
}

int64_t count_above(const float *w, const float *threshold, int64_t rows, int64_t cols, int32_t per_row) {
    int64_t count = 0;
    for (int64_t row = 0; row < rows; ++row) {
        const float t = threshold[per_row ? row : 0];
        const float *line = w + row * cols;
        for (int64_t begin = 0; begin < cols; begin += CHUNK) {
            const int64_t end = begin + CHUNK < cols ? begin + CHUNK : cols;
            int32_t some = 0;
            for (int64_t i = begin; i < end; ++i) some += magnitude(line[i]) > t;
            count += some;
        }
    }
    return count;
}

}  // namespace

extern const rarefy_kernel soft_threshold_kernels[] = {
    RAREFY_KERNEL("soft_threshold_f32", soft_threshold),
    RAREFY_KERNEL("soft_threshold_backward_f32", soft_threshold_backward),
    RAREFY_KERNEL("count_above_f32", count_above),
};
extern const int64_t soft_threshold_kernel_count = sizeof soft_threshold_kernels / sizeof *soft_threshold_kernels;

}  // namespace RAREFY_ISA
}  // namespace rarefy

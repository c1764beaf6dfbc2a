// The soft threshold of STR and AutoSparse and its backward, one pass each. Built once for each instruction set.
#include "isa.h"
#include "parallel.h"

namespace rarefy {
namespace RAREFY_ISA {
namespace {

constexpr int64_t CHUNK = RAREFY_CHUNK;  // a unit of work: partial sums are per chunk, whatever the threads
constexpr int64_t SERIAL = 1 << 20;      // below this many values a thread costs more than it saves

// Sums run over a fixed number of lanes, so that every instruction set adds in the same order.
constexpr int LANES = 16, WIDTH = 8, BLOCK = 256;
typedef float Floats __attribute__((vector_size(WIDTH * sizeof(float))));
typedef double Doubles __attribute__((vector_size(WIDTH * sizeof(double))));

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
    const float t = c.threshold[c.per_row ? s.row : 0], low = c.lower ? c.lower[c.per_row ? s.row : 0] : 0.0f, alpha = c.alpha;
    const float *__restrict grad = c.grad + s.begin, *__restrict w = c.w + s.begin;
    float *__restrict grad_w = c.grad_w + s.begin;
    Doubles sums[LANES / WIDTH] = {};
    for (int64_t begin = 0; begin < s.size; begin += BLOCK) {
        const int64_t size = s.size - begin < BLOCK ? s.size - begin : BLOCK;
        float signed_grad[BLOCK] = {};
        for (int64_t i = 0; i < size; ++i) {
            const float x = w[begin + i], a = magnitude(x), g = grad[begin + i];
            // h'(|W| - T) = 1 if |W| > T, alpha if not; 0 below the sparse backward's bound
            const float masked = a < low ? 0.0f : g * alpha;
            const float kept = a <= t ? masked : g;
            grad_w[begin + i] = kept;
            // dL/dT = -sum g * sign(W), with sign(0) = 0
            signed_grad[i] = x > 0.0f ? kept : x < 0.0f ? -kept : 0.0f;
        }
        // In float within a block, 16 values a lane, then in double.
        Floats lanes[LANES / WIDTH] = {};
        for (int64_t i = 0; i < BLOCK; i += LANES)
            for (int part = 0; part < LANES / WIDTH; ++part) {
                Floats values;
                __builtin_memcpy(&values, signed_grad + i + part * WIDTH, sizeof values);
                lanes[part] += values;
            }
        for (int part = 0; part < LANES / WIDTH; ++part) sums[part] += __builtin_convertvector(lanes[part], Doubles);
    }
    double sum = 0.0;
    for (const Doubles &part : sums)
        for (int lane = 0; lane < WIDTH; ++lane) sum += part[lane];
    c.partial[index] = sum;
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

// Thresholds of all layers in one call: the gradient's way to the dense weights, the weights that are used, how many
// live, and hard masks. Built once for each instruction set.
#include "isa.h"
#include "mode.h"
#include "parallel.h"

namespace rarefy {
namespace RAREFY_ISA {
namespace {

constexpr int64_t CHUNK = RAREFY_CHUNK;  // a unit of work: partial sums are per chunk, whatever the threads
constexpr int64_t SERIAL = 1 << 20;      // below this many values a thread costs more than it saves; not measured apart

// Sums run over a fixed number of lanes, so that every instruction set adds in the same order.
constexpr int LANES = 16, WIDTH = 8, BLOCK = 256;
typedef float Floats __attribute__((vector_size(WIDTH * sizeof(float))));
typedef double Doubles __attribute__((vector_size(WIDTH * sizeof(double))));

inline float magnitude(float x) { return __builtin_fabsf(x); }

inline int64_t chunks_a_row(const rarefy_layer &layer) { return (layer.cols + CHUNK - 1) / CHUNK; }

inline int64_t chunks_of(const rarefy_layer *layers, int64_t count) {
    if (count == 0) return 0;
    const rarefy_layer &last = layers[count - 1];
    return last.first_chunk + last.rows * chunks_a_row(last);
}

inline int32_t useful(const rarefy_layer *layers, int64_t count, int32_t threads) {
    int64_t values = 0;
    for (int64_t i = 0; i < count; ++i) values += layers[i].rows * layers[i].cols;
    return values < SERIAL ? 1 : threads;
}

// What one chunk is a part of: values [begin, begin + size) of a layer, all in the row of one threshold.
struct Span {
    int64_t layer, row, begin, size;
};

inline Span span(const rarefy_layer *layers, int64_t count, int64_t chunk) {
    int64_t low = 0, high = count;  // the last layer whose first chunk is not after this one
    while (high - low > 1) {
        const int64_t middle = low + (high - low) / 2;
        (layers[middle].first_chunk <= chunk ? low : high) = middle;
    }
    const rarefy_layer &layer = layers[low];
    const int64_t index = chunk - layer.first_chunk, chunks = chunks_a_row(layer);
    const int64_t row = index / chunks, offset = index % chunks * CHUNK, left = layer.cols - offset;
    return {low, layer.first_row + row, row * layer.cols + offset, left < CHUNK ? left : CHUNK};
}

struct Before {
    const rarefy_layer *layers;
    int64_t count;
    float *const *weights, *const *grads;
    const float *const *latents;
    const float *thresholds, *alpha, *lower;
    double *partial;
};

void before_chunk(void *context, int64_t chunk) {
    const Before &c = *static_cast<const Before *>(context);
    const Span s = span(c.layers, c.count, chunk);
    const float *__restrict latent = c.latents[s.layer] + s.begin;
    float *__restrict weight = c.weights[s.layer] + s.begin;
    if (!c.grads[s.layer]) {
        for (int64_t i = 0; i < s.size; ++i) weight[i] = latent[i];
        c.partial[chunk] = 0.0;
        return;
    }
    float *__restrict grad = c.grads[s.layer] + s.begin;
    const float t = c.thresholds[s.row], low = c.lower ? c.lower[s.row] : 0.0f, alpha = c.alpha[s.layer];
    Doubles sums[LANES / WIDTH] = {};
    for (int64_t begin = 0; begin < s.size; begin += BLOCK) {
        const int64_t size = s.size - begin < BLOCK ? s.size - begin : BLOCK;
        float signed_grad[BLOCK] = {};
        for (int64_t i = 0; i < size; ++i) {
            const float x = latent[begin + i], a = magnitude(x), g = grad[begin + i];
            // dL/dW = dL/dW^ * (1 if |W| > T, alpha if not; 0 below the bound of the sparse backward)
            const float masked = a < low ? 0.0f : g * alpha;
            const float kept = a <= t ? masked : g;
            grad[begin + i] = kept;
            weight[begin + i] = x;
            // -dL/dT = sum dL/dW * sign(W), with sign(0) = 0
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
    c.partial[chunk] = sum;
}

void before(const rarefy_layer *layers, int64_t count, float *const *weights, float *const *grads,
            const float *const *latents, const float *thresholds, const float *alpha, const float *lower,
            float *grad_thresholds, double *partial, int32_t threads) {
    const DefaultMode mode;
    Before context{layers, count, weights, grads, latents, thresholds, alpha, lower, partial};
    parallel_for(useful(layers, count, threads), chunks_of(layers, count), before_chunk, &context);
    for (int64_t i = 0; i < count; ++i) {
        const int64_t chunks = chunks_a_row(layers[i]);
        for (int64_t row = 0; row < layers[i].rows; ++row) {
            double sum = 0.0;
            for (int64_t chunk = 0; chunk < chunks; ++chunk)
                sum += partial[layers[i].first_chunk + row * chunks + chunk];
            grad_thresholds[layers[i].first_row + row] = static_cast<float>(-sum);
        }
    }
}

struct After {
    const rarefy_layer *layers;
    int64_t count;
    float *const *weights, *const *latents;
    const float *thresholds, *shrink;
};

void after_chunk(void *context, int64_t chunk) {
    const After &c = *static_cast<const After *>(context);
    const Span s = span(c.layers, c.count, chunk);
    // by how much a weight that lives comes nearer to zero: s T
    const float t = c.thresholds[s.row], by = c.shrink[s.layer] * t;
    float *__restrict weight = c.weights[s.layer] + s.begin, *__restrict latent = c.latents[s.layer] + s.begin;
    for (int64_t i = 0; i < s.size; ++i) {
        const float x = weight[i];
        latent[i] = x;
        // W^ = 0 if |W| <= T, else W - sign(W) s T; written so that NaN passes through
        weight[i] = magnitude(x) <= t ? 0.0f : x - __builtin_copysignf(by, x);
    }
}

void after(const rarefy_layer *layers, int64_t count, float *const *weights, float *const *latents,
           const float *thresholds, const float *shrink, int32_t threads) {
    const DefaultMode mode;
    After context{layers, count, weights, latents, thresholds, shrink};
    parallel_for(useful(layers, count, threads), chunks_of(layers, count), after_chunk, &context);
}

struct Count {
    const rarefy_layer *layers;
    int64_t count;
    const float *const *latents, *thresholds;
    int64_t *partial;
};

void count_chunk(void *context, int64_t chunk) {
    const Count &c = *static_cast<const Count *>(context);
    const Span s = span(c.layers, c.count, chunk);
    const float t = c.thresholds[s.row], *latent = c.latents[s.layer] + s.begin;
    int32_t live = 0;
    for (int64_t i = 0; i < s.size; ++i) live += magnitude(latent[i]) > t;
    c.partial[chunk] = live;
}

void count(const rarefy_layer *layers, int64_t count, const float *const *latents, const float *thresholds,
           int64_t *live, int64_t *partial, int32_t threads) {
    const DefaultMode mode;
    Count context{layers, count, latents, thresholds, partial};
    parallel_for(useful(layers, count, threads), chunks_of(layers, count), count_chunk, &context);
    for (int64_t i = 0; i < count; ++i) {
        live[i] = 0;
        for (int64_t chunk = 0; chunk < layers[i].rows * chunks_a_row(layers[i]); ++chunk)
            live[i] += partial[layers[i].first_chunk + chunk];
    }
}

struct Mask {
    const rarefy_layer *layers;
    int64_t count;
    float *const *values;
    const uint8_t *const *masks;
};

void mask_chunk(void *context, int64_t chunk) {
    const Mask &c = *static_cast<const Mask *>(context);
    const Span s = span(c.layers, c.count, chunk);
    float *__restrict values = c.values[s.layer] + s.begin;
    const uint8_t *__restrict mask = c.masks[s.layer] + s.begin;
    // what is masked mostly is 0 already, and reading is cheaper than writing
    constexpr int64_t PART = 1024;
    for (int64_t begin = 0; begin < s.size; begin += PART) {
        const int64_t end = begin + PART < s.size ? begin + PART : s.size;
        uint32_t other = 0;
        for (int64_t i = begin; i < end; ++i) {
            uint32_t bits;
            __builtin_memcpy(&bits, values + i, sizeof bits);
            other |= mask[i] ? 0 : bits;
        }
        if (other == 0) continue;
        for (int64_t i = begin; i < end; ++i) values[i] = mask[i] ? values[i] : 0.0f;
    }
}

void mask(const rarefy_layer *layers, int64_t count, float *const *values, const uint8_t *const *masks,
          int32_t threads) {
    Mask context{layers, count, values, masks};
    parallel_for(useful(layers, count, threads), chunks_of(layers, count), mask_chunk, &context);
}

}  // namespace

extern const rarefy_kernel thresholds_kernels[] = {
    RAREFY_KERNEL("thresholds_before_f32", before),
    RAREFY_KERNEL("thresholds_after_f32", after),
    RAREFY_KERNEL("thresholds_count_f32", count),
    RAREFY_KERNEL("mask_f32", mask),
};
extern const int64_t thresholds_kernel_count = sizeof thresholds_kernels / sizeof *thresholds_kernels;

}  // namespace RAREFY_ISA
}  // namespace rarefy

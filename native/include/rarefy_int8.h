// The C ABI of the engine's int8 programs: networks of uint8 activations and sparse int8 weights on a CPU.
//
// The steps are those of rarefy_engine.h and are collected by its builder; a convolution's weights are whole numbers
// from -128 to 127, its bias is left out. What makes bytes of them is said for each step when the program is made.
//
// Numbers. A value is uint8, with a zero point of its own: it stands for scale * (q - zero_point). Sums over weights
// are int32 and exact, padding counts as the zero point. What follows is float32, every operation rounded by itself:
//
//     conv            t = float(sum_k w[r,k] (x[k] - zero_x)) * multiplier[r] + bias[r] (+ float(residual) * other)
//     binary, add     t = float(x) * multiplier + bias + float(y) * other
//     binary, mul     t = float((x - zero_x) (y - zero_y)) * multiplier + bias
//     averages        t = float(sum of the pixels) * float(ratio / n) + float(zero - zero_x * ratio * inside / n)
//                     n: pixels that count; inside: those among them that are no padding; computed in float64
//     affine          y = table[x]
//     input           t = x * multiplier + bias; NaN becomes the zero point
//     output          y = float(x - zero_x) * multiplier
//
// and y = the nearest whole number (ties to even) of t, clamped to low and high. Maxima, concatenations, upsampling and
// flattening copy bytes. A convolution may give float32 numbers instead: t, clamped to the floats low and high, which
// an output alone may read.
#pragma once

#include <stdint.h>

#include "rarefy_engine.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct rarefy_int8_program rarefy_int8_program;

// How the results of one step become bytes. What a kind of step does not use is ignored.
typedef struct {
    int32_t zero_point;  // of the result; 0 to 255
    int32_t floats;      // conv: 1 gives float32
    float multiplier, other, bias;
    double ratio;                       // averages: the scale of x over that of the result
    float low, high;                    // whole numbers from 0 to 255, or any two for floats
    const float *multipliers, *biases;  // conv: one a row
    int64_t rows;                       // how many of each
    const uint8_t *table;               // affine: 256
    int32_t layout;                     // conv: 0 by rule, 1 single weights, 2 blocks of four, 3 all weights,
                                        // 4 windows, 5 a bitmask
} rarefy_int8_result;

// A program of the builder's steps; `results` says of each of its `count` steps, in order (inputs and outputs among
// them), how its results become bytes. isa as in rarefy_options. The builder is left as it was.
rarefy_int8_program *rarefy_int8_finish(const rarefy_builder *builder, const rarefy_int8_result *results, int64_t count,
                                        const rarefy_options *options, char *error, int64_t size);
void rarefy_int8_free(rarefy_int8_program *program);

// As rarefy_program_run; inputs and outputs are float32.
int32_t rarefy_int8_run(const rarefy_int8_program *program, const rarefy_buffer *inputs, int32_t input_count,
                        const rarefy_buffer *outputs, int32_t output_count, int64_t batch, int32_t threads,
                        double *seconds, int64_t second_count, char *error, int64_t size);

void rarefy_int8_describe(const rarefy_int8_program *program, rarefy_program_info *info);
// Of the builder's step number i.
int32_t rarefy_int8_step(const rarefy_int8_program *program, int32_t step, rarefy_step_info *info);

#ifdef __cplusplus
}
#endif

// The C ABI of the engine: networks with sparse weights on a CPU.
//
// A *builder* takes the steps of a network one after the other; rarefy_builder_finish plans memory, chooses a kernel
// for every step by measuring, and gives a *program*. A program never changes: any number of threads may run it at the
// same time; the scratch memory of a run comes from a pool that the program keeps. Threads that a run began are kept
// for the next one, whichever program it is of; there is no other global state.
//
// Values. A value is what a step makes: channels x height x width float32 numbers for every image of a batch, whose
// size is chosen at each run. One-dimensional signals have height 1; vectors have height and width 1. How a value lies
// in memory is the program's business: only inputs and outputs have a public layout. The input of a sequence model
// (batch, tokens, features) is a value with channels = features, height 1, width = tokens, and the layout
// RAREFY_CHANNELS_LAST.
//
// Numbers. Everything is computed in float32. Sparse kernels leave out weights that are zero (or minus zero): 0 * NaN
// and 0 * infinity then count as 0 where PyTorch, and a dense kernel here, give NaN. Otherwise NaN and infinity in
// activations propagate as in PyTorch: relu(NaN) is NaN, a maximum over NaN is NaN. Sums are taken in another order
// than PyTorch's.
//
// Errors. Functions that give an id return -1, those that give a pointer NULL, where they fail; the reason, a sentence
// without a newline, is then written to `error` (at most `size` bytes with the ending zero; may be NULL with size 0).
// After a builder function failed the builder is unchanged and may be used on.
#pragma once

#include <stdint.h>

#include "rarefy.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct rarefy_builder rarefy_builder;
typedef struct rarefy_program rarefy_program;

enum rarefy_layout {
    RAREFY_CHANNELS_FIRST = 0,  // (batch, channels, height, width), contiguous
    RAREFY_CHANNELS_LAST = 1,   // (batch, height, width, channels), contiguous
};

enum rarefy_activation {
    RAREFY_NONE = 0,
    RAREFY_RELU = 1,
    RAREFY_RELU6 = 2,
    RAREFY_SILU = 3,
    RAREFY_GELU = 4,       // x Phi(x), by erf
    RAREFY_GELU_TANH = 5,  // its tanh approximation
    RAREFY_TANH = 6,
    RAREFY_SIGMOID = 7,
    RAREFY_HARDSWISH = 8,
    RAREFY_HARDSIGMOID = 9,
    RAREFY_LEAKY_RELU = 10,  // slope 0.01
};

// How RAREFY_TANH, RAREFY_SIGMOID, RAREFY_SILU, RAREFY_GELU and RAREFY_GELU_TANH and the gates of recurrent layers are
// computed. All but the first are modes of rarefy.act, where SiLU and GELU of minus infinity are -0; RAREFY_HARD and
// RAREFY_KTANH give its bits.
enum rarefy_mode {
    RAREFY_PLAIN = 0,  // to a few units of the last place; x times a gate is NaN at minus infinity, as in PyTorch
    RAREFY_EXACT = 1,  // the same but for that
    RAREFY_HARD = 2,   // HardTanh, and the lines of the others
    RAREFY_KTANH = 3,  // K-TanH by a table, and what derives from it
    RAREFY_MODES
};

enum rarefy_storage {
    RAREFY_F32 = 0,
    RAREFY_BF16 = 1,  // weights rounded to nearest even; sums stay float32
};

// Functions of whole values that rarefy_builder_tensor takes. Their numbers and constants:
//
// RAREFY_LAYER_NORM, RAREFY_RMS_NORM: over the channels of every pixel, scale (x - mean) / sqrt(variance + eps) + shift
//   and scale x / sqrt(mean of x^2 + eps) + shift. numbers: the bits of eps, a double. constants: scale, then shift,
//   one number a channel each.
// RAREFY_VIEW: copies by strides. numbers: channels, height and width of the result, and how many values it reads; then
//   for each of these how many dimensions follow, where the first entry lies, its channel and pixel in the value and
//   its channel and pixel in the result, and for each dimension its size and the steps in the same four. Every number
//   of the result should be written once. No constants.
// RAREFY_GROUP_NORM: the same as a layer norm over all pixels of so many channels. numbers: the bits of eps, and the
//   number of groups of channels. constants: scale, then shift, one number a channel each.
// RAREFY_POINTWISE: an expression, number by number, of values and constants whose sizes are those of the result, or 1.
//   numbers: how many constants there are; channels, height and width of each; then instructions, three numbers each:
//   an operation (enum rarefy_operation) and the terms that it takes, -1 in the place of a second one that it does not
//   take. The terms are the values, the constants, then what the instructions made; the last one makes the result.
// RAREFY_RESIZE: an image of another size. numbers: 1 for bilinear, 0 for nearest; height and width of the result; then
//   for each of its rows, and after them columns, the row or column of x that it begins at. constants: of a bilinear
//   one, for each of those the share that the next row or column has; 0 of them for nearest.
// RAREFY_REDUCE: one number of all along some axes, which have the size 1 in the result. numbers: what it is (enum
//   rarefy_reduction); the axes, 1 for channels and 2 for height and 4 for width, added up. No constants.
// RAREFY_EMBEDDING: rows of a table, the channels of a pixel each, or one vector that is made of all. x is a vector of
//   whole numbers as they lie in memory, int32 in one channel or int64 in two, low word first. numbers: how many
//   channels a whole number has; rows of the table; what is made of the rows, -1 or a sum, a mean or a maximum (enum
//   rarefy_reduction); height and width of the result. constants: the table. Where x is an input, a run begins with a
//   look whether all are rows, and fails where one is not.
//
// The others read and write their values by *places*: numbers that say, for axes of some sizes, which channel and pixel
// each index of all axes is. A place is a channel and a pixel to begin with, then for every axis how many channels and
// how many pixels its next index is further (at least 0). In numbers stand: how many axes there are; their sizes; the
// shape of the result, channels, height, width; a place for every value, the result's last; then the function's own.
// All axes but those named below are outer ones, in all values alike, and come first.
//
// RAREFY_MATMUL: y[m, n] = scale sum_k a[m, k] b[k, n]. Axes: m, n, k. Values: a, b. Own: the bits of scale, a double.
// RAREFY_SOFTMAX: over the last axis. Axes: columns, what is summed. Values: x.
// RAREFY_ATTENTION: y = softmax(scale q k^T + mask) v. Axes: query, key, feature of q and k, feature of v. Values: q,
//   k, v, and a mask that is added where there is a fourth. Own: the bits of scale, a double; whether query i sees no
//   key after key i; whether a query that sees no key gives 0, not NaN. constants: a mask, if any, of one channel and
//   as many pixels; its place comes after the result's.
enum rarefy_function {
    RAREFY_LAYER_NORM = 0,
    RAREFY_RMS_NORM = 1,
    RAREFY_GROUP_NORM = 2,
    RAREFY_MATMUL = 3,
    RAREFY_SOFTMAX = 4,
    RAREFY_ATTENTION = 5,
    RAREFY_POINTWISE = 6,
    RAREFY_VIEW = 7,
    RAREFY_RESIZE = 8,
    RAREFY_REDUCE = 9,
    RAREFY_EMBEDDING = 10,
    RAREFY_FUNCTIONS
};

// What RAREFY_REDUCE makes of the numbers.
enum rarefy_reduction {
    RAREFY_REDUCE_SUM = 0,
    RAREFY_REDUCE_MEAN = 1,
    RAREFY_REDUCE_NORM = 2,  // the root of the sum of the squares
    RAREFY_REDUCE_MAX = 3,   // NaN where one is NaN; so the next
    RAREFY_REDUCE_MIN = 4,
    RAREFY_REDUCTIONS
};

// Operations of an expression, on x or on x and y.
enum rarefy_operation {
    RAREFY_OP_ADD = 0,
    RAREFY_OP_SUB = 1,
    RAREFY_OP_MUL = 2,
    RAREFY_OP_DIV = 3,
    RAREFY_OP_MIN = 4,  // NaN where one is NaN; so the next
    RAREFY_OP_MAX = 5,
    RAREFY_OP_LEAKY = 6,  // x, and x y where x < 0
    RAREFY_OP_ELU = 7,    // x, and y (e^x - 1) where x < 0
    RAREFY_LAST_OF_TWO = RAREFY_OP_ELU,
    RAREFY_OP_NEG = 8,
    RAREFY_OP_ABS = 9,
    RAREFY_OP_SQRT = 10,
    RAREFY_OP_RSQRT = 11,
    RAREFY_OP_EXP = 12,
    RAREFY_OP_LOG = 13,
    RAREFY_OP_SOFTPLUS = 14,    // log(1 + e^x)
    RAREFY_OP_MISH = 15,        // x tanh(softplus(x))
    RAREFY_OP_ACTIVATION = 16,  // and those that follow: enum rarefy_activation, from RAREFY_NONE on
    RAREFY_OPERATIONS = RAREFY_OP_ACTIVATION + RAREFY_LEAKY_RELU + 1
};

// Which kernels a convolution may use.
enum rarefy_choice {
    RAREFY_MEASURE = 0,  // the fastest one that was measured
    RAREFY_SPARSE = 1,   // stores and computes only nonzero weights
    RAREFY_DENSE = 2,    // stores and computes all weights
};

// A third axis of windows, before rows and columns: the rows of a value are those of so many planes, one after the
// other. All 0: there is none.
typedef struct {
    int32_t planes;  // of x; they divide its rows
    int32_t kernel, stride, dilation;
    int32_t padding[2];  // before, after
} rarefy_depth;

// y = activation(conv(x, weight) + bias + residual), as torch.nn.functional.conv2d, or conv3d, with zero padding.
// A linear layer is a convolution with kernel 1 x 1; a depthwise one has groups = channels of x.
typedef struct {
    int32_t x;                                  // value id
    int32_t residual;                           // value id of the shape of y, added before the activation; -1 for none
    int32_t out_channels;                       // divisible by groups, as the channels of x
    int32_t kernel[2], stride[2], dilation[2];  // height, width; at least 1
    int32_t padding[4];                         // top, bottom, left, right; at least 0
    int32_t groups;
    int32_t activation;   // enum rarefy_activation
    int32_t storage;      // enum rarefy_storage
    int32_t choice;       // enum rarefy_choice
    const float *weight;  // (out_channels, channels of x / groups, [depth.kernel,] kernel[0], kernel[1]); read during
                          // the call only
    int64_t weights;      // how many numbers are there
    const float *bias;    // (out_channels), or NULL
    int64_t biases;
    rarefy_depth depth;
} rarefy_conv;

// Maximum or average over windows, as max_pool2d and avg_pool2d, or 3d. Output size per axis:
// (size + padding before + padding after - dilation * (kernel - 1) - 1) / stride + 1, rounded down; for ceil_mode pass
// the padding at the end that it amounts to. Every window must hold at least one value of x.
typedef struct {
    int32_t x;
    int32_t average;  // 0: maximum; 1: average
    int32_t
        count_padding;  // average: 1 divides by the sizes of the kernel, 0 by the number of values of x in the window
    int32_t kernel[2], stride[2], dilation[2];
    int32_t padding[4];  // top, bottom, left, right
    rarefy_depth depth;
} rarefy_pool;

rarefy_builder *rarefy_builder_new(void);
void rarefy_builder_free(rarefy_builder *builder);

// Each of these adds a step and returns the id of the value it makes. `name` is kept for the profile (may be NULL).
int32_t rarefy_builder_input(rarefy_builder *builder, int32_t channels, int32_t height, int32_t width, int32_t layout,
                             const char *name, char *error, int64_t size);
int32_t rarefy_builder_conv(rarefy_builder *builder, const rarefy_conv *conv, const char *name, char *error,
                            int64_t size);
int32_t rarefy_builder_pool(rarefy_builder *builder, const rarefy_pool *pool, const char *name, char *error,
                            int64_t size);
// The mean over height and width: a vector.
int32_t rarefy_builder_global_average(rarefy_builder *builder, int32_t x, const char *name, char *error, int64_t size);
// activation(x + y) or, with multiply = 1, activation(x * y). y has the shape of x, or is a vector with as many
// channels.
int32_t rarefy_builder_binary(rarefy_builder *builder, int32_t x, int32_t y, int32_t multiply, int32_t activation,
                              const char *name, char *error, int64_t size);
// activation(scale[c] * x + shift[c]); scale or shift may be NULL, which means 1 and 0. count: how many numbers each
// has.
int32_t rarefy_builder_affine(rarefy_builder *builder, int32_t x, const float *scale, const float *shift, int64_t count,
                              int32_t activation, const char *name, char *error, int64_t size);
// The channels of xs[0], then those of xs[1], ...; all of the same height and width.
int32_t rarefy_builder_concat(rarefy_builder *builder, const int32_t *xs, int32_t count, const char *name, char *error,
                              int64_t size);
// Every pixel factor_h x factor_w times (nearest neighbour).
int32_t rarefy_builder_upsample(rarefy_builder *builder, int32_t x, int32_t factor_h, int32_t factor_w,
                                const char *name, char *error, int64_t size);
// (channels, height, width) as a vector of channels * height * width, in that order.
int32_t rarefy_builder_flatten(rarefy_builder *builder, int32_t x, const char *name, char *error, int64_t size);
// An LSTM's cell: gates is a vector of 4 n channels, in PyTorch's order i, f, g, o, before their activations; c one of
// n. sigmoid(f) c + sigmoid(i) tanh(g)
int32_t rarefy_builder_lstm_cell(rarefy_builder *builder, int32_t gates, int32_t c, const char *name, char *error,
                                 int64_t size);
// Its result, of the same gates and of the new cell: sigmoid(o) tanh(c).
int32_t rarefy_builder_lstm_hidden(rarefy_builder *builder, int32_t gates, int32_t c, const char *name, char *error,
                                   int64_t size);
// A GRU's result: x and h are vectors of 3 n channels, in PyTorch's order r, z, n, the products of the input and of the
// state with their weights, biases added; state is one of n.  z state + (1 - z) tanh(x_n + sigmoid(x_r + h_r) h_n)
int32_t rarefy_builder_gru(rarefy_builder *builder, int32_t x, int32_t h, int32_t state, const char *name, char *error,
                           int64_t size);
// A layer of an LSTM or a GRU in one direction over a sequence, whose steps are the pixels of x, one after another: the
// gates of a step are those of x and the product of weight with the state before it, as above. The result has the
// states after every step: h, and behind its channels c where `cells` is set.
typedef struct {
    int32_t x;            // value id: 4 or 3 channels for each of a state's, the products of the input
    int32_t h, c;         // value ids of vectors, the states to begin with; -1: zeros. Of a GRU c is always -1
    int32_t hidden;       // channels of a state
    int32_t reverse;      // 1: the last step runs first
    int32_t cells;        // of an LSTM
    int32_t storage;      // enum rarefy_storage
    int32_t choice;       // enum rarefy_choice
    const float *weight;  // (channels of x, hidden); read during the call only
    int64_t weights;
    const float *bias;  // (channels of x), added to the product of the state, or NULL
    int64_t biases;
} rarefy_recurrence;
int32_t rarefy_builder_recurrence(rarefy_builder *builder, const rarefy_recurrence *recurrence, const char *name,
                                  char *error, int64_t size);
// A function of one or more values, `xs`, which numbers and constants describe: see enum rarefy_function.
typedef struct {
    int32_t function;  // enum rarefy_function
    const int32_t *xs;
    int64_t x_count;
    const int64_t *numbers;
    int64_t number_count;
    const float *constants;
    int64_t constant_count;
} rarefy_tensor;
int32_t rarefy_builder_tensor(rarefy_builder *builder, const rarefy_tensor *tensor, const char *name, char *error,
                              int64_t size);
// The activation of the convolution, binary or affine step that makes x, or the gates of the recurrent one, are
// computed in a mode (enum rarefy_mode); table is that of RAREFY_KTANH, NULL in the others. Returns 0.
int32_t rarefy_builder_mode(rarefy_builder *builder, int32_t x, int32_t mode, const rarefy_shift32 *table, char *error,
                            int64_t size);
// Makes a value a result of the program; returns 0.
int32_t rarefy_builder_output(rarefy_builder *builder, int32_t x, int32_t layout, char *error, int64_t size);
// The shape of a value: channels, height, width. Returns 0.
int32_t rarefy_builder_shape(const rarefy_builder *builder, int32_t value, int32_t shape[3], char *error, int64_t size);

typedef struct {
    const char *isa;  // "avx512", "avx2", "portable" or NULL for the best that this CPU runs
    int32_t batch;    // the batch size to choose for (any other runs, too); at least 1
    int32_t threads;  // the number of threads to choose for; 1 to 1024
    double
        tune_seconds;  // at most about so much time for measuring; 0 chooses by rule, with the same result every time
    // NULL, or a program for the same isa, batch and threads: a layer like one that was measured for it takes the same
    // kernel, not measured again. It is not needed afterwards. int8 has no use for it.
    const rarefy_program *measured;
} rarefy_options;

// Plans and measures. The builder is left as it was and is still to be freed.
rarefy_program *rarefy_builder_finish(const rarefy_builder *builder, const rarefy_options *options, char *error,
                                      int64_t size);
void rarefy_program_free(rarefy_program *program);

typedef struct {
    float *data;
    int64_t floats;
} rarefy_buffer;

// Runs the program: inputs in the order of rarefy_builder_input, outputs in that of rarefy_builder_output, each `batch`
// images in its layout; outputs must not overlap inputs. A rarefy_buffer says how many floats there are: exactly
// `batch` times the size of an image. Uses at most `threads` threads (the calling one among them; at most 1024).
// seconds: NULL, or as many numbers as steps, to which the CPU time of every step is *added* (then one thread is used).
// Returns 0; 1 when there is no memory for the scratch; or -1, with the reason in `error`, when an argument does not
// fit.
int32_t rarefy_program_run(const rarefy_program *program, const rarefy_buffer *inputs, int32_t input_count,
                           const rarefy_buffer *outputs, int32_t output_count, int64_t batch, int32_t threads,
                           double *seconds, int64_t second_count, char *error, int64_t size);

typedef struct {
    int32_t inputs, outputs, steps;
    int32_t group;          // images that the last steps take at once (the first take fewer, where that is faster)
    int64_t weight_bytes;   // weights, biases and indices as stored
    int64_t scratch_bytes;  // memory of one running thread at the batch that was chosen for, less the weights
    double tune_seconds;    // what measuring took
    char isa[16];
} rarefy_program_info;

typedef struct {
    const char *name;    // as given to the builder
    const char *kind;    // "conv", "depthwise", "pool", "input", ...
    char kernel[48];     // what computes it, for example "sparse 4x4 b160"; "dense 6x4 b64"; ...
    int32_t shape[3];    // channels, height, width of what it makes
    int32_t x_shape[3];  // of its first operand
    int64_t weights;     // number of weights, zeros among them
    int64_t nonzeros;    // weights that are not zero
    int64_t stored;      // weights as stored, padding among them
    int64_t macs;        // multiply-adds with nonzero weights for one image
    int64_t dense_macs;  // those of all weights
    int64_t weight_bytes;
    double tuned_seconds;  // time of one image when it was measured (0: was not)
    double dense_seconds;  // the same for the fastest dense kernel (0: was not measured)
} rarefy_step_info;

void rarefy_program_describe(const rarefy_program *program, rarefy_program_info *info);
// The step's facts; strings live as long as the program. Returns 0, or -1 where there is no such step.
int32_t rarefy_program_step(const rarefy_program *program, int32_t step, rarefy_step_info *info);
// Channels, height, width and layout of input (output = 0) or output (output = 1) number i. Returns 0, or -1.
int32_t rarefy_program_port(const rarefy_program *program, int32_t output, int32_t i, int32_t shape[3],
                            int32_t *layout);

// A program as one block of bytes that can be written to a file and mapped. It holds what was chosen, so a program that
// is loaded computes the same bits under the same instruction set.
int64_t rarefy_program_size(const rarefy_program *program);
void rarefy_program_save(const rarefy_program *program, void *out);
// A program that reads its weights in place: data must be 64-byte aligned and stay until the program is freed.
// Everything in data is checked first; what was cut or altered is refused. isa as in rarefy_options (a program saved
// under AVX-512 runs under any other: tiles are chosen anew by rule where lane counts differ).
rarefy_program *rarefy_program_load(const void *data, int64_t size, const char *isa, char *error, int64_t error_size);

#ifdef __cplusplus
}
#endif

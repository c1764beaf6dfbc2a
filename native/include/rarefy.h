// The C ABI of librarefy: one table of kernels; and the engine, which has a header of its own (rarefy_engine.h).
//
// A kernel is a plain function; its signature is the typedef named beside its name below. Kernels keep no state,
// allocate nothing that outlives the call, and use at most the number of threads that the caller passes.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    const char *name;   // what it computes, for example "thresholds_after_f32"
    const char *isa;    // "portable", "avx2", "avx_vnni", "avx512", "avx512_vbmi2", "neon", "neon_dotprod", "neon_i8mm"
    int32_t supported;  // 1 when this CPU can run it
    void *entry;        // the function
} rarefy_kernel;

// The kernels of this library, best instruction set first for every name; returns how many there are.
int64_t rarefy_kernels(const rarefy_kernel **table);

// How many values of a row go into one partial sum.
enum { RAREFY_CHUNK = 1 << 15 };

// One of the layers that a call of the thresholds' kernels goes over: rows * cols values, one threshold a row.
// first_chunk and first_row are the sums of rows * ceil(cols / RAREFY_CHUNK) and of rows of the layers before it.
typedef struct {
    int64_t first_chunk, first_row, rows, cols;
} rarefy_layer;

// In these, weights, grads, latents, values and masks are one pointer a layer, thresholds and lower one number a row of
// all layers, alpha and shrink one a layer; partial is scratch, one value a chunk of all layers. No two arrays overlap.
//
// "thresholds_before_f32", where W is what the latents hold and the factor 1 where |W| > threshold, alpha where
// lower <= |W| <= threshold, else 0 (lower may be null: then 0):
//   grad *= factor,   weight = W,   grad_thresholds = -sum of a row(grad * sign(W)).
// The sum is taken in a fixed order, in double over blocks of 256: the same bits for every instruction set and number
// of threads. A null gradient is one of zeros.
typedef void rarefy_thresholds_before_f32(const rarefy_layer *layers, int64_t count, float *const *weights,
                                          float *const *grads, const float *const *latents, const float *thresholds,
                                          const float *alpha, const float *lower, float *grad_thresholds,
                                          double *partial, int32_t threads);

// "thresholds_after_f32": latent = W = weight, weight = |W| <= threshold ? 0 : W - copysign(shrink * threshold, W).
typedef void rarefy_thresholds_after_f32(const rarefy_layer *layers, int64_t count, float *const *weights,
                                         float *const *latents, const float *thresholds, const float *shrink,
                                         int32_t threads);

// "thresholds_count_f32": live[i] = how many |W| > threshold layer i has.
typedef void rarefy_thresholds_count_f32(const rarefy_layer *layers, int64_t count, const float *const *latents,
                                         const float *thresholds, int64_t *live, int64_t *partial, int32_t threads);

// "mask_f32": values become 0 where the mask's byte is 0, NaN and infinities too; the others keep their bits.
typedef void rarefy_mask_f32(const rarefy_layer *layers, int64_t count, float *const *values,
                             const uint8_t *const *masks, int32_t threads);

// Activation functions: y[i] = f(x[i]) for i < n on the bits of numbers, from the table that is passed. x and y are the
// same array or do not overlap. A NaN comes back unchanged.
//
// Tables as their kernels read them; rarefy.act.Table says what each field means.
typedef struct {
    uint16_t start, length, factor, offset, last, reserved[3];  // last: the bits of infinity
    uint16_t slope[64], base[64];                               // 6 fraction bits; slopes below 256
} rarefy_linear16;

typedef struct {
    uint16_t identity_below, saturate_above, one, last, index_shift, mantissa_mask, reserved[2];
    uint16_t shift[32], base[32];  // base: E << m plus b
} rarefy_shift16;

typedef struct {
    uint32_t identity_below, saturate_above, one, last, index_shift, mantissa_mask, reserved[2];
    uint32_t shift[32], base[32];
} rarefy_shift32;

// The quartic of segment i = bits(|x| + 1) >> 20 mod 32: y = c0 + f (c1 + f (c2 + f (c3 + f c4))), f = |x| - begin.
typedef struct {
    float limit;  // |x| is clamped to it
    float reserved[15];
    float begin[32], coefficient[5][32];
} rarefy_quartic32;

// "act_linear16": any odd function as 64 lines; the table's values must not exceed the inputs'.
// "act_shift16": K-TanH of 32 rows in bf16 or fp16.
// "act_lut16": any function as its 65536 values. "act_lut8": any function of an 8-bit format as its 256 values.
// "act_hard16": min(|x|, 1) with the sign of x; the table is {bits of 1, bits of infinity}.
// "act_sigmoid_bf16", "act_silu_bf16", "act_gelu_bf16", "act_gelu_tanh_bf16": computed in float32; the table is that of
//   act_lut16, read for the few inputs outside the range where float32 gives the correctly rounded bits.
typedef void rarefy_act16(const uint16_t *x, uint16_t *y, int64_t n, const void *table, int32_t threads);
typedef void rarefy_act8(const uint8_t *x, uint8_t *y, int64_t n, const void *table, int32_t threads);
// "act_shift32": K-TanH of 32 rows in float32. "act_tanh32": tanh from a rarefy_quartic32.
// "act_sigmoid32", "act_silu32", "act_gelu32", "act_gelu_tanh32": within one unit of the last place;
// "act_sigmoid32_fast",
//   "act_silu32_fast", "act_gelu32_fast": within a few. They read no table; a NaN comes back as a NaN.
// "act_quick_gelu32", "act_mish32", "act_softplus32", "act_hardswish32", "act_elu32" and "act_exp32": computed in
// double; they read no table.
typedef void rarefy_act32(const uint32_t *x, uint32_t *y, int64_t n, const void *table, int32_t threads);

// Gated units over rows of values: h = act(gate), out = h * up, each rounded once to the format. `act` and its table
// are a kernel above for numbers of that format; gate and up begin a row every so many values (strides), out is without
// gaps, and may be gate or up themselves. n values at a time, at most 1024, go through act and slope.
// "gated_bf16", "gated_fp16": rarefy_gated16. "gated_fp32": rarefy_gated32.
typedef void rarefy_gated16(const uint16_t *gate, const uint16_t *up, uint16_t *out, int64_t rows, int64_t columns,
                            int64_t gate_stride, int64_t up_stride, rarefy_act16 *act, const void *table,
                            int32_t threads);
typedef void rarefy_gated32(const uint32_t *gate, const uint32_t *up, uint32_t *out, int64_t rows, int64_t columns,
                            int64_t gate_stride, int64_t up_stride, rarefy_act32 *act, const void *table,
                            int32_t threads);
// act' as numbers of float32. "slope16": looked up in 65536 numbers. "slope_silu32", "slope_gelu32",
// "slope_gelu_tanh32": computed within 1e-6; they read no table.
typedef void rarefy_slope16(const uint16_t *x, float *y, int64_t n, const void *table, int32_t threads);
typedef void rarefy_slope32(const uint32_t *x, float *y, int64_t n, const void *table, int32_t threads);
// of_gate = (upstream * up) * act'(gate) in float32, rounded once; of_up = upstream * h. upstream is without gaps.
// "gated_backward_bf16", "gated_backward_fp16", "gated_backward_fp32".
typedef void rarefy_gated_backward16(const uint16_t *upstream, const uint16_t *gate, const uint16_t *up,
                                     uint16_t *of_gate, uint16_t *of_up, int64_t rows, int64_t columns,
                                     int64_t gate_stride, int64_t up_stride, int64_t of_gate_stride,
                                     int64_t of_up_stride, rarefy_act16 *act, const void *table, rarefy_slope16 *slope,
                                     const void *slopes, int32_t threads);
typedef void rarefy_gated_backward32(const uint32_t *upstream, const uint32_t *gate, const uint32_t *up,
                                     uint32_t *of_gate, uint32_t *of_up, int64_t rows, int64_t columns,
                                     int64_t gate_stride, int64_t up_stride, int64_t of_gate_stride,
                                     int64_t of_up_stride, rarefy_act32 *act, const void *table, rarefy_slope32 *slope,
                                     const void *slopes, int32_t threads);
// A gate's activation as the cells of recurrent networks apply it.
enum {
    RAREFY_GATE_ENTRY = 0,    // what `entry`, a kernel of activation functions, gives
    RAREFY_GATE_OF_TANH,      // 1/2 + 1/2 entry(x/2); float32 alone, as the two below
    RAREFY_GATE_CLAMP,        // min(max(x, -1), 1)
    RAREFY_GATE_CLAMP_SIXTH,  // min(max(x + 3, 0), 6) / 6
};
typedef struct {
    void *entry;  // rarefy_act16 for bfloat16, rarefy_act32 for float32
    const void *table;
    int64_t kind;
} rarefy_gate;

// One layer of a recurrent network in one direction, over `steps` steps of a `batch` of sequences with `hidden` units;
// G gates: LSTM 4 (i, f, g, o), GRU 3 (r, z, n). Rows are those of all steps, one step after another; step s has the
// rows offsets[s] to offsets[s + 1] (not growing), which are the first ones of the batch; without offsets all of them.
// With `reverse` the last step comes first. "value" is a bfloat16 or a float, as the kernel's name says.
typedef struct {
    int64_t steps, batch, hidden, reverse, threads;
    const int64_t *offsets;  // [steps + 1] or null
    rarefy_gate sigmoid, tanh;
    int64_t narrow;        // products are values, not floats
    const void *products;  // [rows, G hidden]: x W_ih^T and the biases, of a GRU's third gate only the input's
    const void *weights;   // W_hh, values [G hidden, hidden]
    const float *bias;     // [hidden]: that of a GRU's third gate in the product with h, or null
    void *h, *c;           // values [batch, hidden]: before the first step, then after the last; c of an LSTM
    void *y;               // values [rows, hidden]: h of every step
    void *gates;           // values [rows, 4 hidden], null where no gradient is needed. GRU: r, z, n, h W_hn^T + b_hn
    void *cells;           // values [rows, 2 hidden]: c and tanh(c) of an LSTM, null as gates
    float *scratch;        // with B = batch + 15, D = G hidden + 31: (G (hidden + 15) + B) (hidden + 31) forward,
                           // (B + D) (hidden + 63) + B D backward
} rarefy_recurrent;

// The gradients of what comes out (values; null for zeros) and of what goes in.
typedef struct {
    const void *y, *h_n;
    void *products;  // values [rows, G hidden]
    void *hidden;    // values [rows, G hidden], GRU: that of the product with h
    float *h, *c;    // [batch, hidden]; c of an LSTM holds the gradient of the last c before
    int64_t hard;    // the activations are the clamped ones
} rarefy_recurrent_gradients;

// "lstm_f32", "lstm_bf16", "gru_f32", "gru_bf16": all steps. Sums of products are float; gates, c and h are rounded to
// values as they are computed, and nothing between: c = f c + i g, h = o tanh(c); n = tanh(x + r (h W + b)),
// h = (h - n) z + n.
typedef void rarefy_recurrent_forward(const rarefy_recurrent *op);
// "lstm_backward_f32", ... : op as it went forward with gates (and cells), but h and c as they were before the first
// step. Everything is computed in float from the gradients of gates as values.
typedef void rarefy_recurrent_backward(const rarefy_recurrent *op, const rarefy_recurrent_gradients *to);

// "fma_peak_f32": multiplies and adds between registers, and gives back how many floating-point operations that were.
typedef int64_t rarefy_fma_peak_f32(int64_t repeats);

#ifdef __cplusplus
}
#endif

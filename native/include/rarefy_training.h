// The products of a training step with sparse weights; kernels of the table in rarefy.h.
//
// A convolution is a matrix [out_channels] x [in_channels * taps] over positions of a grid. A tensor (n, y, x, c) lies
// in *planes*, one for every channel and phase: the phase (a, b) of strides (s, t) has the rows a, a + s, ... and the
// columns b, b + t, ...; a plane's row i, column j is the tensor's s (i + low_y) + a, t (j + low_x) + b, and 0 where
// the tensor has no such place. So what a tap reads for position q lies at q + a number of its own, for all positions
// alike. A linear layer is the grid of one row.
#pragma once

#include <stdint.h>

#include "rarefy.h"

#ifdef __cplusplus
extern "C" {
#endif

// The most vectors of a tile; sums take 16 floats more than these a row.
enum { RAREFY_TILE = 12 };

typedef struct {
    int64_t channels, height, width;         // of the tensor, one image
    int64_t step_n, step_y, step_x, step_c;  // floats from one to the next
    int64_t stride_y, stride_x, low_y, low_x;
    int64_t rows, columns;      // of a phase's plane
    int64_t plane, phase_size;  // floats from a channel's planes to the next, from a phase to the next
    int64_t phases;
    const int64_t *phase;  // [phases][2]
} rarefy_planes;

// A sparse matrix in blocks of its columns; entries in the order of blocks, then of `rows`.
typedef struct {
    int64_t count, blocks;  // rows; blocks of columns
    const int32_t *rows;    // [blocks][count][2]: a row, and how many entries it has in the block; most first
    const int64_t *begin;   // [blocks + 1]: the first entry of each
    const int32_t *offset;  // [entries]: what is read, as floats from the position's place in the first plane
    const int32_t *which;   // [entries]: which of the live weights, in the order of their memory
} rarefy_entries;

typedef struct {
    int64_t batch, chunk;              // chunk: 0, or how many columns of one row are a unit of work
    int64_t tile;                      // most vectors of a tile
    int64_t slices;                    // threads at most
    rarefy_planes x, y;                // how the input and the output's gradient are laid out in planes
    rarefy_planes out, in;             // where sums go: no low, columns are those of the planes
    int64_t y_begin;                   // where the output's first position lies in the planes of y
    rarefy_entries forward, backward;  // backward rows are (phase, in_channel)
    const float *values;               // [entries]: the live weights, in the order of their memory
    const int32_t *place;              // [entries]: where they are, of the `weights` floats of weight_gradient
    int64_t weights;
    const float *bias, *input, *output_gradient;
    float *output, *input_gradient, *weight_gradient;       // gradients that are null are not computed
    float *forward_weights, *backward_weights, *gradients;  // [entries], scratch
    float *products;                                        // [slices][entries], scratch; null as weight_gradient
    float *scratch;  // [slices][scratch_size]: planes of x and, backward, of y; one tile's sums
    int64_t scratch_size;
} rarefy_layer_step;

// "sparse_forward_f32": output = W input + bias (bias may be null).
// "sparse_backward_f32": input_gradient = W^T output_gradient; weight_gradient, 0 where no weight lives.
typedef void rarefy_layer_step_f32(const rarefy_layer_step *op);

// What "sparse_index" makes of the places of the live weights of a matrix [rows][columns] in memory, in their order.
typedef struct {
    int64_t rows, columns, entries;
    int64_t forward_blocks, backward_rows, backward_blocks, rows_a_block;
    int64_t plane;                                           // of the output's gradient
    int64_t most;                                            // entries of a backward row in one block, at most
    const int32_t *place;                                    // [entries], ascending
    const int32_t *column_block;                             // [columns]: forward block of a column
    const int32_t *column_offset, *column_row, *column_tap;  // forward offset; backward row, and offset from the plane
    int32_t *forward_rows, *backward_entry_rows;             // [blocks][rows][2]
    int64_t *forward_begin, *backward_begin;
    int32_t *forward_offset, *forward_which, *backward_offset, *backward_which;
    int32_t *scratch;  // 2 max(blocks * rows of either side) + max(columns, most) + 2 + rows + 1
} rarefy_index;
typedef void rarefy_sparse_index(const rarefy_index *op);

// "sparse_live_f32": the places of the weights that are not 0 or whose byte in the mask is not (which may be null);
// `place` has room for one more, or is null. Returns how many.
typedef int64_t rarefy_sparse_live_f32(const float *weight, const uint8_t *mask, int64_t n, int32_t *place);

// "sparse_take_f32": values = the weights at the places, ascending; counts[0] = how many of all weights are not 0,
// counts[1] = how many of those at the places.
typedef void rarefy_sparse_take_f32(const float *weight, int64_t n, const int32_t *place, int64_t entries,
                                    float *values, int64_t *counts);

// "sparse_lanes": floats of a vector.
typedef int64_t rarefy_sparse_lanes(void);

#ifdef __cplusplus
}
#endif

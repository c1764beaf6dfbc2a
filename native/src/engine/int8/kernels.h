// What the int8 kernels read and write; rarefy_int8.h says what they compute.
//
// A value lies in planes of bytes, one a channel. A plane's rows follow one another with a gap of zero points between
// them, as wide as what reads the plane reaches beyond its edges, so a weight at any kernel position meets the pixels
// of a whole tile at one offset, and neither tiles nor borders are copied: position p of a result is the sum over k of
// w[k] * x[p + offset[k]]. What stands in a result's gaps is written by a mask. (A stride is a copy beforehand, into a
// plane for every phase of it.)
//
// The weights of a row that are not zero are taken four at a time, any four: a *quad*, with an offset for each. Their
// pixels are interleaved in registers,
//
//     sums[p] += w0 x0[p] + w1 x1[p] + w2 x2[p] + w3 x3[p]
//
// which is one instruction where the processor has VNNI. Elsewhere (`pairs`) vpmaddubsw adds w0 x0 + w1 x1 in 16 bits,
// saturating; so a quad is two pairs, each such that what is positive of it adds up to at most 128, and what is
// negative, too: 255 * 128 < 2^15, and nothing ever saturates. A positive and a negative weight always are such a pair.
//
// NEON has a sum of four products of signed bytes, and only some processors one of unsigned by signed ones. The others
// turn the first bit of every pixel, which makes x - 128 of it (`centre`), and what a row's sums begin from is so much
// larger that they come to the same, whatever the pixel.
//
// Where weights come in blocks of four channels at one kernel position the planes of four channels are interleaved
// beforehand instead. With `pairs` two blocks are taken together, whose sums are added in 16 bits: what is positive of
// their first pairs adds up to at most 128, and so on; a block whose own pairs add up to more is taken as two, each
// with one weight of each pair.
//
// Dense weights are such blocks, too, taken for some rows at once, which share the pixels; with `pairs`, what does not
// fit in 16 bits with the others is left to each row's own blocks.
//
// A vector's layer reads each weight once an image, from memory, whose speed is all that counts: so that its weights
// are to be few bytes, and are to be taken apart in fewer instructions than it takes to fetch them. In `windows`
// WINDOW_ROWS rows go along their columns together, in steps: at a step each has up to QUAD of the weights that are not
// zero, which are next, of the WINDOW columns from the first one on that any of them has left. A weight then is its
// byte and three bits: the first of a quad lies 0 to 15 columns behind the window's first, each other one 1 to 4 behind
// the one before it, and where a row has no more in the window, or none so near, a zero stands in its place. The pixels
// of a window are one shuffle's table. WINDOW_STEPS steps are WINDOW_BYTES bytes, one after the other as they are read:
//
//     [0, 32)     of row r's weight k at 4 r + k, two bits for each step: the first one's lowest, or how far less one
//     [32, 40)    of row r at r, two bits for each step: the first one's highest
//     [40, 44)    of each step: how far its window is from the last one's (of the first one: from column 0)
//     [44, 172)   of each step: row r's weight k at 4 r + k
//
// Weights are from -127 to 127, and pixels 128 less than they are: what vpmaddubsw adds up is the size of two pixels
// times weights with the pixels' signs, at most 2 * 128 * 127 < 2^15, and never saturates.
//
// Where the processor spreads bytes by a mask (AVX512_VBMI2), such weights lie behind a `bitmask` instead: a bit each,
// and a byte of those that are not zero. MASK_ROWS rows of QUAD columns are a mask, bit QUAD r + k that of row r's
// column k, and what it spreads out is one vector of products with the QUAD pixels. The masks of MASK_QUADS quads,
// MASK_BYTES bytes, are followed by the quads' weights, in the order of the bits.
#pragma once

#include <stdint.h>

namespace rarefy {
namespace int8 {

enum Layout { ANY, BLOCKS, DENSE, WINDOWS, BITMASK, LAYOUTS };
enum { MOST_PIXELS = 64, MOST_TILE = 4, QUAD = 4, QUARTERS = 4, PAIR_LIMIT = 128, ROWS = 4, PART = 16 };
enum {
    WINDOW = 16,
    WINDOW_ROWS = 8,
    WINDOW_STEPS = 4,
    FIRSTS_AT = WINDOW_ROWS * QUAD,
    MOVES_AT = FIRSTS_AT + WINDOW_ROWS,
    WEIGHTS_AT = MOVES_AT + WINDOW_STEPS,
    WINDOW_BYTES = WEIGHTS_AT + WINDOW_STEPS * WINDOW_ROWS * QUAD,
    MOST_IMAGES = 4,  // of a call of windows or of a bitmask
    WINDOW_CENTRE = 128,
    MASK_ROWS = 16,
    MASK_QUADS = 8,
    MASK_BYTES = 8 * MASK_QUADS,
    MASK_BEHIND = 64,  // bytes behind the last weight that may be read
    BEHIND = 32        // and behind a vector's pixels
};

// Rows of results for one tile of pixels.
struct RowsCall {
    const uint8_t *x;        // the tile's pixels in the first plane
    const int8_t *weights;   // four of each quad
    const int32_t *offsets;  // four of each quad, or of BLOCKS one
    const int64_t *starts;   // first quad of every row, and the number of quads; of BLOCKS with pairs, of two. Null
                             // where DENSE leaves none
    // DENSE: of all rows of a group at once, each row's in turn; first of every group
    const int8_t *shared;
    const int32_t *shared_offsets;
    const int64_t *shared_starts;
    int64_t skipped;       // DENSE: rows of the first group before the first one
    const int32_t *first;  // what each row's sums begin from
    int64_t rows;
    const float *multipliers, *biases;
    float low, high;
    int32_t bounded;  // 1: what is rounded is less than 2^31
    uint8_t *y;       // at the tile; null for floats
    int64_t y_stride;
    float *floats;
    int64_t floats_stride;
    const uint8_t *residual;  // null: none
    int64_t residual_stride;
    float other;
    const uint8_t *mask;  // null, or 255 for each position of the tile that is a pixel
    uint8_t zero_point;   // of the others
};
typedef void Rows(const RowsCall *);

// How a float32 number becomes a byte: x * multiplier + bias between low and high, and what NaN becomes.
struct Factors {
    float multiplier, bias, nan, low, high;
};

// Rows of a sum or a product of bytes; rarefy_int8.h has the formulas.
struct Combination {
    float multiplier, other, bias, low, high;
    int32_t zero_x, zero_y;
};

struct Kernels {
    int32_t pixels;    // of a vector
    int32_t pairs;     // 1: the sums of pairs saturate
    int32_t together;  // DENSE: rows of a group
    int32_t shuffles;  // 1: windows are fast
    int32_t spreads;   // 1: bitmasks are
    int32_t centre;    // the sums of rows and of dot are those of w (x - centre)
    // for weights as they come, in blocks and dense, which not all have; for tiles of so many quarters of a vector,
    // null where there is none: single weights take whole vectors
    Rows *rows[LAYOUTS][QUARTERS * MOST_TILE + 1];
    // out[4 i + k] = planes[k][i], centred, for n pixels
    void (*interleave)(const uint8_t *const *planes, uint8_t *out, int64_t n);
    // out[r * out_line + i] = x[r * x_line + step * i] for n pixels of so many lines; up to 16 bytes from a line's
    // last pixel on are read
    void (*every)(const uint8_t *x, int64_t x_line, int64_t step, uint8_t *out, int64_t out_line, int64_t n,
                  int64_t lines);
    // the sum of n pixels of so many lines
    int64_t (*total)(const uint8_t *x, int64_t x_line, int64_t n, int64_t lines);
    // to[i] = the largest one of from[0 .. count - 1][i] for n of them
    void (*largest)(const uint8_t *const *from, int64_t count, uint8_t *to, int64_t n);
    void (*quantize)(const float *x, uint8_t *out, int64_t n, const Factors *factors);
    void (*add)(const uint8_t *x, const uint8_t *y, uint8_t *out, int64_t n, const Combination *how);
    void (*multiply)(const uint8_t *x, const uint8_t *y, uint8_t *out, int64_t n, const Combination *how);
    // out[i] = table[x[i]] for n of them
    void (*look_up)(const uint8_t *x, const uint8_t *table, uint8_t *out, int64_t n);
    // sums[r] = sum_k w[r][k] (x[k] - centre) of ROWS rows with all their weights, `count` each, a multiple of PART; w
    // has PART of every row in turn
    void (*dots)(const uint8_t *x, const int8_t *w, int64_t count, int32_t *sums);
    // sum_k w[k] x[index[k]], for a multiple of 16
    int32_t (*dot_sparse)(const uint8_t *x, const int8_t *w, const uint16_t *index, int64_t count);
    // the same of blocks of four, with x[4 * index[k / 4] + k % 4]; `count` is a multiple of 32, too
    int32_t (*dot_blocks)(const uint8_t *x, const int8_t *w, const uint16_t *index, int64_t count);
    // sums[WINDOW_ROWS i + r] = sum_k w[r][k] x[i][k] of WINDOW_ROWS rows whose weights are the bytes [from, to), whole
    // WINDOW_BYTES, for 1 to MOST_IMAGES images less WINDOW_CENTRE. BEHIND bytes behind each are read.
    void (*windows)(const int8_t *const *x, int64_t images, const int8_t *from, const int8_t *to, int32_t *sums);
    // sums[MASK_ROWS i + r] = sum_k w[r][k] x[i][k] of MASK_ROWS rows, whose bytes begin at `from`, for so many groups
    // of MASK_QUADS quads and 1 to MOST_IMAGES images
    void (*bitmask)(const uint8_t *const *x, int64_t images, const int8_t *from, int64_t groups, int32_t *sums);
};

}  // namespace int8
}  // namespace rarefy

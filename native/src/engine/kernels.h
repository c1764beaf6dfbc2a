// What the engine's kernels read and write: plain structures, shared between the files that are built for each
// instruction set and the executor, and the table of functions that every instruction set provides.
//
// A convolution is a sparse matrix times the pixels, for every output channel r and its weights k that are not zero
//
//     y[r] = act(bias[r] + sum_k w[r,k] x[off[r,k]] + residual[r])
//
// where y[r], x[...] and residual[r] are many pixels at once and off[r,k] says where those lie that the weight meets: a
// channel's plane, moved by the kernel position. An activation that is no clamp follows in a pass of its own. So the
// literature has it: as SpMM for pointwise convolutions in E. Elsen, M. Dukhan, T. Gale, K. Simonyan, Fast Sparse
// ConvNets, arXiv:1911.09723 (XNNPACK's f32-spmm), and with offsets for any kernel in J. Park et al., Faster CNNs with
// Direct Sparse Convolutions and Guided Pruning, arXiv:1608.01409.
//
// In the kernels' names and templates
//
//     R  output rows (channels) whose sums are kept in registers at a time
//     T  vectors of output pixels of a tile, so R * T sums
//     L  float32 lanes of a vector: 16, 8 or 4 by instruction set
//     V  the type of one such vector (vec-inl.h)
//     W  the type of a dense kernel's or a vector layer's weights: float, or uint16_t for bfloat16
//
// A convolution works on *tiles*: T vectors of L output pixels. First every channel's part of the input that the tile
// needs is packed into a small buffer, so that each weight's pixels lie in T consecutive aligned vectors at a known
// offset; then every output row (channel) is a sum of weight * vectors at offset, with the T sums kept in registers for
// R rows at a time. Where a plane's pixels lie as they are wanted, *direct* kernels read them there instead.
#pragma once

#include <stdint.h>

#include "rarefy.h"

namespace rarefy {
namespace engine {

enum { MAX_ROWS = 8, MAX_VECTORS = 14, MAX_LANES = 16 };

// How one vector of the packed buffer is made of the channel's plane: lane i is plane[index[i]], or 0.
enum PackKind : uint32_t {
    PACK_PADDING,  // zeros alone
    PACK_FULL,     // plane[a + i]
    PACK_COPY,     // plane[a + i] in the lanes of `lanes`
    PACK_ONE,      // lanes of the vector at a (of which `load_a` may be read) by the index table
    PACK_TWO,      // lanes of the vectors at a and b by the index table
    PACK_HALF,     // plane[a + 2 i] in the lanes of `lanes`; of the vectors at a and a + L - 1 `load_*` may be read
    PACK_GATHER,   // plane[a + index[i]] in the lanes of `lanes`
};

struct Pack {
    uint32_t kind;
    int32_t a, b;    // offsets in the plane, from the tile's source
    int32_t table;   // first number of the index table
    uint16_t lanes;  // lanes that are pixels
    uint16_t load_a, load_b;
    uint16_t reserved;
};

// Where one vector of results goes: its lanes `lanes`, one after the other, to y from `at` on.
struct Store {
    int32_t at;
    uint16_t lanes;  // lanes that are pixels
    uint16_t dense;  // as many low bits as `lanes` has
};

// What is known of all the stores of a tile.
enum StoreShape : int32_t {
    STORE_PLAIN,   // T * L pixels, one after the other
    STORE_TAIL,    // fewer pixels, one after the other: the last vector is not whole. Of a tile; a kernel is told one
                   // of the others
    STORE_PREFIX,  // the pixels of every vector are its first lanes
    STORE_ANY,
};

// R rows of one block of channels.
struct Group {
    int32_t length;  // weights of each row, padding included
    int32_t weight;  // first weight (counted in weights)
    int32_t offset;  // first offset; sparse kernels have one for each weight, dense ones one for R weights
    int32_t flags;   // enum GroupFlags
};

// A long row is summed in spans of its weights, each from zero on, whose sums are added up: the error of one sum grows
// with its terms. A group is a part of one span; what a row's groups leave off at is kept between them, in
// BlockCall::sums, and the sum of the spans that are done in BlockCall::totals.
enum GroupFlags : int32_t {
    GROUP_FIRST = 1,  // starts from the bias
    GROUP_LAST = 2,   // ends with the activation and the store
    GROUP_FRESH = 4,  // starts a span but the first one, from zero; without this and GROUP_FIRST: from the sums
    GROUP_ADDS = 8,   // ends a span but the first one: the totals are added
    GROUP_KEEPS = 16  // ends a span but the last one, with what goes to the totals; without this and GROUP_LAST: to the
                      // sums
};

struct BlockCall {
    const float *packed;
    const float *const *planes;  // of direct kernels: where each channel's pixels are, and after the last one's zeros
    const void *weights;         // float, or uint32 words of (bf16, offset) for sparse bf16, or uint16 for dense bf16
    const uint16_t *offsets;     // in floats of packed, or numbers of planes
    const Group *groups;
    const int32_t *rows;   // R for each group; -1: none
    int64_t count;         // groups
    float *sums, *totals;  // T * L for each row
    float *discard;        // T * L floats that nobody reads
    float *y;              // at the tile
    int64_t y_stride;
    const float *residual;  // at the tile, or null
    int64_t residual_stride;
    const float *bias;
    float low, high;  // the result is clamped to it
    const Store *stores;
    int32_t shape;  // enum StoreShape of all T stores
};
typedef void Block(const BlockCall *);

// Vectors: y = act(W x + bias) for one vector. The weights lie in panels of L rows, each row's next weight beside those
// of the other rows of its panel.
struct VectorCall {
    const void *weights;
    const uint16_t *index;        // columns; of a dense matrix, which has all of them in order, there are none
    const int64_t *starts;        // first weight of every panel, panels + 1
    const int32_t *rows;          // L for each panel, -1: none; null for a dense matrix, whose rows are in order, too
    int32_t first_row, last_row;  // of a dense matrix
    int32_t panels, columns;
    int32_t backwards;  // the last panel first: what was read last is still in a near cache
    const float *x;     // of a sparse matrix followed by a zero
    float *y;           // y[r * y_stride]
    int64_t y_stride;
    const float *residual;
    int64_t residual_stride;
    const float *bias;
    float low, high;
};

// One row of a maximum or average over windows.
struct WindowCall {
    const float *const *rows;  // of the input that the window meets, `width` floats each
    int64_t row_count, width;
    float *line;   // width floats; what stands beyond, on both sides, is the padding
    int64_t left;  // columns of padding
    int64_t taps, stride, dilation;
    int64_t out_width;
    int32_t average;
    float row_scale;     // an average is multiplied by row_scale * scale[x]
    const float *scale;  // out_width floats, and L more that may be read
    float *y;
};

// Rows of one channel's plane under a kernel of its own.
struct DepthwiseCall {
    const float *x;  // the plane
    float *y;
    const float *residual;  // null: none
    const float *weight;    // kernel[0] * kernel[1] of them
    float bias, low, high;
    int64_t in_h, in_w, out_w;
    int64_t kernel[2], stride[2], dilation[2];  // stride[1] is 1 or 2
    int64_t top, left;                          // padding
    int64_t first_row, last_row;                // of y
};

// Normalises over channels: every pixel on its own.
struct NormCall {
    const float *x;
    float *y;
    int64_t x_stride, y_stride;  // between channels
    int64_t channels, pixels;
    const float *scale, *shift;  // one number a channel
    float eps;
    int32_t centred;  // 0: the mean is not taken off
};

// Up to COLUMN_VECTORS vectors of columns of a product, or of queries, and so on; steps are in floats, between columns
// (queries) and between rows. scratch is aligned, and has COLUMN_VECTORS * L floats for each row that is named.
enum { COLUMN_VECTORS = 3 };

// y[m, n] = scale sum_k a[m, k] b[k, n]
struct MatmulCall {
    const float *a, *b;
    float *y;
    int64_t a_step[2];  // between rows, between what is summed
    int64_t b_step[2];  // between columns, between what is summed
    int64_t y_step[2];
    int64_t rows, columns, count;
    float scale;
    float *scratch;  // count + rows rows
};

// Along what is counted, for every column.
struct SoftmaxCall {
    const float *x;
    float *y;
    int64_t x_step[2], y_step[2];
    int64_t columns, count;
    float *scratch;  // count rows
};

// y = softmax(scale q k^T + mask) v
struct AttendCall {
    const float *q, *k, *v, *mask;  // mask: null where there is none
    float *y;
    int64_t q_step[2], k_step[2], v_step[2], y_step[2];  // between tokens, between features
    int64_t mask_step[2];                                // between queries, between keys
    int64_t queries, keys, features, results;            // features of q and k, of v and y
    float scale;
    int32_t causal;         // query i sees no key after key i
    int32_t empty_is_zero;  // what a query gets that sees no key: 0 rather than NaN
    int64_t first;          // number of the first query
    float *scratch;         // features + keys + results rows
};

// One operation of an expression (enum rarefy_operation): y = x[0] op x[1], for rows of n numbers.
struct PointwiseCall {
    int32_t operation;
    int32_t step[2];  // between the numbers of a row: 1, or 0 where it is one number
    const float *x[2];
    int64_t x_row[2], y_row;  // between rows
    float *y;
    int64_t rows, n;
};

enum WeightKind { SPARSE_F32, SPARSE_BF16, SPARSE_KINDS, DENSE_F32 = SPARSE_KINDS, DENSE_BF16, WEIGHT_KINDS };

// How activations are computed: enum rarefy_mode, and the table of RAREFY_KTANH, null in the others.
struct Mode {
    int32_t kind;
    const rarefy_shift32 *table;
};

struct Kernels {
    int32_t lanes;
    int32_t permutes;  // 1: PACK_ONE and PACK_TWO are fast
    // null where R * T is too many registers
    Block *block[WEIGHT_KINDS][MAX_ROWS + 1][MAX_VECTORS + 1];
    Block *direct[SPARSE_KINDS][MAX_ROWS + 1][MAX_VECTORS + 1];
    // `count` vectors for each of `channels` planes: out + c * out_stride. What lies `ahead` floats further is fetched.
    void (*pack)(const float *x, int64_t x_stride, int64_t channels, float *out, int64_t out_stride, const Pack *ops,
                 int64_t count, const int32_t *tables, int64_t ahead);
    void (*window)(const WindowCall *call);
    void (*depthwise)(const DepthwiseCall *call);
    void (*vector)(const VectorCall *call, int32_t bf16);
    void (*add)(const float *x, const float *y, float *out, int64_t n, float low, float high);
    void (*multiply)(const float *x, const float *y, float *out, int64_t n, float low, float high);
    void (*affine)(const float *x, float scale, float shift, float *out, int64_t n, float low, float high);
    // The same with a factor and a summand for each number.
    void (*affine_each)(const float *x, const float *scale, const float *shift, float *out, int64_t n, float low,
                        float high);
    float (*sum)(const float *x, int64_t n);
    // The sum of (x - mean)^2.
    float (*squares)(const float *x, float mean, int64_t n);
    // sigmoid(f) c + sigmoid(i) tanh(g); sigmoid(o) tanh(c); z state + (1 - z) tanh(x_n + r h_n), r and z the sigmoid
    // of x + h.
    void (*lstm_cell)(const Mode &mode, const float *i, const float *f, const float *g, const float *c, float *out,
                      int64_t n);
    void (*lstm_hidden)(const Mode &mode, const float *o, const float *c, float *out, int64_t n);
    void (*gru)(const Mode &mode, const float *const x[3], const float *const h[3], const float *state, float *out,
                int64_t n);
    // y[c y_stride + r] = x[r x_stride + c]
    void (*transpose)(const float *x, int64_t x_stride, int64_t rows, int64_t columns, float *y, int64_t y_stride);
    void (*norm)(const NormCall *call);
    void (*matmul)(const MatmulCall *call);
    void (*softmax)(const SoftmaxCall *call);
    void (*attend)(const AttendCall *call);
    // y[i] lies between x[place[i]] and the number behind it, as long as there is one, which has the share.
    void (*spread)(const float *x, const int64_t *place, const float *share, float *y, int64_t width, int64_t n);
    // (1 - share) a + share b
    void (*between)(const float *a, const float *b, float share, float *y, int64_t n);
    void (*pointwise)(const PointwiseCall *call);
    // An activation of enum rarefy_activation that is no clamp, in place or not. Those that have no modes are computed
    // as they are.
    void (*activate)(int32_t activation, const Mode &mode, const float *x, float *out, int64_t n);
};

}  // namespace engine
}  // namespace rarefy

// What an int8 program is made of.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "engine/int8/kernels.h"
#include "engine/program.h"
#include "rarefy_int8.h"

namespace rarefy::int8 {

using engine::Graph;
using engine::Kind;
using engine::Node;
using engine::Shape;
using engine::Window;

// How far apart the rows and the images of planes of one size are.
struct Gaps {
    int32_t columns = 0, rows = 0;
};

// Where a value lies: pixel (y, x) of channel c in image i is the byte
//     offset + c * stride + ((i modulo group) * (height + gaps.rows) + y) * row() + x
// A value of floats has four bytes for each of these; so has one of interleaved channels, c / 4 in the place of c, for
// the four of them.
struct Value {
    Shape shape;
    int32_t group = 1;  // images that it holds
    Gaps gaps;
    bool around = false;  // what reads it looks beyond the edges: the gaps hold the zero point
    bool floats = false, interleaved = false;
    bool copied = false;  // phases for a convolution
    uint8_t zero_point = 0;
    int64_t stride = 0, offset = 0;

    int64_t row() const { return int64_t{shape.width} + gaps.columns; }
    int64_t image() const { return (int64_t{shape.height} + gaps.rows) * row(); }
    // From the first pixel of `images` images to behind the last one's row.
    int64_t positions(int64_t images) const { return images * image() - gaps.rows * row(); }
    // What may be read before a plane's positions, and behind them: the last row's gap is a part of them.
    int64_t margin() const { return gaps.rows * row() + gaps.columns; }
    int64_t behind() const { return gaps.rows * row(); }
};

// The weights of a convolution: as quads of every row, as quads of groups of rows, or of vectors as numbers for dot
// products. Those that are zero are left out, where they are not among others.
struct Weights {
    engine::Buffer<int8_t> values;
    std::vector<int32_t> offsets;  // of quads
    std::vector<uint16_t> index;   // of dot products of single weights or of blocks
    std::vector<int64_t> starts;   // of rows
    int64_t bytes() const {
        return static_cast<int64_t>(values.size() + 4 * offsets.size() + 2 * index.size() + 8 * starts.size());
    }
};

// How far a kernel reaches beyond the pixel that it is for, along an axis.
struct Reach {
    int32_t low = 0, high = 0;
    bool operator==(const Reach &other) const { return low == other.low && high == other.high; }
};

// Rows of results that are first written elsewhere, since their planes are shorter than vectors are: whole groups, of
// three rows or of four.
enum { SOME_ROWS = 24 };

struct Step {
    Node node;                   // with the values of the program, not of the builder
    int32_t source;              // the builder's step
    int32_t group;               // images at once
    bool copy = false;           // of x for a convolution that is strided, changes the planes' size or takes blocks
    std::vector<int32_t> which;  // copy: the phases that are there, stride[1] * row + column
    Reach reach[2];              // copy: of the kernel
    std::vector<int32_t> operands;
    rarefy_int8_result result;   // its pointers are not used
    Layout layout = ANY;         // conv
    bool vector = false;         // conv: by dot products
    Weights weights, shared;     // of DENSE, what the rows of a group share, and what is left of each
    std::vector<int32_t> first;  // conv: (what the kernels take from pixels - zero_x) * the sum of a row's weights
    std::vector<float> multipliers, biases;
    bool bounded = true;  // conv: what is rounded is less than 2^31
    std::vector<uint8_t> table;
    std::vector<uint8_t> mask_one, mask_group;  // conv: pixels among the positions of one image and of a group's, where
                                                // the gaps between them are read
    int64_t total_weights = 0, nonzeros = 0;

    int64_t weight_bytes() const {
        return weights.bytes() + shared.bytes() + 12 * static_cast<int64_t>(multipliers.size());
    }
};

}  // namespace rarefy::int8

struct rarefy_int8_program {
    rarefy::engine::Graph graph;  // the builder's, without weights
    const rarefy::int8::Kernels *kernels = nullptr;
    std::string isa;
    std::vector<rarefy::int8::Value> values;
    std::vector<rarefy::int8::Step> steps;
    std::vector<rarefy::engine::Stage> stages;  // of these steps
    std::vector<int32_t> inputs, outputs;       // steps
    int64_t arena_bytes = 0, scratch_bytes = 0;

    mutable rarefy::engine::Pool pool;
};

namespace rarefy::int8 {

// Makes the values and the steps of a graph, and says where values lie; an empty string, or what cannot be. Of every
// node that is a convolution, how its weights are taken.
std::string make_plan(rarefy_int8_program &program, const engine::Plan &plan, const rarefy_int8_result *steps,
                      const std::vector<Layout> &layouts);

// How the weights of a convolution are taken: as `asked` in rarefy_int8_result where they can be, or by counting.
Layout choose_layout(const Graph &graph, const Node &node, int32_t group, const std::vector<float> &weight,
                     int32_t asked, const Kernels &kernels);

// Whether a convolution of so many images at once is computed by dot products.
inline bool of_vectors(const Graph &graph, const Node &node, int32_t group) {
    const Shape &x = graph.values[node.x];
    return node.window.pointwise() && x.pixels() == 1 && group == 1 && node.groups == 1 && x.channels <= 65535;
}

// Of a row of so many columns.
inline int64_t mask_groups(int64_t columns) { return (columns + MASK_QUADS * QUAD - 1) / (MASK_QUADS * QUAD); }

// Whether its weights are read once for several images.
inline bool of_several(Layout layout) { return layout == WINDOWS || layout == BITMASK; }

// Whether it can be computed by dot products with weights in windows or behind a bitmask, of any number of images.
inline bool of_images(const Graph &graph, const Node &node) {
    const Shape &x = graph.values[node.x];
    return node.window.pointwise() && x.pixels() == 1 && node.groups == 1;
}

// The weights of a layer of vectors in windows: values are their bytes, starts the first byte of each WINDOW_ROWS rows,
// offsets the rows in the order in which they are taken.
Weights make_windows(const engine::Matrix &m, const std::vector<float> &weight);

// The same behind a bitmask, of each MASK_ROWS rows.
Weights make_bitmask(const engine::Matrix &m, const std::vector<float> &weight);

// Makes the weights of a convolution whose steps are planned.
void make_weights(const rarefy_int8_program &program, Step &step, const std::vector<float> &weight);

// How the kernel position k of an axis meets the input: output pixel i reads pixel i + shift of the given phase.
struct Tap {
    int32_t phase, shift;
};
Tap tap_of(const Window &window, int axis, int32_t k);

// The phases of x that a convolution's kernel meets, stride[1] * row + column, sorted.
std::vector<int32_t> phases_of(const Window &window);

// Where a phase of a channel lies among the planes of a copy.
struct Planes {
    int64_t channels, phases;
    // Four channels at one position are a block, which are then the same phase; fewer make blocks with their phases.
    bool by_phase;
    Planes(int64_t all, int64_t of, bool interleaved)
        : channels(all), phases(of), by_phase(interleaved && all % QUAD == 0) {}
    int64_t plane(int64_t channel, int64_t phase) const {
        return by_phase ? phase * channels + channel : channel * phases + phase;
    }
    int64_t channel(int64_t plane) const { return by_phase ? plane % channels : plane / phases; }
    int64_t phase(int64_t plane) const { return by_phase ? plane / channels : plane % phases; }
};

// Whether a convolution reads the planes of x as they lie, without a copy.
bool in_place(const Window &window);

// Columns of a pooling's line with its padding on both sides, as far as windows reach.
inline int64_t pool_line(const Window &w) {
    const int64_t reach = int64_t{w.out_w - 1} * w.stride[1] + int64_t{w.kernel[1] - 1} * w.dilation[1] + 1;
    return reach > int64_t{w.left} + w.in_w ? reach : int64_t{w.left} + w.in_w;
}

// Bytes of a pointer to each row or column of a pooling's window.
inline int64_t pool_pointers(const Window &w) {
    return 8 * int64_t{w.kernel[0] > w.kernel[1] ? w.kernel[0] : w.kernel[1]};
}

// How many such lines maxima are taken of at a time: as many as a cache keeps.
inline int64_t pool_rows(const Window &w) { return 1 + 16384 / pool_line(w); }

// One thread's view of a run.
struct Frame {
    const rarefy_int8_program *program;
    uint8_t *arena, *scratch;
    const float *const *inputs;
    float *const *outputs;
    int64_t first_image;  // of this thread's share
    int32_t part, parts;  // this thread among those that work on the same images
};
void run_step(const Frame &frame, const Step &step, int64_t at, int64_t images);

}  // namespace rarefy::int8

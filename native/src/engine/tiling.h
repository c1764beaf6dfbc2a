// How the output of a convolution or a pooling is cut into tiles of vectors, and how the input of a tile is packed.
#pragma once

#include <cstdint>
#include <vector>

#include "engine/kernels.h"

namespace rarefy::engine {

// The axis of a window before its rows and columns: of planes that follow one another. As a builder leaves it where
// there is none: one plane.
struct Depth {
    int32_t in = 1, out = 1, kernel = 1, stride = 1, dilation = 1, front = 0;

    int32_t at(int32_t k) const { return k * dilation - front; }
    bool pointwise() const { return kernel == 1 && stride == 1 && front == 0 && in == out; }
};

// Windows over planes: the geometry of one channel.
struct Window {
    int32_t in_h, in_w, out_h, out_w;  // of a plane
    int32_t kernel[2], stride[2], dilation[2];
    int32_t top, left;  // padding
    Depth depth;

    int32_t taps() const { return depth.kernel * kernel[0] * kernel[1]; }
    // Output pixel i is input pixel i.
    bool pointwise() const {
        return taps() == 1 && stride[0] == 1 && stride[1] == 1 && top == 0 && left == 0 && in_h == out_h &&
               in_w == out_w && depth.pointwise();
    }
};

// Output pixels lie in rows of some stride, some lanes of which are no pixel. A vector of pixels meets the input that a
// weight wants at the offset of the weight's kernel position in a *copy* of the input, shifted so that the offset is
// fit.
enum class Form : int32_t {
    SHIFTED,  // rows end at whole vectors; a copy for every kernel column: all loads are aligned
    COMPACT,  // no gaps between rows; a copy for every kernel position, but for those that differ by whole vectors
    SINGLE,   // rows with their padding between them; one copy for each phase of the stride: loads are not aligned
    PLANES,   // no tiles: a depthwise kernel slides over the planes as they lie
    DIRECT,   // of pointwise layers: tiles, but the pixels are read where they lie
};

struct Tile {
    int32_t vectors;
    int32_t pack;         // first Pack
    int32_t source;       // where the Packs' offsets count from, in the plane
    int32_t store;        // first Store
    int32_t y;            // where the Stores' offsets count from, in the plane of results
    int32_t pixels;       // the results are y .. y + pixels
    int32_t shape;        // enum StoreShape
    int32_t first, need;  // the input's pixels that it reads lie in [first, need)
};

// Where a channel's pixels lie in the packed buffer: what weights are made for.
struct Layout {
    int32_t lanes = 0, vectors = 0;  // of the largest tile
    int64_t channel_floats = 0;  // packed floats of one channel; TOO_LARGE where offsets of 16 bits do not reach them
    std::vector<uint16_t> taps;  // offset of each kernel position in a channel's packed floats
};
enum : int64_t { LARGEST_OFFSET = 65535, TOO_LARGE = int64_t{1} << 40 };

struct Tiling : Layout {
    std::vector<Pack> packs;
    std::vector<Store> stores;
    std::vector<int32_t> tables;
    std::vector<Tile> tiles;

    int64_t pack_count() const { return channel_floats / lanes; }
};

// Takes time and memory by the number of taps that fit in 16 bits, whatever the window's sizes.
Layout layout_of(const Window &window, int32_t lanes, int32_t vectors, Form form);

// How many pixels making the tiling would look at.
double tiling_work(const Window &window, int32_t images, const Layout &layout, Form form);

// Tiles of at most `vectors` vectors over `images` images, whose planes follow one another. The layout must not be
// TOO_LARGE.
Tiling make_tiling(const Window &window, int32_t images, const Kernels &kernels, int32_t vectors, Form form);

}  // namespace rarefy::engine

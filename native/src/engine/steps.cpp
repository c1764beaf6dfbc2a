// What each step does with the values of a run.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "engine/program.h"

namespace rarefy::engine {

namespace {

struct Clamp {
    float low = -std::numeric_limits<float>::infinity(), high = std::numeric_limits<float>::infinity();
    bool rest = false;  // more than a clamp: Kernels::activate follows
};

Clamp clamp_of(int32_t activation) {
    Clamp c;
    if (activation == RAREFY_RELU || activation == RAREFY_RELU6) c.low = 0.0f;
    if (activation == RAREFY_RELU6) c.high = 6.0f;
    c.rest = activation > RAREFY_RELU6;
    return c;
}

// Where a value's numbers of one image are.
struct View {
    float *at;
    int64_t stride;
};

View view(const Frame &f, int32_t id, int64_t image) {
    const Value &v = f.program->plan.values[id];
    const int64_t each = v.shape.size() * (f.first_image + image);
    if (v.place == Place::INPUT) return {const_cast<float *>(f.inputs[v.port]) + each, v.stride};
    if (v.place == Place::OUTPUT) return {f.outputs[v.port] + each, v.stride};
    return {f.arena + v.offset + image % v.group * v.shape.pixels(), v.stride};
}

// This thread's share of count things.
struct Share {
    int64_t from, to;
    Share(const Frame &f, int64_t count) : from(count * f.part / f.parts), to(count * (f.part + 1) / f.parts) {}
};

void conv_vector(const Frame &f, const Step &s, int64_t at) {
    const View x = view(f, s.node.x, at), y = view(f, s.node.out, at);
    const Shape &in = f.program->plan.values[s.node.x].shape;
    const int32_t L = f.program->kernels->lanes;
    float *line = f.scratch;
    for (int32_t c = 0; c < in.channels; ++c) line[c] = x.at[c * x.stride];
    for (int32_t c = in.channels; c < in.channels + L; ++c) line[c] = 0.0f;
    const int32_t rows = f.program->plan.values[s.node.out].shape.channels;
    const Share mine(f, rows);
    const Clamp clamp = clamp_of(s.node.activation);
    VectorCall call = {};
    call.weights = s.weights.values.data();
    call.index = s.config.sparse() ? s.weights.offsets.data() : nullptr;
    call.starts = s.weights.starts.data() + mine.from;
    call.rows = static_cast<int32_t>(mine.to - mine.from);
    call.x = line;
    call.y = y.at + mine.from * y.stride;
    call.y_stride = y.stride;
    if (s.node.second >= 0) {
        const View r = view(f, s.node.second, at);
        call.residual = r.at + mine.from * r.stride;
        call.residual_stride = r.stride;
    }
    call.bias = s.first.data() + mine.from;
    call.low = clamp.low;
    call.high = clamp.high;
    f.program->kernels->vector(&call, s.config.bf16());
    if (!clamp.rest) return;
    // one number a row: some at a time, side by side
    float some[64];
    for (int64_t from = 0; from < call.rows; from += 64) {
        const int64_t n = std::min<int64_t>(call.rows - from, 64);
        float *at_row = call.y + from * y.stride;
        for (int64_t r = 0; r < n; ++r) some[r] = at_row[r * y.stride];
        f.program->kernels->activate(s.node.activation, some, some, n);
        for (int64_t r = 0; r < n; ++r) at_row[r * y.stride] = some[r];
    }
}

void conv(const Frame &f, const Step &s, int64_t at, int64_t images, int64_t first_tile, int64_t last_tile) {
    const Kernels &k = *f.program->kernels;
    const Tiling &tiling = s.tiling(images);
    const View x = view(f, s.node.x, at), y = view(f, s.node.out, at);
    const View residual = s.node.second >= 0 ? view(f, s.node.second, at) : View{nullptr, 0};
    const int32_t channels = f.program->plan.values[s.node.x].shape.channels, rows = f.program->plan.values[s.node.out].shape.channels;
    const int32_t blocks = ceil_div(channels, s.config.block), chunks = ceil_div(rows, CHUNK_ROWS);
    const Clamp clamp = clamp_of(s.node.activation);
    const int64_t zero = s.config.block * tiling.channel_floats, width = int64_t{s.config.vectors} * k.lanes;
    float *packed = f.scratch, *sums = packed + f.program->packed_floats, *trash = sums + f.program->sums_floats;
    std::memset(packed + zero, 0, static_cast<size_t>(width) * sizeof(float));

    // a tile is shared between threads by its rows where there are fewer tiles than threads
    const int64_t tiles = last_tile - first_tile;
    const int64_t split = f.parts == 1 ? 1 : std::min<int64_t>(chunks, (2 * f.parts + tiles - 1) / tiles);
    const Share mine(f, tiles * split);
    for (int64_t unit = mine.from; unit < mine.to; ++unit) {
        const Tile &tile = tiling.tiles[first_tile + unit / split];
        const int64_t first_chunk = chunks * (unit % split) / split, last_chunk = chunks * (unit % split + 1) / split;
        BlockCall call = {};
        call.packed = packed;
        call.weights = s.weights.values.data();
        call.offsets = s.weights.offsets.data();
        call.sums = sums;
        call.trash = trash;
        call.y = y.at + tile.y;
        call.y_stride = y.stride;
        call.residual = residual.at ? residual.at + tile.y : nullptr;
        call.residual_stride = residual.stride;
        call.bias = s.first.data();
        call.low = clamp.low;
        call.high = clamp.high;
        call.stores = tiling.stores.data() + tile.store;
        call.shape = tile.shape;
        Block *block_kernel = k.block[s.config.kind][s.config.rows][tile.vectors];
        for (int32_t block = 0; block < blocks; ++block) {
            const int32_t from = s.weights.chunks[block * chunks + first_chunk], to = s.weights.chunks[block * chunks + last_chunk];
            if (from == to) continue;
            const int32_t c = block * s.config.block;
            k.pack(x.at + c * x.stride + tile.source, x.stride, std::min(channels - c, s.config.block), packed, tiling.channel_floats,
                   tiling.packs.data() + tile.pack, tiling.pack_count(), tiling.tables.data(), tile.pixels);
            call.groups = s.weights.groups.data() + from;
            call.rows = s.weights.row_ids.data() + int64_t{from} * s.config.rows;
            call.count = to - from;
            block_kernel(&call);
        }
        if (clamp.rest) {
            const int64_t last_row = std::min<int64_t>(rows, last_chunk * CHUNK_ROWS);
            for (int64_t r = first_chunk * CHUNK_ROWS; r < last_row; ++r)
                k.activate(s.node.activation, call.y + r * y.stride, call.y + r * y.stride, tile.pixels);
        }
    }
}

void pool(const Frame &f, const Step &s, int64_t at, int64_t first_row, int64_t last_row) {
    const Window &w = s.node.window;
    const View x = view(f, s.node.x, at), y = view(f, s.node.out, at);
    const Share mine(f, f.program->plan.values[s.node.out].shape.channels);
    const bool average = s.node.flag;
    // a line with its padding on both sides, and the rows of one window
    float *line = f.scratch + pool_margin(s), *end = line + (w.in_w + 15) / 16 * 16 + pool_margin(s);
    std::fill(f.scratch, end, average ? 0.0f : -std::numeric_limits<float>::infinity());
    const float **rows = reinterpret_cast<const float **>(end);
    WindowCall call = {};
    call.rows = rows;
    call.width = w.in_w;
    call.line = line;
    call.left = w.left;
    call.taps = w.kernel[1];
    call.stride = w.stride[1];
    call.dilation = w.dilation[1];
    call.out_width = w.out_w;
    call.average = average;
    call.scale = s.scale.data();
    for (int64_t c = mine.from; c < mine.to; ++c) {
        for (int64_t row = first_row; row < last_row; ++row) {
            const int64_t image = row / w.out_h;
            call.row_count = 0;
            for (int64_t k = 0; k < w.kernel[0]; ++k) {
                const int64_t from = row % w.out_h * w.stride[0] + k * w.dilation[0] - w.top;
                if (from >= 0 && from < w.in_h) rows[call.row_count++] = x.at + c * x.stride + (image * w.in_h + from) * w.in_w;
            }
            call.row_scale = 1.0f / static_cast<float>(s.node.count_padding ? w.kernel[0] : call.row_count);
            call.y = y.at + c * y.stride + row * w.out_w;
            if (call.row_count == 0) {  // dilation can step over all rows
                std::fill(call.y, call.y + w.out_w, line[-1]);
                continue;
            }
            f.program->kernels->window(&call);
        }
    }
}

void elementwise(const Frame &f, const Step &s, int64_t at, int64_t images) {
    const Kernels &k = *f.program->kernels;
    const View x = view(f, s.node.x, at), y = view(f, s.node.out, at);
    const View second = s.node.second >= 0 ? view(f, s.node.second, at) : View{nullptr, 0};
    const Shape &shape = f.program->plan.values[s.node.out].shape;
    const bool broadcast = s.node.second >= 0 && !(f.program->plan.values[s.node.second].shape == shape);
    const int64_t n = shape.pixels() * images;
    const Clamp clamp = clamp_of(s.node.activation);
    const Share mine(f, shape.channels);
    for (int64_t c = mine.from; c < mine.to; ++c) {
        const float *from = x.at + c * x.stride;
        float *to = y.at + c * y.stride;
        if (s.node.kind == Kind::AFFINE) {
            k.affine(from, s.first[c], s.other[c], to, n, clamp.low, clamp.high);
        } else if (broadcast) {
            for (int64_t i = 0; i < images; ++i) {
                const float value = second.at[c * second.stride + i];
                const int64_t skip = i * shape.pixels();
                k.affine(from + skip, s.node.flag ? value : 1.0f, s.node.flag ? -0.0f : value, to + skip, shape.pixels(), clamp.low, clamp.high);
            }
        } else {
            (s.node.flag ? k.multiply : k.add)(from, second.at + c * second.stride, to, n, clamp.low, clamp.high);
        }
        if (clamp.rest) k.activate(s.node.activation, to, to, n);
    }
}

void global_average(const Frame &f, const Step &s, int64_t at, int64_t images) {
    const View x = view(f, s.node.x, at), y = view(f, s.node.out, at);
    const Shape &shape = f.program->plan.values[s.node.x].shape;
    const Share mine(f, shape.channels);
    for (int64_t c = mine.from; c < mine.to; ++c)
        for (int64_t i = 0; i < images; ++i)
            y.at[c * y.stride + i] = f.program->kernels->sum(x.at + c * x.stride + i * shape.pixels(), shape.pixels()) / static_cast<float>(shape.pixels());
}

void concat(const Frame &f, const Step &s, int64_t at, int64_t images) {
    const View y = view(f, s.node.out, at);
    for (size_t k = 0; k < s.operands.size(); ++k) {
        const View x = view(f, s.operands[k], at);
        const Shape &shape = f.program->plan.values[s.operands[k]].shape;
        const Share mine(f, shape.channels);
        for (int64_t c = mine.from; c < mine.to; ++c)
            std::memcpy(y.at + (s.places[k] + c) * y.stride, x.at + c * x.stride, static_cast<size_t>(shape.pixels() * images) * sizeof(float));
    }
}

void upsample(const Frame &f, const Step &s, int64_t at, int64_t images) {
    const View x = view(f, s.node.x, at), y = view(f, s.node.out, at);
    const Shape &in = f.program->plan.values[s.node.x].shape;
    const int32_t fh = s.node.window.stride[0], fw = s.node.window.stride[1];
    const int64_t width = int64_t{in.width} * fw;
    const Share mine(f, in.channels);
    for (int64_t c = mine.from; c < mine.to; ++c)
        for (int64_t row = 0; row < in.height * images; ++row) {
            const float *from = x.at + c * x.stride + row * in.width;
            float *to = y.at + c * y.stride + row * fh * width;
            for (int64_t i = 0; i < in.width; ++i) std::fill(to + i * fw, to + (i + 1) * fw, from[i]);
            for (int32_t again = 1; again < fh; ++again) std::memcpy(to + again * width, to, static_cast<size_t>(width) * sizeof(float));
        }
}

void flatten(const Frame &f, const Step &s, int64_t at, int64_t images) {
    const View x = view(f, s.node.x, at), y = view(f, s.node.out, at);
    const Shape &in = f.program->plan.values[s.node.x].shape;
    const Share mine(f, in.channels);
    for (int64_t c = mine.from; c < mine.to; ++c)
        for (int64_t i = 0; i < images; ++i)
            for (int64_t p = 0; p < in.pixels(); ++p) y.at[(c * in.pixels() + p) * y.stride + i] = x.at[c * x.stride + i * in.pixels() + p];
}

// Between the caller's layout and ours.
void port(const Frame &f, const Step &s, int64_t at, int64_t images) {
    const bool input = s.node.kind == Kind::INPUT;
    const int32_t id = input ? s.node.out : s.node.x;
    const Value &v = f.program->plan.values[id];
    const std::vector<int32_t> &ports = input ? f.program->inputs : f.program->outputs;
    int32_t number = 0;
    while (&f.program->steps[ports[number]] != &s) ++number;
    if (v.place == (input ? Place::INPUT : Place::OUTPUT) && v.port == number) return;
    const int64_t pixels = v.shape.pixels(), channels = v.shape.channels;
    const Share mine(f, channels);
    for (int64_t i = 0; i < images; ++i) {
        const View ours = view(f, id, at + i);
        const int64_t begin = (f.first_image + at + i) * v.shape.size();
        const float *in = input ? f.inputs[number] + begin : nullptr;
        float *out = input ? nullptr : f.outputs[number] + begin;
        const bool last = s.node.layout == RAREFY_CHANNELS_LAST;
        const int64_t c_step = last ? 1 : pixels, p_step = last ? channels : 1;
        constexpr int64_t SQUARE = 16;  // a line of a cache each way
        for (int64_t p0 = 0; p0 < pixels; p0 += SQUARE)
            for (int64_t c = mine.from; c < mine.to; ++c)
                for (int64_t p = p0; p < std::min(pixels, p0 + SQUARE); ++p) {
                    if (input) ours.at[c * ours.stride + p] = in[c * c_step + p * p_step];
                    else out[c * c_step + p * p_step] = ours.at[c * ours.stride + p];
                }
    }
}

}  // namespace

int64_t unit_count(const Step &s, int64_t images) {
    return s.node.kind == Kind::POOL ? s.node.window.out_h * images : static_cast<int64_t>(s.tiling(images).tiles.size());
}

Unit unit_of(const Step &s, int64_t images, int64_t i) {
    if (s.node.kind != Kind::POOL) {
        const Tile &tile = s.tiling(images).tiles[i];
        return {tile.need, tile.y + tile.pixels};
    }
    const Window &w = s.node.window;
    const int64_t image = i / w.out_h, last = i % w.out_h * w.stride[0] + int64_t{w.kernel[0] - 1} * w.dilation[0] - w.top;
    return {(image * w.in_h + std::min<int64_t>(last + 1, w.in_h)) * w.in_w, (i + 1) * w.out_w};
}

void run_units(const Frame &f, const Step &s, int64_t at, int64_t images, int64_t from, int64_t to) {
    if (s.node.kind == Kind::POOL) pool(f, s, at, from, to);
    else conv(f, s, at, images, from, to);
}

void run_step(const Frame &f, const Step &s, int64_t at, int64_t images) {
    switch (s.node.kind) {
        case Kind::CONV:
            if (s.config.vector) {
                for (int64_t i = 0; i < images; ++i) conv_vector(f, s, at + i);
                return;
            }
            return run_units(f, s, at, images, 0, unit_count(s, images));
        case Kind::POOL: return run_units(f, s, at, images, 0, unit_count(s, images));
        case Kind::GLOBAL_AVERAGE: return global_average(f, s, at, images);
        case Kind::BINARY:
        case Kind::AFFINE: return elementwise(f, s, at, images);
        case Kind::CONCAT: return concat(f, s, at, images);
        case Kind::UPSAMPLE: return upsample(f, s, at, images);
        case Kind::FLATTEN: return flatten(f, s, at, images);
        default: return port(f, s, at, images);
    }
}

}  // namespace rarefy::engine

// What each step does with the values of a run.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <limits>

#include "engine/tensor.h"

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

// The operands of a convolution's images from `at` on.
Operands operands_of(const Frame &f, const Step &s, int64_t at) {
    return {view(f, s.node.x, at), view(f, s.node.out, at),
            s.node.other_operand >= 0 ? view(f, s.node.other_operand, at) : View{nullptr, 0}};
}

// The call of a convolution's kernels, as far as it is the same for all tiles.
BlockCall call_of(const Frame &f, const Step &s, const Operands &o, const Clamp &clamp) {
    BlockCall call = {};
    call.packed = f.scratch;
    call.weights = s.weights.values.data();
    call.offsets = s.weights.offsets.data();
    call.sums = f.scratch + f.program->packed_floats;
    call.totals = call.sums + f.program->sums_floats / 2;
    call.discard = call.sums + f.program->sums_floats;
    call.y_stride = o.y.stride;
    call.residual_stride = o.residual.stride;
    call.bias = s.bias.data();
    call.low = clamp.low;
    call.high = clamp.high;
    return call;
}

// How a kernel stores a tile. The last one of a plane may go beyond its end where there is room in the arena.
int32_t shape_of(const Frame &f, const Step &s, int64_t images, const Tile &tile) {
    if (tile.shape != STORE_TAIL) return tile.shape;
    if (s.node.kind == Kind::RECURRENCE) return STORE_PREFIX;
    const std::vector<Value> &values = f.plan->values;
    const Value &y = values[s.node.out];
    const int64_t end = tile.y + int64_t{tile.vectors} * f.program->kernels->lanes - f.begins[s.node.out];
    const bool last = images == y.group && tile.y + tile.pixels == y.shape.pixels() * images,
               room = y.place == Place::ARENA && end <= std::min(y.stride, (y.held() + 15) / 16 * 16),
               read = s.node.other_operand < 0 || values[s.node.other_operand].place == Place::ARENA;
    return last && room && read ? STORE_PLAIN : STORE_PREFIX;
}

}  // namespace

void multiply_vector(const Frame &f, const Step &s, const Operands &o) {
    const int64_t columns = multiplied(f.program->graph, s.node).channels,
                  rows = product_of(f.program->graph, s.node).channels, lanes = f.program->kernels->lanes;
    float *line = f.scratch;
    if (o.x.stride == 1) std::memcpy(line, o.x.at, static_cast<size_t>(columns) * sizeof(float));
    else
        for (int64_t c = 0; c < columns; ++c) line[c] = o.x.at[c * o.x.stride];
    line[columns] = 0.0f;
    const Share mine(f, s.weights.starts.size() - 1);  // of panels
    const int64_t first = mine.from * lanes, last = std::min(rows, mine.to * lanes);
    const Clamp clamp = clamp_of(s.node.activation);
    VectorCall call = {};
    call.weights = s.weights.values.data();
    call.index = s.config.sparse() ? s.weights.offsets.data() : nullptr;
    call.starts = s.weights.starts.data() + mine.from;
    call.rows = s.config.sparse() ? s.weights.row_ids.data() + first : nullptr;
    call.first_row = static_cast<int32_t>(first);
    call.last_row = static_cast<int32_t>(last);
    call.panels = static_cast<int32_t>(mine.to - mine.from);
    call.columns = static_cast<int32_t>(columns);
    call.backwards = o.backwards;
    call.x = line;
    call.y = o.y.at;
    call.y_stride = o.y.stride;
    call.residual = o.residual.at;
    call.residual_stride = o.residual.stride;
    call.bias = s.bias.data();
    call.low = clamp.low;
    call.high = clamp.high;
    f.program->kernels->vector(&call, s.config.bf16());
    if (!clamp.rest) return;
    const auto activate = [&](float *at, int64_t n) {
        f.program->kernels->activate(s.node.activation, s.mode(), at, at, n);
    };
    if (o.y.stride == 1 && f.parts == 1) return activate(o.y.at, rows);
    // one number a row: some at a time, side by side
    constexpr int64_t SOME = 64;
    float some[SOME];
    for (int64_t from = first; from < mine.to * lanes; from += SOME) {
        float *at[SOME];
        int64_t n = 0;
        for (int64_t i = from; i < std::min(from + SOME, mine.to * lanes); ++i) {
            const int64_t row = call.rows ? call.rows[i - first] : i;
            if (row >= 0 && row < rows) at[n++] = o.y.at + row * o.y.stride;
        }
        for (int64_t i = 0; i < n; ++i) some[i] = *at[i];
        activate(some, n);
        for (int64_t i = 0; i < n; ++i) *at[i] = some[i];
    }
}

void multiply_tiles(const Frame &f, const Step &s, const Operands &o, int64_t images, int64_t first_tile,
                    int64_t last_tile) {
    const Kernels &k = *f.program->kernels;
    const Tiling &tiling = s.tiling(images);
    const View &x = o.x, &y = o.y, &residual = o.residual;
    const int32_t channels = multiplied(f.program->graph, s.node).channels,
                  rows = product_of(f.program->graph, s.node).channels;
    const int32_t blocks = ceil_div(channels, s.config.block), chunks = ceil_div(rows, CHUNK_ROWS);
    const Clamp clamp = clamp_of(s.node.activation);
    const bool direct = s.config.direct();
    const int64_t zero = direct ? 0 : s.config.block * tiling.channel_floats,
                  width = int64_t{s.config.vectors} * k.lanes;
    float *packed = f.scratch;
    std::memset(packed + zero, 0, static_cast<size_t>(width) * sizeof(float));
    const float **planes = reinterpret_cast<const float **>(packed + width);  // of direct kernels, after the zeros
    if (direct) planes[s.config.block] = packed;
    BlockCall call = call_of(f, s, o, clamp);
    call.planes = planes;

    // threads share tiles, which the next layer's same tiles read, and the rows of a tile where there are few tiles
    const int64_t tiles = last_tile - first_tile;
    const int64_t split = f.parts == 1 ? 1 : std::min<int64_t>(chunks, (4 * f.parts + tiles - 1) / tiles);
    const Share mine(f, tiles * split);
    for (int64_t unit = mine.from, next; unit < mine.to; unit = next) {
        next = std::min(mine.to, (unit / split + 1) * split);
        const Tile &tile = tiling.tiles[first_tile + unit / split];
        const int64_t first_chunk = chunks * (unit % split) / split,
                      last_chunk = chunks * (next - unit / split * split) / split;
        call.y = y.at + tile.y;
        call.residual = residual.at ? residual.at + tile.y : nullptr;
        call.stores = tiling.stores.data() + tile.store;
        call.shape = shape_of(f, s, images, tile);
        Block *block_kernel = (direct ? k.direct : k.block)[s.config.kind][s.config.rows][tile.vectors];
        for (int32_t block = 0; block < blocks; ++block) {
            const int32_t from = s.weights.chunks[block * chunks + first_chunk],
                          to = s.weights.chunks[block * chunks + last_chunk];
            if (from == to) continue;
            const int32_t c = block * s.config.block, count = std::min(channels - c, s.config.block);
            const float *pixels = x.at + c * x.stride + tile.source;
            if (direct)
                for (int32_t i = 0; i < count; ++i) planes[i] = pixels + i * x.stride;
            else
                k.pack(pixels, x.stride, count, packed, tiling.channel_floats, tiling.packs.data() + tile.pack,
                       tiling.pack_count(), tiling.tables.data(), tile.pixels);
            call.groups = s.weights.groups.data() + from;
            call.rows = s.weights.row_ids.data() + int64_t{from} * s.config.rows;
            call.count = to - from;
            block_kernel(&call);
        }
        if (clamp.rest) {
            const int64_t last_row = std::min<int64_t>(rows, last_chunk * CHUNK_ROWS);
            for (int64_t r = first_chunk * CHUNK_ROWS; r < last_row; ++r)
                k.activate(s.node.activation, s.mode(), call.y + r * y.stride, call.y + r * y.stride, tile.pixels);
        }
    }
}

namespace {

// Rows of results in a unit of a depthwise step: as many as its kernels compute at once for a 3 x 3 kernel (see
// depthwise-inl.h). Not measured apart.
enum { PLANE_ROWS = 4 };

void depthwise(const Frame &f, const Step &s, int64_t at, int64_t first_unit, int64_t last_unit) {
    const Window &w = s.node.window;
    const View x = view(f, s.node.x, at), y = view(f, s.node.out, at);
    const View residual = s.node.other_operand >= 0 ? view(f, s.node.other_operand, at) : View{nullptr, 0};
    const int64_t channels = f.plan->values[s.node.x].shape.channels, rows = f.plan->values[s.node.out].shape.channels;
    const int64_t in = int64_t{w.in_h} * w.in_w, out = int64_t{w.out_h} * w.out_w,
                  units = (w.out_h + PLANE_ROWS - 1) / PLANE_ROWS;
    const Clamp clamp = clamp_of(s.node.activation);
    DepthwiseCall call = {};
    call.low = clamp.low;
    call.high = clamp.high;
    call.in_h = w.in_h;
    call.in_w = w.in_w;
    call.out_w = w.out_w;
    for (int axis = 0; axis < 2; ++axis) {
        call.kernel[axis] = w.kernel[axis];
        call.stride[axis] = w.stride[axis];
        call.dilation[axis] = w.dilation[axis];
    }
    call.top = w.top;
    call.left = w.left;
    for (int64_t r = 0; r < rows; ++r) {
        call.weight = reinterpret_cast<const float *>(s.weights.values.data()) + r * w.taps();
        if (s.config.bf16()) {
            const uint16_t *half = reinterpret_cast<const uint16_t *>(s.weights.values.data()) + r * w.taps();
            for (int32_t k = 0; k < w.taps(); ++k) f.scratch[k] = from_bf16(half[k]);
            call.weight = f.scratch;
        }
        call.bias = s.bias[r];
        for (int64_t unit = first_unit; unit < last_unit;) {  // image by image
            const int64_t image = unit / units, end = std::min(last_unit, (image + 1) * units);
            call.x = x.at + r / (rows / channels) * x.stride + image * in;
            call.y = y.at + r * y.stride + image * out;
            call.residual = residual.at ? residual.at + r * residual.stride + image * out : nullptr;
            call.first_row = unit % units * PLANE_ROWS;
            call.last_row = std::min<int64_t>(w.out_h, (end - image * units) * PLANE_ROWS);
            f.program->kernels->depthwise(&call);
            if (clamp.rest) {
                float *done = call.y + call.first_row * w.out_w;
                f.program->kernels->activate(s.node.activation, s.mode(), done, done,
                                             (call.last_row - call.first_row) * w.out_w);
            }
            unit = end;
        }
    }
}

void pool(const Frame &f, const Step &s, int64_t at, int64_t first_row, int64_t last_row) {
    const Window &w = s.node.window;
    const View x = view(f, s.node.x, at), y = view(f, s.node.out, at);
    const int64_t channels = f.plan->values[s.node.out].shape.channels;
    const bool average = s.node.average;
    // a line with its padding on both sides, and the rows of one window
    float *line = f.scratch + pool_margin(s), *end = line + (w.in_w + 15) / 16 * 16 + pool_margin(s);
    std::fill(f.scratch, end, average ? 0.0f : -std::numeric_limits<float>::infinity());
    const float **rows = reinterpret_cast<const float **>(end);
    const int32_t down = w.depth.kernel * w.kernel[0];
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
    call.scale = s.column_scale.data();
    for (int64_t c = 0; c < channels; ++c) {
        for (int64_t row = first_row; row < last_row; ++row) {
            const int64_t image = row / w.out_h / w.depth.out, first = row / w.out_h % w.depth.out * w.depth.stride;
            call.row_count = 0;
            for (int32_t tap = 0; tap < down; ++tap) {
                const int64_t plane = first + w.depth.at(tap / w.kernel[0]),
                              from = row % w.out_h * w.stride[0] + tap % w.kernel[0] * w.dilation[0] - w.top;
                if (plane >= 0 && plane < w.depth.in && from >= 0 && from < w.in_h)
                    rows[call.row_count++] =
                        x.at + c * x.stride + ((image * w.depth.in + plane) * w.in_h + from) * w.in_w;
            }
            call.row_scale = 1.0f / static_cast<float>(s.node.count_padding ? down : call.row_count);
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
    const View other = s.node.other_operand >= 0 ? view(f, s.node.other_operand, at) : View{nullptr, 0};
    const Shape &shape = f.plan->values[s.node.out].shape;
    const bool broadcast = s.node.other_operand >= 0 && !(f.plan->values[s.node.other_operand].shape == shape);
    const int64_t n = shape.pixels() * images;
    const Clamp clamp = clamp_of(s.node.activation);
    const Share mine(f, shape.channels);
    if (n == 1 && !broadcast && x.stride == 1 && y.stride == 1 && (!other.at || other.stride == 1)) {  // vectors
        const float *from = x.at + mine.from;
        float *to = y.at + mine.from;
        const int64_t count = mine.to - mine.from;
        if (s.node.kind == Kind::AFFINE)
            k.affine_each(from, s.scale.data() + mine.from, s.shift.data() + mine.from, to, count, clamp.low,
                          clamp.high);
        else (s.node.multiply ? k.multiply : k.add)(from, other.at + mine.from, to, count, clamp.low, clamp.high);
        if (clamp.rest) k.activate(s.node.activation, s.mode(), to, to, count);
        return;
    }
    for (int64_t c = mine.from; c < mine.to; ++c) {
        const float *from = x.at + c * x.stride;
        float *to = y.at + c * y.stride;
        if (s.node.kind == Kind::AFFINE) {
            k.affine(from, s.scale[c], s.shift[c], to, n, clamp.low, clamp.high);
        } else if (broadcast) {
            for (int64_t i = 0; i < images; ++i) {
                const float value = other.at[c * other.stride + i];
                const int64_t skip = i * shape.pixels();
                k.affine(from + skip, s.node.multiply ? value : 1.0f, s.node.multiply ? -0.0f : value, to + skip,
                         shape.pixels(), clamp.low, clamp.high);
            }
        } else {
            (s.node.multiply ? k.multiply : k.add)(from, other.at + c * other.stride, to, n, clamp.low, clamp.high);
        }
        if (clamp.rest) k.activate(s.node.activation, s.mode(), to, to, n);
    }
}

void global_average(const Frame &f, const Step &s, int64_t at, int64_t images) {
    const View x = view(f, s.node.x, at), y = view(f, s.node.out, at);
    const Shape &shape = f.plan->values[s.node.x].shape;
    const Share mine(f, shape.channels);
    for (int64_t c = mine.from; c < mine.to; ++c)
        for (int64_t i = 0; i < images; ++i)
            y.at[c * y.stride + i] = f.program->kernels->sum(x.at + c * x.stride + i * shape.pixels(), shape.pixels()) /
                                     static_cast<float>(shape.pixels());
}

void concat(const Frame &f, const Step &s, int64_t at, int64_t images) {
    const View y = view(f, s.node.out, at);
    for (size_t k = 0; k < s.operands.size(); ++k) {
        const View x = view(f, s.operands[k], at);
        const Shape &shape = f.plan->values[s.operands[k]].shape;
        const Share mine(f, shape.channels);
        for (int64_t c = mine.from; c < mine.to; ++c)
            std::memcpy(y.at + (s.places[k] + c) * y.stride, x.at + c * x.stride,
                        static_cast<size_t>(shape.pixels() * images) * sizeof(float));
    }
}

void upsample(const Frame &f, const Step &s, int64_t at, int64_t images) {
    const View x = view(f, s.node.x, at), y = view(f, s.node.out, at);
    const Shape &in = f.plan->values[s.node.x].shape;
    const int32_t fh = s.node.window.stride[0], fw = s.node.window.stride[1];
    const int64_t width = int64_t{in.width} * fw;
    const Share mine(f, in.channels);
    for (int64_t c = mine.from; c < mine.to; ++c)
        for (int64_t row = 0; row < in.height * images; ++row) {
            const float *from = x.at + c * x.stride + row * in.width;
            float *to = y.at + c * y.stride + row * fh * width;
            for (int64_t i = 0; i < in.width; ++i) std::fill(to + i * fw, to + (i + 1) * fw, from[i]);
            for (int32_t again = 1; again < fh; ++again)
                std::memcpy(to + again * width, to, static_cast<size_t>(width) * sizeof(float));
        }
}

void flatten(const Frame &f, const Step &s, int64_t at, int64_t images) {
    const View x = view(f, s.node.x, at), y = view(f, s.node.out, at);
    const Shape &in = f.plan->values[s.node.x].shape;
    const Share mine(f, in.channels);
    for (int64_t c = mine.from; c < mine.to; ++c)
        for (int64_t i = 0; i < images; ++i)
            for (int64_t p = 0; p < in.pixels(); ++p)
                y.at[(c * in.pixels() + p) * y.stride + i] = x.at[c * x.stride + i * in.pixels() + p];
}

// Calls f(first channel, numbers) for spans of a state's channels that lie one after another in all values alike.
template <class F>
void over_spans(const Frame &f, int64_t channels, int64_t images, std::initializer_list<View> views, const F &span) {
    const Share mine(f, channels);
    const bool dense = std::all_of(views.begin(), views.end(), [=](const View &v) { return v.stride == images; });
    if (dense) return span(mine.from, (mine.to - mine.from) * images);
    for (int64_t c = mine.from; c < mine.to; ++c) span(c, images);
}

void lstm(const Frame &f, const Step &s, int64_t at, int64_t images) {
    const Kernels &k = *f.program->kernels;
    const View gates = view(f, s.node.x, at), c = view(f, s.node.other_operand, at), y = view(f, s.node.out, at);
    const int64_t n = f.plan->values[s.node.out].shape.channels;
    over_spans(f, n, images, {gates, c, y}, [&](int64_t unit, int64_t count) {
        const auto gate = [&](int64_t i) { return gates.at + (i * n + unit) * gates.stride; };
        const float *state = c.at + unit * c.stride;
        float *out = y.at + unit * y.stride;
        if (s.node.kind == Kind::LSTM_CELL) k.lstm_cell(s.mode(), gate(0), gate(1), gate(2), state, out, count);
        else k.lstm_hidden(s.mode(), gate(3), state, out, count);
    });
}

void gru(const Frame &f, const Step &s, int64_t at, int64_t images) {
    const View x = view(f, s.node.x, at), h = view(f, s.node.other_operand, at), state = view(f, s.operands[0], at),
               y = view(f, s.node.out, at);
    const int64_t n = f.plan->values[s.node.out].shape.channels;
    over_spans(f, n, images, {x, h, state, y}, [&](int64_t unit, int64_t count) {
        const float *xs[3], *hs[3];
        for (int64_t i = 0; i < 3; ++i) {
            xs[i] = x.at + (i * n + unit) * x.stride;
            hs[i] = h.at + (i * n + unit) * h.stride;
        }
        f.program->kernels->gru(s.mode(), xs, hs, state.at + unit * state.stride, y.at + unit * y.stride, count);
    });
}

// Vectors of images that lie together: channels by images here, images by channels there.
void port_vectors(const Frame &f, const Step &s, int64_t at, int64_t images, int32_t id, int32_t number,
                  const Share &mine) {
    constexpr int64_t SQUARE = 16;  // a line of a cache each way
    const int64_t channels = f.plan->values[id].shape.channels, begin = (f.first_image + at) * channels;
    const bool input = s.node.kind == Kind::INPUT;
    const View ours = view(f, id, at);
    const auto over = [&](const auto &move) {
        for (int64_t c0 = mine.from; c0 < mine.to; c0 += SQUARE)
            for (int64_t i0 = 0; i0 < images; i0 += SQUARE)
                move(c0, std::min(mine.to, c0 + SQUARE), i0, std::min(images, i0 + SQUARE));
    };
    if (input) {
        const float *in = f.inputs[number] + begin;
        over([&](int64_t c0, int64_t c1, int64_t i0, int64_t i1) {
            for (int64_t c = c0; c < c1; ++c)
                for (int64_t i = i0; i < i1; ++i) ours.at[c * ours.stride + i] = in[i * channels + c];
        });
    } else {
        float *out = f.outputs[number] + begin;
        over([&](int64_t c0, int64_t c1, int64_t i0, int64_t i1) {
            for (int64_t i = i0; i < i1; ++i)
                for (int64_t c = c0; c < c1; ++c) out[i * channels + c] = ours.at[c * ours.stride + i];
        });
    }
}

// Between the caller's layout and ours.
void port(const Frame &f, const Step &s, int64_t at, int64_t images) {
    const bool input = s.node.kind == Kind::INPUT;
    const int32_t id = input ? s.node.out : s.node.x;
    const Value &v = f.plan->values[id];
    const std::vector<int32_t> &ports = input ? f.program->inputs : f.program->outputs;
    int32_t number = 0;
    while (&f.program->steps[ports[number]] != &s) ++number;
    if (v.place == (input ? Place::INPUT : Place::OUTPUT) && v.port == number) return;
    const int64_t pixels = v.shape.pixels(), channels = v.shape.channels;
    const Share mine(f, channels);
    const bool together = v.place == Place::ARENA && at % v.group + images <= v.group;
    if (pixels == 1 && together) return port_vectors(f, s, at, images, id, number, mine);
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

namespace {

// Rows of results in one unit of a step without tiles.
int64_t unit_rows(const Step &s) { return s.node.kind == Kind::POOL ? 1 : PLANE_ROWS; }

bool tiled(const Step &s) { return s.node.kind == Kind::CONV && s.config.tiled(); }

}  // namespace

int64_t unit_count(const Step &s, int64_t images) {
    if (tiled(s)) return static_cast<int64_t>(s.tiling(images).tiles.size());
    return (s.node.window.out_h + unit_rows(s) - 1) / unit_rows(s) * s.node.window.depth.out * images;
}

Unit unit_of(const Step &s, int64_t images, int64_t i) {
    if (tiled(s)) {
        const Tile &tile = s.tiling(images).tiles[i];
        return {tile.first, tile.need, tile.y + tile.pixels};
    }
    const Window &w = s.node.window;
    const Depth &d = w.depth;
    const int64_t each = unit_count(s, 1) / d.out, plane = i / each, row = i % each * unit_rows(s),
                  end = std::min(row + unit_rows(s), int64_t{w.out_h}), image = plane / d.out;
    const int64_t first = row * w.stride[0] - w.top,
                  last = (end - 1) * w.stride[0] + int64_t{w.kernel[0] - 1} * w.dilation[0] - w.top;
    const auto pixel = [&](int64_t k, int64_t y) {
        const int64_t in = plane % d.out * d.stride + d.at(static_cast<int32_t>(k));
        return ((image * d.in + std::clamp<int64_t>(in, 0, d.in - 1)) * w.in_h + std::clamp<int64_t>(y, 0, w.in_h)) *
               w.in_w;
    };
    return {pixel(0, first), pixel(d.kernel - 1, last + 1), (plane * w.out_h + end) * w.out_w};
}

void run_units(const Frame &f, const Step &s, int64_t at, int64_t images, int64_t from, int64_t to) {
    if (s.node.kind == Kind::POOL) pool(f, s, at, from, to);
    else if (s.config.planes()) depthwise(f, s, at, from, to);
    else multiply_tiles(f, s, operands_of(f, s, at), images, from, to);
}

void run_step(const Frame &f, const Step &s, int64_t at, int64_t images) {
    switch (s.node.kind) {
        case Kind::CONV:
            if (s.config.vector) {
                for (int64_t i = 0; i < images; ++i) multiply_vector(f, s, operands_of(f, s, at + i));
                return;
            }
            if (s.config.tiled()) return run_units(f, s, at, images, 0, unit_count(s, images));
            [[fallthrough]];
        case Kind::POOL: {
            const Share mine(f, unit_count(s, images));
            return run_units(f, s, at, images, mine.from, mine.to);
        }
        case Kind::GLOBAL_AVERAGE: return global_average(f, s, at, images);
        case Kind::BINARY:
        case Kind::AFFINE: return elementwise(f, s, at, images);
        case Kind::CONCAT: return concat(f, s, at, images);
        case Kind::UPSAMPLE: return upsample(f, s, at, images);
        case Kind::FLATTEN: return flatten(f, s, at, images);
        case Kind::LSTM_CELL:
        case Kind::LSTM_HIDDEN: return lstm(f, s, at, images);
        case Kind::GRU: return gru(f, s, at, images);
        case Kind::RECURRENCE: return run_recurrence(f, s, at, images);
        case Kind::TENSOR: return run_tensor(f, s, at, images);
        default: return port(f, s, at, images);
    }
}

}  // namespace rarefy::engine

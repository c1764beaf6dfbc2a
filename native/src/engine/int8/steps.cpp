// What each step of an int8 program does with the values of a run.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "engine/int8/program.h"

namespace rarefy::int8 {

namespace {

// The fewest positions of a band. Not measured apart.
constexpr int64_t BAND_PIXELS = 6 * MOST_PIXELS;

// Where a value's pixels of the images from `image` on are.
struct View {
    const Value *value;
    uint8_t *at;
    // Of a value that is neither floats nor interleaved.
    uint8_t *plane(int64_t c) const { return at + c * value->stride; }
    uint8_t *line(int64_t c, int64_t image, int64_t y) const {
        return plane(c) + image * value->image() + y * value->row();
    }
};

View view(const Frame &f, int32_t id, int64_t image) {
    const Value &v = f.program->values[id];
    return {&v, f.arena + v.offset + image % v.group * v.image() * (v.interleaved ? QUAD : 1)};
}

// The same of a value of floats, which has a float for each byte of another.
float *floats(const Frame &f, const View &v) {
    uint8_t *begin = f.arena + v.value->offset;
    return reinterpret_cast<float *>(begin) + (v.at - begin);
}

// This thread's share of count things.
struct Share {
    int64_t from, to;
    Share(int64_t from_, int64_t to_) : from(from_), to(to_) {}
    Share(const Frame &f, int64_t count) : from(count * f.part / f.parts), to(count * (f.part + 1) / f.parts) {}
};

// Threads that share large planes have bands of positions, whole lines of a cache, as they have of the steps before and
// behind, so that most of what one reads it has written itself; otherwise, and of small planes, channels.
bool in_bands(const Frame &f, int64_t positions) { return f.parts > 1 && positions >= BAND_PIXELS * f.parts; }

float clamped(float t, float low, float high) {
    const float above = t > low ? t : low;
    return above < high ? above : high;
}

// The whole number nearest to t, ties to even: the last bits of 1.5 * 2^23 + t. Low and high are from 0 to 255.
uint8_t rounded(float t, float low, float high) {
    const float sum = clamped(t, low, high) + 12582912.0f;
    uint32_t bits;
    std::memcpy(&bits, &sum, sizeof bits);
    return static_cast<uint8_t>(bits);
}

// Zero points around images of a plane, where they are read: before the first one, and behind the last. What follows a
// plane may also be what stands before the next one, which writes it then, but for the gap that ends a whole plane.
void surround(const View &y, int64_t c, int64_t at, int64_t images) {
    const Value &v = *y.value;
    if (!v.around) return;
    const int64_t margin = v.margin(), end = at % v.group * v.image() + v.positions(images);
    const bool whole = at % v.group == 0 && images == v.group;
    const int64_t between = whole ? std::min(margin, v.stride - end) : margin, own = c ? between : margin;
    uint8_t *first = y.plane(c) - at % v.group * v.image();
    std::memset(y.plane(c) - own, v.zero_point, static_cast<size_t>(own));
    const int64_t stop = c + 1 == v.shape.channels ? end + margin : std::min(end + margin, v.stride - between);
    if (stop > end) std::memset(first + end, v.zero_point, static_cast<size_t>(stop - end));
}

// The same, and between the rows and the images of a plane.
void fill_gaps(const View &y, int64_t c, int64_t at, int64_t images) {
    const Value &v = *y.value;
    if (!v.around) return;
    surround(y, c, at, images);
    for (int64_t i = 0; i < images; ++i) {
        for (int64_t row = 0; row < v.shape.height; ++row)
            std::memset(y.line(c, i, row) + v.shape.width, v.zero_point, static_cast<size_t>(v.gaps.columns));
        if (i + 1 < images)
            std::memset(y.line(c, i, v.shape.height), v.zero_point, static_cast<size_t>(v.gaps.rows * v.row()));
    }
}

// Makes the result of row r of a sum.
void finish(const Frame &f, const Step &s, int64_t at, const View &y, int64_t r, int32_t products) {
    const int32_t sum = s.first[r] + products;
    float t = static_cast<float>(sum) * s.multipliers[r];
    t = t + s.biases[r];
    if (s.node.other_operand >= 0) {
        const float residual = static_cast<float>(*view(f, s.node.other_operand, at).plane(r)) * s.result.other;
        t = t + residual;
    }
    if (y.value->floats) floats(f, y)[r * y.value->stride] = clamped(t, s.result.low, s.result.high);
    else *y.plane(r) = rounded(t, s.result.low, s.result.high);
}

void vector(const Frame &f, const Step &s, int64_t at) {
    const View x = view(f, s.node.x, at), y = view(f, s.node.out, at);
    const uint8_t *line = x.at;
    if (x.value->stride != 1) {
        for (int64_t c = 0; c < x.value->shape.channels; ++c) f.scratch[c] = *x.plane(c);
        line = f.scratch;
    }
    const Kernels &k = *f.program->kernels;
    const Share mine(f, y.value->shape.channels);
    int32_t sums[ROWS];
    for (int64_t r = mine.from; r < mine.to; ++r) {
        const int64_t n = r % ROWS;
        if (s.layout == DENSE) {
            const int64_t count = s.weights.starts[1];
            if (n == 0 || r == mine.from) k.dots(line, s.weights.values.data() + (r - n) * count, count, sums);
        } else {
            const int64_t from = s.weights.starts[r], count = s.weights.starts[r + 1] - from;
            const int8_t *w = s.weights.values.data() + from;
            if (s.layout == BLOCKS) sums[n] = k.dot_blocks(line, w, s.weights.index.data() + from / QUAD, count);
            else sums[n] = k.dot_sparse(line, w, s.weights.index.data() + from, count);
        }
        finish(f, s, at, y, r, sums[n]);
    }
}

// Up to MOST_IMAGES vectors, for which weights in windows or behind a bitmask are read once.
void vectors(const Frame &f, const Step &s, int64_t at, int64_t images) {
    const bool bits = s.layout == BITMASK;
    const int64_t rows = f.program->values[s.node.out].shape.channels;
    const int64_t channels = f.program->values[s.node.x].shape.channels;
    const uint8_t turned = bits ? 0 : WINDOW_CENTRE;  // x less 128 is x with its first bit turned
    uint8_t *lines[MOST_IMAGES];
    const int8_t *centred[MOST_IMAGES];
    for (int64_t i = 0; i < images; ++i) {
        lines[i] = f.scratch + i * (channels + BEHIND);
        const View x = view(f, s.node.x, at + i);
        for (int64_t c = 0; c < channels; ++c) lines[i][c] = *x.plane(c) ^ turned;
        centred[i] = reinterpret_cast<const int8_t *>(lines[i]);
    }
    const Kernels &k = *f.program->kernels;
    const int64_t together = bits ? MASK_ROWS : WINDOW_ROWS, groups = mask_groups(channels);
    const Share mine(f, static_cast<int64_t>(s.weights.starts.size()) - 1);
    int32_t sums[MOST_IMAGES * std::max<int64_t>(MASK_ROWS, WINDOW_ROWS)];
    for (int64_t block = mine.from; block < mine.to; ++block) {
        const int8_t *from = s.weights.values.data() + s.weights.starts[block];
        const int8_t *to = s.weights.values.data() + s.weights.starts[block + 1];
        if (bits) k.bitmask(lines, images, from, groups, sums);
        else k.windows(centred, images, from, to, sums);
        const int64_t first = block * together, last = std::min(rows, first + together);
        for (int64_t i = 0; i < images; ++i) {
            const View y = view(f, s.node.out, at + i);
            for (int64_t r = first; r < last; ++r)
                finish(f, s, at + i, y, s.weights.offsets[r], sums[i * together + r - first]);
        }
    }
}

class Conv {
 public:
    Conv(const Frame &f, const Step &s, int64_t at, int64_t images)
        : f_(f), s_(s), kernels_(*f.program->kernels), x_(view(f, s.node.x, at)), y_(view(f, s.node.out, at)),
          positions_(y_.value->positions(images)), last_((positions_ + kernels_.pixels - 1) / kernels_.pixels) {
        const std::vector<uint8_t> &mask = images == 1 ? s.mask_one : s.mask_group;
        mask_ = mask.empty() ? nullptr : mask.data();
        if (s.node.other_operand >= 0) residual_ = view(f, s.node.other_operand, at);
        if (y_.value->floats) floats_ = floats(f, y_);
        call_.shared = s.shared.values.data();
        call_.shared_offsets = s.shared.offsets.data();
        call_.weights = s.weights.values.data();
        call_.offsets = s.weights.offsets.data();
        call_.low = s.result.low;
        call_.high = s.result.high;
        call_.bounded = s.bounded;
        call_.other = s.result.other;
        call_.zero_point = y_.value->zero_point;
        call_.y_stride = call_.floats_stride = y_.value->stride;
    }

    // All rows of this thread's band, the last of which also writes what is between the planes.
    bool band() {
        const Share mine(f_, (positions_ + MOST_PIXELS - 1) / MOST_PIXELS);
        const int64_t vectors = MOST_PIXELS / kernels_.pixels, rows = y_.value->shape.channels;
        first_ = mine.from * vectors;
        last_ = std::min(last_, mine.to * vectors);
        tiles([&](int64_t position, Rows *kernel, int64_t) {
            put_results(position, 0);
            call(kernel, position, 0, rows);
        });
        return f_.part + 1 == f_.parts;
    }

    void rows(int64_t from, int64_t to) {
        if (from >= to) return;
        if (y_.value->stride < MOST_PIXELS) return apart(from, to);
        // the last vectors of a plane reach into the next one, which may be another thread's
        const int64_t whole = f_.parts > 1 ? to - 1 : to;
        tiles([&](int64_t position, Rows *kernel, int64_t) {
            put_results(position, from);
            call(kernel, position, from, whole);
        });
        apart(whole, to);
    }

 private:
    template <class F>
    void tiles(const F &body) const {
        const int64_t quarter = kernels_.pixels / QUARTERS, least = least_of(s_.layout);
        const int64_t all = (positions_ + least * quarter - 1) / (least * quarter) * least;
        const int64_t end = std::min(all, last_ * QUARTERS);
        for (int64_t q = first_ * QUARTERS, count; q < end; q += count) {
            count = QUARTERS * MOST_TILE;
            while (count > end - q || !kernels_.rows[s_.layout][count]) --count;
            body(q * quarter, kernels_.rows[s_.layout][count], std::min(count * quarter, positions_ - q * quarter));
        }
    }

    // The fewest quarters of a vector that there is a kernel for.
    int64_t least_of(Layout layout) const {
        int64_t least = 1;
        while (!kernels_.rows[layout][least]) ++least;
        return least;
    }

    void put_results(int64_t position, int64_t row) {
        call_.y = floats_ ? nullptr : y_.plane(row) + position;
        call_.floats = floats_ ? floats_ + row * y_.value->stride + position : nullptr;
    }

    void call(Rows *kernel, int64_t position, int64_t from, int64_t to) {
        if (from >= to) return;
        call_.x = x_.at + position * (s_.layout == ANY ? 1 : QUAD);
        call_.starts = s_.weights.starts.empty() ? nullptr : s_.weights.starts.data() + from;
        if (s_.layout == DENSE) {
            call_.shared_starts = s_.shared.starts.data() + from / kernels_.together;
            call_.skipped = from % kernels_.together;
        }
        call_.first = s_.first.data() + from;
        call_.rows = to - from;
        call_.multipliers = s_.multipliers.data() + from;
        call_.biases = s_.biases.data() + from;
        call_.mask = mask_ ? mask_ + position : nullptr;
        if (residual_.value) {
            call_.residual = residual_.plane(from) + position;
            call_.residual_stride = residual_.value->stride;
        }
        kernel(&call_);
    }

    // Rows whose vectors are written elsewhere first.
    void apart(int64_t from, int64_t to) {
        constexpr int64_t WIDTH = MOST_TILE * MOST_PIXELS;
        float *some = reinterpret_cast<float *>(f_.scratch);
        for (; from < to; from += SOME_ROWS) {
            const int64_t end = std::min<int64_t>(to, from + SOME_ROWS);
            const size_t size = floats_ ? sizeof(float) : 1;
            tiles([&](int64_t position, Rows *kernel, int64_t count) {
                call_.y = floats_ ? nullptr : f_.scratch;
                call_.floats = floats_ ? some : nullptr;
                call_.y_stride = call_.floats_stride = WIDTH;
                call(kernel, position, from, end);
                for (int64_t r = from; r < end; ++r) {
                    put_results(position, r);
                    std::memcpy(floats_ ? static_cast<void *>(call_.floats) : call_.y,
                                f_.scratch + static_cast<size_t>((r - from) * WIDTH) * size,
                                static_cast<size_t>(count) * size);
                }
            });
        }
        call_.y_stride = call_.floats_stride = y_.value->stride;
    }

    const Frame &f_;
    const Step &s_;
    const Kernels &kernels_;
    const View x_, y_;
    const int64_t positions_;
    int64_t first_ = 0, last_;  // vectors of them
    View residual_ = {nullptr, nullptr};
    const uint8_t *mask_;
    float *floats_ = nullptr;
    RowsCall call_ = {};
};

void conv(const Frame &f, const Step &s, int64_t at, int64_t images) {
    const View y = view(f, s.node.out, at);
    Share rows(f, y.value->shape.channels);
    if (s.vector) {
        const bool several = of_several(s.layout);
        const int64_t some = several ? MOST_IMAGES : 1;
        for (int64_t i = 0; i < images; i += some) {
            if (several) vectors(f, s, at + i, std::min(some, images - i));
            else vector(f, s, at + i);
        }
        for (int64_t r = rows.from; r < rows.to && !y.value->floats; ++r) fill_gaps(y, r, at, images);
        return;
    }
    Conv conv(f, s, at, images);
    if (!in_bands(f, y.value->positions(images))) conv.rows(rows.from, rows.to);
    else rows = {0, conv.band() ? y.value->shape.channels : 0};
    for (int64_t r = rows.from; r < rows.to && !y.value->floats; ++r) surround(y, r, at, images);
}

// What a phase of a stride sees of a plane of x, with zero points around it as far as the kernel reaches, in one of a
// copy's planes, whose first pixel is at `first`.
void phase_of(const Frame &f, const Step &s, const View &x, const Value &to, const Planes &planes, int64_t plane,
              int64_t image, uint8_t *first) {
    const Window &w = s.node.window;
    const int32_t phase = s.which[static_cast<size_t>(planes.phase(plane))], first_y = phase / w.stride[1],
                  first_x = phase % w.stride[1];
    const int64_t columns = first_x < w.in_w ? (w.in_w - first_x - 1) / w.stride[1] + 1 : 0;
    const int64_t lines = first_y < w.in_h ? (w.in_h - first_y - 1) / w.stride[0] + 1 : 0;
    // what a kernel meets beyond the last pixel of the result may be pixels, too
    const int64_t n = std::min<int64_t>(columns, w.out_w + s.reach[1].high);
    const int64_t rows = std::min<int64_t>(lines, w.out_h + s.reach[0].high);
    const int64_t before = s.reach[0].low * to.row() + s.reach[1].low,
                  after = s.reach[0].high * to.row() + s.reach[1].high;
    std::memset(first - before, to.zero_point, static_cast<size_t>(before + to.positions(1) + after));
    f.program->kernels->every(x.line(planes.channel(plane), image, first_y) + first_x, w.stride[0] * x.value->row(),
                              w.stride[1], first, to.row(), n, rows);
}

void copy(const Frame &f, const Step &s, int64_t at, int64_t images) {
    const View x = view(f, s.node.x, at), y = view(f, s.node.out, at);
    const Value &to = *y.value;
    const int64_t count = static_cast<int64_t>(s.which.size());
    const Planes order(x.value->shape.channels, count, to.interleaved);
    if (!to.interleaved) {
        const Share mine(f, x.value->shape.channels);
        for (int64_t plane = mine.from * count; plane < mine.to * count; ++plane)
            for (int64_t i = 0; i < images; ++i) phase_of(f, s, x, to, order, plane, i, y.line(plane, i, 0));
        return;
    }
    const int64_t before = s.reach[0].low * to.row() + s.reach[1].low,
                  after = s.reach[0].high * to.row() + s.reach[1].high, length = before + to.positions(1) + after;
    const bool bands = in_place(s.node.window) && in_bands(f, to.positions(1));
    const Share all(0, (to.shape.channels + QUAD - 1) / QUAD), mine = bands ? all : Share(f, all.to);
    const Share band = bands ? Share(f, length) : Share(0, length);
    for (int64_t block = mine.from; block < mine.to; ++block) {
        for (int64_t i = 0; i < images; ++i) {
            const uint8_t *planes[QUAD];
            for (int64_t k = 0; k < QUAD; ++k) {
                // what stands in the place of a plane that is not there meets no weights
                const int64_t plane = std::min<int64_t>(block * QUAD + k, to.shape.channels - 1);
                if (in_place(s.node.window)) {
                    planes[k] = x.line(plane, i, 0) - before + band.from;
                    continue;
                }
                uint8_t *some = f.scratch + k * length;
                phase_of(f, s, x, to, order, plane, i, some + before);
                planes[k] = some;
            }
            const int64_t start = (at % to.group + i) * to.image();
            // What follows a block is what stands before the next one, which another thread may write.
            const int64_t end = block + 1 < all.to ? std::min(band.to, to.stride - start) : band.to;
            uint8_t *out = f.arena + to.offset + QUAD * (block * to.stride + start - before);
            if (end > band.from) f.program->kernels->interleave(planes, out + QUAD * band.from, end - band.from);
        }
    }
}

// Channels and pixels that are transposed at a time. Few pixels, since their channels are far apart, often by a power
// of two, and compete for the same lines of the cache.
enum { CHANNELS = 64, PIXELS = 16 };

// Calls body(channel, channels, pixel, pixels) for all parts of a line of so many pixels.
template <class F>
void in_squares(const Share &channels, int64_t width, const F &body) {
    for (int64_t p = 0; p < width; p += PIXELS)
        for (int64_t c = channels.from; c < channels.to; c += CHANNELS)
            body(c, std::min<int64_t>(CHANNELS, channels.to - c), p, std::min<int64_t>(PIXELS, width - p));
}

// Images of one pixel whose bytes follow each other: they are then the pixels of one image with its channels last.
bool across(const Value &v) { return v.shape.pixels() == 1 && v.image() == 1; }

// The node's number among such ports.
int32_t number_of(const Frame &f, const std::vector<int32_t> &ports, const Step &s) {
    int32_t number = 0;
    while (&f.program->steps[ports[number]] != &s) ++number;
    return number;
}

void input(const Frame &f, const Step &s, int64_t at, int64_t images) {
    const View y = view(f, s.node.out, at);
    const Shape &shape = y.value->shape;
    const float *first = f.inputs[number_of(f, f.program->inputs, s)] + (f.first_image + at) * shape.size();
    const Factors to_bytes = {s.result.multiplier, s.result.bias, static_cast<float>(s.result.zero_point), s.result.low,
                              s.result.high};
    const auto quantize = f.program->kernels->quantize;
    const bool wide = across(*y.value), last = wide || s.node.layout == RAREFY_CHANNELS_LAST;
    const int64_t width = wide ? images : shape.width;
    const Share mine(f, shape.channels);
    for (int64_t i = 0; i < (wide ? 1 : images); ++i)
        for (int64_t row = 0; row < shape.height; ++row) {
            const float *in = first + i * shape.size() + row * width * (last ? shape.channels : 1);
            if (!last) {
                for (int64_t c = mine.from; c < mine.to; ++c)
                    quantize(in + c * shape.pixels(), y.line(c, i, row), width, &to_bytes);
                continue;
            }
            in_squares(mine, width, [&](int64_t c, int64_t channels, int64_t p, int64_t pixels) {
                uint8_t square[PIXELS][CHANNELS];
                for (int64_t k = 0; k < pixels; ++k)
                    quantize(in + (p + k) * shape.channels + c, square[k], channels, &to_bytes);
                for (int64_t n = 0; n < channels; ++n) {
                    uint8_t *out = y.line(c + n, i, row) + p;
                    for (int64_t k = 0; k < pixels; ++k) out[k] = square[k][n];
                }
            });
        }
    for (int64_t c = mine.from; c < mine.to; ++c) fill_gaps(y, c, at, images);
}

void output(const Frame &f, const Step &s, int64_t at, int64_t images) {
    const View x = view(f, s.node.x, at);
    const Value &v = *x.value;
    const Shape &shape = v.shape;
    float *first = f.outputs[number_of(f, f.program->outputs, s)] + (f.first_image + at) * shape.size();
    const bool wide = across(v), last = wide || s.node.layout == RAREFY_CHANNELS_LAST;
    const int64_t width = wide ? images : shape.width;
    const int64_t c_step = last ? 1 : shape.pixels(), p_step = last ? shape.channels : 1;
    const int32_t zero = v.zero_point;
    const float factor = s.result.multiplier;
    const Share mine(f, shape.channels);
    for (int64_t i = 0; i < (wide ? 1 : images); ++i)
        for (int64_t row = 0; row < shape.height; ++row) {
            float *out = first + i * shape.size() + row * width * p_step;
            in_squares(mine, width, [&](int64_t c, int64_t channels, int64_t p, int64_t pixels) {
                for (int64_t n = c; n < c + channels; ++n) {
                    const uint8_t *line = x.line(n, i, row) + p;
                    float *to = out + n * c_step + p * p_step;
                    if (v.floats) {
                        const float *from = floats(f, x) + (line - x.at);
                        for (int64_t k = 0; k < pixels; ++k) to[k * p_step] = from[k];
                    } else {
                        for (int64_t k = 0; k < pixels; ++k)
                            to[k * p_step] = static_cast<float>(line[k] - zero) * factor;
                    }
                }
            });
        }
}

// Calls body(line of x) for the rows of an image that a window meets; gives their number.
template <class F>
int32_t over_window(const Window &w, const View &x, int64_t c, int64_t image, int64_t row, const F &body) {
    int32_t inside = 0;
    for (int32_t k = 0; k < w.kernel[0]; ++k) {
        const int64_t from = row * w.stride[0] + int64_t{k} * w.dilation[0] - w.top;
        if (from < 0 || from >= w.in_h) continue;
        body(x.line(c, image, from));
        ++inside;
    }
    return inside;
}

// The maxima of a channel, some rows at a time: down the columns into lines with zeros on both sides, then along all of
// them, then every so many of them.
void maximum(const Frame &f, const Step &s, const View &x, int64_t c, int64_t image, const View &y) {
    const Window &w = s.node.window;
    const Kernels &k = *f.program->kernels;
    const int64_t length = pool_line(w), some = pool_rows(w), size = some * length;
    const uint8_t **from = reinterpret_cast<const uint8_t **>(f.scratch);
    uint8_t *down = f.scratch + pool_pointers(w), *most = down + size;
    std::memset(down, 0, static_cast<size_t>(size));
    for (int64_t first = 0; first < w.out_h; first += some) {
        const int64_t rows = std::min(some, w.out_h - first);
        for (int64_t row = 0; row < rows; ++row) {
            int64_t count = 0;
            over_window(w, x, c, image, first + row, [&](const uint8_t *line) { from[count++] = line; });
            uint8_t *to = down + row * length + w.left;
            if (count > 0) k.largest(from, count, to, w.in_w);
            else std::memset(to, 0, static_cast<size_t>(w.in_w));
        }
        for (int64_t column = 0; column < w.kernel[1]; ++column) from[column] = down + column * w.dilation[1];
        k.largest(from, w.kernel[1], most, size - int64_t{w.kernel[1] - 1} * w.dilation[1]);
        k.every(most, length, w.stride[1], y.line(c, image, first), y.value->row(), w.out_w, rows);
    }
}

void average(const Frame &f, const Step &s, const View &x, int64_t c, int64_t image, int64_t row, uint8_t *out) {
    const Window &w = s.node.window;
    const rarefy_int8_result &r = s.result;
    int32_t *down = reinterpret_cast<int32_t *>(f.scratch);
    std::fill(down, down + w.in_w, 0);
    const int32_t rows = over_window(w, x, c, image, row, [&](const uint8_t *from) {
        for (int64_t p = 0; p < w.in_w; ++p) down[p] += from[p];
    });
    for (int32_t p = 0; p < w.out_w; ++p) {
        int32_t sum = 0, columns = 0;
        for (int32_t k = 0; k < w.kernel[1]; ++k) {
            const int32_t from = p * w.stride[1] + k * w.dilation[1] - w.left;
            if (from < 0 || from >= w.in_w) continue;
            sum += down[from];
            ++columns;
        }
        const double inside = rows * columns, counted = s.node.count_padding ? w.taps() : inside;
        float t = static_cast<float>(sum) * static_cast<float>(r.ratio / counted);
        t = t + static_cast<float>(r.zero_point - x.value->zero_point * r.ratio * inside / counted);
        out[p] = rounded(t, r.low, r.high);
    }
}

void pool(const Frame &f, const Step &s, int64_t at, int64_t images) {
    const View x = view(f, s.node.x, at), y = view(f, s.node.out, at);
    const Share mine(f, y.value->shape.channels);
    for (int64_t c = mine.from; c < mine.to; ++c) {
        for (int64_t i = 0; i < images; ++i) {
            if (!s.node.average) maximum(f, s, x, c, i, y);
            for (int64_t row = 0; s.node.average && row < s.node.window.out_h; ++row)
                average(f, s, x, c, i, row, y.line(c, i, row));
        }
        fill_gaps(y, c, at, images);
    }
}

void global_average(const Frame &f, const Step &s, int64_t at, int64_t images) {
    const View x = view(f, s.node.x, at), y = view(f, s.node.out, at);
    const Shape &shape = x.value->shape;
    const float factor = static_cast<float>(s.result.ratio / static_cast<double>(shape.pixels()));
    const float bias = static_cast<float>(s.result.zero_point - x.value->zero_point * s.result.ratio);
    const Share mine(f, shape.channels);
    for (int64_t c = mine.from; c < mine.to; ++c) {
        for (int64_t i = 0; i < images; ++i) {
            const int64_t sum = f.program->kernels->total(x.line(c, i, 0), x.value->row(), shape.width, shape.height);
            float t = static_cast<float>(sum) * factor;
            t = t + bias;
            *y.line(c, i, 0) = rounded(t, s.result.low, s.result.high);
        }
        fill_gaps(y, c, at, images);
    }
}

void binary(const Frame &f, const Step &s, int64_t at, int64_t images) {
    const View x = view(f, s.node.x, at), other = view(f, s.node.other_operand, at), y = view(f, s.node.out, at);
    const Shape &shape = y.value->shape;
    const rarefy_int8_result &r = s.result;
    const bool broadcast = !(other.value->shape == shape);
    const Combination combination = {r.multiplier,           r.other, r.bias, r.low, r.high, x.value->zero_point,
                                     other.value->zero_point};
    const auto combine = s.node.multiply ? f.program->kernels->multiply : f.program->kernels->add;
    const Share mine(f, shape.channels);
    for (int64_t c = mine.from; c < mine.to; ++c) {
        for (int64_t i = 0; i < images; ++i) {
            if (broadcast) std::memset(f.scratch, *other.line(c, i, 0), static_cast<size_t>(shape.width));
            for (int64_t row = 0; row < shape.height; ++row)
                combine(x.line(c, i, row), broadcast ? f.scratch : other.line(c, i, row), y.line(c, i, row),
                        shape.width, &combination);
        }
        fill_gaps(y, c, at, images);
    }
}

// Calls body(line of x, line of y) for every row of the channels [from, to), y's being `first` further.
template <class F>
void over_lines(const Frame &f, const View &x, const View &y, int64_t first, int64_t at, int64_t images,
                const F &body) {
    const Share mine(f, x.value->shape.channels);
    for (int64_t c = mine.from; c < mine.to; ++c) {
        for (int64_t i = 0; i < images; ++i)
            for (int64_t row = 0; row < x.value->shape.height; ++row) body(x.line(c, i, row), c, i, row);
        fill_gaps(y, first + c, at, images);
    }
}

void table(const Frame &f, const Step &s, int64_t at, int64_t images) {
    const View x = view(f, s.node.x, at), y = view(f, s.node.out, at);
    over_lines(f, x, y, 0, at, images, [&](const uint8_t *line, int64_t c, int64_t i, int64_t row) {
        f.program->kernels->look_up(line, s.table.data(), y.line(c, i, row), x.value->shape.width);
    });
}

void concat(const Frame &f, const Step &s, int64_t at, int64_t images) {
    const View y = view(f, s.node.out, at);
    int64_t first = 0;
    for (const int32_t id : s.operands) {
        const View x = view(f, id, at);
        const size_t width = static_cast<size_t>(x.value->shape.width);
        over_lines(f, x, y, first, at, images, [&](const uint8_t *line, int64_t c, int64_t i, int64_t row) {
            std::memcpy(y.line(first + c, i, row), line, width);
        });
        first += x.value->shape.channels;
    }
}

void upsample(const Frame &f, const Step &s, int64_t at, int64_t images) {
    const View x = view(f, s.node.x, at), y = view(f, s.node.out, at);
    const int64_t fh = s.node.window.stride[0], fw = s.node.window.stride[1];
    over_lines(f, x, y, 0, at, images, [&](const uint8_t *line, int64_t c, int64_t i, int64_t row) {
        for (int64_t again = 0; again < fh; ++again) {
            uint8_t *out = y.line(c, i, row * fh + again);
            for (int64_t p = 0; p < x.value->shape.width; ++p) std::fill_n(out + p * fw, fw, line[p]);
        }
    });
}

void flatten(const Frame &f, const Step &s, int64_t at, int64_t images) {
    const View x = view(f, s.node.x, at), y = view(f, s.node.out, at);
    const Shape &in = x.value->shape;
    const Share mine(f, in.channels);
    for (int64_t c = mine.from; c < mine.to; ++c)
        for (int64_t p = 0; p < in.pixels(); ++p) {
            for (int64_t i = 0; i < images; ++i)
                *y.line(c * in.pixels() + p, i, 0) = x.line(c, i, p / in.width)[p % in.width];
            fill_gaps(y, c * in.pixels() + p, at, images);
        }
}

}  // namespace

void run_step(const Frame &f, const Step &s, int64_t at, int64_t images) {
    if (s.copy) return copy(f, s, at, images);
    switch (s.node.kind) {
        case Kind::INPUT: return input(f, s, at, images);
        case Kind::CONV: return conv(f, s, at, images);
        case Kind::POOL: return pool(f, s, at, images);
        case Kind::GLOBAL_AVERAGE: return global_average(f, s, at, images);
        case Kind::BINARY: return binary(f, s, at, images);
        case Kind::AFFINE: return table(f, s, at, images);
        case Kind::CONCAT: return concat(f, s, at, images);
        case Kind::UPSAMPLE: return upsample(f, s, at, images);
        case Kind::FLATTEN: return flatten(f, s, at, images);
        default: return output(f, s, at, images);
    }
}

}  // namespace rarefy::int8

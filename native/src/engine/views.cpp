// Views: copies by strides between the planes of values.
#include <algorithm>
#include <cstring>

#include "engine/tensor.h"

namespace rarefy::engine {

namespace {

// The numbers of a view: the shape that it makes and how many values it reads; then of each of these its dimensions,
// where the first entry lies in it and in the result, and the dimensions.
enum { CHANNELS, HEIGHT, WIDTH, PARTS, HEAD };
enum { DIMENSIONS, IN_CHANNEL, IN_PIXEL, OUT_CHANNEL, OUT_PIXEL, PART };
enum { SIZE, DIMENSION = 5 };  // a size, and the steps along the same four axes
constexpr int64_t MOST_DIMENSIONS = 16, LARGEST = 1 << 30;

int64_t part_size(const int64_t *part) { return PART + part[DIMENSIONS] * DIMENSION; }

int32_t operand(const Node &node, const std::vector<int32_t> &operands, int64_t part) {
    return part == 0 ? node.x : operands[static_cast<size_t>(part) - 1];
}

// Whether all entries of a part lie within [0, size) along one of the four axes.
bool inside(const int64_t *part, int axis, int64_t size) {
    const auto within = [](int64_t x) { return x >= -LARGEST && x <= LARGEST; };
    int64_t low = part[axis], high = part[axis];
    if (!within(low)) return false;
    for (int64_t d = 0; d < part[DIMENSIONS]; ++d) {
        const int64_t *dimension = part + PART + d * DIMENSION, step = dimension[axis];
        if (dimension[SIZE] < 1 || dimension[SIZE] > LARGEST || !within(step)) return false;
        (step < 0 ? low : high) += (dimension[SIZE] - 1) * step;  // at most 2^60, and checked before the next
        if (low < 0 || high >= size) return false;
    }
    return low >= 0 && high < size;
}

std::string infer_view(const Graph &graph, const Node &node, const Given &given, Shape *out) {
    const std::vector<int64_t> &numbers = given.numbers;
    const int64_t parts = static_cast<int64_t>(given.operands.size()) + 1;
    if (numbers.size() < HEAD || numbers[PARTS] != parts || given.constants)
        return "a view has a shape and a part for every value";
    for (const int axis : {CHANNELS, HEIGHT, WIDTH})
        if (numbers[axis] < 1 || numbers[axis] > LARGEST) return "every size of a view must be between 1 and 2^30";
    if (numbers[HEIGHT] * numbers[WIDTH] > LARGEST) return "a view has at most 2^30 numbers";
    *out = {static_cast<int32_t>(numbers[CHANNELS]), static_cast<int32_t>(numbers[HEIGHT]),
            static_cast<int32_t>(numbers[WIDTH])};
    size_t at = HEAD;
    for (int64_t p = 0; p < parts; ++p) {
        const int64_t *part = numbers.data() + at;
        if (numbers.size() < at + PART || part[DIMENSIONS] < 0 || part[DIMENSIONS] > MOST_DIMENSIONS ||
            numbers.size() < at + static_cast<size_t>(part_size(part)))
            return "the description of a view is cut, or has more than 16 dimensions";
        const Shape &x = graph.values[operand(node, given.operands, p)];
        if (!inside(part, IN_CHANNEL, x.channels) || !inside(part, IN_PIXEL, x.pixels()) ||
            !inside(part, OUT_CHANNEL, out->channels) || !inside(part, OUT_PIXEL, out->pixels()))
            return "a view reads and writes its values alone";
        at += static_cast<size_t>(part_size(part));
    }
    return at == numbers.size() ? "" : "the description of a view is too long";
}

int64_t no_scratch(const Graph &, const Step &) { return 0; }

struct Dimension {
    int64_t size, in, out;  // steps in memory
};

constexpr int64_t SQUARE = 16;  // a line of a cache each way

// Entries that lie side by side in the one along `rows` and in the other along `columns`.
void transpose(const float *in, float *out, Dimension rows, Dimension columns) {
    for (int64_t c0 = 0; c0 < columns.size; c0 += SQUARE)
        for (int64_t r = 0; r < rows.size; ++r) {
            const float *from = in + r * rows.in;
            float *to = out + r * rows.out;
            for (int64_t c = c0; c < std::min(columns.size, c0 + SQUARE); ++c)
                to[c * columns.out] = from[c * columns.in];
        }
}

// Dimensions that go on where others end are one with them; the one that is written in the smallest steps is the last.
int64_t simplified(Dimension *all, int64_t count) {
    count = std::remove_if(all, all + count, [](const Dimension &d) { return d.size == 1; }) - all;
    std::sort(all, all + count,
              [](const Dimension &a, const Dimension &b) { return std::abs(a.out) > std::abs(b.out); });
    int64_t kept = 0;
    for (int64_t d = 0; d < count; ++d) {
        const Dimension next = all[d], before = kept ? all[kept - 1] : Dimension{0, 0, 0};
        if (kept && before.in == next.size * next.in && before.out == next.size * next.out)
            all[kept - 1] = {before.size * next.size, next.in, next.out};
        else all[kept++] = next;
    }
    return kept;
}

void copy_part(const Frame &f, const int64_t *part, const View &x, const View &y) {
    const float *in = x.at + part[IN_CHANNEL] * x.stride + part[IN_PIXEL];
    float *out = y.at + part[OUT_CHANNEL] * y.stride + part[OUT_PIXEL];
    Dimension all[MOST_DIMENSIONS];
    for (int64_t d = 0; d < part[DIMENSIONS]; ++d) {
        const int64_t *from = part + PART + d * DIMENSION;
        all[d] = {from[SIZE], from[IN_CHANNEL] * x.stride + from[IN_PIXEL],
                  from[OUT_CHANNEL] * y.stride + from[OUT_PIXEL]};
    }
    int64_t outer = simplified(all, part[DIMENSIONS]);
    Dimension last = outer ? all[--outer] : Dimension{1, 1, 1}, rows = {1, 0, 0};
    if (in == out && last.in == last.out && std::all_of(all, all + outer, [](auto &d) { return d.in == d.out; }))
        return;          // it lies in what it is a view of
    if (last.in != 1) {  // the one that is read side by side, or the next
        Dimension *side = std::find_if(all, all + outer, [](const Dimension &d) { return d.in == 1; });
        if (side == all + outer && outer) side = all + outer - 1;
        if (side < all + outer) {
            rows = *side;
            std::copy(side + 1, all + outer, side);
            --outer;
        }
    }
    const int64_t blocks = (rows.size + SQUARE - 1) / SQUARE;
    int64_t units = blocks;
    for (int64_t d = 0; d < outer; ++d) units *= all[d].size;
    const Share mine(f, units);
    for (int64_t unit = mine.from; unit < mine.to; ++unit) {
        const int64_t row = unit % blocks * SQUARE;
        const float *from = in + row * rows.in;
        float *to = out + row * rows.out;
        for (int64_t d = outer, rest = unit / blocks; d-- > 0; rest /= all[d].size) {
            from += rest % all[d].size * all[d].in;
            to += rest % all[d].size * all[d].out;
        }
        if (last.in == 1 && last.out == 1) std::memcpy(to, from, static_cast<size_t>(last.size) * sizeof(float));
        else transpose(from, to, last, {std::min(SQUARE, rows.size - row), rows.in, rows.out});
    }
}

void run_view(const Frame &f, const Step &s, int64_t image) {
    const View y = view(f, s.node.out, image);
    const int64_t *part = s.numbers.data() + HEAD;
    for (int64_t p = 0; p < s.numbers[PARTS]; ++p, part += part_size(part))
        copy_part(f, part, view(f, operand(s.node, s.operands, p), image), y);
}

}  // namespace

int32_t range_of(const Graph &graph, const Node &node, const std::vector<int64_t> &numbers) {
    if (node.kind != Kind::TENSOR || node.function != RAREFY_VIEW || numbers[PARTS] != 1) return -1;
    const int64_t *part = numbers.data() + HEAD;
    const Shape &x = graph.values[node.x], &y = graph.values[node.out];
    if (part[IN_PIXEL] || part[OUT_PIXEL] || part[OUT_CHANNEL] || x.pixels() != y.pixels() ||
        part[IN_CHANNEL] + y.channels > x.channels)
        return -1;
    for (int64_t d = 0; d < part[DIMENSIONS]; ++d) {
        const int64_t *dimension = part + PART + d * DIMENSION;
        if (dimension[IN_CHANNEL] != dimension[OUT_CHANNEL] || dimension[IN_PIXEL] != dimension[OUT_PIXEL]) return -1;
    }
    return static_cast<int32_t>(part[IN_CHANNEL]);
}

const Function VIEW = {"view", infer_view, no_scratch, run_view};

}  // namespace rarefy::engine

// Images of another size: the pixels that are nearest, or between four of them.
#include <cmath>
#include <cstring>

#include "engine/tensor.h"

namespace rarefy::engine {

namespace {

// numbers: 1 for bilinear, 0 for nearest; height and width of the result; then for each of its rows, and after them
// columns, the row or column of x that it begins at. constants: of bilinear ones, for each of those the share of the
// next one.
enum { BILINEAR, HEIGHT, WIDTH, PLACES };

std::string infer_resize(const Graph &, const Node &, const Given &given, Shape *out) {
    const std::vector<int64_t> &n = given.numbers;
    if (n.size() < PLACES || !given.operands.empty() || n[BILINEAR] < 0 || n[BILINEAR] > 1)
        return "a resized image has one value, a kind and a size";
    const int64_t height = n[HEIGHT], width = n[WIDTH], places = static_cast<int64_t>(n.size()) - PLACES;
    if (height < 1 || width < 1 || height > places || width > places || height + width != places)
        return "there must be a place for each row and column";
    for (int64_t i = 0; i < places; ++i)
        if (n[PLACES + i] < 0 || n[PLACES + i] >= (i < height ? out->height : out->width))
            return "place " + std::to_string(n[PLACES + i]) + " is not in the image";
    if (given.constants != (n[BILINEAR] ? places : 0)) return "there must be a share for each row and column";
    out->height = static_cast<int32_t>(height);
    out->width = static_cast<int32_t>(width);
    return "";
}

// Two lines of the result's width.
int64_t resize_scratch(const Graph &, const Step &step) { return 2 * ((step.numbers[WIDTH] + 15) / 16 * 16); }

void run_resize(const Frame &f, const Step &s, int64_t image) {
    const View x = view(f, s.node.x, image), y = view(f, s.node.out, image);
    const Shape &in = f.plan->values[s.node.x].shape, &out = f.plan->values[s.node.out].shape;
    const int64_t *rows = s.numbers.data() + PLACES, *columns = rows + out.height;
    const bool bilinear = s.numbers[BILINEAR] != 0;
    const float *row_shares = s.constants.data(), *column_shares = row_shares + (bilinear ? out.height : 0);
    const size_t line_bytes = static_cast<size_t>(out.width) * sizeof(float);
    float *lines[2] = {f.scratch, f.scratch + (out.width + 15) / 16 * 16};
    const Share mine(f, in.channels);
    for (int64_t c = mine.from; c < mine.to; ++c) {
        const float *from = x.at + c * x.stride;
        float *to = y.at + c * y.stride;
        int64_t held[2] = {-1, -1};  // the rows of x that the lines are made of
        const auto line_of = [&](int64_t row, int64_t other) {
            if (held[0] == row) return lines[0];
            if (held[1] == row) return lines[1];
            const int which = held[0] == other ? 1 : 0;
            held[which] = row;
            f.program->kernels->spread(from + row * in.width, columns, column_shares, lines[which], in.width,
                                       out.width);
            return lines[which];
        };
        for (int64_t r = 0; r < out.height; ++r, to += out.width) {
            const int64_t row = rows[r];
            if (!bilinear) {
                if (r > 0 && rows[r - 1] == row) {
                    std::memcpy(to, to - out.width, line_bytes);
                } else {
                    for (int64_t i = 0; i < out.width; ++i) to[i] = from[row * in.width + columns[i]];
                }
                continue;
            }
            const int64_t next = std::min<int64_t>(row + 1, in.height - 1);
            const float *first = line_of(row, next), *second = line_of(next, row);
            f.program->kernels->between(first, second, row_shares[r], to, out.width);
        }
    }
}

}  // namespace

const Function RESIZE = {"resize", infer_resize, resize_scratch, run_resize};

}  // namespace rarefy::engine

// Sums, means, norms and extremes over channels, rows or columns.
#include <algorithm>
#include <cmath>
#include <limits>

#include "engine/tensor.h"

namespace rarefy::engine {

namespace {

constexpr int64_t OVER_CHANNELS = 1, OVER_ROWS = 2, OVER_COLUMNS = 4;
// Numbers of a row that are reduced together, rows of them in one float32 sum, and lanes of what is folded along a row.
constexpr int64_t BLOCK = 256, CHUNK = 16, FOLDED = 64, SPAN = 1 << 14;

std::string infer_reduce(const Graph &, const Node &, const Given &given, Shape *out) {
    if (given.numbers.size() != 2 || !given.operands.empty() || given.constants)
        return "a reduction has one value and two numbers, what it makes and the axes";
    const int64_t what = given.numbers[0], axes = given.numbers[1];
    if (what < 0 || what >= RAREFY_REDUCTIONS) return "reduction " + std::to_string(what) + " is unknown";
    if (axes < 1 || axes > (OVER_CHANNELS | OVER_ROWS | OVER_COLUMNS))
        return "the axes of a reduction are 1 to 7, got " + std::to_string(axes);
    if (axes & OVER_CHANNELS) out->channels = 1;
    if (axes & OVER_ROWS) out->height = 1;
    if (axes & OVER_COLUMNS) out->width = 1;
    return "";
}

int64_t reduce_scratch(const Graph &, const Step &) { return (CHUNK + 1) * BLOCK; }

// One reduction as runs of rows: outer times inner rows of n numbers.
struct Rows {
    int64_t outer, outer_step, inner, inner_step, n;
};

struct Reduction {
    const Kernels &k;
    int64_t what;
    double count;
    float *scratch;

    bool sums() const { return what <= RAREFY_REDUCE_NORM; }
    int32_t operation() const {
        return sums() ? RAREFY_OP_ADD : what == RAREFY_REDUCE_MAX ? RAREFY_OP_MAX : RAREFY_OP_MIN;
    }
    float first() const {
        constexpr float END = std::numeric_limits<float>::infinity();
        return sums() ? 0.0f : what == RAREFY_REDUCE_MAX ? -END : END;
    }
    double last(double all) const {
        return what == RAREFY_REDUCE_MEAN ? all / count : what == RAREFY_REDUCE_NORM ? std::sqrt(all) : all;
    }

    // y = y and every row of x
    void fold(float *y, const float *x, int64_t rows, int64_t x_row, int64_t n) const {
        const PointwiseCall call = {operation(), {1, 1}, {y, x}, {0, x_row}, 0, y, rows, n};
        k.pointwise(&call);
    }

    float extreme(float a, float b) const {
        if (std::isnan(a) || std::isnan(b)) return std::numeric_limits<float>::quiet_NaN();
        return what == RAREFY_REDUCE_MAX ? std::max(a, b) : std::min(a, b);
    }

    double row(const float *x, int64_t n) const {
        double all = 0.0;
        if (sums()) {
            for (int64_t i = 0; i < n; i += SPAN) {
                const int64_t some = std::min(SPAN, n - i);
                all += what == RAREFY_REDUCE_NORM ? k.squares(x + i, 0.0f, some) : k.sum(x + i, some);
            }
            return all;
        }
        float found = first();
        const int64_t whole = n / FOLDED;
        if (whole) {
            std::fill(scratch, scratch + FOLDED, first());
            fold(scratch, x, whole, FOLDED, FOLDED);
            for (int64_t i = 0; i < FOLDED; ++i) found = extreme(found, scratch[i]);
        }
        for (int64_t i = whole * FOLDED; i < n; ++i) found = extreme(found, x[i]);
        return found;
    }

    // All numbers of the rows.
    float whole(const float *x, const Rows &rows) const {
        double all = first();
        for (int64_t o = 0; o < rows.outer; ++o)
            for (int64_t i = 0; i < rows.inner; ++i) {
                const double more = row(x + o * rows.outer_step + i * rows.inner_step, rows.n);
                all = sums() ? all + more : extreme(static_cast<float>(all), static_cast<float>(more));
            }
        return static_cast<float>(last(all));
    }

    // Number by number over the rows; n is at most BLOCK.
    void columns(const float *x, float *y, const Rows &rows, int64_t n) const {
        double all[BLOCK] = {};
        float *part = scratch, *squares = part + BLOCK;
        std::fill(part, part + n, first());
        for (int64_t o = 0; o < rows.outer; ++o)
            for (int64_t i = 0; i < rows.inner; i += CHUNK) {
                const int64_t some = std::min(CHUNK, rows.inner - i);
                const float *at = x + o * rows.outer_step + i * rows.inner_step;
                int64_t step = rows.inner_step;
                if (what == RAREFY_REDUCE_NORM) {
                    const PointwiseCall call = {RAREFY_OP_MUL, {1, 1}, {at, at}, {step, step}, BLOCK, squares, some, n};
                    k.pointwise(&call);
                    at = squares, step = BLOCK;
                }
                fold(part, at, some, step, n);
                if (!sums()) continue;
                for (int64_t p = 0; p < n; ++p) all[p] += part[p], part[p] = 0.0f;
            }
        for (int64_t p = 0; p < n; ++p) y[p] = sums() ? static_cast<float>(last(all[p])) : part[p];
    }
};

void run_reduce(const Frame &f, const Step &s, int64_t image) {
    const View x = view(f, s.node.x, image), y = view(f, s.node.out, image);
    const Shape &shape = f.plan->values[s.node.x].shape, &out = f.plan->values[s.node.out].shape;
    int64_t axes = s.numbers[1], channels = shape.channels, height = shape.height, width = shape.width;
    if (height == 1 || width == 1 || !(axes & OVER_ROWS) == !(axes & OVER_COLUMNS)) {  // all pixels are one row
        const int64_t over = axes & (width > 1 ? OVER_COLUMNS : OVER_ROWS);
        axes = (axes & OVER_CHANNELS) | (over ? OVER_COLUMNS : 0);
        width *= height, height = 1;
    }
    int64_t x_step = x.stride, y_step = y.stride;
    if (width == 1 && x_step == 1 && (axes & OVER_CHANNELS)) {  // so are all channels of one pixel
        width = channels, channels = 1, axes = OVER_COLUMNS;
    }
    const bool over_channels = axes & OVER_CHANNELS, over_rows = axes & OVER_ROWS, along = axes & OVER_COLUMNS;
    const double count = static_cast<double>(shape.size()) / static_cast<double>(out.size());
    const Reduction reduction = {*f.program->kernels, s.numbers[0], count, f.scratch};
    const Rows rows = over_rows ? Rows{over_channels ? channels : 1, x_step, height, width, width}
                                : Rows{1, 0, over_channels ? channels : 1, x_step, width};
    const int64_t kept_channels = over_channels ? 1 : channels, kept_rows = over_rows ? 1 : height;
    const int64_t blocks = along ? 1 : (width + BLOCK - 1) / BLOCK;
    const Share mine(f, kept_channels * kept_rows * blocks);
    for (int64_t each = mine.from; each < mine.to; ++each) {
        const int64_t column = each % blocks * BLOCK, h = each / blocks % kept_rows, c = each / blocks / kept_rows;
        const float *from = x.at + c * x_step + h * width + column;
        if (along) y.at[c * y_step + h] = reduction.whole(from, rows);
        else reduction.columns(from, y.at + c * y_step + h * width + column, rows, std::min(BLOCK, width - column));
    }
}

}  // namespace

const Function REDUCE = {"reduce", infer_reduce, reduce_scratch, run_reduce};

}  // namespace rarefy::engine

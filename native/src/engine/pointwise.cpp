// Expressions of values and constants, number by number, in one pass over blocks that stay in the nearest cache.
#include <algorithm>

#include "engine/tensor.h"

namespace rarefy::engine {

namespace {

enum : int64_t { MOST_INSTRUCTIONS = 64, MOST_TERMS = 64, BLOCK_FLOATS = 512 };

// numbers: how many constants there are; channels, height and width of each; then the instructions: an operation and
// two terms each. The terms are the values, the constants and the results so far.
struct Expression {
    struct Instruction {
        int32_t operation, terms[2];
    };
    std::vector<Shape> constants;
    std::vector<Instruction> instructions;
};

bool reads_two(int64_t operation) { return operation <= RAREFY_LAST_OF_TWO; }

// An empty string, or what is wrong.
std::string read(const std::vector<int64_t> &numbers, int64_t values, Expression *out) {
    const int64_t size = static_cast<int64_t>(numbers.size()), constants = size ? numbers[0] : -1;
    if (constants < 0 || values + constants > MOST_TERMS || size < 1 + 3 * constants)
        return "an expression has at most 64 values and constants, each with its sizes";
    const int64_t begin = 1 + 3 * constants, count = (size - begin) / 3;
    if ((size - begin) % 3 || count < 1 || count > MOST_INSTRUCTIONS)
        return "an expression has 1 to 64 instructions of three numbers";
    for (int64_t i = 0; i < constants; ++i) {
        const int64_t *sizes = &numbers[1 + 3 * i];
        if (!std::all_of(sizes, sizes + 3, [](int64_t n) { return n >= 1 && n <= int64_t{1} << 30; }))
            return "a constant's sizes must be at least 1";
        out->constants.push_back(
            {static_cast<int32_t>(sizes[0]), static_cast<int32_t>(sizes[1]), static_cast<int32_t>(sizes[2])});
    }
    for (int64_t i = 0; i < count; ++i) {
        const int64_t *given = &numbers[begin + 3 * i], terms = values + constants + i;
        if (given[0] < 0 || given[0] >= RAREFY_OPERATIONS)
            return "operation " + std::to_string(given[0]) + " is unknown";
        const bool two = reads_two(given[0]);
        if (given[1] < 0 || given[1] >= terms || given[2] < (two ? 0 : -1) || given[2] >= (two ? terms : 0))
            return "instruction " + std::to_string(i) + " reads what is not there";
        out->instructions.push_back(
            {static_cast<int32_t>(given[0]), {static_cast<int32_t>(given[1]), static_cast<int32_t>(given[2])}});
    }
    return "";
}

std::string infer_pointwise(const Graph &graph, const Node &node, const Given &given, Shape *out) {
    Expression all;
    const std::string wrong = read(given.numbers, 1 + static_cast<int64_t>(given.operands.size()), &all);
    if (!wrong.empty()) return wrong;
    std::vector<Shape> shapes = {graph.values[node.x]};
    for (const int32_t id : given.operands) shapes.push_back(graph.values[id]);
    int64_t constants = 0;
    for (const Shape &shape : all.constants) {
        if (shape.pixels() > MOST_WEIGHTS || shape.size() > MOST_WEIGHTS) return "a constant is too large";
        constants += shape.size();
        shapes.push_back(shape);
    }
    if (constants != given.constants)
        return "there must be " + std::to_string(constants) + " constants, got " + std::to_string(given.constants);
    *out = {1, 1, 1};
    for (const Shape &shape : shapes)
        *out = {std::max(out->channels, shape.channels), std::max(out->height, shape.height),
                std::max(out->width, shape.width)};
    const auto fits = [](int32_t size, int32_t whole) { return size == 1 || size == whole; };
    for (const Shape &shape : shapes)
        if (!fits(shape.channels, out->channels) || !fits(shape.height, out->height) || !fits(shape.width, out->width))
            return "sizes must be those of the result or 1";
    return "";
}

int64_t pointwise_scratch(const Graph &, const Step &step) {
    return (static_cast<int64_t>(step.numbers.size()) / 3 + 1) * BLOCK_FLOATS;
}

// Where a term is: channel c, row h, column w is at[c * channel + h * row + w * step].
struct Term {
    const float *at;
    int64_t channel, row, step;
};

Term term_of(const float *at, int64_t stride, const Shape &shape) {
    return {at, shape.channels > 1 ? stride : 0, shape.height > 1 ? shape.width : 0, shape.width > 1 ? 1 : 0};
}

// The rows [0, rows) of n numbers at this place, a block; scratch holds what the instructions make but the last.
void run_block(const Kernels &k, const Expression &all, const std::vector<Term> &terms, float *scratch, float *y,
               int64_t y_row, int64_t channel, int64_t row, int64_t column, int64_t rows, int64_t n) {
    const int64_t given = static_cast<int64_t>(terms.size()), line = (n + MAX_LANES - 1) / MAX_LANES * MAX_LANES;
    PointwiseCall call = {};
    call.rows = rows;
    call.n = n;
    const int64_t count = static_cast<int64_t>(all.instructions.size());
    for (int64_t i = 0; i < count; ++i) {
        const Expression::Instruction &what = all.instructions[i];
        call.operation = what.operation;
        for (int t = 0; t < 1 + reads_two(what.operation); ++t) {
            const int64_t id = what.terms[t];
            if (id < given) {
                const Term &from = terms[id];
                call.x[t] = from.at + channel * from.channel + row * from.row + column * from.step;
                call.x_row[t] = from.channel;
                call.step[t] = static_cast<int32_t>(from.step);
            } else {
                call.x[t] = scratch + (id - given) * BLOCK_FLOATS;
                call.x_row[t] = line;
                call.step[t] = 1;
            }
        }
        const bool last = i == count - 1;
        call.y = last ? y : scratch + i * BLOCK_FLOATS;
        call.y_row = last ? y_row : line;
        k.pointwise(&call);
    }
}

void run_pointwise(const Frame &f, const Step &s, int64_t image) {
    Expression all;
    read(s.numbers, 1 + static_cast<int64_t>(s.operands.size()), &all);
    const Shape &out = f.plan->values[s.node.out].shape;
    const View y = view(f, s.node.out, image);
    std::vector<Term> terms;
    bool line = y.stride == 1;  // whether all channels of one pixel lie one after another
    const auto add = [&](const float *at, int64_t stride, const Shape &shape) {
        terms.push_back(term_of(at, stride, shape));
        line = line && (shape.channels == 1 || stride == 1);
    };
    const auto add_value = [&](int32_t id) {
        const View x = view(f, id, image);
        add(x.at, x.stride, f.plan->values[id].shape);
    };
    add_value(s.node.x);
    for (const int32_t id : s.operands) add_value(id);
    const float *constant = s.constants.data();
    for (const Shape &shape : all.constants) {
        add(constant, shape.pixels(), shape);
        constant += shape.size();
    }
    int64_t channels = out.channels, height = out.height, width = out.width;
    // rows that follow each other in all terms are one
    const bool flat = std::all_of(terms.begin(), terms.end(), [&](const Term &t) {
        return (t.row == width && t.step == 1) || (t.row == 0 && t.step == 0) || height == 1;
    });
    if (width == 1 && height > 1 && flat == false) {
        // columns of one number: the rows take their place
        for (Term &t : terms) t.step = t.row;
        width = height, height = 1;
    } else if (flat) {
        width *= height, height = 1;
    }
    if (line && width == 1 && height == 1) {
        for (Term &t : terms) t.step = t.channel, t.channel = 0;
        width = channels, channels = 1;
    }
    const int64_t n_most = std::min<int64_t>(width, BLOCK_FLOATS),
                  rows_most = BLOCK_FLOATS / ((n_most + MAX_LANES - 1) / MAX_LANES * MAX_LANES);
    const bool by_columns = channels < f.parts && width > BLOCK_FLOATS;
    const Share mine(f, by_columns ? (width + BLOCK_FLOATS - 1) / BLOCK_FLOATS : channels);
    const int64_t first_channel = by_columns ? 0 : mine.from, last_channel = by_columns ? channels : mine.to;
    const int64_t first_column = by_columns ? mine.from * BLOCK_FLOATS : 0,
                  last_column = by_columns ? std::min(width, mine.to * BLOCK_FLOATS) : width;
    for (int64_t c = first_channel; c < last_channel; c += rows_most)
        for (int64_t h = 0; h < height; ++h)
            for (int64_t p = first_column; p < last_column; p += BLOCK_FLOATS)
                run_block(*f.program->kernels, all, terms, f.scratch, y.at + c * y.stride + h * width + p, y.stride, c,
                          h, p, std::min(rows_most, last_channel - c),
                          std::min<int64_t>(BLOCK_FLOATS, last_column - p));
}

}  // namespace

const Function POINTWISE = {"pointwise", infer_pointwise, pointwise_scratch, run_pointwise};

}  // namespace rarefy::engine

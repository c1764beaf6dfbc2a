// Attention, products of two values, softmax: functions of numbers that lie at places (enum rarefy_function).
#include <algorithm>
#include <initializer_list>

#include "engine/tensor.h"

namespace rarefy::engine {

namespace {

constexpr int64_t MOST_AXES = 12, LARGEST = 1 << 30;

// The numbers of a step, once they are known to be right.
struct Places {
    const int64_t *numbers;
    int64_t axes() const { return numbers[0]; }
    int64_t size(int64_t axis) const { return numbers[1 + axis]; }
    const int64_t *place(int64_t value) const { return numbers + 1 + axes() + 3 + value * (2 + 2 * axes()); }
    // Floats between the indices of an axis, in planes so far apart.
    int64_t step(int64_t value, int64_t axis, int64_t stride) const {
        const int64_t *at = place(value) + 2 + 2 * axis;
        return at[0] * stride + at[1];
    }
    // Floats from the value's begin to where `unit` of the first axes begins.
    int64_t begin(int64_t value, int64_t outer, int64_t unit, int64_t stride) const {
        const int64_t *at = place(value);
        int64_t floats = at[0] * stride + at[1];
        for (int64_t axis = outer; axis-- > 0; unit /= size(axis))
            floats += unit % size(axis) * step(value, axis, stride);
        return floats;
    }
    int64_t units(int64_t outer) const {
        int64_t all = 1;
        for (int64_t axis = 0; axis < outer; ++axis) all *= size(axis);
        return all;
    }
};

int64_t number_count(int64_t axes, int64_t values, int64_t own) { return 1 + axes + 3 + values * (2 + 2 * axes) + own; }

// Whether all indices of a value's place lie in its shape.
bool lies_in(const Places &places, int64_t value, const Shape &shape) {
    const int64_t *at = places.place(value);
    int64_t last[2] = {at[0], at[1]};
    const int64_t count[2] = {shape.channels, shape.pixels()};
    for (int i = 0; i < 2; ++i) {
        if (at[i] < 0 || at[i] >= count[i]) return false;
        for (int64_t axis = 0; axis < places.axes(); ++axis) {
            const int64_t step = at[2 + 2 * axis + i];
            if (step < 0 || step > LARGEST) return false;
            last[i] += (places.size(axis) - 1) * step;
            if (last[i] >= count[i]) return false;
        }
    }
    return true;
}

// The shapes that the places of a step are of: its values, its result, and where there are constants those.
std::vector<Shape> shapes_of(const Graph &graph, const Node &n, const Given &given, const Shape &out) {
    std::vector<Shape> shapes = {graph.values[n.x]};
    for (const int32_t id : given.operands) shapes.push_back(graph.values[id]);
    shapes.push_back(out);
    if (given.constants) shapes.push_back({1, 1, static_cast<int32_t>(given.constants)});
    return shapes;
}

// Checks numbers of `inner` axes of the function's own behind the outer ones, and of `own` numbers behind the places;
// those axes in `made` are the result's.
std::string infer_places(const Graph &graph, const Node &n, const Given &given, int64_t inner, int64_t own,
                         std::initializer_list<int64_t> made, Shape *out) {
    const std::vector<int64_t> &numbers = given.numbers;
    const int64_t axes = numbers.empty() ? -1 : numbers[0];
    const int64_t values = static_cast<int64_t>(given.operands.size()) + 2 + (given.constants ? 1 : 0);
    if (axes < inner || axes > MOST_AXES || given.constants > LARGEST ||
        static_cast<int64_t>(numbers.size()) != number_count(axes, values, own))
        return "there must be at least " + std::to_string(inner) + " axes, and a place for every value";
    const Places places{numbers.data()};
    int64_t shape[3], results = 1;
    for (int64_t axis = 0; axis < axes; ++axis) {
        if (places.size(axis) < 1 || places.size(axis) > LARGEST) return "a size must be at least 1";
        bool written = axis < axes - inner;
        for (const int64_t each : made) written |= axis == axes - inner + each;
        if (written) results *= places.size(axis);
        if (results > LARGEST) return "the result is too large";
    }
    for (int i = 0; i < 3; ++i) {
        shape[i] = numbers[1 + axes + i];
        if (shape[i] < 1 || shape[i] > LARGEST) return "the result has no such shape";
    }
    *out = {static_cast<int32_t>(shape[0]), static_cast<int32_t>(shape[1]), static_cast<int32_t>(shape[2])};
    if (shape[1] * shape[2] > LARGEST || out->size() != results) return "the result has another size";
    const std::vector<Shape> shapes = shapes_of(graph, n, given, *out);
    for (int64_t value = 0; value < values; ++value)
        if (!lies_in(places, value, shapes[value])) return "a place is outside of its value";
    return "";
}

// Whether the numbers of these axes may all be other ones of a value: so that nothing small in a file is much work.
bool fits(const Places &places, std::initializer_list<int64_t> axes, const Shape &shape) {
    int64_t all = 1;
    for (const int64_t axis : axes) all *= places.size(axis);
    return all <= shape.size();
}

// The function's own numbers.
const int64_t *own_numbers(const std::vector<int64_t> &numbers, size_t count) {
    return numbers.data() + numbers.size() - count;
}

bool is_flag(int64_t number) { return number == 0 || number == 1; }

// Blocks of up to COLUMN_VECTORS vectors of columns, about equally many in each.
struct Blocks {
    int64_t columns, lanes, vectors, count;
    Blocks(int64_t columns, int64_t lanes)
        : columns(columns), lanes(lanes), vectors((columns + lanes - 1) / lanes),
          count((vectors + COLUMN_VECTORS - 1) / COLUMN_VECTORS) {}
    int64_t begin(int64_t block) const { return std::min(columns, vectors * block / count * lanes); }
};

// Calls run(unit of the outer axes, first column, columns) for this thread's share.
template <class F>
void over_blocks(const Frame &f, const Places &places, int64_t outer, int64_t columns, const F &run) {
    const Blocks blocks(columns, f.program->kernels->lanes);
    const Share mine(f, places.units(outer) * blocks.count);
    for (int64_t i = mine.from; i < mine.to; ++i) {
        const int64_t first = blocks.begin(i % blocks.count), next = blocks.begin(i % blocks.count + 1);
        run(i / blocks.count, first, next - first);
    }
}

constexpr int64_t WIDTH = int64_t{COLUMN_VECTORS} * MAX_LANES;

// Where a value's numbers begin in an image, and how far apart the channels are.
struct Operand {
    Places places;
    int64_t value, outer;
    View view;
    float *at(int64_t unit) const { return view.at + places.begin(value, outer, unit, view.stride); }
    int64_t step(int64_t inner) const { return places.step(value, outer + inner, view.stride); }
    void steps(int64_t (&to)[2], int64_t first, int64_t second) const { to[0] = step(first), to[1] = step(second); }
};

// ---- products

std::string infer_matmul(const Graph &graph, const Node &n, const Given &given, Shape *out) {
    if (given.operands.size() != 1 || given.constants) return "a product has two values";
    const std::string wrong = infer_places(graph, n, given, 3, 1, {0, 1}, out);
    if (!wrong.empty()) return wrong;
    const Places places{given.numbers.data()};
    const int64_t m = places.axes() - 3;
    if (!fits(places, {m, m + 2}, graph.values[n.x]) || !fits(places, {m + 1, m + 2}, graph.values[given.operands[0]]))
        return "a value is smaller than its axes";
    return "";
}

int64_t matmul_scratch(const Graph &, const Step &step) {
    const Places places{step.numbers.data()};
    return (places.size(places.axes() - 1) + places.size(places.axes() - 3)) * WIDTH;
}

void run_matmul(const Frame &f, const Step &s, int64_t image) {
    const Places places{s.numbers.data()};
    const int64_t outer = places.axes() - 3;
    const Operand a{places, 0, outer, view(f, s.node.x, image)}, b{places, 1, outer, view(f, s.operands[0], image)},
        y{places, 2, outer, view(f, s.node.out, image)};
    MatmulCall call = {};
    a.steps(call.a_step, 0, 2);
    b.steps(call.b_step, 1, 2);
    y.steps(call.y_step, 1, 0);
    call.rows = places.size(outer);
    call.count = places.size(outer + 2);
    call.scale = static_cast<float>(number(s.numbers, s.numbers.size() - 1));
    call.scratch = f.scratch;
    over_blocks(f, places, outer, places.size(outer + 1), [&](int64_t unit, int64_t first, int64_t columns) {
        call.a = a.at(unit);
        call.b = b.at(unit) + first * call.b_step[0];
        call.y = y.at(unit) + first * call.y_step[0];
        call.columns = columns;
        f.program->kernels->matmul(&call);
    });
}

// ---- softmax

std::string infer_softmax(const Graph &graph, const Node &n, const Given &given, Shape *out) {
    if (!given.operands.empty() || given.constants) return "softmax has one value";
    return infer_places(graph, n, given, 2, 0, {0, 1}, out);
}

int64_t softmax_scratch(const Graph &, const Step &step) {
    const Places places{step.numbers.data()};
    return places.size(places.axes() - 1) * WIDTH;
}

void run_softmax(const Frame &f, const Step &s, int64_t image) {
    const Places places{s.numbers.data()};
    const int64_t outer = places.axes() - 2;
    const Operand x{places, 0, outer, view(f, s.node.x, image)}, y{places, 1, outer, view(f, s.node.out, image)};
    SoftmaxCall call = {};
    x.steps(call.x_step, 0, 1);
    y.steps(call.y_step, 0, 1);
    call.count = places.size(outer + 1);
    call.scratch = f.scratch;
    over_blocks(f, places, outer, places.size(outer), [&](int64_t unit, int64_t first, int64_t columns) {
        call.x = x.at(unit) + first * call.x_step[0];
        call.y = y.at(unit) + first * call.y_step[0];
        call.columns = columns;
        f.program->kernels->softmax(&call);
    });
}

// ---- attention

constexpr size_t OWN = 3;  // scale, causal, empty_is_zero

std::string infer_attention(const Graph &graph, const Node &n, const Given &given, Shape *out) {
    const size_t others = given.operands.size();
    if (others < 2 || others > 3 || (others == 3 && given.constants))
        return "attention has a query, keys, values, and at most one mask";
    const std::string wrong = infer_places(graph, n, given, 4, OWN, {0, 3}, out);
    if (!wrong.empty()) return wrong;
    const int64_t *own = own_numbers(given.numbers, OWN);
    if (!is_flag(own[1]) || !is_flag(own[2])) return "a number must be 0 or 1";
    const Places places{given.numbers.data()};
    const int64_t query = places.axes() - 4;
    if (!fits(places, {query, query + 2}, graph.values[n.x]) ||
        !fits(places, {query + 1, query + 2}, graph.values[given.operands[0]]) ||
        !fits(places, {query + 1, query + 3}, graph.values[given.operands[1]]))
        return "a value is smaller than its axes";
    return "";
}

int64_t attention_scratch(const Graph &, const Step &step) {
    const Places places{step.numbers.data()};
    int64_t rows = 0;
    for (int64_t axis = 1; axis < 4; ++axis) rows += places.size(places.axes() - 4 + axis);
    return rows * WIDTH;
}

void run_attention(const Frame &f, const Step &s, int64_t image) {
    const Places places{s.numbers.data()};
    const int64_t outer = places.axes() - 4, result = 1 + static_cast<int64_t>(s.operands.size());
    const Operand q{places, 0, outer, view(f, s.node.x, image)}, k{places, 1, outer, view(f, s.operands[0], image)},
        v{places, 2, outer, view(f, s.operands[1], image)}, y{places, result, outer, view(f, s.node.out, image)};
    const bool constant = s.constants.size() > 0, masked = constant || s.operands.size() == 3;
    const View added = constant                 ? View{const_cast<float *>(s.constants.data()), 0}
                       : s.operands.size() == 3 ? view(f, s.operands[2], image)
                                                : View{nullptr, 0};
    const Operand mask{places, constant ? result + 1 : 3, outer, added};
    const int64_t *own = own_numbers(s.numbers, OWN);
    AttendCall call = {};
    q.steps(call.q_step, 0, 2);
    k.steps(call.k_step, 1, 2);
    v.steps(call.v_step, 1, 3);
    y.steps(call.y_step, 0, 3);
    if (masked) mask.steps(call.mask_step, 0, 1);
    call.keys = places.size(outer + 1);
    call.features = places.size(outer + 2);
    call.results = places.size(outer + 3);
    call.scale = static_cast<float>(number(s.numbers, s.numbers.size() - OWN));
    call.causal = own[1] != 0;
    call.empty_is_zero = own[2] != 0;
    call.scratch = f.scratch;
    over_blocks(f, places, outer, places.size(outer), [&](int64_t unit, int64_t first, int64_t queries) {
        call.q = q.at(unit) + first * call.q_step[0];
        call.k = k.at(unit);
        call.v = v.at(unit);
        call.mask = masked ? mask.at(unit) + first * call.mask_step[0] : nullptr;
        call.y = y.at(unit) + first * call.y_step[0];
        call.first = first;
        call.queries = queries;
        f.program->kernels->attend(&call);
    });
}

}  // namespace

const Function MATMUL = {"matmul", infer_matmul, matmul_scratch, run_matmul};
const Function SOFTMAX = {"softmax", infer_softmax, softmax_scratch, run_softmax};
const Function ATTENTION = {"attention", infer_attention, attention_scratch, run_attention};

}  // namespace rarefy::engine

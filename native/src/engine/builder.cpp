// The builder: checks every step and collects them.
#include <algorithm>
#include <cstring>
#include <iterator>

#include "engine/program.h"
#include "engine/tensor.h"

namespace rarefy::engine {

int32_t fail(char *error, int64_t size, const std::string &message) {
    if (error && size > 0) {
        const size_t n = std::min(message.size(), static_cast<size_t>(size - 1));
        std::memcpy(error, message.data(), n);
        error[n] = 0;
    }
    return -1;
}

namespace {

// More than any network has, and few enough that no product of two overflows.
constexpr int64_t LARGEST = 1 << 30;

std::string text(const Shape &s) {
    return std::to_string(s.channels) + " x " + std::to_string(s.height) + " x " + std::to_string(s.width);
}

bool between(int64_t x, int64_t low, int64_t high) { return x >= low && x <= high; }

// One axis of a window.
struct Axis {
    int32_t size, kernel, stride, dilation, before, after;

    // How many windows there are along it; 0 and what is wrong where there are none.
    int64_t windows(bool pool, std::string *wrong) const {
        if (!between(kernel, 1, 1024) || !between(stride, 1, 1024) || !between(dilation, 1, 1024)) {
            *wrong = "kernel, stride and dilation must be between 1 and 1024";
            return 0;
        }
        const int64_t reach = int64_t{dilation} * (kernel - 1) + 1, room = int64_t{size} + before + after - reach;
        if (!between(before, 0, 1 << 20) || !between(after, 0, 1 << 20))
            *wrong = "padding must be between 0 and 1048576";
        else if (room < 0) *wrong = "the kernel is larger than the padded input, of " + std::to_string(size);
        else if (pool && (before >= reach || room / stride * stride - before >= size))
            *wrong = "a window must hold at least one value of x, so padding must be smaller than the kernel";
        return wrong->empty() ? room / stride + 1 : 0;
    }
};

Axis depth_of(const Node &n) {
    const Depth &d = n.window.depth;
    return {d.in, d.kernel, d.stride, d.dilation, d.front, n.back};
}

std::string infer_window(const Node &n, const Shape &x, Shape *out) {
    const Window &w = n.window;
    if (!between(w.depth.in, 1, x.height) || x.height % w.depth.in)
        return "the rows of x, " + text(x) + ", must be those of so many planes, got " + std::to_string(w.depth.in);
    const Axis axes[3] = {
        depth_of(n),
        {x.height / w.depth.in, w.kernel[0], w.stride[0], w.dilation[0], w.top, n.bottom},
        {x.width, w.kernel[1], w.stride[1], w.dilation[1], w.left, n.right},
    };
    int64_t sizes[3];
    std::string wrong;
    for (int axis = 0; axis < 3; ++axis) {
        sizes[axis] = axes[axis].windows(n.kind == Kind::POOL, &wrong);
        if (!wrong.empty()) return wrong;
    }
    if (sizes[0] != w.depth.out) return "its planes are wrong";
    if (sizes[0] * sizes[1] > LARGEST) return "the result is too large";
    out->height = static_cast<int32_t>(sizes[0] * sizes[1]);
    out->width = static_cast<int32_t>(sizes[2]);
    return "";
}

bool known(const Graph &graph, int32_t id) { return id >= 0 && id < static_cast<int32_t>(graph.values.size()); }

std::string no_value(int32_t id) { return "there is no value " + std::to_string(id); }

// An empty string, or why a layer's weights are not stored or computed with as it says.
std::string wrong_weights(const Node &n) {
    if (n.storage != RAREFY_F32 && n.storage != RAREFY_BF16)
        return "storage " + std::to_string(n.storage) + " is unknown";
    return between(n.choice, RAREFY_MEASURE, RAREFY_DENSE) ? "" : "choice " + std::to_string(n.choice) + " is unknown";
}

std::string infer_conv(const Graph &graph, const Node &n, const Shape &x, Shape *out) {
    if (!between(n.groups, 1, x.channels) || x.channels % n.groups || !between(n.out_channels, 1, LARGEST) ||
        n.out_channels % n.groups)
        return "groups must divide the " + std::to_string(x.channels) + " channels of x and out_channels, got groups " +
               std::to_string(n.groups) + " and out_channels " + std::to_string(n.out_channels);
    out->channels = n.out_channels;
    const std::string wrong = infer_window(n, x, out);
    if (!wrong.empty()) return wrong;
    if (int64_t{n.out_channels} * (x.channels / n.groups) > MOST_WEIGHTS / n.window.taps())
        return "a layer has at most 2^31 - 1 weights";
    const std::string unknown = wrong_weights(n);
    if (!unknown.empty()) return unknown;
    if (n.other_operand == -1) return "";
    if (!known(graph, n.other_operand)) return no_value(n.other_operand);
    const Shape &residual = graph.values[n.other_operand];
    if (!(residual == *out))
        return "the residual must have the shape of the result, " + text(*out) + ", got " + text(residual);
    return "";
}

std::string infer_binary(const Graph &graph, const Node &n, const Shape &x) {
    if (!known(graph, n.other_operand)) return no_value(n.other_operand);
    const Shape &y = graph.values[n.other_operand];
    if (!(y == x) && !(y == Shape{x.channels, 1, 1}))
        return "y must have the shape of x, " + text(x) + ", or be a vector of as many channels, got " + text(y);
    return "";
}

std::string infer_concat(const Graph &graph, const std::vector<int32_t> &operands, Shape *out) {
    if (operands.empty()) return "there is nothing to concatenate";
    int64_t channels = 0;
    for (const int32_t id : operands) {
        if (!known(graph, id)) return no_value(id);
        const Shape &s = graph.values[id], &f = graph.values[operands[0]];
        if (s.height != f.height || s.width != f.width)
            return "all must have the same height and width, got " + text(f) + " and " + text(s);
        channels += s.channels;
    }
    if (channels > LARGEST) return "the result is too large";
    *out = graph.values[operands[0]];
    out->channels = static_cast<int32_t>(channels);
    return "";
}

std::string infer_upsample(const Node &n, const Shape &x, Shape *out) {
    const int32_t *factor = n.window.stride;
    if (!between(factor[0], 1, 1024) || !between(factor[1], 1, 1024)) return "factors must be between 1 and 1024";
    if (int64_t{x.height} * factor[0] > LARGEST || int64_t{x.width} * factor[1] > LARGEST)
        return "the result is too large";
    out->height = x.height * factor[0];
    out->width = x.width * factor[1];
    return "";
}

std::string infer_flatten(const Shape &x, Shape *out) {
    if (x.size() > LARGEST) return "the result is too large";
    *out = {static_cast<int32_t>(x.size()), 1, 1};
    return "";
}

// Gates of some number of channels for each of a state's: vectors.
std::string infer_gates(const Graph &graph, int32_t id, int32_t gates, const Shape &state) {
    if (!known(graph, id)) return no_value(id);
    const Shape &x = graph.values[id];
    if (state.pixels() == 1 && x.pixels() == 1 && int64_t{gates} * state.channels == x.channels) return "";
    return "gates must be a vector of " + std::to_string(gates) + " channels for each of the state's, got " + text(x) +
           " for " + text(state);
}

std::string infer_lstm(const Graph &graph, const Node &n, Shape *out) {
    if (!known(graph, n.other_operand)) return no_value(n.other_operand);
    *out = graph.values[n.other_operand];
    return infer_gates(graph, n.x, 4, *out);
}

std::string infer_gru(const Graph &graph, const Node &n, const std::vector<int32_t> &operands, Shape *out) {
    if (operands.size() != 1) return "a GRU has one state";
    if (!known(graph, operands[0])) return no_value(operands[0]);
    *out = graph.values[operands[0]];
    const std::string wrong = infer_gates(graph, n.x, 3, *out);
    return wrong.empty() ? infer_gates(graph, n.other_operand, 3, *out) : wrong;
}

// A layer of an LSTM, of four gates for each channel of its state, or of a GRU, of three.
std::string infer_recurrence(const Graph &graph, const Node &n, const std::vector<int32_t> &operands, Shape *out) {
    const int64_t hidden = n.out_channels, channels = out->channels;
    const bool lstm = channels == 4 * hidden;
    if (hidden < 1 || (!lstm && channels != 3 * hidden))
        return "a recurrence has 3 or 4 gates for each channel of its state, got " + std::to_string(channels) +
               " channels for a state of " + std::to_string(hidden);
    if (channels * hidden > MOST_WEIGHTS) return "a layer has at most 2^31 - 1 weights";
    if (!between(n.reverse, 0, 1) || !between(n.cells, 0, lstm))
        return "reverse and cells must be 0 or 1, cells of an LSTM";
    if (n.groups != 1 || n.activation != RAREFY_NONE) return "a recurrence has one group and no activation";
    const std::string wrong = wrong_weights(n);
    if (!wrong.empty()) return wrong;
    const size_t others = n.other_operand >= 0 && lstm;
    if (n.other_operand < -1 || operands.size() != others)
        return "a recurrence begins from all of its states, or from zeros";
    std::vector<int32_t> states = operands;
    if (n.other_operand >= 0) states.push_back(n.other_operand);
    for (const int32_t id : states) {
        if (!known(graph, id)) return no_value(id);
        if (!(graph.values[id] == Shape{n.out_channels, 1, 1}))
            return "a state must be a vector of " + std::to_string(hidden) + " channels, got " + text(graph.values[id]);
    }
    out->channels = static_cast<int32_t>(n.cells ? 2 * hidden : hidden);
    return "";
}

// The shape that the kind of node makes of x, which is in *out already.
std::string infer_kind(const Graph &graph, const Node &n, const Given &given, Shape *out) {
    const Shape x = *out;
    const std::vector<int32_t> &operands = given.operands;
    switch (n.kind) {
        case Kind::CONV: return infer_conv(graph, n, x, out);
        case Kind::POOL: return infer_window(n, x, out);
        case Kind::GLOBAL_AVERAGE: *out = {x.channels, 1, 1}; return "";
        case Kind::BINARY: return infer_binary(graph, n, x);
        case Kind::CONCAT: return infer_concat(graph, operands, out);
        case Kind::UPSAMPLE: return infer_upsample(n, x, out);
        case Kind::FLATTEN: return infer_flatten(x, out);
        case Kind::LSTM_CELL:
        case Kind::LSTM_HIDDEN: return infer_lstm(graph, n, out);
        case Kind::GRU: return infer_gru(graph, n, operands, out);
        case Kind::RECURRENCE: return infer_recurrence(graph, n, operands, out);
        case Kind::TENSOR: return infer_tensor(graph, n, given, out);
        default: return "";
    }
}

// An empty string, or why a step's activations are not computed in its mode.
std::string wrong_mode(const Node &n, const std::vector<int64_t> &numbers) {
    if (n.mode == RAREFY_PLAIN) return "";
    if (!between(n.mode, 0, RAREFY_MODES - 1)) return "mode " + std::to_string(n.mode) + " is unknown";
    const bool gates =
        n.kind == Kind::LSTM_CELL || n.kind == Kind::LSTM_HIDDEN || n.kind == Kind::GRU || n.kind == Kind::RECURRENCE;
    const bool layer = n.kind == Kind::CONV || n.kind == Kind::BINARY || n.kind == Kind::AFFINE;
    if (!gates && !(layer && between(n.activation, RAREFY_SILU, RAREFY_SIGMOID)))
        return "there is no activation that has modes";
    if (n.mode == RAREFY_KTANH) {
        if (numbers.size() != numbers_of({}).size() ||
            !std::all_of(numbers.begin(), numbers.end(), [](int64_t x) { return between(x, 0, UINT32_MAX); }))
            return "mode RAREFY_KTANH needs a table";
        const rarefy_shift32 t = table_of(numbers);
        const bool shifts = std::all_of(t.shift, t.shift + 32, [](uint32_t x) { return x < 32; });
        if (t.one != 0x3F800000 || t.last != 0x7F800000 || t.mantissa_mask != 0x7FFFFF || !shifts ||
            !between(t.index_shift, 18, 23) || !between(t.identity_below, 1, t.one) ||
            !between(t.saturate_above, t.identity_below, t.last))
            return "the table is none of tanh in float32";
    }
    return "";
}

}  // namespace

rarefy_shift32 table_of(const std::vector<int64_t> &numbers) {
    uint32_t fields[sizeof(rarefy_shift32) / sizeof(uint32_t)];
    for (size_t i = 0; i < std::size(fields); ++i) fields[i] = static_cast<uint32_t>(numbers[i]);
    rarefy_shift32 table;
    std::memcpy(&table, fields, sizeof table);
    return table;
}

std::vector<int64_t> numbers_of(const rarefy_shift32 &table) {
    uint32_t fields[sizeof table / sizeof(uint32_t)];
    std::memcpy(fields, &table, sizeof table);
    return {std::begin(fields), std::end(fields)};
}

std::string infer(const Graph &graph, const Node &n, const Given &given, Shape *out) {
    if (n.activation < RAREFY_NONE || n.activation > RAREFY_LEAKY_RELU)
        return "activation " + std::to_string(n.activation) + " is unknown";
    if (n.layout != RAREFY_CHANNELS_FIRST && n.layout != RAREFY_CHANNELS_LAST)
        return "layout " + std::to_string(n.layout) + " is unknown";
    if (n.kind != Kind::INPUT && n.kind != Kind::CONCAT) {
        if (!known(graph, n.x)) return no_value(n.x);
        *out = graph.values[n.x];
    }
    std::string wrong = infer_kind(graph, n, given, out);
    if (wrong.empty()) wrong = wrong_mode(n, given.numbers);
    if (!wrong.empty()) return wrong;
    if (!between(out->channels, 1, LARGEST) || !between(out->height, 1, LARGEST) || !between(out->width, 1, LARGEST) ||
        out->pixels() > LARGEST || out->size() > LARGEST)
        return "every size must be at least 1 and a value at most 2^30 numbers, got " + text(*out);
    return "";
}

Matrix matrix_of(const Graph &graph, const Node &node) {
    return {product_of(graph, node).channels, multiplied(graph, node).channels,
            node.kind == Kind::RECURRENCE ? 1 : node.window.taps(), node.groups};
}

Shape multiplied(const Graph &graph, const Node &node) {
    return node.kind == Kind::RECURRENCE ? Shape{node.out_channels, 1, 1} : graph.values[node.x];
}

Shape product_of(const Graph &graph, const Node &node) {
    return node.kind == Kind::RECURRENCE ? Shape{graph.values[node.x].channels, 1, 1} : graph.values[node.out];
}

Node node_of(Kind kind, int32_t x, int32_t other_operand) {
    Node n = {};
    n.kind = kind;
    n.x = x;
    n.other_operand = other_operand;
    n.out = -1;
    n.groups = 1;
    return n;
}

namespace {

int32_t append(rarefy_builder *builder, Node node, const char *name, char *error, int64_t size, Given given = {},
               Shape shape = {1, 1, 1}) {
    Graph &g = builder->graph;
    std::string wrong = infer(g, node, given, &shape);
    int64_t all = static_cast<int64_t>(given.operands.size());
    for (const auto &others : g.operands) all += static_cast<int64_t>(others.size());
    if (g.nodes.size() >= static_cast<size_t>(MOST_STEPS) || all > MOST_OPERANDS)
        wrong = "a program has at most 8192 steps and concatenates at most 65536 values";
    if (!wrong.empty()) return fail(error, size, (name && *name ? std::string(name) + ": " : std::string()) + wrong);
    if (node.kind != Kind::OUTPUT) {
        node.out = static_cast<int32_t>(g.values.size());
        g.values.push_back(shape);
    }
    if (node.kind != Kind::INPUT && node.kind != Kind::CONCAT) {
        node.window.in_h = g.values[node.x].height / node.window.depth.in;
        node.window.in_w = g.values[node.x].width;
    }
    node.window.out_h = shape.height / node.window.depth.out;
    node.window.out_w = shape.width;
    node.operands = static_cast<int32_t>(given.operands.size());
    g.nodes.push_back(node);
    g.names.push_back(name ? name : "");
    g.operands.push_back(std::move(given.operands));
    g.numbers.push_back(std::move(given.numbers));
    g.weights.emplace_back();
    g.bias.emplace_back();
    g.scale.emplace_back();
    g.shift.emplace_back();
    g.constants.emplace_back();
    return node.out;
}

void set_window(Node &n, const int32_t *kernel, const int32_t *stride, const int32_t *dilation, const int32_t *padding,
                const rarefy_depth &depth) {
    for (int axis = 0; axis < 2; ++axis) {
        n.window.kernel[axis] = kernel[axis];
        n.window.stride[axis] = stride[axis];
        n.window.dilation[axis] = dilation[axis];
    }
    n.window.top = padding[0];
    n.bottom = padding[1];
    n.window.left = padding[2];
    n.right = padding[3];
    if (!depth.planes) return;
    n.window.depth = {depth.planes, 1, depth.kernel, depth.stride, depth.dilation, depth.padding[0]};
    n.back = depth.padding[1];
    std::string wrong;  // which infer_window says
    n.window.depth.out = static_cast<int32_t>(std::max<int64_t>(1, depth_of(n).windows(n.kind == Kind::POOL, &wrong)));
}

}  // namespace
}  // namespace rarefy::engine

using namespace rarefy::engine;

extern "C" {
#define RAREFY_API __attribute__((visibility("default")))

RAREFY_API rarefy_builder *rarefy_builder_new(void) { return new (std::nothrow) rarefy_builder; }
RAREFY_API void rarefy_builder_free(rarefy_builder *builder) { delete builder; }

RAREFY_API int32_t rarefy_builder_input(rarefy_builder *builder, int32_t channels, int32_t height, int32_t width,
                                        int32_t layout, const char *name, char *error, int64_t size) {
    Node n = node_of(Kind::INPUT, -1);
    n.layout = layout;
    return append(builder, n, name, error, size, {}, {channels, height, width});
}

RAREFY_API int32_t rarefy_builder_conv(rarefy_builder *builder, const rarefy_conv *conv, const char *name, char *error,
                                       int64_t size) {
    Node n = node_of(Kind::CONV, conv->x, conv->residual);
    n.out_channels = conv->out_channels;
    n.activation = conv->activation;
    n.groups = conv->groups;
    n.storage = conv->storage;
    n.choice = conv->choice;
    set_window(n, conv->kernel, conv->stride, conv->dilation, conv->padding, conv->depth);
    const Graph &before = builder->graph;
    Shape shape = {1, 1, 1};
    if (infer(before, n, {}, &shape).empty()) {  // otherwise append says why not
        const int64_t wanted = int64_t{n.out_channels} * (before.values[n.x].channels / n.groups) * n.window.taps();
        if (!conv->weight || conv->weights != wanted)
            return fail(error, size,
                        "there must be " + std::to_string(wanted) + " weights, got " +
                            std::to_string(conv->weight ? conv->weights : 0));
        if (conv->bias && conv->biases != n.out_channels)
            return fail(
                error, size,
                "there must be " + std::to_string(n.out_channels) + " biases, got " + std::to_string(conv->biases));
    }
    const int32_t out = append(builder, n, name, error, size);
    if (out < 0) return out;
    Graph &g = builder->graph;
    const Matrix m = matrix_of(g, g.nodes.back());
    g.weights.back().assign(conv->weight, conv->weight + conv->weights);
    g.bias.back().assign(m.rows, 0.0f);
    if (conv->bias) g.bias.back().assign(conv->bias, conv->bias + m.rows);
    return out;
}

RAREFY_API int32_t rarefy_builder_pool(rarefy_builder *builder, const rarefy_pool *pool, const char *name, char *error,
                                       int64_t size) {
    Node n = node_of(Kind::POOL, pool->x);
    n.average = pool->average != 0;
    n.count_padding = pool->count_padding != 0;
    set_window(n, pool->kernel, pool->stride, pool->dilation, pool->padding, pool->depth);
    return append(builder, n, name, error, size);
}

RAREFY_API int32_t rarefy_builder_global_average(rarefy_builder *builder, int32_t x, const char *name, char *error,
                                                 int64_t size) {
    return append(builder, node_of(Kind::GLOBAL_AVERAGE, x), name, error, size);
}

RAREFY_API int32_t rarefy_builder_binary(rarefy_builder *builder, int32_t x, int32_t y, int32_t multiply,
                                         int32_t activation, const char *name, char *error, int64_t size) {
    Node n = node_of(Kind::BINARY, x, y);
    n.multiply = multiply != 0;
    n.activation = activation;
    return append(builder, n, name, error, size);
}

RAREFY_API int32_t rarefy_builder_affine(rarefy_builder *builder, int32_t x, const float *scale, const float *shift,
                                         int64_t count, int32_t activation, const char *name, char *error,
                                         int64_t size) {
    Node n = node_of(Kind::AFFINE, x);
    n.activation = activation;
    const std::vector<Shape> &values = builder->graph.values;
    if ((scale || shift) && x >= 0 && x < static_cast<int32_t>(values.size()) && values[x].channels != count)
        return fail(error, size,
                    "there must be " + std::to_string(values[x].channels) + " factors and summands, got " +
                        std::to_string(count));
    const int32_t out = append(builder, n, name, error, size);
    if (out < 0) return out;
    Graph &g = builder->graph;
    const int32_t channels = g.values[out].channels;
    g.scale.back().assign(channels, 1.0f);
    g.shift.back().assign(channels, -0.0f);  // added, it leaves signed zeros as they are
    if (scale) g.scale.back().assign(scale, scale + channels);
    if (shift) g.shift.back().assign(shift, shift + channels);
    return out;
}

RAREFY_API int32_t rarefy_builder_concat(rarefy_builder *builder, const int32_t *xs, int32_t count, const char *name,
                                         char *error, int64_t size) {
    return append(builder, node_of(Kind::CONCAT, -1), name, error, size,
                  {std::vector<int32_t>(xs, xs + (count > 0 ? count : 0)), {}, 0});
}

RAREFY_API int32_t rarefy_builder_upsample(rarefy_builder *builder, int32_t x, int32_t factor_h, int32_t factor_w,
                                           const char *name, char *error, int64_t size) {
    Node n = node_of(Kind::UPSAMPLE, x);
    n.window.stride[0] = factor_h;
    n.window.stride[1] = factor_w;
    return append(builder, n, name, error, size);
}

RAREFY_API int32_t rarefy_builder_flatten(rarefy_builder *builder, int32_t x, const char *name, char *error,
                                          int64_t size) {
    return append(builder, node_of(Kind::FLATTEN, x), name, error, size);
}

RAREFY_API int32_t rarefy_builder_lstm_cell(rarefy_builder *builder, int32_t gates, int32_t c, const char *name,
                                            char *error, int64_t size) {
    return append(builder, node_of(Kind::LSTM_CELL, gates, c), name, error, size);
}

RAREFY_API int32_t rarefy_builder_lstm_hidden(rarefy_builder *builder, int32_t gates, int32_t c, const char *name,
                                              char *error, int64_t size) {
    return append(builder, node_of(Kind::LSTM_HIDDEN, gates, c), name, error, size);
}

RAREFY_API int32_t rarefy_builder_gru(rarefy_builder *builder, int32_t x, int32_t h, int32_t state, const char *name,
                                      char *error, int64_t size) {
    return append(builder, node_of(Kind::GRU, x, h), name, error, size, {{state}, {}, 0});
}

RAREFY_API int32_t rarefy_builder_recurrence(rarefy_builder *builder, const rarefy_recurrence *recurrence,
                                             const char *name, char *error, int64_t size) {
    Node n = node_of(Kind::RECURRENCE, recurrence->x, recurrence->h);
    n.out_channels = recurrence->hidden;
    n.reverse = recurrence->reverse != 0;
    n.cells = recurrence->cells != 0;
    n.storage = recurrence->storage;
    n.choice = recurrence->choice;
    Given given;
    if (recurrence->c != -1) given.operands.push_back(recurrence->c);
    Shape shape = {1, 1, 1};
    if (infer(builder->graph, n, given, &shape).empty()) {  // otherwise append says why not
        const int64_t rows = builder->graph.values[n.x].channels, wanted = rows * n.out_channels;
        if (!recurrence->weight || recurrence->weights != wanted || (recurrence->bias && recurrence->biases != rows))
            return fail(error, size,
                        "there must be " + std::to_string(wanted) + " weights, got " +
                            std::to_string(recurrence->weight ? recurrence->weights : 0) + ", and " +
                            std::to_string(rows) + " biases or none, got " + std::to_string(recurrence->biases));
    }
    const int32_t out = append(builder, n, name, error, size, std::move(given));
    if (out < 0) return out;
    Graph &g = builder->graph;
    const int32_t rows = g.values[n.x].channels;
    g.weights.back().assign(recurrence->weight, recurrence->weight + recurrence->weights);
    g.bias.back().assign(rows, 0.0f);
    if (recurrence->bias) g.bias.back().assign(recurrence->bias, recurrence->bias + rows);
    return out;
}

RAREFY_API int32_t rarefy_builder_tensor(rarefy_builder *builder, const rarefy_tensor *tensor, const char *name,
                                         char *error, int64_t size) {
    if (!tensor->xs || tensor->x_count < 1 || tensor->x_count > MOST_OPERANDS || tensor->number_count < 0 ||
        tensor->number_count > MOST_NUMBERS || tensor->constant_count < 0 || tensor->constant_count > MOST_WEIGHTS)
        return fail(error, size, "there must be a value, and not too many numbers");
    Node n = node_of(Kind::TENSOR, tensor->xs[0]);
    n.function = tensor->function;
    Given given = {{tensor->xs + 1, tensor->xs + tensor->x_count},
                   {tensor->numbers, tensor->numbers + tensor->number_count},
                   tensor->constant_count};
    const int32_t out = append(builder, n, name, error, size, std::move(given));
    if (out >= 0) builder->graph.constants.back().assign(tensor->constants, tensor->constants + tensor->constant_count);
    return out;
}

RAREFY_API int32_t rarefy_builder_mode(rarefy_builder *builder, int32_t x, int32_t mode, const rarefy_shift32 *table,
                                       char *error, int64_t size) {
    Graph &g = builder->graph;
    if (!known(g, x)) return fail(error, size, no_value(x));
    size_t i = 0;
    while (g.nodes[i].out != x) ++i;
    Node n = g.nodes[i];
    n.mode = mode;
    std::vector<int64_t> numbers = n.kind == Kind::TENSOR ? g.numbers[i] : std::vector<int64_t>();
    if (mode == RAREFY_KTANH && table) numbers = numbers_of(*table);
    const std::string wrong = wrong_mode(n, numbers);
    if (!wrong.empty()) return fail(error, size, wrong);
    g.nodes[i] = n;
    g.numbers[i] = std::move(numbers);
    return 0;
}

RAREFY_API int32_t rarefy_builder_output(rarefy_builder *builder, int32_t x, int32_t layout, char *error,
                                         int64_t size) {
    Node n = node_of(Kind::OUTPUT, x);
    n.layout = layout;
    const size_t before = builder->graph.nodes.size();
    append(builder, n, "output", error, size);
    return builder->graph.nodes.size() > before ? 0 : -1;
}

RAREFY_API int32_t rarefy_builder_shape(const rarefy_builder *builder, int32_t value, int32_t shape[3], char *error,
                                        int64_t size) {
    if (value < 0 || value >= static_cast<int32_t>(builder->graph.values.size()))
        return fail(error, size, "there is no value " + std::to_string(value));
    const Shape &s = builder->graph.values[value];
    shape[0] = s.channels;
    shape[1] = s.height;
    shape[2] = s.width;
    return 0;
}
}

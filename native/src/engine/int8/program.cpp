// Making an int8 program, running it and telling about it.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <exception>

#include "engine/int8/program.h"
#include "engine/threads.h"

namespace rarefy::int8 {

namespace {

bool whole(float v, float low, float high) { return v >= low && v <= high && v == std::floor(v); }

// No sum of int32 overflows, the zero points' and the weights' each for itself: so many weights a row at most.
constexpr int64_t MOST_SUMMANDS = (int64_t{1} << 30) / (128 * 255) - 1;

// An empty string, or what is wrong with what was said of a step.
std::string check_conv(const Graph &graph, size_t i, const rarefy_int8_result &s) {
    const engine::Matrix m = engine::matrix_of(graph, graph.nodes[i]);
    if (s.rows != m.rows || !s.multipliers || !s.biases)
        return "there must be " + std::to_string(m.rows) + " multipliers and biases, got " + std::to_string(s.rows);
    if (s.layout < 0 || s.layout > LAYOUTS)
        return "a layout must be from 0 to " + std::to_string(LAYOUTS) + ", got " + std::to_string(s.layout);
    if (int64_t{m.channels} / m.groups * m.taps > MOST_SUMMANDS)
        return "a row has at most " + std::to_string(MOST_SUMMANDS) + " weights";
    for (const float w : graph.weights[i])
        if (!whole(w, -128.0f, 127.0f)) return "weights must be whole numbers from -128 to 127";
    for (int64_t r = 0; r < s.rows; ++r)
        if (!std::isfinite(s.multipliers[r]) || !std::isfinite(s.biases[r]))
            return "multipliers and biases must be finite";
    return "";
}

std::string check(const Graph &graph, const rarefy_int8_result *steps) {
    std::vector<uint8_t> floats(graph.values.size(), 0);
    for (size_t i = 0; i < graph.nodes.size(); ++i) {
        const Node &n = graph.nodes[i];
        const rarefy_int8_result &s = steps[i];
        const auto refuse = [&](const std::string &why) {
            return (graph.names[i].empty() ? std::string() : graph.names[i] + ": ") + why;
        };
        std::vector<int32_t> read = graph.operands[i];
        read.insert(read.end(), {n.x, n.other_operand});
        for (const int32_t id : read)
            if (id >= 0 && floats[id] && n.kind != Kind::OUTPUT) return refuse("it reads a value of floats");
        if (n.kind == Kind::TENSOR) return refuse("it is computed in float32");
        if (n.kind == Kind::LSTM_CELL || n.kind == Kind::LSTM_HIDDEN || n.kind == Kind::GRU)
            return refuse("a recurrence is computed in float32");
        if (n.activation != RAREFY_NONE) return refuse("an activation is a clamp or a table here");
        if (n.kind != Kind::OUTPUT && (s.zero_point < 0 || s.zero_point > 255))
            return refuse("a zero point must be from 0 to 255, got " + std::to_string(s.zero_point));
        const bool as_floats = n.kind == Kind::CONV && s.floats;
        if (as_floats) floats[n.out] = 1;
        const bool bounds =
            as_floats ? s.low <= s.high : whole(s.low, 0, 255) && whole(s.high, 0, 255) && s.low <= s.high;
        if (!bounds && n.kind != Kind::OUTPUT && n.kind != Kind::CONCAT && n.kind != Kind::UPSAMPLE &&
            n.kind != Kind::FLATTEN && n.kind != Kind::AFFINE)
            return refuse("low and high must be whole numbers from 0 to 255, in this order");
        if (!std::isfinite(s.multiplier) || !std::isfinite(s.other) || !std::isfinite(s.bias) ||
            !std::isfinite(s.ratio))
            return refuse("factors must be finite");
        if (n.kind == Kind::AFFINE && !s.table) return refuse("there is no table");
        if (n.kind == Kind::CONV) {
            const std::string wrong = check_conv(graph, i, s);
            if (!wrong.empty()) return refuse(wrong);
        }
    }
    return "";
}

// What a thread needs beside the arena: a line of a vector's channels, of a pooling's sums, of a factor, or some rows
// of results.
int64_t scratch_of(const rarefy_int8_program &program) {
    int64_t bytes = SOME_ROWS * int64_t{MOST_TILE} * MOST_PIXELS * static_cast<int64_t>(sizeof(float));
    for (const Step &step : program.steps) {
        if (step.node.kind == Kind::POOL) {
            const Window &w = step.node.window;
            bytes =
                std::max({bytes, 4 * pool_line(w), pool_pointers(w) + 2 * pool_rows(w) * pool_line(w) + MOST_PIXELS});
        }
        if (step.node.kind == Kind::BINARY) bytes = std::max<int64_t>(bytes, program.values[step.node.out].shape.width);
        if (step.copy) bytes = std::max(bytes, QUAD * (program.values[step.node.out].stride + 128));
        if (step.vector)
            bytes = std::max<int64_t>(bytes, MOST_IMAGES * (program.values[step.node.x].shape.channels + 64));
    }
    return (bytes + 63) / 64 * 64;
}

}  // namespace
}  // namespace rarefy::int8

using namespace rarefy::int8;
using rarefy::engine::fail;

#define RAREFY_API __attribute__((visibility("default")))

extern "C" {

RAREFY_API rarefy_int8_program *rarefy_int8_finish(const rarefy_builder *builder, const rarefy_int8_result *steps,
                                                   int64_t count, const rarefy_options *options, char *error,
                                                   int64_t size) {
    const Graph &graph = builder->graph;
    const auto refuse = [&](const std::string &why) {
        fail(error, size, why);
        return nullptr;
    };
    const auto has = [&](Kind kind) {
        return std::any_of(graph.nodes.begin(), graph.nodes.end(), [=](const Node &n) { return n.kind == kind; });
    };
    if (!has(Kind::INPUT) || !has(Kind::OUTPUT)) return refuse("a program needs at least one input and one output");
    if (count != static_cast<int64_t>(graph.nodes.size()))
        return refuse("there must be " + std::to_string(graph.nodes.size()) + " steps, got " + std::to_string(count));
    if (options->batch < 1 || options->threads < 1 || options->threads > rarefy::engine::MOST_THREADS)
        return refuse("batch must be at least 1, threads between 1 and 1024");
    try {
        std::string wrong = check(graph, steps);
        if (!wrong.empty()) return refuse(wrong);
        auto program = std::make_unique<rarefy_int8_program>();
        program->isa = options->isa ? options->isa : "";
        program->kernels = static_cast<const Kernels *>(rarefy::engine::find_kernels("int8", &program->isa));
        if (!program->kernels)
            return refuse("this CPU or this library has no instruction set " + program->isa + " for int8");
        program->graph.values = graph.values;
        program->graph.nodes = graph.nodes;
        program->graph.names = graph.names;
        program->graph.operands = graph.operands;
        const rarefy::engine::Plan plan = rarefy::engine::make_plan(graph, options->batch, options->threads);
        std::vector<Layout> layouts;
        for (size_t i = 0; i < graph.nodes.size(); ++i)
            layouts.push_back(graph.nodes[i].kind == Kind::CONV
                                  ? choose_layout(graph, graph.nodes[i], plan.groups[i], graph.weights[i],
                                                  steps[i].layout, *program->kernels)
                                  : ANY);
        wrong = make_plan(*program, plan, steps, layouts);
        if (!wrong.empty()) return refuse(wrong);
        for (Step &step : program->steps) {
            const rarefy_int8_result &given = steps[step.source];
            if (step.node.kind == Kind::AFFINE) step.table.assign(given.table, given.table + 256);
            if (step.node.kind != Kind::CONV || step.copy) continue;
            step.multipliers.assign(given.multipliers, given.multipliers + given.rows);
            step.biases.assign(given.biases, given.biases + given.rows);
            make_weights(*program, step, graph.weights[step.source]);
        }
        program->scratch_bytes = scratch_of(*program);
        return program.release();
    } catch (const std::exception &e) {
        return refuse(std::string("there is not enough memory for this program: ") + e.what());
    }
}

RAREFY_API void rarefy_int8_free(rarefy_int8_program *program) { delete program; }

RAREFY_API int32_t rarefy_int8_run(const rarefy_int8_program *program, const rarefy_buffer *read, int32_t input_count,
                                   const rarefy_buffer *written, int32_t output_count, int64_t batch, int32_t threads,
                                   double *seconds, int64_t second_count, char *error, int64_t size) {
    using namespace rarefy::engine;
    const auto sizes = [&](const std::vector<int32_t> &ports) {
        std::vector<int64_t> all;
        for (const int32_t port : ports) {
            const Node &node = program->steps[port].node;
            all.push_back(program->values[node.kind == Kind::INPUT ? node.out : node.x].shape.size());
        }
        return all;
    };
    const Call call{read, input_count, written, output_count, batch, threads, seconds, second_count};
    const auto take = [&] { return program->pool.take(program->scratch_bytes / 4, (program->arena_bytes + 3) / 4); };
    const auto run = [&](const Part &part) {
        const rarefy::int8::Frame frame{program,
                                        reinterpret_cast<uint8_t *>(part.arena),
                                        reinterpret_cast<uint8_t *>(part.scratch),
                                        part.inputs,
                                        part.outputs,
                                        part.first_image,
                                        part.part,
                                        part.parts};
        over_stages(program->stages, part.images, [&](const Stage &stage, int64_t at, int64_t images) {
            for (int32_t i = stage.first; i < stage.last; ++i) {
                const auto &step = program->steps[i];
                over_images(stage.group, at, images, [&](int64_t first, int64_t some) {
                    const double before = seconds ? thread_seconds() : 0.0;
                    run_step(frame, step, first, some);
                    if (seconds) seconds[step.source] += thread_seconds() - before;
                    part.barrier->wait();
                });
            }
        });
    };
    try {
        const std::string wrong = check_call(call, static_cast<int64_t>(program->graph.nodes.size()),
                                             sizes(program->inputs), sizes(program->outputs));
        if (!wrong.empty()) return fail(error, size, wrong);
        return share_out(call, program->pool, take, run) ? 0 : 1;
    } catch (const std::bad_alloc &) {
        return 1;
    }
}

RAREFY_API void rarefy_int8_describe(const rarefy_int8_program *program, rarefy_program_info *info) {
    std::memset(info, 0, sizeof *info);
    info->inputs = static_cast<int32_t>(program->inputs.size());
    info->outputs = static_cast<int32_t>(program->outputs.size());
    info->steps = static_cast<int32_t>(program->graph.nodes.size());
    info->group = program->stages.back().group;
    for (const Step &step : program->steps) info->weight_bytes += step.weight_bytes();
    info->scratch_bytes = program->arena_bytes + program->scratch_bytes;
    std::snprintf(info->isa, sizeof info->isa, "%s", program->isa.c_str());
}

RAREFY_API int32_t rarefy_int8_step(const rarefy_int8_program *program, int32_t i, rarefy_step_info *info) {
    const auto found = std::find_if(program->steps.begin(), program->steps.end(),
                                    [=](const Step &s) { return s.source == i && !s.copy; });
    if (found == program->steps.end()) return -1;
    const Graph &graph = program->graph;
    const Node &n = graph.nodes[i];
    std::memset(info, 0, sizeof *info);
    info->name = graph.names[i].c_str();
    info->kind = n.kind == Kind::AFFINE ? "table" : rarefy::engine::kind_name(graph, n);
    const auto put = [](const Shape &s, int32_t *out) { out[0] = s.channels, out[1] = s.height, out[2] = s.width; };
    put(graph.values[n.out >= 0 ? n.out : n.x], info->shape);
    const std::vector<int32_t> &operands = graph.operands[i];
    put(graph.values[n.x >= 0 ? n.x : operands.empty() ? n.out : operands[0]], info->x_shape);
    if (n.kind != Kind::CONV) return 0;
    info->weight_bytes = found->weight_bytes();
    static const char *const NAMES[LAYOUTS][2] = {{"quads", "vector"},
                                                  {"blocks", "vector of blocks"},
                                                  {"dense", "dense vector"},
                                                  {"", "vector of windows"},
                                                  {"", "vector of bits"}};
    std::snprintf(info->kernel, sizeof info->kernel, "int8 %s", NAMES[found->layout][found->vector]);
    info->weights = found->total_weights;
    info->nonzeros = found->nonzeros;
    info->stored = static_cast<int64_t>(found->weights.values.size() + found->shared.values.size());
    if (found->layout == WINDOWS) info->stored = info->stored / WINDOW_BYTES * (WINDOW_BYTES - WEIGHTS_AT);
    if (found->layout == BITMASK) info->stored = info->nonzeros;
    const int64_t pixels = graph.values[n.out].pixels();
    info->macs = info->nonzeros * pixels;
    info->dense_macs = info->weights * pixels;
    return 0;
}
}

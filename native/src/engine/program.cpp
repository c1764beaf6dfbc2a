// Making a program of what a builder holds, and telling about it.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <exception>
#include <string_view>
#include <time.h>

#include "engine/tensor.h"
#include "rarefy.h"

namespace rarefy::engine {

double thread_seconds() {
    timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

const void *find_kernels(std::string_view name, std::string *isa) {
    const rarefy_kernel *table = nullptr;
    const int64_t count = rarefy_kernels(&table);
    for (int64_t i = 0; i < count; ++i) {
        if (name != table[i].name || !table[i].supported) continue;
        if (!isa->empty() && *isa != table[i].isa) continue;
        *isa = table[i].isa;
        return reinterpret_cast<const void *(*)()>(table[i].entry)();
    }
    return nullptr;
}

const char *kind_name(const Graph &graph, const Node &node) {
    switch (node.kind) {
        case Kind::INPUT: return "input";
        case Kind::CONV: return node.groups > 1 && node.groups == graph.values[node.x].channels ? "depthwise" : "conv";
        case Kind::POOL: return node.average ? "average pool" : "max pool";
        case Kind::GLOBAL_AVERAGE: return "global average";
        case Kind::BINARY: return node.multiply ? "multiply" : "add";
        case Kind::AFFINE: return "affine";
        case Kind::CONCAT: return "concat";
        case Kind::UPSAMPLE: return "upsample";
        case Kind::FLATTEN: return "flatten";
        case Kind::LSTM_CELL: return "lstm cell";
        case Kind::LSTM_HIDDEN: return "lstm hidden";
        case Kind::GRU: return "gru";
        case Kind::RECURRENCE: return graph.values[node.x].channels == 4 * node.out_channels ? "lstm" : "gru";
        case Kind::TENSOR: return function_of(node).name;
        default: return "output";
    }
}

namespace {

void describe_kernel(const Step &step, char *out, size_t size) {
    const Config &c = step.config;
    const char *type = c.bf16() ? " bf16" : "";
    static const char *const forms[] = {"shifted", "compact", "single"};
    if (c.vector) std::snprintf(out, size, "%s%s vector", c.sparse() ? "sparse" : "dense", type);
    else if (c.planes()) std::snprintf(out, size, "dense%s planes", type);
    else if (step.node.window.pointwise())
        std::snprintf(out, size, "%s%s %dx%d b%d%s", c.sparse() ? "sparse" : "dense", type, c.rows, c.vectors, c.block,
                      c.direct() ? " direct" : "");
    else
        std::snprintf(out, size, "%s%s %dx%d b%d %s", c.sparse() ? "sparse" : "dense", type, c.rows, c.vectors, c.block,
                      forms[c.form]);
}

}  // namespace

void make_steps(rarefy_program &program) {
    const Graph &g = program.graph;
    program.steps.resize(g.nodes.size());
    for (size_t i = 0; i < g.nodes.size(); ++i) {
        Step &step = program.steps[i];
        step.node = g.nodes[i];
        step.name = g.names[i].c_str();
        step.group = program.plan.groups[i];
        step.config = {};
        int32_t channel = 0, before = 0;
        if (step.node.kind == Kind::GRU || step.node.kind == Kind::TENSOR || step.node.kind == Kind::RECURRENCE)
            step.operands = g.operands[i];
        // the weights of a recurrence see one step at a time
        if (step.node.kind == Kind::RECURRENCE) step.node.window = {1, 1, 1, 1, {1, 1}, {1, 1}, {1, 1}, 0, 0, {}};
        step.numbers = g.numbers[i];
        step.table = step.node.mode == RAREFY_KTANH ? table_of(step.numbers) : rarefy_shift32{};
        for (const int32_t k : program.plan.copied[i]) {
            for (; before < k; ++before) channel += g.values[g.operands[i][before]].channels;
            step.operands.push_back(g.operands[i][k]);
            step.places.push_back(channel);
        }
        if (step.node.kind == Kind::INPUT) program.inputs.push_back(static_cast<int32_t>(i));
        if (step.node.kind == Kind::OUTPUT) program.outputs.push_back(static_cast<int32_t>(i));
    }
}

}  // namespace rarefy::engine

using namespace rarefy::engine;

#define RAREFY_API __attribute__((visibility("default")))

extern "C" {

RAREFY_API rarefy_program *rarefy_builder_finish(const rarefy_builder *builder, const rarefy_options *options,
                                                 char *error, int64_t size) {
    const Graph &graph = builder->graph;
    const auto refuse = [&](const std::string &why) {
        fail(error, size, why);
        return nullptr;
    };
    const auto has = [&](Kind kind) {
        return std::any_of(graph.nodes.begin(), graph.nodes.end(), [=](const Node &n) { return n.kind == kind; });
    };
    if (!has(Kind::INPUT) || !has(Kind::OUTPUT)) return refuse("a program needs at least one input and one output");
    if (options->batch < 1 || options->threads < 1 || options->threads > MOST_THREADS)
        return refuse("batch must be at least 1, threads between 1 and 1024");
    try {
        auto program = std::make_unique<rarefy_program>();
        program->isa = options->isa ? options->isa : "";
        program->kernels = static_cast<const Kernels *>(find_kernels("engine", &program->isa));
        if (!program->kernels)
            return refuse("this CPU or this library has no instruction set " + program->isa + " for the engine");
        program->batch = options->batch;
        program->threads = options->threads;
        program->graph.values = graph.values;
        program->graph.nodes = graph.nodes;
        program->graph.names = graph.names;
        program->graph.operands = graph.operands;
        program->graph.numbers = graph.numbers;
        program->plan = make_plan(graph, options->batch, options->threads);
        make_steps(*program);
        for (size_t i = 0; i < program->steps.size(); ++i) {
            program->steps[i].bias = Array<float>(graph.bias[i]);
            program->steps[i].scale = Array<float>(graph.scale[i]);
            program->steps[i].shift = Array<float>(graph.shift[i]);
            program->steps[i].constants = Array<float>(graph.constants[i]);
        }
        const std::string wrong = choose(*program, graph, options->tune_seconds, options->measured);
        if (!wrong.empty()) return refuse(wrong);
        finish_program(*program);
        return program.release();
    } catch (const std::exception &e) {
        return refuse(std::string("there is not enough memory for this program: ") + e.what());
    }
}

RAREFY_API void rarefy_program_free(rarefy_program *program) { delete program; }

RAREFY_API void rarefy_program_describe(const rarefy_program *program, rarefy_program_info *info) {
    std::memset(info, 0, sizeof *info);
    info->inputs = static_cast<int32_t>(program->inputs.size());
    info->outputs = static_cast<int32_t>(program->outputs.size());
    info->steps = static_cast<int32_t>(program->steps.size());
    info->group = program->plan.stages.back().group;
    for (const Step &step : program->steps) info->weight_bytes += step.weight_bytes();
    info->scratch_bytes =
        (program->plan_for(program->batch, program->threads).arena_floats + program->scratch_floats()) * 4;
    info->tune_seconds = program->tune_seconds;
    std::snprintf(info->isa, sizeof info->isa, "%s", program->isa.c_str());
}

RAREFY_API int32_t rarefy_program_step(const rarefy_program *program, int32_t i, rarefy_step_info *info) {
    if (i < 0 || i >= static_cast<int32_t>(program->steps.size())) return -1;
    const Step &step = program->steps[i];
    std::memset(info, 0, sizeof *info);
    info->name = step.name;
    info->kind = kind_name(program->graph, step.node);
    const auto put = [](const Shape &s, int32_t *out) { out[0] = s.channels, out[1] = s.height, out[2] = s.width; };
    put(program->graph.values[step.node.out >= 0 ? step.node.out : step.node.x], info->shape);
    const std::vector<int32_t> &operands = program->graph.operands[i];
    put(program->graph.values[step.node.x >= 0   ? step.node.x
                              : operands.empty() ? step.node.out
                                                 : operands[0]],
        info->x_shape);
    info->weight_bytes = step.weight_bytes();
    if (!step.node.layer()) return 0;
    describe_kernel(step, info->kernel, sizeof info->kernel);
    info->weights = step.total_weights;
    info->nonzeros = step.nonzeros;
    info->stored = step.weights.stored;
    info->macs = step.macs;
    info->dense_macs = step.dense_macs;
    info->tuned_seconds = step.tuned_seconds;
    info->dense_seconds = step.dense_seconds;
    return 0;
}

RAREFY_API int32_t rarefy_program_port(const rarefy_program *program, int32_t output, int32_t i, int32_t shape[3],
                                       int32_t *layout) {
    const std::vector<int32_t> &ports = output ? program->outputs : program->inputs;
    if (i < 0 || i >= static_cast<int32_t>(ports.size())) return -1;
    const Node &node = program->steps[ports[i]].node;
    const Shape &s = program->graph.values[output ? node.x : node.out];
    shape[0] = s.channels;
    shape[1] = s.height;
    shape[2] = s.width;
    *layout = node.layout;
    return 0;
}
}

#include "engine/tensor.h"

#include <cstring>

namespace rarefy::engine {

namespace {

const Function *const FUNCTIONS[RAREFY_FUNCTIONS] = {&LAYER_NORM, &RMS_NORM,  &GROUP_NORM, &MATMUL,
                                                     &SOFTMAX,    &ATTENTION, &POINTWISE,  &VIEW,
                                                     &RESIZE,     &REDUCE,    &EMBEDDING};

}  // namespace

View view(const Frame &f, int32_t id, int64_t image) {
    const Value &v = f.plan->values[id];
    const int64_t each = v.shape.size() * (f.first_image + image);
    if (v.place == Place::INPUT) return {const_cast<float *>(f.inputs[v.port]) + each, v.stride};
    if (v.place == Place::OUTPUT) return {f.outputs[v.port] + each, v.stride};
    return {f.arena + v.offset + image % v.group * v.shape.pixels() - f.begins[id], v.stride};
}

const Function &function_of(const Node &node) { return *FUNCTIONS[node.function]; }

std::string infer_tensor(const Graph &graph, const Node &node, const Given &given, Shape *out) {
    if (node.function < 0 || node.function >= RAREFY_FUNCTIONS)
        return "function " + std::to_string(node.function) + " is unknown";
    for (const int32_t id : given.operands)
        if (id < 0 || id >= static_cast<int32_t>(graph.values.size())) return "there is no value " + std::to_string(id);
    return function_of(node).infer(graph, node, given, out);
}

void run_tensor(const Frame &f, const Step &s, int64_t at, int64_t images) {
    for (int64_t image = at; image < at + images; ++image) function_of(s.node).run(f, s, image);
}

double number(const std::vector<int64_t> &numbers, size_t index) {
    double value;
    std::memcpy(&value, &numbers[index], sizeof value);
    return value;
}

}  // namespace rarefy::engine

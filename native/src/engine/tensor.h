// Functions of whole values (enum rarefy_function), a source each; what is the same for all of them is in tensor.cpp.
#pragma once

#include "engine/program.h"

namespace rarefy::engine {

// Where a value's numbers of one image are: channel c, pixel p is at[c * stride + p].
struct View {
    float *at;
    int64_t stride;
};
View view(const Frame &frame, int32_t id, int64_t image);

// What the weights of a layer multiply, where the products go, and what is added to them (null: nothing).
struct Operands {
    View x, y, residual;
    bool backwards = false;  // VectorCall
};
// The products of one vector, and of the tiles [first_tile, last_tile) of so many images (1 or step.group); this
// thread's share of them.
void multiply_vector(const Frame &frame, const Step &step, const Operands &operands);
void multiply_tiles(const Frame &frame, const Step &step, const Operands &operands, int64_t images, int64_t first_tile,
                    int64_t last_tile);

// This thread's share of count things.
struct Share {
    int64_t from, to;
    Share(const Frame &f, int64_t count) : from(count * f.part / f.parts), to(count * (f.part + 1) / f.parts) {}
};

struct Function {
    const char *name;
    // The shape that it makes; *out is that of x. Whatever this accepts runs without reading or writing anything else
    // than its values and scratch: numbers may come from a file that was altered.
    std::string (*infer)(const Graph &graph, const Node &node, const Given &given, Shape *out);
    // Floats of scratch memory that a thread needs, from the shapes of a program's values.
    int64_t (*scratch)(const Graph &graph, const Step &step);
    // One image; this thread's share of it.
    void (*run)(const Frame &frame, const Step &step, int64_t image);
};

extern const Function LAYER_NORM, RMS_NORM, GROUP_NORM, MATMUL, SOFTMAX, ATTENTION, POINTWISE, VIEW, RESIZE, REDUCE,
    EMBEDDING;

// An empty string, or what is wrong with the whole numbers that an embedding is given.
std::string check_rows(const Step &step, const float *words, int64_t numbers);

const Function &function_of(const Node &node);
std::string infer_tensor(const Graph &graph, const Node &node, const Given &given, Shape *out);
void run_tensor(const Frame &frame, const Step &step, int64_t at, int64_t images);

// Numbers that are doubles.
double number(const std::vector<int64_t> &numbers, size_t index);

}  // namespace rarefy::engine

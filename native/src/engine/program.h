// What a builder collects and what a program is made of.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "engine/tiling.h"
#include "engine/weights.h"
#include "rarefy_engine.h"

namespace rarefy::engine {

enum class Kind : int32_t {
    INPUT,
    CONV,
    POOL,
    GLOBAL_AVERAGE,
    BINARY,
    AFFINE,
    CONCAT,
    UPSAMPLE,
    FLATTEN,
    LSTM_CELL,
    LSTM_HIDDEN,
    GRU,
    RECURRENCE,
    TENSOR,
    OUTPUT,
    KINDS
};

struct Shape {
    int32_t channels, height, width;
    int64_t pixels() const { return int64_t{height} * width; }
    int64_t size() const { return channels * pixels(); }
    bool operator==(const Shape &other) const {
        return channels == other.channels && height == other.height && width == other.width;
    }
};

// A step as the builder was told: integers alone, as they stand in a file.
struct Node {
    Kind kind;
    int32_t x, other_operand, out;  // values; -1: none. other_operand: CONV: the residual; BINARY: y;
                                    // LSTM_*: c; GRU: the products of the state; RECURRENCE: h
    int32_t activation, layout;     // enums of rarefy_engine.h
    int32_t out_channels;           // CONV; RECURRENCE: of its state
    int32_t average;                // POOL: 0 for the maximum
    int32_t multiply;               // BINARY: 0 for the sum
    int32_t count_padding;          // POOL: of an average
    Window window;                  // CONV, POOL; UPSAMPLE: stride holds the factors
    int32_t bottom, right, back;    // padding
    int32_t groups, storage, choice;
    int32_t operands;        // CONCAT: number of them; GRU: the state; RECURRENCE: c; TENSOR: those after x
    int32_t function;        // TENSOR: enum rarefy_function
    int32_t mode;            // of activations: enum rarefy_mode
    int32_t reverse, cells;  // RECURRENCE: from the last step on; whether the result has c, too
    // Whether it has weights.
    bool layer() const { return kind == Kind::CONV || kind == Kind::RECURRENCE; }
};

struct Graph {
    std::vector<Shape> values;
    std::vector<Node> nodes;
    std::vector<std::string> names;                // of the nodes
    std::vector<std::vector<int32_t>> operands;    // of the nodes that are CONCAT, GRU, RECURRENCE or TENSOR
    std::vector<std::vector<int64_t>> numbers;     // of TENSOR; of mode RAREFY_KTANH: a rarefy_shift32
    std::vector<std::vector<float>> weights;       // of layers: as given; empty in a program
    std::vector<std::vector<float>> bias;          // of layers
    std::vector<std::vector<float>> scale, shift;  // of AFFINE
    std::vector<std::vector<float>> constants;     // of TENSOR; empty in a program
};

// A step of this kind, with nothing said of it yet.
Node node_of(Kind kind, int32_t x, int32_t other_operand = -1);

// What a node was given beside its integers. constants: how many of them there are.
struct Given {
    std::vector<int32_t> operands;
    std::vector<int64_t> numbers;
    int64_t constants = 0;
};

// The shape that a node makes of its operands, or an error.
std::string infer(const Graph &graph, const Node &node, const Given &given, Shape *out);

enum class Place : int32_t { ARENA, INPUT, OUTPUT };

// Where a value lies: channel c of image i is `stride` * c + (i modulo group) * pixels floats from the value's begin.
struct Value {
    Shape shape;
    int32_t group;  // images that it holds
    Place place;
    int32_t port;  // of an input or output
    int64_t stride, offset;
    int64_t window;  // pixels of a channel that are there at a time; 0: all
    int64_t held() const { return window ? window : shape.pixels() * group; }
    int64_t floats() const { return (shape.channels - 1) * stride + (held() + 15) / 16 * 16; }
};

struct Step {
    Node node;
    const char *name;
    std::vector<int32_t> operands;  // CONCAT: those that must be copied, with the channel where they go
    std::vector<int32_t> places;
    int32_t group;  // images at once
    Config config;
    Weights weights;
    Array<float> bias;             // of layers: one number a row
    Array<float> scale, shift;     // AFFINE: one number a channel
    std::vector<int64_t> numbers;  // TENSOR
    rarefy_shift32 table;          // of mode RAREFY_KTANH
    Array<float> constants;        // TENSOR
    std::shared_ptr<const Tiling> tiling_one, tiling_group;
    std::vector<float> column_scale;  // average pooling: a factor for every column
    int64_t total_weights = 0, nonzeros = 0, macs = 0, dense_macs = 0;
    double tuned_seconds = 0.0, dense_seconds = 0.0;

    int64_t weight_bytes() const {
        return weights.bytes() + bias.bytes() + scale.bytes() + shift.bytes() + constants.bytes();
    }
    Mode mode() const { return {node.mode, &table}; }
    const Tiling &tiling(int64_t images) const { return images == 1 ? *tiling_one : *tiling_group; }
};

// Steps that take the same number of images at once.
struct Stage {
    int32_t first, last, group;
};

// The window of a value that began at a pixel moves on: the pixels [low, done) go to its begin.
struct Move {
    int32_t value;
    int64_t begin, low, done;
};

// Units [from, to) of a step.
struct Run {
    int32_t step;
    int64_t from, to;
    std::vector<Move> moves;  // before
};

// Steps [first, last) that are run in bands: each reads what the one before makes, as soon as enough of it is there, so
// that it is still in a near cache.
struct Chain {
    int32_t first, last;
    std::vector<Run> runs;
};

// Memory of one running thread: scratch, and behind it the arena.
struct Workspace {
    std::unique_ptr<float, void (*)(void *)> memory{nullptr, nullptr};
    int64_t floats = 0;
    float *arena = nullptr, *scratch = nullptr;
};

// Workspaces that no run uses at the moment.
class Pool {
 public:
    // One of so many floats, all zero when it is new; without memory where there is none.
    Workspace take(int64_t scratch_floats, int64_t arena_floats);
    void give(std::vector<Workspace> &&spaces);

 private:
    std::mutex mutex_;
    std::vector<Workspace> idle_;
};

struct Plan {
    std::vector<Value> values;
    std::vector<Stage> stages;
    std::vector<Chain> chains;    // in order
    std::vector<int32_t> groups;  // of the steps
    int64_t arena_floats = 0;
    std::vector<std::vector<int32_t>> copied;  // of the steps that are CONCAT: operands that do not lie in place
};

// Decides how many images every step takes, where every value lies, which concatenations need no copy. Of values with a
// window only so many pixels are there at a time.
Plan make_plan(const Graph &graph, int32_t batch, int32_t threads, std::vector<Chain> chains = {},
               const std::vector<int64_t> &windows = {});

// What a tiling is made for, besides the kernels: a window, images, vectors and form.
constexpr size_t WINDOW_NUMBERS = sizeof(Window) / sizeof(int32_t);
typedef std::array<int32_t, WINDOW_NUMBERS + 3> TilingKey;

Matrix matrix_of(const Graph &graph, const Node &node);

// What the weights of a layer multiply, and what that gives: of a recurrence those of one step, vectors.
Shape multiplied(const Graph &graph, const Node &node);
Shape product_of(const Graph &graph, const Node &node);

// The table of mode RAREFY_KTANH from its numbers, one for each of its fields in order; and the numbers of a table.
rarefy_shift32 table_of(const std::vector<int64_t> &numbers);
std::vector<int64_t> numbers_of(const rarefy_shift32 &table);

// The first channel of x that a node makes a view of, where that is a range of channels as they are; -1 for another.
int32_t range_of(const Graph &graph, const Node &node, const std::vector<int64_t> &numbers);

}  // namespace rarefy::engine

struct rarefy_builder {
    rarefy::engine::Graph graph;
};

struct rarefy_program {
    rarefy::engine::Graph graph;
    const rarefy::engine::Kernels *kernels = nullptr;
    std::string isa;
    int32_t batch = 1, threads = 1;
    rarefy::engine::Plan plan;    // of whole values; for threads that share an image
    rarefy::engine::Plan banded;  // with chains; for threads that have images of their own
    std::vector<rarefy::engine::Step> steps;
    std::vector<int32_t> inputs, outputs;                // steps
    std::vector<std::pair<int32_t, int32_t>> looked_up;  // embeddings of inputs: step, input
    int64_t packed_floats = 0, sums_floats = 0, discard_floats = 0, state_floats = 0;  // scratch, in this order
    double tune_seconds = 0.0;
    std::map<rarefy::engine::TilingKey, std::shared_ptr<const rarefy::engine::Tiling>> tilings;  // while it is made

    mutable rarefy::engine::Pool pool;

    int64_t scratch_floats() const { return packed_floats + sums_floats + discard_floats + state_floats; }

    // Whether each of so many threads has images of its own; and the plan for that.
    static bool threads_own_images(int64_t images, int32_t running) { return images >= running; }
    const rarefy::engine::Plan &plan_for(int64_t images, int32_t running) const {
        return threads_own_images(images, running) ? banded : plan;
    }
};

namespace rarefy::engine {

// The kernels of this name for an instruction set ("" for the best), or null; `isa` becomes its name.
const void *find_kernels(std::string_view name, std::string *isa);

// What a step is, in words.
const char *kind_name(const Graph &graph, const Node &node);

// The plan with chains in bands, once the steps' tilings are known.
Plan make_banded_plan(const rarefy_program &program);

// What weights of a config are made for: of one that is not tiled, the lanes alone.
Layout layout_for(const Step &step, const Config &config, int32_t lanes);

// Fills what follows from graph, plan and the steps' configs and weights: tilings, sizes of scratch, the plan in bands.
void finish_step(rarefy_program &program, Step &step);
void finish_program(rarefy_program &program);

// About how many pixels finish_program looks at: a unit that is planned counts for so many.
constexpr double UNIT_WORK = 64.0;
double preparation(const rarefy_program &program);

// Limits of a program: more than any network has, and few enough that planning takes no time to speak of.
enum : int64_t {
    MOST_STEPS = 8192,
    MOST_OPERANDS = 65536,
    MOST_NUMBERS = 1 << 20,
    MOST_WEIGHTS = (int64_t{1} << 31) - 1,
    MOST_SCRATCH_FLOATS = int64_t{1} << 30
};
enum : int32_t { MOST_THREADS = 1024 };

// Chooses the config of every layer and makes its weights; an empty string, or what cannot be. Where measuring,
// layers like those of a program that is not null take their configs.
std::string choose(rarefy_program &program, const Graph &graph, double seconds, const rarefy_program *measured);

// Steps from graph and plan; configs and weights are still missing.
void make_steps(rarefy_program &program);

// Checks the weights of a step that was read from a file; if that was saved under other lanes than ours they are made
// anew, under a config chosen by rule. An empty string, or what is wrong.
std::string adopt(rarefy_program &program, Step &step, int32_t lanes);

// Whether a kernel can slide over the planes of a step: a depthwise one whose columns are at most 2 apart.
inline bool slides(const Step &step, const Matrix &m) {
    return step.node.kind == Kind::CONV && step.node.groups == m.channels && step.node.window.stride[1] <= 2 &&
           step.node.window.depth.in == 1 && step.node.window.depth.pointwise();
}

// Whether the tiles of a pointwise step can be read where they lie: in planes that may be read by whole vectors.
inline bool reads_in_place(const rarefy_program &program, const Step &step) {
    const Value &x = program.plan.values[step.node.x];
    return step.node.kind == Kind::CONV && step.node.window.pointwise() && x.place == Place::ARENA &&
           x.stride % MAX_LANES == 0;
}

// Steps of the same window share their tiling.
std::shared_ptr<const Tiling> tiling_of(rarefy_program &program, const Step &step, const Config &config,
                                        int32_t images);

Workspace take(const rarefy_program &program, const Plan &plan);

// One thread's view of a run.
struct Frame {
    const rarefy_program *program;
    const Plan *plan;
    const int64_t *begins;  // of every value: the first pixel that is there
    float *arena, *scratch;
    const float *const *inputs;
    float *const *outputs;
    int64_t first_image;  // of this thread's share
    int32_t part, parts;  // this thread among those that work on the same images
};

// Floats on each side of a pooling's line that may be read.
int64_t pool_margin(const Step &step);

// Runs a step on `images` images (1 or step.group) from image `at` of the frame's share.
void run_step(const Frame &frame, const Step &step, int64_t at, int64_t images);

// The checksum of a saved program, whose own 8 bytes from CHECKSUM_AT on count as 0. size is at least 64.
enum { CHECKSUM_AT = 24 };
uint64_t block_sum(const uint8_t *data, size_t size);

// A recurrence, its states and what belongs to a few of its steps in scratch memory of so many floats.
int64_t recurrence_floats(const rarefy_program &program, const Step &step);
void run_recurrence(const Frame &frame, const Step &step, int64_t at, int64_t images);

// CPU time of this thread.
double thread_seconds();

// A convolution's tiles or a pooling's rows, in order: which pixels of its input it reads, [first, need), and up to
// which pixel its result is there afterwards.
struct Unit {
    int64_t first, need, done;
};
int64_t unit_count(const Step &step, int64_t images);
Unit unit_of(const Step &step, int64_t images, int64_t unit);
void run_units(const Frame &frame, const Step &step, int64_t at, int64_t images, int64_t from, int64_t to);

int32_t fail(char *error, int64_t size, const std::string &message);

}  // namespace rarefy::engine

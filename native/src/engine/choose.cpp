// Chooses how each convolution is computed: by rule, or by measuring.
#include <algorithm>
#include <cstring>
#include <map>
#include <random>
#include <string_view>
#include <time.h>

#include "engine/program.h"
#include "rarefy.h"

namespace rarefy::engine {

double thread_seconds() {
    timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

const Kernels *find_kernels(std::string *isa) {
    const rarefy_kernel *table = nullptr;
    const int64_t count = rarefy_kernels(&table);
    for (int64_t i = 0; i < count; ++i) {
        if (std::string_view(table[i].name) != "engine" || !table[i].supported) continue;
        if (!isa->empty() && *isa != table[i].isa) continue;
        *isa = table[i].isa;
        return reinterpret_cast<const Kernels *(*)()>(table[i].entry)();
    }
    return nullptr;
}

std::shared_ptr<const Tiling> tiling_of(const rarefy_program &program, const Step &step, const Config &config,
                                        int32_t images) {
    return std::make_shared<const Tiling>(
        make_tiling(step.node.window, images, *program.kernels, config.vectors, static_cast<Form>(config.form)));
}

namespace {

// For an average: one over the number of values in the window, for each column.
std::vector<float> scales(const Step &step) {
    const Window &w = step.node.window;
    std::vector<float> all(static_cast<size_t>(w.out_w) + MAX_LANES, 1.0f);
    for (int32_t x = 0; x < w.out_w; ++x) {
        int32_t inside = 0;
        for (int32_t k = 0; k < w.kernel[1]; ++k) {
            const int32_t from = x * w.stride[1] + k * w.dilation[1] - w.left;
            inside += step.node.count_padding || (from >= 0 && from < w.in_w);
        }
        all[x] = 1.0f / static_cast<float>(inside);
    }
    return all;
}

bool is_vector(const rarefy_program &program, const Step &step) {
    const Shape &x = program.graph.values[step.node.x];
    return step.group == 1 && x.pixels() == 1 && step.node.window.pointwise() && step.node.groups == 1 &&
           x.channels < 65535;
}

bool depthwise(const Step &step, const Matrix &m) { return step.node.groups == m.channels; }

// Vectors of pixels that a step has.
int32_t vectors_of(const rarefy_program &program, const Step &step) {
    const int64_t pixels = program.graph.values[step.node.out].pixels() * step.group;
    return static_cast<int32_t>(
        std::min<int64_t>(1 << 20, (pixels + program.kernels->lanes - 1) / program.kernels->lanes));
}

// What weights of a config are made for: of one that is not tiled, the lanes alone.
Layout layout_for(const Step &step, const Config &config, int32_t lanes) {
    if (config.tiled()) return layout_of(step.node.window, lanes, config.vectors, static_cast<Form>(config.form));
    Layout layout;
    layout.lanes = lanes;
    return layout;
}

// Sets the block so that a block's packed pixels take about `bytes`; false where the config cannot be.
bool fit(const rarefy_program &program, const Step &step, const Matrix &m, Config &config, int64_t bytes) {
    if (!config.tiled()) return true;
    const Kernels &k = *program.kernels;
    if (!k.block[config.kind][config.rows][config.vectors]) return false;
    if (config.direct() && !reads_in_place(program, step)) return false;
    const Layout layout = layout_for(step, config, k.lanes);
    const int32_t most = largest_block(config, layout);
    if (most < 1) return false;
    const int64_t wanted = std::max<int64_t>(1, bytes / (layout.channel_floats * 4));
    const int32_t blocks = ceil_div(m.channels, static_cast<int32_t>(std::min<int64_t>({wanted, most, m.channels})));
    config.block = ceil_div(m.channels, blocks);
    return true;
}

int32_t kind_of(bool sparse, int32_t storage) {
    return storage == RAREFY_BF16 ? sparse ? SPARSE_BF16 : DENSE_BF16 : sparse ? SPARSE_F32 : DENSE_F32;
}

// The config of a kernel that slides over the planes, for a depthwise step.
Config planes(const Step &step) {
    Config c = {};
    c.kind = kind_of(false, step.node.storage);
    c.form = static_cast<int32_t>(Form::PLANES);
    c.rows = c.vectors = c.block = 1;
    return c;
}

// The config of tiles, or of vectors; no rows where there is none.
Config tiles(const rarefy_program &program, const Step &step, const Matrix &m, double density) {
    const bool sparse = step.node.choice == RAREFY_SPARSE ||
                        (step.node.choice == RAREFY_MEASURE && density < 0.45 && !depthwise(step, m));
    Config c = {};
    c.kind = kind_of(sparse, step.node.storage);
    c.vector = is_vector(program, step);
    const int32_t all = vectors_of(program, step);
    for (const Form form : {Form::DIRECT, Form::SHIFTED, Form::SINGLE}) {
        if (form == Form::DIRECT && !sparse) continue;
        c.form = static_cast<int32_t>(form);
        for (int32_t vectors = 7; vectors >= 1; vectors = vectors == 7 ? 4 : vectors / 2) {
            for (const int32_t rows : {depthwise(step, m) ? 1 : 4, 3, 2, 1}) {
                c.vectors = std::min(vectors, all);
                c.rows = rows;
                if (fit(program, step, m, c, 40 << 10)) return c;
            }
        }
    }
    c.rows = 0;
    return c;
}

Config by_rule(const rarefy_program &program, const Step &step, const Matrix &m, double density) {
    return slides(step, m) && step.node.choice != RAREFY_SPARSE ? planes(step) : tiles(program, step, m, density);
}

}  // namespace

int64_t pool_margin(const Step &step) {
    const Window &w = step.node.window;
    // the last vector of results may begin at the last column
    const int64_t reach =
        (int64_t{w.out_w} + 2 * MAX_LANES) * w.stride[1] + int64_t{w.kernel[1]} * w.dilation[1] - w.in_w;
    return (std::max<int64_t>(reach, w.left) + 2 * MAX_LANES + 15) / 16 * 16;
}

void finish_step(rarefy_program &program, Step &step) {
    const int32_t lanes = program.kernels->lanes;
    if (step.node.kind == Kind::CONV && step.config.vector) {
        program.packed_floats =
            std::max<int64_t>(program.packed_floats, program.graph.values[step.node.x].channels + 2 * lanes);
    } else if (step.node.kind == Kind::CONV && step.config.planes()) {
        program.packed_floats = std::max<int64_t>(program.packed_floats, step.node.window.taps());
    } else if (step.node.kind == Kind::CONV) {
        step.one = tiling_of(program, step, step.config, 1);
        step.many = step.group == 1 ? step.one : tiling_of(program, step, step.config, step.group);
        const int64_t width = int64_t{step.config.vectors} * lanes;
        // packed pixels, or addresses of planes; and zeros
        constexpr int64_t ADDRESS = sizeof(uintptr_t) / sizeof(float);
        const int64_t held =
            step.config.direct() ? (step.config.block + 1) * ADDRESS : step.config.block * step.one->channel_floats;
        program.packed_floats = std::max(program.packed_floats, held + width);
        // sums are kept between the blocks of a tile
        const bool blocks = step.config.block < program.graph.values[step.node.x].channels;
        program.sums_floats =
            std::max(program.sums_floats, blocks ? program.graph.values[step.node.out].channels * width : 0);
        program.trash_floats = std::max(program.trash_floats, width);
    } else if (step.node.kind == Kind::POOL) {
        // its rows' addresses follow the line
        const int64_t pointers = step.node.window.kernel[0] * int64_t{2};
        program.packed_floats =
            std::max(program.packed_floats, 2 * pool_margin(step) + step.node.window.in_w + pointers + 32);
        if (step.node.flag) step.scale = scales(step);
    }
}

double preparation(const rarefy_program &program) {
    double work = 0.0;
    for (const Step &step : program.steps) {
        const Window &w = step.node.window;
        if (step.node.kind == Kind::POOL)
            work += UNIT_WORK * w.out_h + (step.node.flag ? static_cast<double>(w.out_w) * w.kernel[1] : 0.0);
        if (step.node.kind != Kind::CONV || step.config.vector) continue;
        if (step.config.planes()) work += UNIT_WORK * w.out_h;
        else
            for (const int32_t images : {1, step.group})
                work += tiling_work(w, images, layout_for(step, step.config, program.kernels->lanes),
                                    static_cast<Form>(step.config.form));
    }
    return work;
}

void finish_program(rarefy_program &program) {
    for (Step &step : program.steps) finish_step(program, step);
    for (int64_t *floats : {&program.packed_floats, &program.sums_floats, &program.trash_floats})
        *floats = (*floats + 31) / 16 * 16;
    program.banded = make_banded_plan(program);
}

namespace {

// Runs candidates on buffers of the plan's own layout, filled with noise.
class Measurer {
 public:
    Measurer(rarefy_program &program, const Graph &graph)
        : program_(program), graph_(graph), begins_(program.plan.values.size(), 0) {
        int64_t channels = 1;
        for (const Value &v : program.plan.values) {
            channels = std::max<int64_t>(channels, v.shape.channels);
            if (v.place == Place::ARENA) continue;
            std::vector<std::vector<float>> &ports = v.place == Place::INPUT ? inputs_ : outputs_;
            if (static_cast<int32_t>(ports.size()) <= v.port) ports.resize(v.port + 1);
            ports[v.port].assign(v.shape.size(), 0.5f);
        }
        program_.packed_floats = 65536 + 1024;
        program_.trash_floats = MAX_VECTORS * MAX_LANES;
        program_.sums_floats = channels * MAX_VECTORS * MAX_LANES;
        space_ = take(program_, program_.plan);
        if (!space_.memory) throw std::bad_alloc();
        for (const auto &port : inputs_) input_pointers_.push_back(port.data());
        for (auto &port : outputs_) output_pointers_.push_back(port.data());
    }
    ~Measurer() { program_.packed_floats = program_.trash_floats = program_.sums_floats = 0; }

    void refill() {
        std::minstd_rand noise(1);
        for (int64_t i = 0; i < program_.plan.arena_floats; ++i)
            space_.arena[i] = static_cast<float>(noise() % 2001) * 1e-3f - 1.0f;
    }

    // Seconds of one image under this config; weights are left in the step. 0 where the config cannot be.
    double seconds(Step &step, const Matrix &m, const Entries &entries, const Config &config) {
        step.config = config;
        step.one = step.many = nullptr;
        if (config.tiled()) {
            step.one = tiling_of(program_, step, config, 1);
            step.many = step.group == 1 ? step.one : tiling_of(program_, step, config, step.group);
        }
        step.weights = make_weights(m, entries, config, layout_for(step, config, program_.kernels->lanes));
        const Frame frame{&program_,
                          &program_.plan,
                          begins_.data(),
                          space_.arena,
                          space_.scratch,
                          input_pointers_.data(),
                          output_pointers_.data(),
                          0,
                          0,
                          1};
        double best = 1e30, all = 0.0;
        for (int32_t i = 0; i < 12 && (i < 4 || all < 1e-3); ++i) {
            const double before = thread_seconds();
            run_step(frame, step, 0, step.group);
            const double took = thread_seconds() - before;
            if (i) best = std::min(best, took);  // the first run fetches weights and code
            all += took;
        }
        return best / step.group;
    }

 private:
    rarefy_program &program_;
    const Graph &graph_;
    Workspace space_;
    std::vector<std::vector<float>> inputs_, outputs_;
    std::vector<const float *> input_pointers_;
    std::vector<float *> output_pointers_;
    std::vector<int64_t> begins_;
};

struct Found {
    Config config = {};
    double seconds = 1e30;
};

// The fastest config of one kind: first the form, then the tile, then the size of a block.
class Search {
 public:
    Search(Measurer &measurer, const rarefy_program &program, Step &step, const Matrix &m, const Entries &entries,
           double deadline)
        : measurer_(measurer), program_(program), step_(step), m_(m), entries_(entries), deadline_(deadline) {}

    Found run(Config start, bool thorough) {
        consider(start, 40);
        if (start.vector) return best_;
        const bool dense = !start.sparse();
        const Config tiled = start.planes() ? tiles(program_, step_, m_, 1.0) : start;  // tiles win on small planes
        if (tiled.rows) {
            const bool pointwise = step_.node.window.pointwise();
            for (const Form form : {Form::SHIFTED, Form::COMPACT, Form::SINGLE}) {
                if (pointwise && (dense || form != Form::SHIFTED)) continue;  // packed: there is one way
                Config c = tiled;
                c.form = static_cast<int32_t>(form);
                consider(c, 40);
            }
        }
        if (!thorough || best_.config.planes()) return best_;
        static const int32_t sparse_tiles[][2] = {{2, 7},  {3, 7}, {4, 4}, {6, 4}, {2, 13}, {1, 14},
                                                  {2, 10}, {4, 5}, {3, 9}, {6, 3}, {8, 3}};
        static const int32_t dense_tiles[][2] = {{6, 4}, {4, 6}, {4, 5}, {3, 7}, {8, 3}, {2, 9}, {4, 4}};
        static const int32_t depthwise_tiles[][2] = {{1, 4}, {1, 7}, {1, 10}, {1, 14}};
        const auto try_tiles = [&](const int32_t (*tiles)[2], size_t count) {
            for (size_t i = 0; i < count; ++i) {
                Config c = best_.config;
                c.rows = tiles[i][0];
                c.vectors = tiles[i][1];
                consider(c, kilobytes_);
            }
        };
        if (step_.node.groups == m_.channels) try_tiles(depthwise_tiles, 4);
        else if (dense) try_tiles(dense_tiles, 7);
        else try_tiles(sparse_tiles, 11);
        for (const int32_t kilobytes : {20, 30, 56, 80, 160}) consider(best_.config, kilobytes);
        return best_;
    }

 private:
    void consider(Config c, int32_t kilobytes) {
        const int32_t all = vectors_of(program_, step_);
        if (c.tiled()) {
            c.vectors = std::min(c.vectors, all);
            if (!fit(program_, step_, m_, c, kilobytes << 10)) return;
        }
        for (const Config &known : tried_)
            if (std::memcmp(&known, &c, sizeof c) == 0) return;
        if (!tried_.empty() && thread_seconds() > deadline_) return;
        tried_.push_back(c);
        const double seconds = measurer_.seconds(step_, m_, entries_, c);
        if (seconds < best_.seconds) {
            best_ = {c, seconds};
            kilobytes_ = kilobytes;
        }
    }

    Measurer &measurer_;
    const rarefy_program &program_;
    Step &step_;
    const Matrix &m_;
    const Entries &entries_;
    const double deadline_;
    Found best_;
    int32_t kilobytes_ = 40;
    std::vector<Config> tried_;
};

// Steps of the same shape and about the same number of weights are measured once.
std::string signature(const rarefy_program &program, const Step &step, const Matrix &m) {
    Node n = step.node;
    n.x = program.plan.values[n.x].place == Place::INPUT;
    n.second = n.second >= 0;
    n.out = 0;
    std::string key(reinterpret_cast<const char *>(&n), sizeof n);
    const int64_t density = step.nonzeros * 40 / std::max<int64_t>(1, step.total_weights);
    for (const int64_t v : {int64_t{m.rows}, int64_t{m.channels}, density, int64_t{step.group}})
        key.append(reinterpret_cast<const char *>(&v), sizeof v);
    return key;
}

}  // namespace

std::string choose(rarefy_program &program, const Graph &graph, double seconds) {
    const double begin = thread_seconds();
    struct Measured {
        Config config;
        double seconds, dense_seconds;
    };
    std::map<std::string, Measured> known;
    int64_t left = 0;
    for (const Step &step : program.steps) left += step.node.kind == Kind::CONV;
    std::unique_ptr<Measurer> measurer;
    if (seconds > 0.0) measurer = std::make_unique<Measurer>(program, graph);
    for (size_t i = 0; i < program.steps.size(); ++i) {
        Step &step = program.steps[i];
        if (step.node.kind != Kind::CONV) continue;
        const Matrix m = matrix_of(graph, step.node);
        const std::vector<float> &w = graph.weights[i];
        step.total_weights = static_cast<int64_t>(w.size());
        step.nonzeros = std::count_if(w.begin(), w.end(), [](float v) { return v != 0.0f; });
        const int64_t pixels = graph.values[step.node.out].pixels();
        step.macs = step.nonzeros * pixels;
        step.dense_macs = step.total_weights * pixels;
        const double density = static_cast<double>(step.nonzeros) / static_cast<double>(w.size());
        step.config = by_rule(program, step, m, density);
        if (!step.config.rows)
            return "the kernel, " + std::to_string(step.node.window.kernel[0]) + " x " +
                   std::to_string(step.node.window.kernel[1]) + ", is too large for this input";
        if (measurer) {
            const auto found = known.find(signature(program, step, m));
            if (found != known.end()) {
                step.config = found->second.config;
                step.tuned_seconds = found->second.seconds;
                step.dense_seconds = found->second.dense_seconds;
            } else {
                // what is left of the time is shared by the steps that are left
                const double now = thread_seconds(),
                             share = std::max(0.0, begin + seconds - now) / static_cast<double>(left) * 2.0;
                measurer->refill();
                Found best;
                for (const bool sparse : {true, false}) {
                    if (step.node.choice == (sparse ? RAREFY_DENSE : RAREFY_SPARSE)) continue;
                    if (step.node.choice == RAREFY_MEASURE && sparse && (depthwise(step, m) || density > 0.7)) continue;
                    // weights that are read once an image come from memory, not from the cache that measuring fills
                    if (step.node.choice == RAREFY_MEASURE && !sparse && step.config.vector && density < 0.45) continue;
                    Config start = step.config;
                    if (start.sparse() != sparse) {
                        Step other = {};
                        other.node = step.node;
                        other.node.choice = sparse ? RAREFY_SPARSE : RAREFY_DENSE;
                        other.group = step.group;
                        start = by_rule(program, other, m, density);
                        if (!start.rows) continue;
                    }
                    const Entries entries = entries_of(m, w.data(), !sparse);
                    Search search(*measurer, program, step, m, entries, now + share);
                    const Found one = search.run(start, sparse ? density < 0.6 : density > 0.2 || best.seconds > 1e29);
                    if (!sparse) step.dense_seconds = one.seconds;
                    // dense weights take more memory: they must be clearly faster
                    if (one.seconds < best.seconds * (sparse ? 1.0 : 0.95)) best = one;
                }
                step.config = best.config;
                step.tuned_seconds = best.seconds;
                known[signature(program, step, m)] = {step.config, step.tuned_seconds, step.dense_seconds};
            }
        }
        --left;
        step.weights = make_weights(m, entries_of(m, w.data(), !step.config.sparse()), step.config,
                                    layout_for(step, step.config, program.kernels->lanes));
    }
    program.tune_seconds = measurer ? thread_seconds() - begin : 0.0;
    return "";
}

std::string adopt(rarefy_program &program, Step &step, int32_t lanes) {
    const Matrix m = matrix_of(program.graph, step.node);
    const bool same = program.kernels->lanes == lanes;
    const Config c = step.config;
    const Layout layout = layout_for(step, c, lanes);
    if (c.tiled() && c.block > largest_block(c, layout)) return "its blocks are too large";
    std::string wrong = check_weights(m, step.weights, c, layout);
    if (!wrong.empty() || same || c.planes()) return wrong;
    const Entries entries = entries_of(m, step.weights, c, layout);
    wrong = check_entries(m, entries, c);
    if (!wrong.empty()) return wrong;
    Step like = {};
    like.node = step.node;
    like.node.choice = c.sparse() ? RAREFY_SPARSE : RAREFY_DENSE;
    like.group = step.group;
    step.config = by_rule(program, like, m, 0.0);
    if (!step.config.rows) return "its kernel is too large for this instruction set";
    step.weights = make_weights(m, entries, step.config, layout_for(step, step.config, program.kernels->lanes));
    return "";
}

}  // namespace rarefy::engine

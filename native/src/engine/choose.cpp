// Chooses how each convolution is computed: by rule, or by measuring.
#include <algorithm>
#include <cstring>
#include <map>
#include <random>

#include "engine/program.h"

namespace rarefy::engine {

namespace {

// What is tried, and what is taken without trying. A density is the share of weights that are not zero. None of these
// numbers was measured apart, on any machine: each was set with the code that uses it, and only the engine as a whole
// was measured (docs/engine.md).

// By rule: sparse kernels below this density. Weights of a vector layer below it are not dense when measured, either.
constexpr double SPARSE_BELOW = 0.45;
// The same for a recurrence, one sequence at a time, whose weights stay in a cache of so many bytes between its steps:
// a sparse vector is gathered.
constexpr double RECURRENT_SPARSE_BELOW = 0.15;
constexpr int64_t RECURRENT_CACHE = 1 << 20;
// Measuring: above this density sparse kernels are not tried.
constexpr double SPARSE_TRIED_TO = 0.7;
// Measuring: all tiles and blocks are tried for sparse kernels below the first density, and for dense ones above the
// second or where no sparse ones were; elsewhere the first guess alone, with each form of its copies.
constexpr double SPARSE_SEARCHED_BELOW = 0.6, DENSE_SEARCHED_ABOVE = 0.2;
// Measuring: dense weights take more memory, so they must take at most this share of the sparse kernels' time.
constexpr double DENSE_MUST_TAKE = 0.95;
// KiB of a block's packed pixels, so that they stay in a near cache: by rule and to begin with, and what else is tried.
constexpr int32_t KILOBYTES = 40, MORE_KILOBYTES[] = {20, 30, 56, 80, 160};
// Tiles to try, {R, T}, for each number of registers: R * T sums must fit in them (ACCUMULATORS of vec-inl.h), and of
// dense kernels R weights or T vectors of pixels, too. Those that an instruction set has no kernel for are left out.
constexpr int32_t SPARSE_TILES[][2] = {{2, 7},  {3, 7}, {4, 4}, {6, 4}, {2, 13}, {1, 14},
                                       {2, 10}, {4, 5}, {3, 9}, {6, 3}, {8, 3},  {3, 4}};
constexpr int32_t DENSE_TILES[][2] = {{6, 4}, {4, 6}, {4, 5}, {3, 7}, {8, 3}, {2, 9}, {4, 4}, {4, 3}, {3, 4}, {6, 2}};
constexpr int32_t DEPTHWISE_TILES[][2] = {{1, 4}, {1, 7}, {1, 10}, {1, 14}};
// Runs of a candidate: the first is not counted, the least of the others is; MOST_RUNS, or fewer once LEAST_RUNS were
// made and ENOUGH_SECONDS are spent.
constexpr int32_t MOST_RUNS = 12, LEAST_RUNS = 4;
constexpr double ENOUGH_SECONDS = 1e-3;
// It runs no more once it took so many times the time of the fastest of its kind: at first, and afterwards, when it may
// be of any kind.
constexpr double LOST_AT_FIRST = 3.0, LOST = 1.3;
// A step may take so many times its even share of the time that is left.
constexpr double SHARES = 2.0;
constexpr double NEVER = 1e30;  // seconds of what was not measured

bool is_vector(const rarefy_program &program, const Step &step) {
    const Shape x = multiplied(program.graph, step.node);
    return step.group == 1 && x.pixels() == 1 && step.node.window.pointwise() && step.node.groups == 1 &&
           x.channels < 65535;
}

bool depthwise(const Step &step, const Matrix &m) { return step.node.groups == m.channels; }

// Vectors of pixels that a step has.
int32_t vectors_of(const rarefy_program &program, const Step &step) {
    const int64_t pixels = product_of(program.graph, step.node).pixels() * step.group;
    return static_cast<int32_t>(
        std::min<int64_t>(1 << 20, (pixels + program.kernels->lanes - 1) / program.kernels->lanes));
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
    Config c = {};
    c.vector = is_vector(program, step);
    const bool cached =
        c.vector && step.node.kind == Kind::RECURRENCE && int64_t{m.rows} * m.channels * 4 < RECURRENT_CACHE;
    const double below = cached ? RECURRENT_SPARSE_BELOW : SPARSE_BELOW;
    const bool sparse = step.node.choice == RAREFY_SPARSE ||
                        (step.node.choice == RAREFY_MEASURE && density < below && !depthwise(step, m));
    c.kind = kind_of(sparse, step.node.storage);
    const Kernels &k = *program.kernels;
    const int32_t all = vectors_of(program, step);
    for (const Form form : {Form::DIRECT, Form::SHIFTED, Form::SINGLE}) {
        if (form == Form::DIRECT && !sparse) continue;
        c.form = static_cast<int32_t>(form);
        for (int32_t vectors = sparse || k.lanes == MAX_LANES ? 7 : 3; vectors >= 1;
             vectors = vectors == 7 ? 4 : vectors / 2) {
            for (const int32_t rows : {depthwise(step, m) ? 1 : 4, 3, 2, 1}) {
                c.vectors = std::min(vectors, all);
                c.rows = rows;
                if (fit(program, step, m, c, KILOBYTES << 10)) return c;
            }
        }
    }
    c.rows = 0;
    return c;
}

Config by_rule(const rarefy_program &program, const Step &step, const Matrix &m, double density) {
    return slides(step, m) && step.node.choice != RAREFY_SPARSE ? planes(step) : tiles(program, step, m, density);
}

// The config by rule of a step that must be sparse, or must not.
Config by_rule_as(const rarefy_program &program, const Step &step, const Matrix &m, bool sparse) {
    Step like = {};
    like.node = step.node;
    like.node.choice = sparse ? RAREFY_SPARSE : RAREFY_DENSE;
    like.group = step.group;
    return by_rule(program, like, m, 0.0);
}

// Runs candidates on buffers of the plan's own layout, filled with noise.
class Measurer {
 public:
    explicit Measurer(rarefy_program &program) : program_(program), begins_(program.plan.values.size(), 0) {
        int64_t channels = 1;
        for (const Value &v : program.plan.values) {
            channels = std::max<int64_t>(channels, v.shape.channels);
            if (v.place == Place::ARENA) continue;
            std::vector<std::vector<float>> &ports = v.place == Place::INPUT ? inputs_ : outputs_;
            if (static_cast<int32_t>(ports.size()) <= v.port) ports.resize(v.port + 1);
            ports[v.port].assign(v.shape.size(), 0.5f);
        }
        program_.packed_floats = 65536 + 1024;
        program_.discard_floats = MAX_VECTORS * MAX_LANES;
        program_.sums_floats = 2 * channels * MAX_VECTORS * MAX_LANES;
        for (const Step &step : program.steps)
            program_.state_floats = std::max(program_.state_floats, recurrence_floats(program, step));
        space_ = take(program_, program_.plan);
        if (!space_.memory) throw std::bad_alloc();
        for (const auto &port : inputs_) input_pointers_.push_back(port.data());
        for (auto &port : outputs_) output_pointers_.push_back(port.data());
    }
    ~Measurer() { program_.packed_floats = program_.discard_floats = program_.sums_floats = program_.state_floats = 0; }

    void refill() {
        std::minstd_rand noise(1);
        for (int64_t i = 0; i < program_.plan.arena_floats; ++i)
            space_.arena[i] = static_cast<float>(noise() % 2001) * 1e-3f - 1.0f;
    }

    // Seconds of one image under this config, the least of some runs, or of few where others took clearly less: one of
    // its kind, and one of any. Weights are left in the step.
    double seconds(Step &step, const Matrix &m, const Entries &entries, const Config &config, double of_kind,
                   double of_any) {
        step.config = config;
        step.tiling_one = step.tiling_group = nullptr;
        if (config.tiled()) {
            step.tiling_one = tiling_of(program_, step, config, 1);
            step.tiling_group = step.group == 1 ? step.tiling_one : tiling_of(program_, step, config, step.group);
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
        double best = NEVER, all = 0.0;
        for (int32_t i = 0; i < MOST_RUNS && (i < LEAST_RUNS || all < ENOUGH_SECONDS); ++i) {
            const double before = thread_seconds();
            run_step(frame, step, 0, step.group);
            const double took = thread_seconds() - before;
            all += took;
            if (took > LOST_AT_FIRST * of_kind * step.group) return took / step.group;
            if (!i) continue;  // the first run fetches weights and code
            best = std::min(best, took);
            if (best > LOST * of_any * step.group) break;
        }
        return best / step.group;
    }

 private:
    rarefy_program &program_;
    Workspace space_;
    std::vector<std::vector<float>> inputs_, outputs_;
    std::vector<const float *> input_pointers_;
    std::vector<float *> output_pointers_;
    std::vector<int64_t> begins_;
};

struct Found {
    Config config = {};
    double seconds = NEVER;
};

// The fastest config of one kind: first the form, then the tile, then the size of a block.
class Search {
 public:
    Search(Measurer &measurer, const rarefy_program &program, Step &step, const Matrix &m, const Entries &entries,
           double deadline, double other)
        : measurer_(measurer), program_(program), step_(step), m_(m), entries_(entries), deadline_(deadline),
          other_(other) {}

    Found run(Config start, bool thorough) {
        consider(start, KILOBYTES);
        if (start.vector) return best_;
        const bool dense = !start.sparse();
        const Config tiled = start.planes() ? tiles(program_, step_, m_, 1.0) : start;  // tiles win on small planes
        if (tiled.rows) {
            const bool pointwise = step_.node.window.pointwise();
            for (const Form form : {Form::SHIFTED, Form::COMPACT, Form::SINGLE}) {
                if (pointwise && (dense || form != Form::SHIFTED)) continue;  // packed: there is one way
                Config c = tiled;
                c.form = static_cast<int32_t>(form);
                consider(c, KILOBYTES);
            }
        }
        if (!thorough || best_.config.planes()) return best_;
        if (step_.node.groups == m_.channels) consider_all(DEPTHWISE_TILES);
        else if (dense) consider_all(DENSE_TILES);
        else consider_all(SPARSE_TILES);
        for (const int32_t kilobytes : MORE_KILOBYTES) consider(best_.config, kilobytes);
        return best_;
    }

 private:
    template <size_t N>
    void consider_all(const int32_t (&tiles)[N][2]) {
        for (const auto &tile : tiles) {
            Config c = best_.config;
            c.rows = tile[0];
            c.vectors = tile[1];
            consider(c, kilobytes_);
        }
    }

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
        const double seconds =
            measurer_.seconds(step_, m_, entries_, c, best_.seconds, std::min(best_.seconds, other_));
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
    const double other_;  // seconds of the fastest config of another kind
    Found best_;
    int32_t kilobytes_ = KILOBYTES;
    std::vector<Config> tried_;
};

// Steps of the same shape and about the same number of weights are measured once.
std::string signature(const rarefy_program &program, const Step &step, const Matrix &m) {
    Node n = step.node;
    n.x = reads_in_place(program, step) ? 2 : program.plan.values[n.x].place == Place::INPUT;
    n.other_operand = n.other_operand >= 0;
    n.out = 0;
    std::string key(reinterpret_cast<const char *>(&n), sizeof n);
    const int64_t density = step.nonzeros * 40 / std::max<int64_t>(1, step.total_weights);
    for (const int64_t v : {int64_t{m.rows}, int64_t{m.channels}, density, int64_t{step.group}})
        key.append(reinterpret_cast<const char *>(&v), sizeof v);
    return key;
}

// Whether kernels of this kind are worth measuring on a step.
bool worth_trying(const Step &step, const Matrix &m, double density, bool sparse) {
    if (step.node.choice != RAREFY_MEASURE) return step.node.choice == (sparse ? RAREFY_SPARSE : RAREFY_DENSE);
    if (sparse) return !depthwise(step, m) && density <= SPARSE_TRIED_TO;
    // weights that are read once an image come from memory, not from the cache that measuring fills
    return !step.config.vector || density >= SPARSE_BELOW || step.node.kind == Kind::RECURRENCE;
}

// Chooses the config of one convolution after the other.
class Chooser {
 public:
    Chooser(rarefy_program &program, const Graph &graph, double seconds, const rarefy_program *measured)
        : program_(program), graph_(graph), begin_(thread_seconds()), end_(begin_ + seconds) {
        for (const Step &step : program.steps) left_ += step.node.layer();
        if (seconds > 0.0) measurer_ = std::make_unique<Measurer>(program);
        if (!measured || measured->isa != program.isa) return;
        for (const Step &step : measured->steps)
            if (step.tuned_seconds > 0.0)
                known_.emplace(signature(*measured, step, matrix_of(measured->graph, step.node)),
                               Measured{step.config, step.tuned_seconds, step.dense_seconds});
    }

    // Chooses the config of a step and makes its weights; an empty string, or what cannot be.
    std::string choose_one(Step &step, const std::vector<float> &weights) {
        const Matrix m = matrix_of(graph_, step.node);
        count(step, weights);
        const double density = static_cast<double>(step.nonzeros) / static_cast<double>(step.total_weights);
        step.config = by_rule(program_, step, m, density);
        if (!step.config.rows)
            return "the kernel, " + std::to_string(step.node.window.kernel[0]) + " x " +
                   std::to_string(step.node.window.kernel[1]) + ", is too large for this input";
        if (measurer_) measure(step, m, weights, density);
        --left_;
        step.weights = make_weights(m, entries_of(m, weights.data(), !step.config.sparse()), step.config,
                                    layout_for(step, step.config, program_.kernels->lanes));
        return "";
    }

    // What measuring took so far.
    double seconds() const { return measurer_ ? thread_seconds() - begin_ : 0.0; }

 private:
    struct Measured {
        Config config;
        double seconds, dense_seconds;
    };

    void count(Step &step, const std::vector<float> &weights) const {
        step.total_weights = static_cast<int64_t>(weights.size());
        step.nonzeros = std::count_if(weights.begin(), weights.end(), [](float v) { return v != 0.0f; });
        const int64_t pixels = graph_.values[step.node.out].pixels();
        step.macs = step.nonzeros * pixels;
        step.dense_macs = step.total_weights * pixels;
    }

    // The fastest config of a step, or that of one like it which was measured before.
    void measure(Step &step, const Matrix &m, const std::vector<float> &weights, double density) {
        const std::string key = signature(program_, step, m);
        auto known = known_.find(key);
        if (known == known_.end()) {
            const Found best = search(step, m, weights, density);
            known = known_.emplace(key, Measured{best.config, best.seconds, step.dense_seconds}).first;
        }
        step.config = known->second.config;
        step.tuned_seconds = known->second.seconds;
        step.dense_seconds = known->second.dense_seconds;
    }

    // The fastest of the sparse and dense configs that are worth trying; the step's dense_seconds become the dense
    // one's.
    Found search(Step &step, const Matrix &m, const std::vector<float> &weights, double density) {
        // what is left of the time is shared by the steps that are left
        const double now = thread_seconds();
        const double deadline = now + std::max(0.0, end_ - now) / static_cast<double>(left_) * SHARES;
        measurer_->refill();
        Found best;
        for (const bool sparse : {true, false}) {
            if (!worth_trying(step, m, density, sparse)) continue;
            const Config start = by_rule_as(program_, step, m, sparse);
            if (!start.rows) continue;
            const Entries entries = entries_of(m, weights.data(), !sparse);
            const bool thorough =
                sparse ? density < SPARSE_SEARCHED_BELOW : density > DENSE_SEARCHED_ABOVE || best.seconds == NEVER;
            const Found one =
                Search(*measurer_, program_, step, m, entries, deadline, best.seconds).run(start, thorough);
            if (!sparse) step.dense_seconds = one.seconds;
            if (one.seconds < best.seconds * (sparse ? 1.0 : DENSE_MUST_TAKE)) best = one;
        }
        return best;
    }

    rarefy_program &program_;
    const Graph &graph_;
    const double begin_, end_;
    int64_t left_ = 0;  // convolutions
    std::unique_ptr<Measurer> measurer_;
    std::map<std::string, Measured> known_;
};

}  // namespace

std::string choose(rarefy_program &program, const Graph &graph, double seconds, const rarefy_program *measured) {
    Chooser chooser(program, graph, seconds, measured);
    for (size_t i = 0; i < program.steps.size(); ++i) {
        if (!program.steps[i].node.layer()) continue;
        const std::string wrong = chooser.choose_one(program.steps[i], graph.weights[i]);
        if (!wrong.empty()) return wrong;
    }
    program.tune_seconds = chooser.seconds();
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
    step.config = by_rule_as(program, step, m, c.sparse());
    if (!step.config.rows) return "its kernel is too large for this instruction set";
    step.weights = make_weights(m, entries, step.config, layout_for(step, step.config, program.kernels->lanes));
    return "";
}

}  // namespace rarefy::engine

// Chooses how each convolution is computed: by rule, or by measuring.
#include <algorithm>
#include <chrono>
#include <cstring>
#include <random>
#include <string_view>
#include <time.h>

#include "engine/program.h"
#include "rarefy.h"

namespace rarefy::engine {

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

std::shared_ptr<const Tiling> tiling_of(const rarefy_program &program, const Step &step, const Config &config, int32_t images) {
    return std::make_shared<const Tiling>(
        make_tiling(step.node.window, images, *program.kernels, config.vectors, static_cast<Form>(config.form)));
}

namespace {

// For an average: one over the number of values in the window, for each lane.
std::vector<float> scales(const Step &step, const Tiling &tiling) {
    const Window &w = step.node.window;
    std::vector<float> all;
    for (const Tile &tile : tiling.tiles) {
        for (int32_t t = 0; t < tile.vectors; ++t) {
            const Store &store = tiling.stores[tile.store + t];
            int32_t pixel = tile.y + store.at;
            for (int32_t lane = 0; lane < tiling.lanes; ++lane) {
                all.push_back(0.0f);
                if (!(store.lanes >> lane & 1)) continue;
                const int32_t at = pixel++ % (w.out_h * w.out_w), y = at / w.out_w, x = at % w.out_w;
                int32_t inside[2] = {0, 0};
                for (int32_t k = 0; k < w.kernel[0]; ++k) {
                    const int32_t from = y * w.stride[0] + k * w.dilation[0] - w.top;
                    inside[0] += step.node.count_padding || (from >= 0 && from < w.in_h);
                }
                for (int32_t k = 0; k < w.kernel[1]; ++k) {
                    const int32_t from = x * w.stride[1] + k * w.dilation[1] - w.left;
                    inside[1] += step.node.count_padding || (from >= 0 && from < w.in_w);
                }
                all.back() = 1.0f / static_cast<float>(inside[0] * inside[1]);
            }
        }
    }
    return all;
}

bool is_vector(const rarefy_program &program, const Step &step) {
    const Shape &x = program.graph.values[step.node.x];
    return step.group == 1 && x.pixels() == 1 && step.node.window.pointwise() && step.node.groups == 1 && x.channels < 65535;
}

bool depthwise(const Step &step, const Matrix &m) { return step.node.groups == m.channels; }

// Vectors of pixels that a step has.
int32_t vectors_of(const rarefy_program &program, const Step &step) {
    const int64_t pixels = program.graph.values[step.node.out].pixels() * step.group;
    return static_cast<int32_t>(std::min<int64_t>(1 << 20, (pixels + program.kernels->lanes - 1) / program.kernels->lanes));
}

// Sets the block so that a block's packed pixels take about `bytes`; false where the config cannot be.
bool fit(const rarefy_program &program, const Step &step, const Matrix &m, Config &config, int64_t bytes) {
    if (config.vector) return true;
    const Kernels &k = *program.kernels;
    if (!k.block[config.kind][config.rows][config.vectors]) return false;
    Window window = step.node.window;
    window.out_h = std::min(window.out_h, 2);  // the sizes do not depend on it
    const Tiling tiling = make_tiling(window, 1, k, config.vectors, static_cast<Form>(config.form));
    const int32_t most = largest_block(tiling.channel_floats, config.vectors, k.lanes);
    if (most < 1) return false;
    const int64_t wanted = std::max<int64_t>(1, bytes / (tiling.channel_floats * 4));
    const int32_t blocks = ceil_div(m.channels, static_cast<int32_t>(std::min<int64_t>({wanted, most, m.channels})));
    config.block = ceil_div(m.channels, blocks);
    return true;
}

int32_t kind_of(bool sparse, int32_t storage) {
    return storage == RAREFY_BF16 ? sparse ? SPARSE_BF16 : DENSE_BF16 : sparse ? SPARSE_F32 : DENSE_F32;
}

Config by_rule(const rarefy_program &program, const Step &step, const Matrix &m, double density) {
    const bool sparse = step.node.choice == RAREFY_SPARSE || (step.node.choice == RAREFY_MEASURE && density < 0.45 && !depthwise(step, m));
    Config c = {};
    c.kind = kind_of(sparse, step.node.storage);
    c.vector = is_vector(program, step);
    c.form = static_cast<int32_t>(Form::SHIFTED);
    const int32_t all = vectors_of(program, step);
    const Form forms[] = {Form::SHIFTED, Form::SINGLE};
    for (const Form form : forms) {
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

}  // namespace

void finish_step(rarefy_program &program, Step &step) {
    const int32_t lanes = program.kernels->lanes;
    if (step.node.kind == Kind::CONV && step.config.vector) {
        program.packed_floats = std::max<int64_t>(program.packed_floats, program.graph.values[step.node.x].channels + 2 * lanes);
    } else if (step.node.kind == Kind::CONV) {
        step.one = tiling_of(program, step, step.config, 1);
        step.many = step.group == 1 ? step.one : tiling_of(program, step, step.config, step.group);
        const int64_t width = int64_t{step.config.vectors} * lanes;
        program.packed_floats = std::max(program.packed_floats, step.config.block * step.one->channel_floats + width);
        program.sums_floats = std::max(program.sums_floats, program.graph.values[step.node.out].channels * width);
        program.trash_floats = std::max(program.trash_floats, width);
    } else if (step.node.kind == Kind::POOL) {
        Config config = {};
        config.form = static_cast<int32_t>(Form::SHIFTED);
        config.vectors = std::min<int32_t>(MAX_VECTORS, vectors_of(program, step));
        step.one = tiling_of(program, step, config, 1);
        if (step.one->channel_floats > 65535) config.form = static_cast<int32_t>(Form::SINGLE), step.one = tiling_of(program, step, config, 1);
        step.many = step.group == 1 ? step.one : tiling_of(program, step, config, step.group);
        program.packed_floats = std::max(program.packed_floats, step.one->channel_floats);
        if (step.node.flag) {
            step.scale_one = scales(step, *step.one);
            step.scale_many = scales(step, *step.many);
        }
    }
}

void finish_program(rarefy_program &program) {
    for (Step &step : program.steps) finish_step(program, step);
    for (int64_t *floats : {&program.packed_floats, &program.sums_floats, &program.trash_floats}) *floats = (*floats + 31) / 16 * 16;
}

std::string choose(rarefy_program &program, const Graph &graph, double seconds) {
    (void)seconds;
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
        step.config = by_rule(program, step, m, static_cast<double>(step.nonzeros) / static_cast<double>(w.size()));
        if (!step.config.rows) return "the kernel, " + std::to_string(step.node.window.kernel[0]) + " x " + std::to_string(step.node.window.kernel[1]) + ", is too large for this input";
        std::shared_ptr<const Tiling> tiling;
        if (!step.config.vector) tiling = tiling_of(program, step, step.config, 1);
        step.weights = make_weights(m, entries_of(m, w.data(), !step.config.sparse()), step.config, tiling.get(), program.kernels->lanes);
    }
    return "";
}

}  // namespace rarefy::engine

// What follows from a program's graph, plan, and the steps' configs and weights: tilings, scratch, bands.
#include <algorithm>
#include <cstring>

#include "engine/tensor.h"

namespace rarefy::engine {

std::shared_ptr<const Tiling> tiling_of(rarefy_program &program, const Step &step, const Config &config,
                                        int32_t images) {
    TilingKey key;
    std::memcpy(key.data(), &step.node.window, sizeof(Window));
    key[WINDOW_NUMBERS] = images;
    key[WINDOW_NUMBERS + 1] = config.vectors;
    key[WINDOW_NUMBERS + 2] = config.form;
    std::shared_ptr<const Tiling> &tiling = program.tilings[key];
    if (!tiling)
        tiling = std::make_shared<const Tiling>(
            make_tiling(step.node.window, images, *program.kernels, config.vectors, static_cast<Form>(config.form)));
    return tiling;
}

Layout layout_for(const Step &step, const Config &config, int32_t lanes) {
    if (config.tiled()) return layout_of(step.node.window, lanes, config.vectors, static_cast<Form>(config.form));
    Layout layout;
    layout.lanes = lanes;
    return layout;
}

namespace {

// For an average: one over the number of values in the window, for each column.
std::vector<float> column_scales(const Step &step) {
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

// Whether sums are kept between the groups of a row.
bool keeps_sums(const Weights &weights) {
    constexpr int32_t WHOLE = GROUP_FIRST | GROUP_LAST;
    const Group *from = weights.groups.data();
    return std::any_of(from, from + weights.groups.size(), [](const Group &g) { return (g.flags & WHOLE) != WHOLE; });
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
    program.state_floats = std::max(program.state_floats, recurrence_floats(program, step));
    if (step.node.layer() && step.config.vector) {
        program.packed_floats =
            std::max<int64_t>(program.packed_floats, multiplied(program.graph, step.node).channels + 2 * lanes);
    } else if (step.node.layer() && step.config.planes()) {
        program.packed_floats = std::max<int64_t>(program.packed_floats, step.node.window.taps());
    } else if (step.node.layer()) {
        step.tiling_one = tiling_of(program, step, step.config, 1);
        step.tiling_group = step.group == 1 ? step.tiling_one : tiling_of(program, step, step.config, step.group);
        const int64_t width = int64_t{step.config.vectors} * lanes;
        // packed pixels, or addresses of planes; and zeros
        constexpr int64_t ADDRESS = sizeof(uintptr_t) / sizeof(float);
        const int64_t held = step.config.direct() ? (step.config.block + 1) * ADDRESS
                                                  : step.config.block * step.tiling_one->channel_floats;
        program.packed_floats = std::max(program.packed_floats, held + width);
        if (keeps_sums(step.weights))
            program.sums_floats =
                std::max(program.sums_floats, product_of(program.graph, step.node).channels * width * 2);
        program.discard_floats = std::max(program.discard_floats, width);
    } else if (step.node.kind == Kind::TENSOR) {
        const int64_t floats = function_of(step.node).scratch(program.graph, step);
        program.packed_floats = std::max(program.packed_floats, floats);
    } else if (step.node.kind == Kind::POOL) {
        // its rows' addresses follow the line
        const int64_t pointers = int64_t{step.node.window.depth.kernel} * step.node.window.kernel[0] * 2;
        program.packed_floats =
            std::max(program.packed_floats, 2 * pool_margin(step) + step.node.window.in_w + pointers + 32);
        if (step.node.average) step.column_scale = column_scales(step);
    }
}

double preparation(const rarefy_program &program) {
    double work = 0.0;
    for (const Step &step : program.steps) {
        const Window &w = step.node.window;
        if (step.node.kind == Kind::POOL)
            work += UNIT_WORK * w.depth.out * w.out_h +
                    (step.node.average ? static_cast<double>(w.out_w) * w.kernel[1] : 0.0);
        if (!step.node.layer() || step.config.vector) continue;
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
    program.looked_up.clear();
    for (size_t i = 0; i < program.steps.size(); ++i)
        for (size_t k = 0; k < program.inputs.size(); ++k) {
            const Node &n = program.steps[i].node, &input = program.steps[program.inputs[k]].node;
            if (n.kind == Kind::TENSOR && n.function == RAREFY_EMBEDDING && n.x == input.out)
                program.looked_up.push_back({static_cast<int32_t>(i), static_cast<int32_t>(k)});
        }
    program.tilings.clear();  // the steps hold those that they run with
    for (int64_t *floats :
         {&program.packed_floats, &program.sums_floats, &program.discard_floats, &program.state_floats})
        *floats = (*floats + 63) / 32 * 32;
    program.banded = make_banded_plan(program);
}

}  // namespace rarefy::engine

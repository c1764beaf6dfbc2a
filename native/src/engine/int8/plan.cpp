// Where the values of an int8 program lie, and which copies of phases it needs.
#include <algorithm>
#include <map>

#include "engine/int8/program.h"

namespace rarefy::int8 {

namespace {

constexpr int64_t MOST_BYTES = int64_t{1} << 31;  // of a value: offsets have 32 bits

int32_t floor_div(int32_t a, int32_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }

int32_t padding(const Window &w, int axis) { return axis ? w.left : w.top; }

Reach reach_of(const Window &w, int axis) {
    Reach reach;
    for (int32_t k = 0; k < w.kernel[axis]; ++k) {
        const int32_t shift = tap_of(w, axis, k).shift;
        reach.low = std::max(reach.low, -shift);
        reach.high = std::max(reach.high, shift);
    }
    return reach;
}

// The gap that an axis needs: the padding on both sides of a line is the same, but what a copy holds is not.
int32_t gap_of(const Window &w, int axis) {
    const Reach reach = reach_of(w, axis);
    return in_place(w) ? std::max(reach.low, reach.high) : reach.low + reach.high;
}

typedef std::map<std::pair<int32_t, int32_t>, Gaps> Sizes;

// The gaps of planes of every size that occurs.
Sizes sizes_of(const Graph &graph) {
    Sizes sizes;
    for (const Node &n : graph.nodes) {
        if (n.kind != Kind::CONV) continue;
        Gaps &gaps = sizes[{n.window.out_h, n.window.out_w}];
        gaps.rows = std::max(gaps.rows, gap_of(n.window, 0));
        gaps.columns = std::max(gaps.columns, gap_of(n.window, 1));
    }
    return sizes;
}

Value value_of(const Shape &shape, int32_t group, const Sizes &sizes) {
    Value v;
    v.shape = shape;
    v.group = group;
    const auto found = sizes.find({shape.height, shape.width});
    if (found != sizes.end()) v.gaps = found->second;
    return v;
}

int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Bytes from one plane to the next: its positions, written in whole vectors, and what is read behind its last pixel, or
// of a copy, whose planes are filled apart from one another, what is behind its positions. A plane of 7x7 with gaps of
// one is 64 bytes, and one byte more would be 128.
int64_t stride_of(const Value &v) {
    const int64_t positions = v.positions(v.group), one = v.positions(1);
    if (positions == 1 && v.margin() == 0) return 1;
    const int64_t written =
        std::max(rounded_up(positions, MOST_PIXELS), positions - one + rounded_up(one, MOST_PIXELS));
    const int64_t bytes = rounded_up(std::max(positions + (v.copied ? v.margin() : v.behind()), written), 64);
    // planes an odd number of lines apart do not compete for the same lines of a cache
    return bytes >= 512 && bytes / 64 % 2 == 0 ? bytes + 64 : bytes;
}

// Positions that may be read before the first plane.
int64_t before(const Value &v) { return rounded_up(v.margin() + 1, 64); }

int64_t bytes_of(const Value &v) {
    // tiles are read in whole vectors, at an offset
    const int64_t planes = v.interleaved ? (v.shape.channels + 3) / 4 : v.shape.channels;
    const int64_t all = 2 * before(v) + planes * v.stride + MOST_TILE * MOST_PIXELS;
    return rounded_up(v.floats || v.interleaved ? 4 * all : all, 64);
}

class Planner {
 public:
    Planner(rarefy_int8_program &program, const engine::Plan &plan, const rarefy_int8_result *results,
            const std::vector<Layout> &layouts)
        : program_(program), plan_(plan), results_(results), layouts_(layouts), sizes_(sizes_of(program.graph)) {}

    std::string run() {
        const Graph &graph = program_.graph;
        for (size_t id = 0; id < graph.values.size(); ++id)
            program_.values.push_back(value_of(graph.values[id], plan_.values[id].group, sizes_));
        size_t stage = 0;
        program_.stages = plan_.stages;
        for (size_t i = 0; i < graph.nodes.size(); ++i) {
            while (static_cast<int32_t>(i) >= plan_.stages[stage].last) ++stage;
            if (static_cast<int32_t>(i) == plan_.stages[stage].first)
                program_.stages[stage].first = begun_ = static_cast<int32_t>(program_.steps.size());
            add(static_cast<int32_t>(i));
            program_.stages[stage].last = static_cast<int32_t>(program_.steps.size());
        }
        return place();
    }

 private:
    void add(int32_t i) {
        const Node &n = program_.graph.nodes[i];
        Step step;
        step.node = n;
        step.source = i;
        step.group = plan_.groups[i];
        step.operands = program_.graph.operands[i];
        step.result = results_[i];
        if (n.out >= 0) {
            program_.values[n.out].zero_point = static_cast<uint8_t>(step.result.zero_point);
            program_.values[n.out].floats = n.kind == Kind::CONV && step.result.floats;
        }
        if (n.kind == Kind::CONV) {
            step.layout = layouts_[i];
            step.vector = of_several(step.layout) || of_vectors(program_.graph, n, step.group);
            if (in_place(n.window) && n.window.taps() > 1) program_.values[n.x].around = true;
            if (!in_place(n.window) || (step.layout != ANY && !step.vector)) step.node.x = copy(step);
        }
        if (n.kind == Kind::INPUT) program_.inputs.push_back(static_cast<int32_t>(program_.steps.size()));
        if (n.kind == Kind::OUTPUT) program_.outputs.push_back(static_cast<int32_t>(program_.steps.size()));
        program_.steps.push_back(std::move(step));
    }

    // The value that holds the phases of a convolution's input, in planes of the size of its result; interleaved for
    // weights in blocks. One of this stage serves all convolutions that read alike.
    int32_t copy(const Step &conv) {
        const Window &w = conv.node.window;
        Step step;
        step.node = engine::node_of(Kind::CONV, conv.node.x);
        step.node.window = w;
        step.source = conv.source;
        step.group = conv.group;
        step.result = {};
        step.copy = true;
        step.which = phases_of(w);
        for (int axis = 0; axis < 2; ++axis) step.reach[axis] = reach_of(w, axis);
        const Shape &x = program_.graph.values[conv.node.x];
        const int64_t channels = x.channels * static_cast<int64_t>(step.which.size());
        if (channels > MOST_BYTES) too_large_ = true;
        Value v =
            value_of({static_cast<int32_t>(std::min(channels, MOST_BYTES - 1)), w.out_h, w.out_w}, conv.group, sizes_);
        v.around = v.copied = true;
        v.interleaved = conv.layout != ANY;
        v.zero_point = program_.values[conv.node.x].zero_point;
        for (size_t i = static_cast<size_t>(begun_); i < program_.steps.size(); ++i)
            if (program_.steps[i].copy && alike(program_.steps[i], step, v)) return program_.steps[i].node.out;
        step.node.out = static_cast<int32_t>(program_.values.size());
        program_.values.push_back(v);
        program_.steps.push_back(std::move(step));
        return program_.steps.back().node.out;
    }

    bool alike(const Step &a, const Step &b, const Value &v) const {
        const Value &of = program_.values[a.node.out];
        const Window &p = a.node.window, &q = b.node.window;
        return a.node.x == b.node.x && a.which == b.which && a.group == b.group && of.shape == v.shape &&
               of.interleaved == v.interleaved && p.stride[0] == q.stride[0] && p.stride[1] == q.stride[1] &&
               a.reach[0] == b.reach[0] && a.reach[1] == b.reach[1];
    }

    // Every value as low as those that live at the same time leave room, in the order in which they are made.
    std::string place() {
        std::vector<int32_t> first(program_.values.size(), -1), last(program_.values.size(), -1);
        for (size_t i = 0; i < program_.steps.size(); ++i) {
            const Node &n = program_.steps[i].node;
            // one that is gathered from several runs of earlier steps is there all along
            if (n.out >= 0)
                first[n.out] = program_.values[n.out].group > program_.steps[i].group ? 0 : static_cast<int32_t>(i);
            std::vector<int32_t> read = program_.steps[i].operands;
            read.insert(read.end(), {n.x, n.other_operand, n.out});
            for (const int32_t id : read)
                if (id >= 0) last[id] = static_cast<int32_t>(i);
        }
        std::vector<std::pair<int64_t, int64_t>> taken(program_.values.size());  // begin, end
        for (size_t id = 0; id < program_.values.size(); ++id) {
            Value &v = program_.values[id];
            if (double(v.positions(v.group)) * v.shape.channels > 1e9) too_large_ = true;
            if (too_large_) return "a value is too large for int8";
            v.stride = stride_of(v);
            const int64_t bytes = bytes_of(v);
            if (bytes > MOST_BYTES) return "a value is too large for int8";
            std::vector<std::pair<int64_t, int64_t>> others;
            for (size_t o = 0; o < id; ++o)
                if (first[o] <= last[id] && first[id] <= last[o]) others.push_back(taken[o]);
            std::sort(others.begin(), others.end());
            int64_t at = 0;
            for (const auto &o : others) {
                if (at + bytes <= o.first) break;
                at = std::max(at, o.second);
            }
            taken[id] = {at, at + bytes};
            v.offset = at + (v.floats ? 0 : before(v) * (v.interleaved ? 4 : 1));
            program_.arena_bytes = std::max(program_.arena_bytes, at + bytes);
        }
        for (Step &step : program_.steps) {
            if (step.node.kind != Kind::CONV || step.copy || !program_.values[step.node.out].around) continue;
            step.mask_one = mask_of(program_.values[step.node.out], 1);
            step.mask_group = mask_of(program_.values[step.node.out], step.group);
        }
        return "";
    }

    // Which positions of so many images are pixels, in whole vectors.
    static std::vector<uint8_t> mask_of(const Value &v, int32_t images) {
        std::vector<uint8_t> mask(static_cast<size_t>(rounded_up(v.positions(images), MOST_PIXELS)), 0);
        for (int32_t i = 0; i < images; ++i)
            for (int32_t row = 0; row < v.shape.height; ++row)
                std::fill_n(mask.begin() + i * v.image() + row * v.row(), v.shape.width, uint8_t{255});
        return mask;
    }

    rarefy_int8_program &program_;
    const engine::Plan &plan_;
    const rarefy_int8_result *results_;
    const std::vector<Layout> &layouts_;
    const Sizes sizes_;
    bool too_large_ = false;
    int32_t begun_ = 0;  // the first step of this stage
};

}  // namespace

Tap tap_of(const Window &w, int axis, int32_t k) {
    const int32_t at = k * w.dilation[axis] - padding(w, axis), shift = floor_div(at, w.stride[axis]);
    return {at - shift * w.stride[axis], shift};
}

std::vector<int32_t> phases_of(const Window &w) {
    std::vector<int32_t> all;
    for (int32_t y = 0; y < w.kernel[0]; ++y)
        for (int32_t x = 0; x < w.kernel[1]; ++x)
            all.push_back(tap_of(w, 0, y).phase * w.stride[1] + tap_of(w, 1, x).phase);
    std::sort(all.begin(), all.end());
    all.erase(std::unique(all.begin(), all.end()), all.end());
    return all;
}

bool in_place(const Window &w) {
    return w.stride[0] == 1 && w.stride[1] == 1 && w.in_h == w.out_h && w.in_w == w.out_w;
}

std::string make_plan(rarefy_int8_program &program, const engine::Plan &plan, const rarefy_int8_result *steps,
                      const std::vector<Layout> &layouts) {
    return Planner(program, plan, steps, layouts).run();
}

}  // namespace rarefy::int8

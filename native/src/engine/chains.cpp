// Chains: convolutions and poolings over large planes that are run in bands, each as far as what the one before has
// made allows, so that a band is still in a near cache when it is read (a bottleneck is computed depth first). What
// only the next steps of a chain read is then never there as a whole: it lives in a window of some rows.
#include <algorithm>
#include <limits>

#include "engine/program.h"

namespace rarefy::engine {

namespace {

constexpr int64_t LARGE_PLANE = 784;  // pixels: layers from this size on are run in bands; not measured apart
// The most steps of a chain. On an Intel Xeon (Emerald Rapids, ResNet-50 at batch 1) longer chains were no faster: six
// steps took 0.99 to 1.02 of the time, fourteen 1.02 to 1.09 (docs/engine.md).
constexpr size_t CHAIN_STEPS = 3;
// A window is so many times as large as it must be, so that it is seldom moved; not measured apart.
constexpr int64_t ROOM = 3;

// Whether step k of a chain can do this unit when the steps before have made `done` pixels each.
bool ready(const rarefy_program &program, const Chain &c, const Step &step, int32_t k, const int64_t *done,
           const Unit &unit) {
    if (k > 0 && unit.need > done[k - 1]) return false;
    for (int32_t j = 0; j < k; ++j) {
        // a residual must be there; and have been read, since the result may be written over it
        const Node &before = program.steps[c.first + j].node;
        const bool same =
            before.out == step.node.other_operand || (before.x == step.node.other_operand && before.window.pointwise());
        if (step.node.other_operand >= 0 && same && unit.done > done[j]) return false;
    }
    return true;
}

std::vector<Run> runs_of(const rarefy_program &program, const Chain &c) {
    std::vector<Run> runs;
    int64_t next[CHAIN_STEPS] = {}, done[CHAIN_STEPS] = {};
    const int32_t count = c.last - c.first;
    const int64_t units = unit_count(program.steps[c.first], 1);
    while (next[0] < units) {
        for (int32_t k = 0; k < count; ++k) {
            const Step &step = program.steps[c.first + k];
            const int64_t from = next[k], end = unit_count(step, 1);
            // the first does one; the others whatever can be done
            while (next[k] < end && (k > 0 || next[k] == from) &&
                   ready(program, c, step, k, done, unit_of(step, 1, next[k]))) {
                done[k] = std::max(done[k], unit_of(step, 1, next[k]).done);
                ++next[k];
            }
            if (next[k] > from) runs.push_back({c.first + k, from, next[k], {}});
        }
    }
    return runs;
}

// A value that lives in a window while a chain is run.
class Sliding {
 public:
    Sliding(const rarefy_program &program, const Chain &chain, std::vector<Run> &runs, int32_t id)
        : program_(program), runs_(runs), id_(id) {
        for (int32_t i = chain.first; i < chain.last; ++i) {
            const Step &step = program.steps[i];
            if (step.node.x != id) continue;
            // the first pixel that is read from a unit on
            std::vector<int64_t> first(static_cast<size_t>(unit_count(step, 1)) + 1,
                                       std::numeric_limits<int64_t>::max());
            for (size_t u = first.size() - 1; u-- > 0;)
                first[u] = std::min(first[u + 1], unit_of(step, 1, static_cast<int64_t>(u)).first);
            readers_.push_back({i, std::move(first)});
        }
    }

    // The pixels that a window must have, a multiple of a vector.
    int64_t least() {
        int64_t most = 0;
        walk([&](Run &, int64_t low, int64_t, int64_t after) { most = std::max(most, after - low); });
        return (most + MAX_LANES - 1) / MAX_LANES * MAX_LANES;
    }

    // Says when the window has to be moved.
    void move_in(int64_t window) {
        int64_t begin = 0;
        walk([&](Run &run, int64_t low, int64_t done, int64_t after) {
            if (after - begin <= window) return;
            run.moves.push_back({id_, begin, low, done});
            begin = low;
        });
    }

 private:
    struct Reader {
        int32_t step;
        std::vector<int64_t> first;
        int64_t next = 0;
    };

    // For every run that makes pixels of the value: from where on they are still read, how many there are, before and
    // after.
    template <class F>
    void walk(const F &visit) {
        for (Reader &reader : readers_) reader.next = 0;
        int64_t done = 0;
        for (Run &run : runs_) {
            const Step &step = program_.steps[run.step];
            for (Reader &reader : readers_)
                if (reader.step == run.step) reader.next = run.to;
            if (step.node.out != id_) continue;
            int64_t low = done, after = done;
            for (const Reader &reader : readers_) low = std::min(low, reader.first[static_cast<size_t>(reader.next)]);
            for (int64_t u = run.from; u < run.to; ++u) after = std::max(after, unit_of(step, 1, u).done);
            visit(run, low / MAX_LANES * MAX_LANES, done, after);
            done = after;
        }
    }

    const rarefy_program &program_;
    std::vector<Run> &runs_;
    const int32_t id_;
    std::vector<Reader> readers_;
};

// Whether all that reads a value is the windows of this chain's steps.
bool inside(const rarefy_program &program, const Chain &chain, int32_t id) {
    const Value &v = program.plan.values[id];
    if (v.place != Place::ARENA || v.group != 1) return false;
    bool read = false;
    for (int32_t i = 0; i < static_cast<int32_t>(program.steps.size()); ++i) {
        const Node &n = program.steps[i].node;
        const std::vector<int32_t> &operands = program.graph.operands[i];
        if (n.other_operand == id || std::find(operands.begin(), operands.end(), id) != operands.end()) return false;
        if (n.x != id) continue;
        if (i < chain.first || i >= chain.last) return false;
        read = true;
    }
    return read;
}

// Chains of convolutions and poolings over large planes, without their runs.
std::vector<Chain> choose_chains(const Graph &graph, const std::vector<int32_t> &groups) {
    std::vector<Chain> chains;
    const auto large = [&](size_t i) {
        const Node &n = graph.nodes[i];
        return (n.kind == Kind::CONV || n.kind == Kind::POOL) && groups[i] == 1 &&
               graph.values[n.x].pixels() >= LARGE_PLANE;
    };
    for (size_t i = 0; i < graph.nodes.size();) {
        size_t end = i;
        while (end < graph.nodes.size() && end - i < CHAIN_STEPS && large(end) &&
               (end == i || graph.nodes[end].x == graph.nodes[end - 1].out))
            ++end;
        if (end - i > 1) chains.push_back({static_cast<int32_t>(i), static_cast<int32_t>(end), {}});
        i = std::max(end, i + 1);
    }
    return chains;
}

}  // namespace

Plan make_banded_plan(const rarefy_program &program) {
    std::vector<Chain> chains = choose_chains(program.graph, program.plan.groups);
    std::vector<int64_t> windows(program.graph.values.size(), 0);
    for (Chain &chain : chains) {
        chain.runs = runs_of(program, chain);
        for (int32_t i = chain.first; i < chain.last; ++i) {
            const int32_t id = program.steps[i].node.out;
            if (!inside(program, chain, id)) continue;
            Sliding sliding(program, chain, chain.runs, id);
            const int64_t window = ROOM * sliding.least();
            if (window >= program.graph.values[id].pixels()) continue;
            sliding.move_in(window);
            windows[id] = window;
        }
    }
    return make_plan(program.graph, program.batch, program.threads, std::move(chains), windows);
}

}  // namespace rarefy::engine

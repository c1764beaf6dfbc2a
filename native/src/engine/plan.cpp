// Decides where values lie and how many images a step takes at once.
//
// Early layers have large planes and few weights: they take one image at a time, so that activations stay in cache.
// Late ones have small planes and many weights: they take several, so that a weight that was fetched is used more
// often. Steps are nested accordingly: before a step that takes 4 images runs, those before it run 4 times.
#include <algorithm>

#include "engine/program.h"

namespace rarefy::engine {

namespace {

// Layers of up to so many pixels take SMALL_GROUP images at once, those of one pixel VECTOR_GROUP. Not measured apart.
constexpr int64_t SMALL_PLANE = 64;
constexpr int32_t SMALL_GROUP = 4, VECTOR_GROUP = 64;

int32_t power_below(int32_t n) {
    int32_t p = 1;
    while (p * 2 <= n) p *= 2;
    return p;
}

std::vector<int32_t> reads(const Graph &graph, size_t i) {
    const Node &n = graph.nodes[i];
    std::vector<int32_t> ids = graph.operands[i];
    if (n.x >= 0) ids.push_back(n.x);
    if (n.other_operand >= 0) ids.push_back(n.other_operand);
    return ids;
}

std::vector<int32_t> choose_groups(const Graph &graph, int32_t images) {
    const int32_t small = power_below(std::min(images, SMALL_GROUP));
    const int32_t vector = images >= 8 ? power_below(std::min(images, VECTOR_GROUP)) : small;
    std::vector<int32_t> groups;
    for (size_t i = 0; i < graph.nodes.size(); ++i) {
        const Node &n = graph.nodes[i];
        int64_t pixels = n.out >= 0 ? graph.values[n.out].pixels() : 1;
        for (const int32_t id : reads(graph, i)) pixels = std::max(pixels, graph.values[id].pixels());
        groups.push_back(n.kind == Kind::INPUT ? vector : pixels == 1 ? vector : pixels <= SMALL_PLANE ? small : 1);
    }
    // The weights of a recurrence are read once for each step of its sequence: all images take one together.
    int32_t least = 1;
    for (size_t i = 0; i < groups.size(); ++i) {
        if (graph.nodes[i].kind == Kind::RECURRENCE) least = vector;
        groups[i] = std::max(groups[i], least);
    }
    for (size_t i = groups.size(); i-- > 1;) groups[i - 1] = std::min(groups[i - 1], groups[i]);
    return groups;
}

// A piece of the arena: a value, or several that share their memory.
struct Buffer {
    int64_t floats = 0, offset = 0;
    int32_t first = 0, last = -1;
};

class Planner {
 public:
    Planner(const Graph &graph, Plan &plan, const std::vector<int64_t> &windows)
        : graph_(graph), plan_(plan), windows_(windows), producer_(graph.values.size(), -1),
          last_(graph.values.size(), -1), parent_(graph.values.size(), -1), begin_(graph.values.size(), 0),
          is_parent_(graph.values.size(), 0) {}

    void run() {
        const int32_t nodes = static_cast<int32_t>(graph_.nodes.size());
        for (int32_t i = 0; i < nodes; ++i) {
            const Node &n = graph_.nodes[i];
            if (n.out >= 0) producer_[n.out] = last_[n.out] = i;
            for (const int32_t id : reads(graph_, i)) last_[id] = i;
        }
        last_use_ = last_;
        chain_of_.assign(nodes, -1);
        for (size_t k = 0; k < plan_.chains.size(); ++k)
            for (int32_t i = plan_.chains[k].first; i < plan_.chains[k].last; ++i)
                chain_of_[i] = static_cast<int32_t>(k);
        // what is used in a chain is used all along it
        for (int32_t &last : last_)
            if (last >= 0 && chain_of_[last] >= 0) last = plan_.chains[chain_of_[last]].last - 1;
        place_values();
        concatenate();
        view_ranges();
        for (Value &v : plan_.values) {
            const int64_t held = v.held();
            v.stride = v.place != Place::ARENA ? v.shape.pixels() : held == 1 ? 1 : (held + 15) / 16 * 16;
            // planes that start at the same place of a page would compete for the same lines of a cache
            if (v.stride > 1 && v.stride % 1024 == 0 && v.place == Place::ARENA) v.stride += 16;
        }
        buffers();
    }

 private:
    void place_values() {
        for (size_t id = 0; id < graph_.values.size(); ++id)
            plan_.values.push_back({graph_.values[id], 1, Place::ARENA, 0, 0, 0, windows_.empty() ? 0 : windows_[id]});
        for (size_t i = 0; i < graph_.nodes.size(); ++i) {
            const Node &n = graph_.nodes[i];
            for (const int32_t id : reads(graph_, i))
                plan_.values[id].group = std::max(plan_.values[id].group, plan_.groups[i]);
            if (n.out >= 0) plan_.values[n.out].group = std::max(plan_.values[n.out].group, plan_.groups[i]);
        }
        int32_t inputs = 0, outputs = 0;
        for (size_t i = 0; i < graph_.nodes.size(); ++i) {
            const Node &n = graph_.nodes[i];
            if (n.kind != Kind::INPUT && n.kind != Kind::OUTPUT) continue;
            Value &v = plan_.values[n.kind == Kind::INPUT ? n.out : n.x];
            const int32_t port = n.kind == Kind::INPUT ? inputs++ : outputs++;
            // the caller's memory itself, where one image at a time is read or written as it lies there
            const bool same = n.layout == RAREFY_CHANNELS_FIRST || v.shape.channels == 1 || v.shape.pixels() == 1;
            if (!same || v.group != 1 || v.place != Place::ARENA) continue;
            if (n.kind == Kind::OUTPUT && graph_.nodes[producer_[n.x]].kind == Kind::INPUT) continue;
            v.place = n.kind == Kind::INPUT ? Place::INPUT : Place::OUTPUT;
            v.port = port;
        }
    }

    // Operands of a concatenation lie in their place in the result where nothing speaks against it.
    void concatenate() {
        plan_.copied.assign(graph_.nodes.size(), {});
        for (size_t i = graph_.nodes.size(); i-- > 0;) {
            const Node &n = graph_.nodes[i];
            if (n.kind != Kind::CONCAT) continue;
            Value &whole = plan_.values[n.out];
            int32_t channel = 0;
            for (size_t k = 0; k < graph_.operands[i].size(); ++k) {
                const int32_t id = graph_.operands[i][k];
                Value &part = plan_.values[id];
                const bool free = part.place == Place::ARENA && parent_[id] < 0 && !is_parent(id) &&
                                  whole.place == Place::ARENA && parent_[n.out] < 0;
                if (free) {
                    parent_[id] = n.out;
                    is_parent_[n.out] = 1;
                    begin_[id] = channel;
                    whole.group = std::max(whole.group, part.group);
                } else {
                    plan_.copied[i].push_back(static_cast<int32_t>(k));
                }
                channel += part.shape.channels;
            }
        }
        for (size_t id = 0; id < parent_.size(); ++id) {
            if (parent_[id] < 0) continue;
            plan_.values[id].group = plan_.values[parent_[id]].group;
        }
    }

    // Views of a range of channels lie in what they view, where both are ours.
    void view_ranges() {
        for (size_t i = 0; i < graph_.nodes.size(); ++i) {
            const Node &n = graph_.nodes[i];
            const int32_t first = range_of(graph_, n, graph_.numbers[i]);
            if (first < 0 || parent_[n.out] >= 0 || is_parent(n.out)) continue;
            const int32_t whole = parent_[n.x] >= 0 ? parent_[n.x] : n.x;
            if (plan_.values[n.out].place != Place::ARENA || plan_.values[whole].place != Place::ARENA) continue;
            parent_[n.out] = whole;
            begin_[n.out] = first + (parent_[n.x] >= 0 ? begin_[n.x] : 0);
            is_parent_[whole] = 1;
            plan_.values[whole].group = std::max(plan_.values[whole].group, plan_.values[n.out].group);
        }
        for (size_t id = 0; id < parent_.size(); ++id)
            if (parent_[id] >= 0) plan_.values[id].group = plan_.values[parent_[id]].group;
    }

    bool is_parent(int32_t id) const { return is_parent_[id] != 0; }

    // From when to when a value is needed. One that is gathered from several runs of earlier steps is needed all along.
    int32_t first_of(int32_t id) const {
        const int32_t i = producer_[id];
        if (plan_.values[id].group > plan_.groups[i]) return 0;
        return chain_of_[i] >= 0 ? plan_.chains[chain_of_[i]].first : i;
    }

    void buffers() {
        std::vector<int32_t> buffer_of(plan_.values.size(), -1);
        std::vector<Buffer> all;
        for (size_t i = 0; i < graph_.nodes.size(); ++i) {
            const int32_t out = graph_.nodes[i].out;
            if (out < 0 || plan_.values[out].place != Place::ARENA || parent_[out] >= 0) continue;
            const int32_t reuse = in_place(static_cast<int32_t>(i));
            if (reuse >= 0 && all[buffer_of[reuse]].last == last_[reuse]) {
                buffer_of[out] = buffer_of[reuse];
            } else {
                buffer_of[out] = static_cast<int32_t>(all.size());
                all.push_back({});
                all.back().first = first_of(out);
            }
            Buffer &b = all[buffer_of[out]];
            b.first = std::min(b.first, first_of(out));
            b.last = std::max(b.last, last_[out]);
            for (size_t id = 0; is_parent(out) && id < parent_.size(); ++id) {
                if (parent_[id] != out) continue;
                b.first = std::min(b.first, first_of(static_cast<int32_t>(id)));
                b.last = std::max(b.last, last_[id]);
            }
            b.floats = std::max(b.floats, plan_.values[out].floats() + 16);
        }
        // the largest first, each as low as those that live at the same time leave room
        std::vector<int32_t> order(all.size());
        for (size_t k = 0; k < order.size(); ++k) order[k] = static_cast<int32_t>(k);
        std::stable_sort(order.begin(), order.end(),
                         [&](int32_t a, int32_t b) { return all[a].floats > all[b].floats; });
        std::vector<int32_t> placed;
        for (const int32_t k : order) {
            Buffer &b = all[k];
            std::vector<const Buffer *> others;
            for (const int32_t o : placed)
                if (all[o].first <= b.last && b.first <= all[o].last) others.push_back(&all[o]);
            std::sort(others.begin(), others.end(),
                      [](const Buffer *p, const Buffer *q) { return p->offset < q->offset; });
            for (const Buffer *o : others) {
                if (b.offset + b.floats <= o->offset) break;
                b.offset = std::max(b.offset, o->offset + o->floats);
            }
            b.offset = (b.offset + 15) / 16 * 16;
            plan_.arena_floats = std::max(plan_.arena_floats, b.offset + (b.floats + 15) / 16 * 16);
            placed.push_back(k);
        }
        for (size_t id = 0; id < plan_.values.size(); ++id)
            if (buffer_of[id] >= 0) plan_.values[id].offset = all[buffer_of[id]].offset;
        for (size_t id = 0; id < plan_.values.size(); ++id)
            if (parent_[id] >= 0)
                plan_.values[id].offset =
                    plan_.values[parent_[id]].offset + begin_[id] * plan_.values[parent_[id]].stride;
    }

    // Whether the other steps of i's chain have read a pixel of this value before step i writes it.
    bool read_before(int32_t id, int32_t i) const {
        for (int32_t k = chain_of_[i] < 0 ? i : plan_.chains[chain_of_[i]].first; k < i; ++k) {
            const std::vector<int32_t> ids = reads(graph_, k);
            if (std::find(ids.begin(), ids.end(), id) != ids.end() && !graph_.nodes[k].window.pointwise()) return false;
        }
        return true;
    }

    // An operand whose memory the result of a step may take: read at the same place just before it is written, and not
    // needed any more.
    int32_t in_place(int32_t i) const {
        const Node &n = graph_.nodes[i];
        const int32_t id = n.kind == Kind::CONV                               ? n.other_operand
                           : n.kind == Kind::BINARY || n.kind == Kind::AFFINE ? n.x
                                                                              : -1;
        if (id < 0 || (n.kind == Kind::CONV && id == n.x) || last_use_[id] != i || !read_before(id, i)) return -1;
        const Value &from = plan_.values[id], &to = plan_.values[n.out];
        const bool same = from.place == Place::ARENA && !from.window && !to.window && from.stride == to.stride &&
                          from.group == to.group && parent_[id] < 0 && !is_parent(id) && !is_parent(n.out);
        return same && from.group == plan_.groups[producer_[id]] && to.group == plan_.groups[i] ? id : -1;
    }

    const Graph &graph_;
    Plan &plan_;
    const std::vector<int64_t> &windows_;
    std::vector<int32_t> producer_, last_, parent_, begin_, last_use_, chain_of_;
    std::vector<uint8_t> is_parent_;
};

}  // namespace

Plan make_plan(const Graph &graph, int32_t batch, int32_t threads, std::vector<Chain> chains,
               const std::vector<int64_t> &windows) {
    Plan plan;
    plan.chains = std::move(chains);
    plan.groups = choose_groups(graph, batch >= threads ? batch / threads : 1);
    for (size_t i = 0; i < plan.groups.size(); ++i) {
        if (plan.stages.empty() || plan.stages.back().group != plan.groups[i])
            plan.stages.push_back({static_cast<int32_t>(i), static_cast<int32_t>(i), plan.groups[i]});
        plan.stages.back().last = static_cast<int32_t>(i) + 1;
    }
    Planner(graph, plan, windows).run();
    return plan;
}

}  // namespace rarefy::engine

// The weights of int8 convolutions as the kernels read them.
#include <algorithm>
#include <array>
#include <cstdlib>
#include <map>
#include <tuple>

#include "engine/int8/program.h"

namespace rarefy::int8 {

namespace {

// A weight that is not zero, and where its pixels are.
struct Entry {
    int32_t offset, value;
};

// Takes the weights of a row two at a time, such that the positive ones of each two add up to at most PAIR_LIMIT, and
// the negative ones, too: the largest with the largest one of the other sign, those that are left of one sign with the
// largest that there is room for.
class Pairer {
 public:
    explicit Pairer(const std::vector<Entry> &row) {
        for (const Entry &e : row) offsets_[e.value < 0][std::abs(e.value)].push_back(e.offset);
    }

    // The next pair, the second of which may be nothing; nothing twice when all are taken.
    std::vector<Entry> next() {
        std::vector<Entry> pair;
        if (!take(0, LARGEST, pair) && !take(1, LARGEST, pair)) return pair;
        const bool negative = pair[0].value < 0;
        if (!take(1 - negative, LARGEST, pair)) take(negative, PAIR_LIMIT - std::abs(pair[0].value), pair);
        return pair;
    }

 private:
    enum { LARGEST = 128 };

    // The largest one of this sign that is no larger than `most`.
    bool take(int sign, int32_t most, std::vector<Entry> &pair) {
        for (int32_t size = std::min<int32_t>(most, LARGEST); size > 0; --size) {
            std::vector<int32_t> &same = offsets_[sign][size];
            if (same.empty()) continue;
            pair.push_back({same.back(), sign ? -size : size});
            same.pop_back();
            return true;
        }
        return false;
    }

    std::vector<int32_t> offsets_[2][LARGEST + 1];
};

class QuadMaker {
 public:
    explicit QuadMaker(bool pairs) : pairs_(pairs) { out_.starts.push_back(0); }

    void row(const std::vector<Entry> &entries) {
        std::vector<Entry> all = entries;
        if (pairs_) {
            all.clear();
            Pairer pairer(entries);
            for (std::vector<Entry> pair = pairer.next(); !pair.empty(); pair = pairer.next()) {
                all.insert(all.end(), pair.begin(), pair.end());
                if (pair.size() == 1) all.push_back({pair[0].offset, 0});
            }
        }
        while (all.size() % QUAD) all.push_back({all.back().offset, 0});
        for (size_t i = 0; i < all.size(); i += QUAD) add(all.data() + i);
        out_.starts.push_back(static_cast<int64_t>(out_.offsets.size()) / QUAD);
    }

    Weights make() { return std::move(out_); }

 private:
    void add(const Entry *quad) {
        for (int32_t i = 0; i < QUAD; ++i) {
            out_.offsets.push_back(quad[i].offset);
            out_.values.push_back(static_cast<int8_t>(quad[i].value));
        }
    }

    const bool pairs_;
    Weights out_;
};

// Where the kernel positions of a channel lie: in which of its phases, and how far from the pixel.
struct Lines {
    Planes planes;
    int64_t stride;
    int64_t row;
    std::vector<int32_t> phase;
    std::vector<Tap> down, along;

    // x is the value that the kernels read, of so many channels.
    Lines(const Window &w, const Value &x, int64_t channels)
        : planes(channels, static_cast<int64_t>(phases_of(w).size()), x.interleaved), stride(x.stride), row(x.row()) {
        const std::vector<int32_t> which = phases_of(w);
        for (int32_t ky = 0; ky < w.kernel[0]; ++ky)
            for (int32_t kx = 0; kx < w.kernel[1]; ++kx) {
                const Tap ty = tap_of(w, 0, ky), tx = tap_of(w, 1, kx);
                const int32_t number = ty.phase * w.stride[1] + tx.phase;
                phase.push_back(
                    static_cast<int32_t>(std::lower_bound(which.begin(), which.end(), number) - which.begin()));
                down.push_back(ty);
                along.push_back(tx);
            }
    }
};

// A weight that is not zero, of a plane of the value that the kernels read, so many rows and columns from the pixel.
struct Tapped {
    int64_t plane;
    int32_t rows, columns, value;
};

// Those of a row, whose first channel is this one.
std::vector<Tapped> taps_of(const engine::Matrix &m, const Lines &lines, const float *weight, int64_t first) {
    std::vector<Tapped> all;
    for (int32_t c = 0; c < m.channels / m.groups; ++c)
        for (int32_t k = 0; k < m.taps; ++k) {
            const int32_t value = static_cast<int32_t>(weight[int64_t{c} * m.taps + k]);
            if (value)
                all.push_back(
                    {lines.planes.plane(first + c, lines.phase[k]), lines.down[k].shift, lines.along[k].shift, value});
        }
    return all;
}

// Four weights of planes that are interleaved, and the bytes that they are from the pixel.
struct Quad {
    int32_t offset;
    std::array<int8_t, QUAD> w;
};

// What is positive and what is negative of each of a quad's two pairs.
class Loads {
 public:
    explicit Loads(const Quad &quad) {
        for (int32_t k = 0; k < QUAD; ++k) load_[k / 2 * 2 + (quad.w[k] < 0)] += std::abs(int32_t{quad.w[k]});
    }
    int32_t most() const { return *std::max_element(load_.begin(), load_.end()); }
    bool fits() const { return most() <= PAIR_LIMIT; }
    bool fits(const Loads &other) const {
        for (int32_t k = 0; k < QUAD; ++k)
            if (load_[k] + other.load_[k] > PAIR_LIMIT) return false;
        return true;
    }

 private:
    std::array<int32_t, QUAD> load_ = {};
};

// The weights of a row in blocks of four planes at one shift.
std::vector<Quad> quads_of(const Lines &lines, const std::vector<Tapped> &taps) {
    std::map<std::tuple<int64_t, int32_t, int32_t>, std::array<int8_t, QUAD>> blocks;
    for (const Tapped &t : taps)
        blocks[{t.plane / QUAD, t.rows, t.columns}][t.plane % QUAD] = static_cast<int8_t>(t.value);
    std::vector<Quad> quads;
    for (const auto &[at, w] : blocks) {
        const auto [block, rows, columns] = at;
        quads.push_back({static_cast<int32_t>(QUAD * (block * lines.stride + rows * lines.row + columns)), w});
    }
    return quads;
}

// Takes blocks one by one; with pairs two at a time, where two are left that may be added.
class BlockMaker {
 public:
    explicit BlockMaker(bool pairs) : pairs_(pairs) { out_.starts.push_back(0); }

    void row(std::vector<Quad> quads) {
        if (pairs_) quads = in_twos(quads);
        for (const Quad &quad : quads) {
            out_.offsets.push_back(quad.offset);
            out_.values.insert(out_.values.end(), quad.w.begin(), quad.w.end());
        }
        out_.starts.push_back(static_cast<int64_t>(out_.offsets.size()) / (pairs_ ? 2 : 1));
    }

    Weights make() { return std::move(out_); }

 private:
    enum { TRIES = 64 };  // for the largest quad that one fits with

    static std::vector<Quad> in_twos(const std::vector<Quad> &quads) {
        std::vector<std::pair<Loads, Quad>> all;
        for (const Quad &quad : quads) {
            if (Loads(quad).fits()) {
                all.push_back({Loads(quad), quad});
                continue;
            }
            for (const Quad &half :
                 {Quad{quad.offset, {quad.w[0], 0, quad.w[2], 0}}, Quad{quad.offset, {0, quad.w[1], 0, quad.w[3]}}})
                all.push_back({Loads(half), half});
        }
        std::stable_sort(all.begin(), all.end(),
                         [](const auto &a, const auto &b) { return a.first.most() > b.first.most(); });
        std::vector<Quad> out;
        std::vector<uint8_t> taken(all.size(), 0);
        for (size_t i = 0; i < all.size(); ++i) {
            if (taken[i]) continue;
            out.push_back(all[i].second);
            out.push_back({all[i].second.offset, {}});
            int32_t tries = 0;
            for (size_t k = i + 1; k < all.size() && tries < TRIES; ++k) {
                if (taken[k]) continue;
                // the first of those that are left for a half of the tries, then the smallest
                if (tries++ == TRIES / 2) k = std::max(k, all.size() - TRIES / 2);
                if (taken[k] || !all[i].first.fits(all[k].first)) continue;
                taken[k] = 1;
                out.back() = all[k].second;
                break;
            }
        }
        return out;
    }

    const bool pairs_;
    Weights out_;
};

// Takes the blocks of some rows together, each for all of them. With pairs two at a time, chosen such that few rows
// have weights that may not be added to the others of a pair; those are left to the row alone.
class GroupMaker {
 public:
    explicit GroupMaker(bool pairs) : pairs_(pairs), own_(pairs) { shared_.starts.push_back(0); }

    // The first `there` of these rows are rows of results.
    void group(const std::vector<std::vector<Quad>> &rows, int32_t there) {
        rows_ = rows.size();
        // Where lines are shorter than a kernel is wide, several of its positions lie at one offset.
        std::map<std::pair<int32_t, int32_t>, Shared> at;
        for (size_t r = 0; r < rows_; ++r) {
            std::map<int32_t, int32_t> times;
            for (const Quad &quad : rows[r]) {
                Shared &block = at[{quad.offset, times[quad.offset]++}];
                block.offset = quad.offset;
                block.w[r] = quad.w;
            }
        }
        std::vector<Shared> all;
        for (const auto &found : at) all.push_back(found.second);
        left_.assign(rows_, {});
        if (pairs_) all = in_twos(all);
        const size_t batch = pairs_ ? 2 : 1;
        for (size_t i = 0; i < all.size(); i += batch) {
            for (size_t b = i; b < i + batch; ++b) shared_.offsets.push_back(all[b].offset);
            for (size_t r = 0; r < rows_; ++r)
                for (size_t b = i; b < i + batch; ++b)
                    shared_.values.insert(shared_.values.end(), all[b].w[r].begin(), all[b].w[r].end());
        }
        shared_.starts.push_back(static_cast<int64_t>(shared_.offsets.size() / batch));
        for (int32_t r = 0; r < there; ++r) own_.row(left_[static_cast<size_t>(r)]);
    }

    void make(Weights &shared, Weights &own) {
        shared = std::move(shared_);
        if (pairs_) own = own_.make();
    }

 private:
    enum { MOST_ROWS = 4, TRIES = 32 };  // for the largest block that one fits with in all rows

    struct Shared {
        int32_t offset = 0;
        std::array<std::array<int8_t, QUAD>, MOST_ROWS> w = {};
    };
    struct Loaded {
        Shared block;
        std::vector<Loads> loads;
        int32_t most = 0;
    };

    // A block of which each row's pairs fit: the smaller weight of one that does not is left to the row.
    Loaded loaded(const Shared &given) {
        Loaded made{given, {}, 0};
        for (size_t r = 0; r < rows_; ++r) {
            std::array<int8_t, QUAD> &w = made.block.w[r], rest = {};
            for (size_t k = 0; k < QUAD; k += 2) {
                const bool fits = (w[k] < 0) != (w[k + 1] < 0) || std::abs(w[k] + w[k + 1]) <= PAIR_LIMIT;
                const size_t smaller = k + (std::abs(w[k]) > std::abs(w[k + 1]));
                if (!fits) std::swap(w[smaller], rest[smaller]);
            }
            leave(r, given.offset, rest);
            made.loads.push_back(Loads({given.offset, w}));
            made.most = std::max(made.most, made.loads.back().most());
        }
        return made;
    }

    void leave(size_t row, int32_t offset, const std::array<int8_t, QUAD> &w) {
        if (w != std::array<int8_t, QUAD>{}) left_[row].push_back({offset, w});
    }

    // Rows in which two blocks do not fit.
    static int32_t misfits(const Loaded &a, const Loaded &b) {
        int32_t count = 0;
        for (size_t r = 0; r < a.loads.size(); ++r) count += !a.loads[r].fits(b.loads[r]);
        return count;
    }

    std::vector<Shared> in_twos(const std::vector<Shared> &blocks) {
        std::vector<Loaded> all;
        for (const Shared &block : blocks) all.push_back(loaded(block));
        std::stable_sort(all.begin(), all.end(), [](const Loaded &a, const Loaded &b) { return a.most > b.most; });
        std::vector<std::pair<Shared, Shared>> twos;
        std::vector<uint8_t> taken(all.size(), 0);
        for (size_t i = 0; i < all.size(); ++i) {
            if (taken[i]) continue;
            size_t best = i;
            int32_t least = MOST_ROWS + 1, tries = 0;
            for (size_t k = i + 1; k < all.size() && tries < TRIES && least > 0; ++k) {
                if (taken[k]) continue;
                // the first of those that are left for a half of the tries, then the smallest
                if (tries++ == TRIES / 2) k = std::max(k, all.size() - TRIES / 2);
                if (taken[k]) continue;
                const int32_t count = misfits(all[i], all[k]);
                if (count < least) best = k, least = count;
            }
            twos.push_back({all[i].block, {}});
            Shared &second = twos.back().second;
            second.offset = all[i].block.offset;
            if (best == i) continue;
            taken[best] = 1;
            second = all[best].block;
            for (size_t r = 0; r < rows_; ++r)
                if (!all[i].loads[r].fits(all[best].loads[r])) {
                    leave(r, second.offset, second.w[r]);
                    second.w[r] = {};
                }
        }
        // in the order of memory
        std::sort(twos.begin(), twos.end(),
                  [](const auto &a, const auto &b) { return a.first.offset < b.first.offset; });
        std::vector<Shared> out;
        for (const auto &two : twos) out.insert(out.end(), {two.first, two.second});
        return out;
    }

    const bool pairs_;
    size_t rows_ = 0;
    Weights shared_;
    BlockMaker own_;
    std::vector<std::vector<Quad>> left_;  // of each row of a group
};

// Vectors with all their weights: PART of ROWS rows in turn, with zeros where there are no more; a row's length.
Weights make_dense(const engine::Matrix &m, const std::vector<float> &weight) {
    const int64_t count = (m.channels + PART - 1) / PART * PART;
    Weights out;
    out.starts = {0, count};
    out.values.resize(static_cast<size_t>((m.rows + ROWS - 1) / ROWS * ROWS * count));
    for (int64_t row = 0; row < m.rows; ++row)
        for (int64_t c = 0; c < m.channels; ++c) {
            const int64_t part = row / ROWS * ROWS * count + c / PART * ROWS * PART + row % ROWS * PART;
            out.values[static_cast<size_t>(part + c % PART)] = static_cast<int8_t>(weight[row * m.channels + c]);
        }
    return out;
}

// Vectors with the weights that are not zero, in multiples of 16, or with the blocks that have such a one, in multiples
// of 32, and their places.
Weights make_vectors(const engine::Matrix &m, const std::vector<float> &weight, Layout layout) {
    Weights out;
    out.starts.push_back(0);
    const int32_t width = layout == BLOCKS ? QUAD : 1;
    for (int32_t row = 0; row < m.rows; ++row) {
        const float *from = weight.data() + int64_t{row} * m.channels;
        for (int32_t c = 0; c < m.channels; c += width) {
            const int32_t there = std::min(width, m.channels - c);
            if (std::all_of(from + c, from + c + there, [](float w) { return w == 0.0f; })) continue;
            for (int32_t k = 0; k < width; ++k)
                out.values.push_back(k < there ? static_cast<int8_t>(from[c + k]) : int8_t{0});
            out.index.push_back(static_cast<uint16_t>(c / width));
        }
        while (out.values.size() % (layout == BLOCKS ? 32 : 16)) out.values.push_back(0);
        out.index.resize(out.values.size() / static_cast<size_t>(width));
        out.starts.push_back(static_cast<int64_t>(out.values.size()));
    }
    return out;
}

// Of a vector's layer: how many blocks of four there are with a weight that is not zero.
int64_t blocks_of(const engine::Matrix &m, const std::vector<float> &weight) {
    int64_t blocks = 0;
    for (int32_t row = 0; row < m.rows; ++row)
        for (int32_t c = 0; c < m.channels; c += QUAD) {
            const float *from = weight.data() + int64_t{row} * m.channels + c;
            blocks +=
                std::any_of(from, from + std::min<int32_t>(QUAD, m.channels - c), [](float w) { return w != 0.0f; });
        }
    return blocks;
}

// A block takes this share of the time of four single weights, what interleaving takes among it: 0.63 in the first
// layer of ResNet-50 on an AMD EPYC with AVX2. With VNNI and with NEON it was not measured.
constexpr double BLOCK_COST = 0.65;
// Above this density all weights together take less time than single ones: on the same processor those of ResNet-50's
// layers at 14x14 do above 0.41 to 0.43.
constexpr double DENSE_ABOVE = 0.45;
// A block takes so many times the time of a single weight in a dot product: 1.01 cycles against 0.81 on the same
// processor.
constexpr double VECTOR_BLOCK_COST = 1.2;
// Between these densities layers of vectors take windows, where they are fast: below, windows are nearly empty. On the
// same processor windows took 1.07, 0.83 and 0.62 of the time of all weights at densities of 0.5, 0.3 and 0.1, from
// memory.
constexpr double WINDOWS_ABOVE = 0.04, WINDOWS_BELOW = 0.45;
// And between these a bitmask, where that is fast: 0.89, 0.64, 0.49 and 0.33 of the time of all weights at densities of
// 0.8, 0.5, 0.3 and 0.05, from memory, on an Intel Xeon with AVX512_VBMI2.
constexpr double BITMASK_ABOVE = 0.04, BITMASK_BELOW = 0.85;
// Above this density the dot products of vectors take all weights, whose pixels are then read in a row: on an AMD EPYC
// with AVX2 both take as long at about this density, from memory.
constexpr double VECTOR_DENSE_ABOVE = 0.12;

}  // namespace

void make_weights(const rarefy_int8_program &program, Step &step, const std::vector<float> &weight) {
    const Node &built = program.graph.nodes[step.source];
    const engine::Matrix m = engine::matrix_of(program.graph, built);
    const Window &w = built.window;
    step.total_weights = static_cast<int64_t>(weight.size());
    step.nonzeros = std::count_if(weight.begin(), weight.end(), [](float v) { return v != 0.0f; });
    const int32_t channels = m.channels / m.groups, rows_a_group = m.rows / m.groups;
    const int32_t centre = step.layout == WINDOWS                ? int32_t{WINDOW_CENTRE}
                           : step.vector && step.layout != DENSE ? 0
                                                                 : program.kernels->centre;
    const int32_t zero = program.values[built.x].zero_point;
    for (int32_t row = 0; row < m.rows; ++row) {
        int32_t sum = 0, sizes = 0;
        for (int64_t i = 0; i < int64_t{channels} * m.taps; ++i) {
            const int32_t w = static_cast<int32_t>(weight[row * int64_t{channels} * m.taps + i]);
            sum += w;
            sizes += std::abs(w);
        }
        step.first.push_back((centre - zero) * sum);
        const double most = 255.0 * sizes * std::abs(double{step.multipliers[row]}) +
                            std::abs(double{step.biases[row]}) + 255.0 * std::abs(double{step.result.other});
        step.bounded &= most < 1e9;
    }
    if (step.layout == WINDOWS) {
        step.weights = make_windows(m, weight);
        return;
    }
    if (step.layout == BITMASK) {
        step.weights = make_bitmask(m, weight);
        return;
    }
    if (step.vector) {
        step.weights = step.layout == DENSE ? make_dense(m, weight) : make_vectors(m, weight, step.layout);
        return;
    }
    const Lines lines(w, program.values[step.node.x], m.channels);
    const auto taps = [&](int32_t row) {
        return taps_of(m, lines, weight.data() + int64_t{row} * channels * m.taps, row / rows_a_group * channels);
    };
    if (step.layout == BLOCKS) {
        BlockMaker maker(program.kernels->pairs != 0);
        for (int32_t row = 0; row < m.rows; ++row) maker.row(quads_of(lines, taps(row)));
        step.weights = maker.make();
        return;
    }
    if (step.layout == DENSE) {
        GroupMaker maker(program.kernels->pairs != 0);
        for (int32_t row = 0; row < m.rows; row += program.kernels->together) {
            std::vector<std::vector<Quad>> rows(static_cast<size_t>(program.kernels->together));
            for (int32_t r = row; r < std::min(m.rows, row + program.kernels->together); ++r)
                rows[static_cast<size_t>(r - row)] = quads_of(lines, taps(r));
            maker.group(rows, std::min(m.rows - row, program.kernels->together));
        }
        maker.make(step.shared, step.weights);
        return;
    }
    QuadMaker maker(program.kernels->pairs != 0);
    for (int32_t row = 0; row < m.rows; ++row) {
        std::vector<Entry> entries;
        for (const Tapped &t : taps(row))
            entries.push_back({static_cast<int32_t>(t.plane * lines.stride + t.rows * lines.row + t.columns), t.value});
        maker.row(entries);
    }
    step.weights = maker.make();
}

Layout choose_layout(const Graph &graph, const Node &node, int32_t group, const std::vector<float> &weight,
                     int32_t asked, const Kernels &kernels) {
    const engine::Matrix m = engine::matrix_of(graph, node);
    const bool vector = of_vectors(graph, node, group);
    if (m.groups > 1) return ANY;
    const bool some = of_images(graph, node);
    const bool fits = some && std::find(weight.begin(), weight.end(), -128.0f) == weight.end();
    if (asked == WINDOWS + 1 && fits) return WINDOWS;
    if (asked == BITMASK + 1 && some) return BITMASK;
    const double all = static_cast<double>(weight.size());
    const double nonzeros = all - static_cast<double>(std::count(weight.begin(), weight.end(), 0.0f));
    const bool windows = kernels.shuffles && fits && group <= MOST_IMAGES;
    const bool bits = kernels.spreads && some && group <= MOST_IMAGES;
    const bool asked_for = asked > 0 && asked <= WINDOWS;
    if (!asked_for && bits && nonzeros > BITMASK_ABOVE * all && nonzeros < BITMASK_BELOW * all) return BITMASK;
    if (!asked_for && windows && nonzeros > WINDOWS_ABOVE * all && nonzeros < WINDOWS_BELOW * all) return WINDOWS;
    if (!vector && !kernels.rows[DENSE][QUARTERS]) return ANY;
    if (asked_for) return static_cast<Layout>(asked - 1);
    if (vector) {
        if (nonzeros > VECTOR_DENSE_ABOVE * all) return DENSE;
        return static_cast<double>(blocks_of(m, weight)) * VECTOR_BLOCK_COST < nonzeros ? BLOCKS : ANY;
    }
    if (nonzeros > DENSE_ABOVE * all) return DENSE;
    Value unplaced;
    unplaced.shape = {1, 1, 1};
    unplaced.interleaved = true;
    const Lines lines(node.window, unplaced, m.channels);
    BlockMaker maker(kernels.pairs != 0);
    for (int32_t row = 0; row < m.rows; ++row)
        maker.row(quads_of(lines, taps_of(m, lines, weight.data() + int64_t{row} * m.channels * m.taps, 0)));
    const double blocks = static_cast<double>(maker.make().offsets.size());
    return blocks * BLOCK_COST < nonzeros / QUAD ? BLOCKS : ANY;
}

}  // namespace rarefy::int8

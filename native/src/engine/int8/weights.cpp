// The weights of int8 convolutions as the kernels read them.
#include <algorithm>
#include <cstdlib>

#include "engine/int8/program.h"

namespace rarefy::int8 {

namespace {

// A weight that is not zero, and where its pixels are.
struct Entry {
    int32_t offset, value;
};

// Takes the weights of a row four at a time, the largest first, such that the positive ones of each four add up to at
// most PAIR_LIMIT, and the negative ones, too. Which four they are is free, so almost all quads are full.
class Packer {
 public:
    explicit Packer(const std::vector<Entry> &row) {
        for (const Entry &e : row) {
            std::vector<int32_t> &same = offsets_[e.value < 0][std::abs(e.value)];
            same.push_back(e.offset);
        }
        left_[0] = std::count_if(row.begin(), row.end(), [](const Entry &e) { return e.value > 0; });
        left_[1] = static_cast<int64_t>(row.size()) - left_[0];
    }

    // The next quad's entries; none when all are taken.
    std::vector<Entry> next() {
        std::vector<Entry> quad;
        int32_t room[2] = {PAIR_LIMIT, PAIR_LIMIT};
        while (static_cast<int32_t>(quad.size()) < QUAD) {
            const int sign = left_[0] >= left_[1] ? 0 : 1;
            if (!take(sign, room, quad) && !take(1 - sign, room, quad)) break;
        }
        return quad;
    }

 private:
    // The largest one of this sign that there is room for.
    bool take(int sign, int32_t (&room)[2], std::vector<Entry> &quad) {
        if (left_[sign] == 0) return false;
        for (int32_t size = std::min(room[sign], 127); size > 0; --size) {
            std::vector<int32_t> &same = offsets_[sign][size];
            if (same.empty()) continue;
            quad.push_back({same.back(), sign ? -size : size});
            same.pop_back();
            --left_[sign];
            room[sign] -= size;
            return true;
        }
        return false;
    }

    std::vector<int32_t> offsets_[2][128];
    int64_t left_[2];
};

class QuadMaker {
 public:
    explicit QuadMaker(bool pairs) : pairs_(pairs) { out_.starts.push_back(0); }

    void row(const std::vector<Entry> &entries) {
        if (pairs_) {
            Packer packer(entries);
            for (std::vector<Entry> quad = packer.next(); !quad.empty(); quad = packer.next()) add(quad);
            if (count_ % 2) add({});  // two are taken at a time
        } else {
            for (size_t i = 0; i < entries.size(); i += QUAD)
                add({entries.begin() + static_cast<int64_t>(i),
                     entries.begin() + static_cast<int64_t>(std::min(entries.size(), i + QUAD))});
        }
        out_.starts.push_back(count_);
    }

    Weights make() { return std::move(out_); }

 private:
    void add(std::vector<Entry> quad) {
        quad.resize(QUAD, {quad.empty() ? 0 : quad[0].offset, 0});
        for (const Entry &e : quad) out_.offsets.push_back(e.offset);
        for (int32_t i = 0; i < QUAD; i += 2)
            for (int32_t again = 0; again < (pairs_ ? 2 : 1); ++again)
                for (int32_t k = 0; k < 2; ++k) out_.values.push_back(static_cast<int8_t>(quad[i + k].value));
        ++count_;
    }

    const bool pairs_;
    int64_t count_ = 0;
    Weights out_;
};

// Vectors: rows of all weights, in multiples of 32, or of those that are not zero with their columns.
Weights make_vectors(const engine::Matrix &m, const std::vector<float> &weight, bool dense) {
    Weights out;
    out.starts.push_back(0);
    for (int32_t row = 0; row < m.rows; ++row) {
        for (int32_t c = 0; c < m.channels; ++c) {
            const int8_t w = static_cast<int8_t>(weight[int64_t{row} * m.channels + c]);
            if (!dense && w == 0) continue;
            out.values.push_back(w);
            if (!dense) out.index.push_back(static_cast<uint16_t>(c));
        }
        while (dense && out.values.size() % 32) out.values.push_back(0);
        out.starts.push_back(static_cast<int64_t>(out.values.size()));
    }
    return out;
}

// Above this density the dot products of vectors take all weights: their pixels are then read in a row. On an AMD EPYC
// with AVX2 a weight that is picked takes about six times as long as one in a row.
constexpr double VECTOR_DENSE_ABOVE = 0.17;

}  // namespace

void make_weights(const rarefy_int8_program &program, Step &step, const std::vector<float> &weight) {
    const Node &built = program.graph.nodes[step.source];
    const engine::Matrix m = engine::matrix_of(program.graph, built);
    const Window &w = built.window;
    step.total_weights = static_cast<int64_t>(weight.size());
    step.nonzeros = std::count_if(weight.begin(), weight.end(), [](float v) { return v != 0.0f; });
    const int32_t channels = m.channels / m.groups, rows_a_group = m.rows / m.groups;
    const int32_t zero = program.values[built.x].zero_point;
    for (int32_t row = 0; row < m.rows; ++row) {
        int32_t sum = 0;
        for (int64_t i = 0; i < int64_t{channels} * m.taps; ++i)
            sum += static_cast<int32_t>(weight[row * int64_t{channels} * m.taps + i]);
        step.first.push_back(-zero * sum);
    }
    if (step.vector) {
        step.dense = static_cast<double>(step.nonzeros) > VECTOR_DENSE_ABOVE * static_cast<double>(step.total_weights);
        step.weights = make_vectors(m, weight, step.dense);
        return;
    }
    // where each tap of a channel lies
    const Value &x = program.values[step.node.x];
    const int32_t phases = x.shape.channels / m.channels;
    const std::vector<int32_t> *which = nullptr;
    for (const Step &other : program.steps)
        if (other.phases && other.node.out == step.node.x) which = &other.which;
    std::vector<int64_t> taps;
    for (int32_t ky = 0; ky < w.kernel[0]; ++ky) {
        for (int32_t kx = 0; kx < w.kernel[1]; ++kx) {
            const Tap ty = tap_of(w, 0, ky), tx = tap_of(w, 1, kx);
            int64_t phase = 0;
            if (which)
                phase =
                    std::lower_bound(which->begin(), which->end(), ty.phase * w.stride[1] + tx.phase) - which->begin();
            taps.push_back(phase * x.stride + ty.shift * x.row() + tx.shift);
        }
    }
    QuadMaker maker(program.kernels->pairs != 0);
    for (int32_t row = 0; row < m.rows; ++row) {
        std::vector<Entry> entries;
        const float *from = weight.data() + int64_t{row} * channels * m.taps;
        for (int32_t c = 0; c < channels; ++c) {
            const int64_t plane = (int64_t{row} / rows_a_group * channels + c) * phases * x.stride;
            for (int32_t k = 0; k < m.taps; ++k) {
                const int32_t value = static_cast<int32_t>(from[int64_t{c} * m.taps + k]);
                if (value) entries.push_back({static_cast<int32_t>(plane + taps[k]), value});
            }
        }
        maker.row(entries);
    }
    step.weights = maker.make();
}

}  // namespace rarefy::int8

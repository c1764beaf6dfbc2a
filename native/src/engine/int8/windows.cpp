// The weights of a vector's layer in windows; kernels.h says what those are.
#include <algorithm>
#include <numeric>

#include "engine/int8/program.h"

namespace rarefy::int8 {

namespace {

enum { MOST_GAP = 4, MOST_MOVE = 255 };

// One of WINDOW_ROWS rows: which of its weights that are not zero comes next.
class Row {
 public:
    Row(const float *weight, int32_t columns) : weight_(weight), columns_(columns) { skip(); }
    int32_t next() const { return next_; }  // its column; `columns` when there is none
    int8_t value() const { return static_cast<int8_t>(weight_[next_]); }
    void take() {
        ++next_;
        skip();
    }

 private:
    void skip() {
        while (next_ < columns_ && weight_[next_] == 0.0f) ++next_;
    }
    const float *weight_;
    int32_t columns_, next_ = 0;
};

// What a row takes of a window that begins at this column.
struct Quad {
    int32_t place[QUAD];
    int8_t w[QUAD];
};

Quad take(Row &row, int32_t columns, int32_t begin) {
    Quad quad = {};
    int32_t last = -1;
    bool ended = false;
    for (int32_t k = 0; k < QUAD; ++k) {
        const int32_t place = row.next() - begin;
        ended |= row.next() >= columns || place >= WINDOW;
        // where the next one is too far, or there is none, a zero stands on the way there
        const bool near = last < 0 || place - last <= MOST_GAP;
        last = ended ? last + 1 : near ? place : last + MOST_GAP;
        quad.place[k] = last;
        if (ended || !near) continue;
        quad.w[k] = row.value();
        row.take();
    }
    return quad;
}

void put(engine::Buffer<int8_t> &bytes, size_t at, int32_t step, int32_t row, const Quad &quad) {
    const auto add = [&](int32_t where, int32_t bits) {
        int8_t &to = bytes[at + static_cast<size_t>(where)];
        to = static_cast<int8_t>(static_cast<uint8_t>(to) | static_cast<uint8_t>(bits << 2 * step));
    };
    add(QUAD * row, quad.place[0] & 3);
    add(FIRSTS_AT + row, quad.place[0] >> 2);
    for (int32_t k = 1; k < QUAD; ++k) add(QUAD * row + k, quad.place[k] - quad.place[k - 1] - 1);
    std::copy_n(quad.w, QUAD,
                bytes.begin() + static_cast<int64_t>(at) + WEIGHTS_AT + (step * WINDOW_ROWS + row) * QUAD);
}

}  // namespace

Weights make_windows(const engine::Matrix &m, const std::vector<float> &weight) {
    const auto row_at = [&](int32_t row) { return weight.data() + int64_t{row} * m.channels; };
    // rows with about as many weights wait little for each other
    std::vector<int64_t> counts;
    for (int32_t row = 0; row < m.rows; ++row)
        counts.push_back(std::count_if(row_at(row), row_at(row) + m.channels, [](float w) { return w != 0.0f; }));
    Weights out;
    out.offsets.resize(static_cast<size_t>(m.rows));
    std::iota(out.offsets.begin(), out.offsets.end(), 0);
    std::stable_sort(out.offsets.begin(), out.offsets.end(), [&](int32_t a, int32_t b) {
        return counts[static_cast<size_t>(a)] > counts[static_cast<size_t>(b)];
    });
    out.starts.push_back(0);
    for (int32_t first = 0; first < m.rows; first += WINDOW_ROWS) {
        std::vector<Row> rows;
        for (int32_t r = first; r < std::min(m.rows, first + WINDOW_ROWS); ++r)
            rows.emplace_back(row_at(out.offsets[static_cast<size_t>(r)]), m.channels);
        int32_t begin = 0;
        for (int32_t step = 0;; step = (step + 1) % WINDOW_STEPS) {
            int32_t next = m.channels;
            for (const Row &row : rows) next = std::min(next, row.next());
            if (next == m.channels && step == 0) break;
            if (step == 0) out.values.resize(out.values.size() + WINDOW_BYTES);
            if (next == m.channels) continue;
            const size_t at = out.values.size() - WINDOW_BYTES;
            const int32_t move = std::min<int32_t>(next - begin, MOST_MOVE);
            out.values[at + MOVES_AT + static_cast<size_t>(step)] = static_cast<int8_t>(move);
            begin += move;
            for (size_t r = 0; r < rows.size(); ++r)
                put(out.values, at, step, static_cast<int32_t>(r), take(rows[r], m.channels, begin));
        }
        out.starts.push_back(static_cast<int64_t>(out.values.size()));
    }
    return out;
}

}  // namespace rarefy::int8

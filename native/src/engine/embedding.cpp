// Rows of a table, by whole numbers, or what is made of all of them.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "engine/tensor.h"

namespace rarefy::engine {

namespace {

enum { WORDS, ROWS, REDUCTION, HEIGHT, WIDTH, NUMBERS };
constexpr int64_t LARGEST = 1 << 30;
constexpr int64_t SOME_COLUMNS = 64;  // at once: as many lines of the result stay in a near cache

std::string infer_embedding(const Graph &, const Node &, const Given &given, Shape *out) {
    const std::vector<int64_t> &n = given.numbers;
    if (n.size() != NUMBERS || !given.operands.empty() || (n[WORDS] != 1 && n[WORDS] != 2))
        return "an embedding has one value and five numbers, the first of them 1 or 2";
    const int64_t count = out->channels / n[WORDS];
    if (out->channels % n[WORDS] || out->pixels() != 1) return "the whole numbers of an embedding are a vector";
    const bool known = n[REDUCTION] == -1 || n[REDUCTION] == RAREFY_REDUCE_SUM || n[REDUCTION] == RAREFY_REDUCE_MEAN ||
                       n[REDUCTION] == RAREFY_REDUCE_MAX;
    if (!known) return "an embedding gives all rows, or their sum, mean or maximum";
    for (const int axis : {HEIGHT, WIDTH})
        if (n[axis] < 1 || n[axis] > LARGEST) return "every size must be between 1 and 2^30";
    if (n[HEIGHT] * n[WIDTH] != (n[REDUCTION] == -1 ? count : 1)) return "an embedding has a pixel a row that it gives";
    if (n[ROWS] < 1 || given.constants % n[ROWS] || !given.constants || given.constants / n[ROWS] > LARGEST)
        return "the constants of an embedding are rows of the same size";
    *out = {static_cast<int32_t>(given.constants / n[ROWS]), static_cast<int32_t>(n[HEIGHT]),
            static_cast<int32_t>(n[WIDTH])};
    return "";
}

int64_t no_scratch(const Graph &, const Step &) { return 0; }

uint32_t bits(float word) {
    uint32_t found;
    std::memcpy(&found, &word, sizeof found);
    return found;
}

// The whole number of one or two words that are `stride` apart.
int64_t whole(const float *words, int64_t stride, int64_t count) {
    if (count == 1) return static_cast<int32_t>(bits(words[0]));
    return static_cast<int64_t>(uint64_t{bits(words[stride])} << 32 | bits(words[0]));
}

void run_embedding(const Frame &f, const Step &s, int64_t image) {
    const View x = view(f, s.node.x, image), y = view(f, s.node.out, image);
    const int64_t words = s.numbers[WORDS], rows = s.numbers[ROWS], what = s.numbers[REDUCTION],
                  count = f.plan->values[s.node.x].shape.channels / words, width = s.constants.size() / rows;
    // outside the table there is nothing: rarefy_program_run has looked, if not at what changes meanwhile
    const auto at = [&](int64_t i, int64_t column) {
        const uint64_t row = static_cast<uint64_t>(whole(x.at + i * words * x.stride, x.stride, words));
        return row < static_cast<uint64_t>(rows) ? s.constants.data() + static_cast<int64_t>(row) * width + column
                                                 : nullptr;
    };
    constexpr float NOTHING = std::numeric_limits<float>::quiet_NaN();
    const Share mine(f, width);
    for (int64_t from = mine.from; from < mine.to; from += SOME_COLUMNS) {
        const int64_t some = std::min(SOME_COLUMNS, mine.to - from);
        float *to = y.at + from * y.stride;
        for (int64_t i = 0; i < count; ++i) {
            const float *row = at(i, from);
            for (int64_t c = 0; c < some; ++c) {
                const float v = row ? row[c] : NOTHING;
                float &made = to[c * y.stride + (what == -1 ? i : 0)];
                if (what == -1 || i == 0) made = v;
                else if (what == RAREFY_REDUCE_MAX) made = v > made || std::isnan(v) ? v : made;
                else made += v;
            }
        }
        if (what == RAREFY_REDUCE_MEAN)
            for (int64_t c = 0; c < some; ++c) to[c * y.stride] /= static_cast<float>(count);
    }
}

}  // namespace

std::string check_rows(const Step &s, const float *words, int64_t numbers) {
    const int64_t each = s.numbers[WORDS], rows = s.numbers[ROWS];
    for (int64_t i = 0; i < numbers; i += each) {
        const int64_t row = whole(words + i, 1, each);
        if (row < 0 || row >= rows)
            return std::string(s.name) + ": " + std::to_string(row) + " is none of the " + std::to_string(rows) +
                   " rows of the embedding, 0 to " + std::to_string(rows - 1);
    }
    return "";
}

const Function EMBEDDING = {"embedding", infer_embedding, no_scratch, run_embedding};

}  // namespace rarefy::engine

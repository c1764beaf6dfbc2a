#include "engine/weights.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <numeric>

namespace rarefy::engine {

uint16_t to_bf16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7FFFFFFF) > 0x7F800000) return static_cast<uint16_t>(bits >> 16 | 0x40);  // NaN stays one
    return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

float from_bf16(uint16_t half) {
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

namespace {

template <class T>
void append(Buffer<uint8_t> &bytes, T value) {
    const size_t at = bytes.size();
    bytes.resize(at + sizeof value);
    std::memcpy(bytes.data() + at, &value, sizeof value);
}

void put(uint8_t *at, int32_t kind, float value, uint32_t offset) {
    const uint32_t half = kind == SPARSE_BF16 || kind == DENSE_BF16 ? to_bf16(value) : 0, word = half << 16 | offset;
    if (kind == SPARSE_BF16) std::memcpy(at, &word, sizeof word);
    else if (kind == DENSE_BF16) std::memcpy(at, &half, 2);
    else std::memcpy(at, &value, sizeof value);
}

// Panels of as many rows as there are lanes: a dense matrix's in order, a sparse one's by their length.
Weights make_vector_weights(const Matrix &matrix, const Entries &entries, const Config &config, int32_t lanes) {
    Weights out;
    const int32_t panels = ceil_div(matrix.rows, lanes);
    std::vector<int32_t> order(static_cast<size_t>(panels * lanes), -1);
    std::iota(order.begin(), order.begin() + matrix.rows, 0);
    if (config.sparse())
        std::stable_sort(order.begin(), order.begin() + matrix.rows,
                         [&](int32_t a, int32_t b) { return entries[a].size() > entries[b].size(); });
    Buffer<uint8_t> values;
    Buffer<uint16_t> index;
    Buffer<int64_t> starts{0};
    for (int32_t panel = 0; panel < panels; ++panel) {
        const int32_t *rows = order.data() + panel * lanes;
        const size_t length = entries[rows[0]].size();
        for (size_t k = 0; k < length; ++k)
            for (int32_t i = 0; i < lanes; ++i) {
                // padding reads the zero behind the vector
                const bool some = rows[i] >= 0 && k < entries[rows[i]].size();
                const Entry e = some ? entries[rows[i]][k] : Entry{matrix.channels, 0, 0.0f};
                if (config.bf16()) append(values, to_bf16(e.value));
                else append(values, e.value);
                if (config.sparse()) index.push_back(static_cast<uint16_t>(e.channel));
            }
        starts.push_back(starts.back() + static_cast<int64_t>(length) * lanes);
    }
    out.stored = starts.back();
    out.values = Array<uint8_t>(std::move(values));
    out.offsets = Array<uint16_t>(std::move(index));
    out.starts = Array<int64_t>(std::move(starts));
    if (config.sparse()) out.row_ids = Array<int32_t>(order);
    return out;
}

// Every row's taps, one after the other.
Weights make_plane_weights(const Entries &entries, const Config &config) {
    Buffer<uint8_t> values;
    Weights out;
    for (const auto &row : entries) {
        for (const Entry &e : row) {
            if (config.bf16()) append(values, to_bf16(e.value));
            else append(values, e.value);
        }
        out.stored += static_cast<int64_t>(row.size());
    }
    out.values = Array<uint8_t>(std::move(values));
    return out;
}

// Terms of a sum that are added one after the other, weights that are zero not counted: the error of a sum of positive
// terms is then about that of PyTorch's (tests/engine/test_layers.py). Rows of up to MOST_TERMS are one span, longer
// ones are cut into spans of up to SPAN_TERMS: sparse rows side by side are padded to the same length in each span.
constexpr int64_t SPAN_TERMS = 256, MOST_TERMS = 384;

// The number of spans of every row, the same whatever the config: so are the sums.
int64_t spans_of(const Entries &entries) {
    int64_t longest = 0, all = 0;
    for (const auto &row : entries) {
        const int64_t terms = std::count_if(row.begin(), row.end(), [](const Entry &e) { return e.value != 0.0f; });
        longest = std::max(longest, terms);
        all += terms;
    }
    const int64_t terms = std::max(longest / 2, all / static_cast<int64_t>(entries.size()));
    return terms <= MOST_TERMS ? 1 : (terms + SPAN_TERMS - 1) / SPAN_TERMS;
}

// A row's part in one block.
struct Part {
    int32_t row, flags;
    const Entry *from, *to;
    int64_t length() const { return to - from; }
};

class Maker {
 public:
    Maker(const Matrix &matrix, const Entries &entries, const Config &config, const Layout &layout)
        : matrix_(matrix), entries_(entries), config_(config), layout_(layout),
          blocks_(ceil_div(matrix.channels, config.block)),
          places_(int64_t{matrix.channels / matrix.groups} * matrix.taps) {
        const int64_t spans = spans_of(entries);
        span_ = (places_ + spans - 1) / spans;
    }

    Weights make() {
        for (int32_t block = 0; block < blocks_; ++block) {
            for (int32_t first = 0; first < matrix_.rows; first += CHUNK_ROWS) {
                chunks_.push_back(static_cast<int32_t>(groups_.size()));
                std::vector<Part> parts;
                for (int32_t row = first; row < std::min(matrix_.rows, first + CHUNK_ROWS); ++row)
                    add_part(block, row, parts);
                // rows of one group start and end in the same blocks; where they have the same spans, too, or are
                // dense and read the same pixels, they are of the same group of channels
                std::stable_sort(parts.begin(), parts.end(), [&](const Part &a, const Part &b) {
                    if (a.flags != b.flags) return a.flags < b.flags;
                    if (side_by_side(a) != side_by_side(b)) return side_by_side(a) < side_by_side(b);
                    return config_.sparse() && a.length() > b.length();
                });
                for (size_t i = 0; i < parts.size();) {
                    size_t n = 1;
                    while (n < static_cast<size_t>(config_.rows) && i + n < parts.size() &&
                           parts[i + n].flags == parts[i].flags && side_by_side(parts[i + n]) == side_by_side(parts[i]))
                        ++n;
                    add_groups(block, parts.data() + i, n);
                    i += n;
                }
            }
        }
        chunks_.push_back(static_cast<int32_t>(groups_.size()));
        Weights out;
        out.stored = stored_;
        out.values = Array<uint8_t>(std::move(values_));
        out.offsets = Array<uint16_t>(std::move(offsets_));
        out.groups = Array<Group>(std::move(groups_));
        out.row_ids = Array<int32_t>(std::move(row_ids_));
        out.chunks = Array<int32_t>(std::move(chunks_));
        return out;
    }

 private:
    bool one_span() const { return span_ == places_; }
    int32_t channels_of(int32_t row) const { return row / (matrix_.rows / matrix_.groups); }
    int32_t side_by_side(const Part &part) const { return config_.sparse() && one_span() ? 0 : channels_of(part.row); }

    // A row's entries in [from, to): places are numbers of channels times the kernel's positions, and more.
    Part between(const Part &of, int64_t from, int64_t to) const {
        const auto before = [&](const Entry &e, int64_t place) {
            return int64_t{e.channel} * matrix_.taps + e.tap < place;
        };
        const Entry *const begin = std::lower_bound(of.from, of.to, from, before);
        return {of.row, of.flags, begin, std::lower_bound(begin, of.to, to, before)};
    }

    int64_t block_begin(int32_t block) const {
        return std::min<int64_t>(int64_t{block} * config_.block, matrix_.channels) * matrix_.taps;
    }

    void add_part(int32_t block, int32_t row, std::vector<Part> &parts) const {
        const std::vector<Entry> &all = entries_[row];
        const Entry *const end = all.data() + all.size();
        Part part = between({row, 0, all.data(), end}, block_begin(block), block_begin(block + 1));
        if (!one_span()) {  // even if there are no entries: so that the flags of rows side by side are the same
            const int64_t first = channels_of(row) * places_;
            if (first < block_begin(block + 1) && first + places_ > block_begin(block)) parts.push_back(part);
            return;
        }
        if (part.from == part.to && !(all.empty() && block == 0)) return;
        part.flags = (part.from == all.data() ? GROUP_FIRST : 0) | (part.to == end ? GROUP_LAST : 0);
        parts.push_back(part);
    }

    // Of rows' parts in a block, span by span.
    void add_groups(int32_t block, const Part *parts, size_t count) {
        if (one_span()) return add_group(block, parts, count);
        const int64_t first = channels_of(parts[0].row) * places_, last = first + places_,
                      end = std::min(last, block_begin(block + 1));
        std::vector<Part> pieces(count);
        for (int64_t from = std::max(first, block_begin(block)), to; from < end; from = to) {
            const int64_t span = (from - first) / span_, span_end = std::min(last, first + (span + 1) * span_);
            to = std::min(end, span_end);
            int32_t flags = to == last ? GROUP_LAST : to == span_end ? GROUP_KEEPS : 0;
            if (from == first + span * span_) flags |= span ? GROUP_FRESH : GROUP_FIRST;
            if (to == span_end && span) flags |= GROUP_ADDS;
            for (size_t r = 0; r < count; ++r) {
                pieces[r] = between(parts[r], from, to);
                pieces[r].flags = flags;
            }
            add_group(block, pieces.data(), count);
        }
    }

    uint32_t offset(int32_t block, const Entry &e) const {
        return static_cast<uint32_t>((e.channel - block * config_.block) * config_.channel_step(layout_) +
                                     layout_.taps[e.tap]);
    }

    void add_group(int32_t block, const Part *parts, size_t count) {
        int64_t length = 0;
        for (size_t r = 0; r < count; ++r) length = std::max(length, parts[r].length());
        Group group = {};
        group.length = static_cast<int32_t>(length);
        group.weight = static_cast<int32_t>(stored_);
        group.offset = static_cast<int32_t>(offsets_.size());
        group.flags = parts[0].flags;
        stored_ += length * config_.rows;
        const uint32_t zero = static_cast<uint32_t>(config_.block * config_.channel_step(layout_));
        if (!config_.sparse()) {
            std::vector<uint16_t> shared;
            for (int64_t k = 0; k < length; ++k)
                shared.push_back(static_cast<uint16_t>(offset(block, parts[0].from[k])));
            const auto known = known_.emplace(shared, group.offset);
            group.offset = known.first->second;
            if (known.second) offsets_.insert(offsets_.end(), shared.begin(), shared.end());
        }
        const size_t rows = static_cast<size_t>(config_.rows), begin = values_.size(),
                     width = config_.kind == DENSE_BF16 ? 2 : 4;
        values_.resize(begin + static_cast<size_t>(length) * rows * width);
        if (config_.kind == SPARSE_F32) offsets_.resize(offsets_.size() + static_cast<size_t>(length) * rows);
        uint8_t *value = values_.data() + begin;
        uint16_t *place = offsets_.data() + group.offset;
        for (int64_t k = 0; k < length; ++k) {
            for (size_t r = 0; r < rows; ++r, value += width) {
                const bool some = r < count && k < parts[r].length();
                const uint32_t at = some ? offset(block, parts[r].from[k]) : zero;
                put(value, config_.kind, some ? parts[r].from[k].value : 0.0f, at);
                if (config_.kind == SPARSE_F32) *place++ = static_cast<uint16_t>(at);
            }
        }
        for (size_t r = 0; r < static_cast<size_t>(config_.rows); ++r)
            row_ids_.push_back(r < count ? parts[r].row : -1);
        groups_.push_back(group);
    }

    const Matrix &matrix_;
    const Entries &entries_;
    const Config &config_;
    const Layout &layout_;
    const int32_t blocks_;
    const int64_t places_;  // of a row's weights
    int64_t span_;
    int64_t stored_ = 0;
    Buffer<uint8_t> values_;
    Buffer<uint16_t> offsets_;
    Buffer<Group> groups_;
    Buffer<int32_t> row_ids_, chunks_;
    std::map<std::vector<uint16_t>, int32_t> known_;
};

}  // namespace

Entries entries_of(const Matrix &matrix, const float *weight, bool all) {
    Entries rows(matrix.rows);
    const int32_t rows_a_group = matrix.rows / matrix.groups, channels = matrix.channels / matrix.groups;
    for (int32_t row = 0; row < matrix.rows; ++row) {
        const float *w = weight + int64_t{row} * channels * matrix.taps;
        for (int32_t c = 0; c < channels; ++c)
            for (int32_t tap = 0; tap < matrix.taps; ++tap) {
                const float value = w[int64_t{c} * matrix.taps + tap];
                if (all || value != 0.0f) rows[row].push_back({row / rows_a_group * channels + c, tap, value});
            }
    }
    return rows;
}

int32_t largest_block(const Config &config, const Layout &layout) {
    // the largest offset is that of the zeros, vectors * lanes of which follow the last channel
    if (layout.channel_floats + config.vectors * layout.lanes > LARGEST_OFFSET) return 0;
    return static_cast<int32_t>(LARGEST_OFFSET / config.channel_step(layout));
}

Weights make_weights(const Matrix &matrix, const Entries &entries, const Config &config, const Layout &layout) {
    if (config.vector) return make_vector_weights(matrix, entries, config, layout.lanes);
    if (config.planes()) return make_plane_weights(entries, config);
    return Maker(matrix, entries, config, layout).make();
}

namespace {

float value_at(const Weights &weights, const Config &config, int64_t i) {
    if (config.kind == SPARSE_BF16 && !config.vector) {
        uint32_t word;
        std::memcpy(&word, weights.values.data() + i * 4, sizeof word);
        return from_bf16(static_cast<uint16_t>(word >> 16));
    }
    if (config.bf16()) {
        uint16_t half;
        std::memcpy(&half, weights.values.data() + i * 2, sizeof half);
        return from_bf16(half);
    }
    float value;
    std::memcpy(&value, weights.values.data() + i * 4, sizeof value);
    return value;
}

// The offset of weight r, k of a group.
uint32_t offset_at(const Weights &weights, const Config &config, const Group &group, int64_t k, int32_t r) {
    if (!config.sparse()) return weights.offsets[group.offset + k];
    if (config.kind == SPARSE_F32) return weights.offsets[group.offset + k * config.rows + r];
    uint32_t word;
    std::memcpy(&word, weights.values.data() + (group.weight + k * config.rows + r) * 4, sizeof word);
    return word & 0xFFFF;
}

}  // namespace

Entries entries_of(const Matrix &matrix, const Weights &weights, const Config &config, const Layout &layout) {
    Entries rows(matrix.rows);
    if (config.vector) {
        const int32_t lanes = layout.lanes;
        for (int64_t panel = 0; panel + 1 < weights.starts.size(); ++panel)
            for (int64_t i = weights.starts[panel]; i < weights.starts[panel + 1]; ++i) {
                const int64_t at = panel * lanes + i % lanes;
                const int32_t row = config.sparse() ? weights.row_ids[at] : static_cast<int32_t>(at);
                const int32_t column =
                    config.sparse() ? weights.offsets[i] : static_cast<int32_t>((i - weights.starts[panel]) / lanes);
                if (row >= 0 && row < matrix.rows && column < matrix.channels)
                    rows[row].push_back({column, 0, value_at(weights, config, i)});
            }
    } else if (config.planes()) {
        for (int32_t row = 0; row < matrix.rows; ++row)
            for (int32_t tap = 0; tap < matrix.taps; ++tap)
                rows[row].push_back({row / (matrix.rows / matrix.groups), tap,
                                     value_at(weights, config, int64_t{row} * matrix.taps + tap)});
    } else {
        std::map<uint32_t, int32_t> tap_at;
        for (int32_t k = 0; k < matrix.taps; ++k) tap_at[config.direct() ? 0 : layout.taps[k]] = k;
        const int32_t blocks = ceil_div(matrix.channels, config.block), chunks = ceil_div(matrix.rows, CHUNK_ROWS);
        const uint32_t step = static_cast<uint32_t>(config.channel_step(layout));
        for (int32_t block = 0; block < blocks; ++block)
            for (int32_t g = weights.chunks[block * chunks]; g < weights.chunks[(block + 1) * chunks]; ++g)
                for (int64_t k = 0; k < weights.groups[g].length; ++k)
                    for (int32_t r = 0; r < config.rows; ++r) {
                        const int32_t row = weights.row_ids[int64_t{g} * config.rows + r];
                        const uint32_t offset = offset_at(weights, config, weights.groups[g], k, r);
                        if (row < 0 || offset == config.block * step) continue;
                        const int32_t channel = block * config.block + static_cast<int32_t>(offset / step);
                        rows[row].push_back(
                            {channel, tap_at.at(offset % step),
                             value_at(weights, config, weights.groups[g].weight + k * config.rows + r)});
                    }
    }
    for (auto &row : rows)
        std::sort(row.begin(), row.end(), [](const Entry &a, const Entry &b) {
            return a.channel != b.channel ? a.channel < b.channel : a.tap < b.tap;
        });
    return rows;
}

std::string check_entries(const Matrix &matrix, const Entries &entries, const Config &config) {
    const int32_t rows_a_group = matrix.rows / matrix.groups, channels = matrix.channels / matrix.groups;
    for (int32_t row = 0; row < matrix.rows; ++row) {
        const std::vector<Entry> &all = entries[row];
        if (!config.sparse() && static_cast<int64_t>(all.size()) != int64_t{channels} * matrix.taps)
            return "a row has too many or too few weights";
        for (size_t i = 0; i < all.size(); ++i) {
            if (all[i].channel / channels != row / rows_a_group) return "a weight is of another group of channels";
            if (i && all[i].channel == all[i - 1].channel && all[i].tap == all[i - 1].tap)
                return "a weight is there twice";
        }
    }
    return "";
}

namespace {

std::string check_vector(const Matrix &matrix, const Weights &weights, const Config &config, int32_t lanes,
                         int64_t stored) {
    const int64_t panels = ceil_div(matrix.rows, lanes);
    if (weights.groups.size() || weights.chunks.size()) return "there is more than its kernel takes";
    if (weights.starts.size() != panels + 1 || weights.starts[0] != 0 || weights.starts[panels] != stored)
        return "rows do not fit the weights";
    if (weights.offsets.size() != (config.sparse() ? stored : 0)) return "columns do not fit the weights";
    if (weights.row_ids.size() != (config.sparse() ? panels * lanes : 0)) return "rows do not fit the weights";
    for (int64_t panel = 0; panel < panels; ++panel) {
        const int64_t from = weights.starts[panel], to = weights.starts[panel + 1];
        if (to < from || to > stored || (to - from) % lanes) return "a row is out of range";
        if (!config.sparse() && to - from != int64_t{matrix.channels} * lanes) return "a row is out of range";
    }
    for (int64_t i = 0; i < weights.offsets.size(); ++i)
        if (weights.offsets[i] > matrix.channels) return "a column is out of range";
    std::vector<bool> there(static_cast<size_t>(matrix.rows));
    for (int64_t i = 0; i < weights.row_ids.size(); ++i) {
        const int32_t row = weights.row_ids[i];
        if (row < -1 || row >= matrix.rows || (row >= 0 && there[row])) return "a row is out of range";
        if (row >= 0) there[row] = true;
    }
    const bool whole = !config.sparse() || std::find(there.begin(), there.end(), false) == there.end();
    return whole ? "" : "a row has no result";
}

// What is there of a row, group by group.
struct Row {
    bool sums = false, totals = false, ended = false;

    // Whether a group with these flags may follow.
    bool take(int32_t flags) {
        const bool first = flags & GROUP_FIRST, last = flags & GROUP_LAST, fresh = flags & GROUP_FRESH,
                   adds = flags & GROUP_ADDS, keeps = flags & GROUP_KEEPS;
        if (flags & ~(GROUP_FIRST | GROUP_LAST | GROUP_FRESH | GROUP_ADDS | GROUP_KEEPS) || ended) return false;
        if (first ? fresh || sums || totals : fresh ? sums || !totals : !sums) return false;
        if ((last && keeps) || adds != (totals && (last || keeps))) return false;
        sums = !last && !keeps;
        totals = totals || keeps;
        ended = last;
        return true;
    }
};

// The offsets that weights of a block may have: a kernel position of one of its channels, or the zeros behind the
// block. A byte for each, not a bit, since every weight of a file is looked up.
class Places {
 public:
    Places(const Config &config, const Layout &layout)
        : taps_(config.direct() ? std::vector<uint16_t>{0} : layout.taps), step_(config.channel_step(layout)),
          zero_(config.block * step_), there_(static_cast<size_t>(std::min<int64_t>(zero_, LARGEST_OFFSET)) + 1) {}

    // For a block of so many channels.
    void of(int64_t channels) {
        if (channels == channels_) return;
        channels_ = channels;
        std::fill(there_.begin(), there_.end(), 0);
        for (int64_t channel = 0; channel < channels; ++channel)
            for (const uint16_t tap : taps_) add(channel * step_ + tap);
        add(zero_);
    }

    // Whether all offsets of a group are such.
    bool all(const Weights &weights, const Config &config, const Group &group) const {
        if (config.kind == SPARSE_BF16) {
            const uint8_t *words = weights.values.data() + int64_t{group.weight} * 4;
            return all(int64_t{group.length} * config.rows, [=](int64_t i) {
                uint16_t offset;  // the lower half of a word
                std::memcpy(&offset, words + i * 4, sizeof offset);
                return offset;
            });
        }
        const uint16_t *offsets = weights.offsets.data() + group.offset;
        return all(int64_t{group.length} * (config.sparse() ? config.rows : 1), [=](int64_t i) { return offsets[i]; });
    }

 private:
    template <class Offset>
    bool all(int64_t count, const Offset &offset) const {
        uint16_t most = 0;
        for (int64_t i = 0; i < count; ++i) most = std::max(most, offset(i));
        if (most >= there_.size()) return false;
        uint8_t right = 1;
        for (int64_t i = 0; i < count; ++i) right &= there_[offset(i)];
        return right;
    }
    void add(int64_t offset) {
        if (offset < static_cast<int64_t>(there_.size())) there_[static_cast<size_t>(offset)] = 1;
    }

    const std::vector<uint16_t> taps_;
    const int64_t step_, zero_;
    int64_t channels_ = 0;
    std::vector<uint8_t> there_;
};

std::string check_tiles(const Matrix &matrix, const Weights &weights, const Config &config, const Layout &layout,
                        int64_t stored) {
    const int64_t blocks = ceil_div(matrix.channels, config.block), chunks = ceil_div(matrix.rows, CHUNK_ROWS);
    const int64_t count = weights.groups.size();
    if (weights.starts.size()) return "there is more than its kernel takes";
    if (weights.chunks.size() != blocks * chunks + 1 || weights.chunks[0] != 0 ||
        weights.chunks[blocks * chunks] != count)
        return "chunks do not fit the groups";
    if (weights.row_ids.size() != count * config.rows) return "rows do not fit the groups";
    if (weights.offsets.size() > stored || (config.kind == SPARSE_F32 && weights.offsets.size() != stored) ||
        (config.kind == SPARSE_BF16 && weights.offsets.size()))
        return "offsets do not fit the weights";
    Places places(config, layout);
    std::vector<Row> rows(static_cast<size_t>(matrix.rows));
    int64_t next = 0;  // weights lie in the order of their groups, so that no work is more than what the file holds
    for (int64_t part = 0; part < blocks * chunks; ++part) {
        if (weights.chunks[part + 1] < weights.chunks[part] || weights.chunks[part + 1] > count)
            return "chunks are out of order";
        const int64_t block = part / chunks;
        if (part % chunks == 0) places.of(std::min<int64_t>(config.block, matrix.channels - block * config.block));
        for (int64_t g = weights.chunks[part]; g < weights.chunks[part + 1]; ++g) {
            const Group &group = weights.groups[g];
            const int64_t weight_count = int64_t{group.length} * config.rows;
            if (group.length < 0 || group.offset < 0) return "a group is out of range";
            if (group.weight != next || (next += weight_count) > stored) return "a group's weights are out of range";
            if (config.kind == SPARSE_F32
                    ? group.offset != group.weight
                    : !config.sparse() && group.offset + int64_t{group.length} > weights.offsets.size())
                return "a group's offsets are out of range";
            for (int32_t r = 0; r < config.rows; ++r) {
                const int32_t id = weights.row_ids[g * config.rows + r];
                if (id == -1) continue;
                if (id < part % chunks * CHUNK_ROWS || id >= (part % chunks + 1) * CHUNK_ROWS || id >= matrix.rows)
                    return "a row is out of range";
                if (!rows[static_cast<size_t>(id)].take(group.flags)) return "a row begins twice, or not at all";
            }
            if (!places.all(weights, config, group)) return "an offset is out of range";
        }
    }
    if (next != stored) return "there are weights that no group has";
    return std::all_of(rows.begin(), rows.end(), [](const Row &row) { return row.ended; }) ? "" : "a row has no result";
}

}  // namespace

std::string check_weights(const Matrix &matrix, const Weights &weights, const Config &config, const Layout &layout) {
    const int64_t width = config.kind == DENSE_BF16 || (config.vector && config.bf16()) ? 2 : 4;
    if (weights.values.size() % width) return "weights are cut";
    const int64_t stored = weights.values.size() / width;
    if (stored != weights.stored) return "the number of weights is wrong";
    if (config.vector) return check_vector(matrix, weights, config, layout.lanes, stored);
    if (!config.planes()) return check_tiles(matrix, weights, config, layout, stored);
    const bool more = weights.offsets.size() || weights.groups.size() || weights.row_ids.size() ||
                      weights.chunks.size() || weights.starts.size();
    return stored == int64_t{matrix.rows} * matrix.taps && !more ? "" : "its weights do not fit its kernel";
}

}  // namespace rarefy::engine

// Weights as the kernels read them: cut into blocks of channels whose packed pixels fit in a cache, rows sorted and
// grouped.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "engine/memory.h"
#include "engine/tiling.h"

namespace rarefy::engine {

// An array that is owned, or that lies in a file that was mapped.
template <class T>
class Array {
 public:
    Array() = default;
    explicit Array(Buffer<T> items)
        : own_(std::move(items)), data_(own_.data()), size_(static_cast<int64_t>(own_.size())) {}
    explicit Array(const std::vector<T> &items) : Array(Buffer<T>(items.begin(), items.end())) {}
    Array(const T *data, int64_t size) : data_(data), size_(size) {}
    Array(Array &&other) noexcept { *this = std::move(other); }
    Array &operator=(Array &&other) noexcept {
        const bool owned = other.data_ == other.own_.data();
        own_ = std::move(other.own_);
        data_ = owned ? own_.data() : other.data_;
        size_ = other.size_;
        return *this;
    }
    const T *data() const { return data_; }
    int64_t size() const { return size_; }
    int64_t bytes() const { return size_ * static_cast<int64_t>(sizeof(T)); }
    const T &operator[](int64_t i) const { return data_[i]; }

 private:
    Buffer<T> own_;
    const T *data_ = nullptr;
    int64_t size_ = 0;
};

// How a convolution is computed.
struct Config {
    int32_t kind;     // enum WeightKind
    int32_t vector;   // 1: one pixel at a time, in panels of rows (vectors in, vectors out)
    int32_t rows;     // R
    int32_t vectors;  // T
    int32_t form;     // enum Form
    int32_t block;    // channels of a block
    int32_t reserved[2];

    bool planes() const { return !vector && form == static_cast<int32_t>(Form::PLANES); }
    bool tiled() const { return !vector && !planes(); }
    bool direct() const { return !vector && form == static_cast<int32_t>(Form::DIRECT); }
    // What an offset grows by from one channel of a block to the next.
    int64_t channel_step(const Layout &layout) const { return direct() ? 1 : layout.channel_floats; }
    bool sparse() const { return kind == SPARSE_F32 || kind == SPARSE_BF16; }
    bool bf16() const { return kind == SPARSE_BF16 || kind == DENSE_BF16; }
};

// One weight of an output row: input channel and kernel position.
struct Entry {
    int32_t channel, tap;
    float value;
};
typedef std::vector<std::vector<Entry>> Entries;

// What Weights describes.
struct Matrix {
    int32_t rows;      // output channels
    int32_t channels;  // input channels
    int32_t taps;      // kernel positions
    int32_t groups;    // of the convolution
};

// Rows that are sorted, and given to a thread, together. Not measured apart.
enum { CHUNK_ROWS = 64 };

struct Weights {
    Array<uint8_t> values;    // float, uint16, or uint32 words of bf16 and offset
    Array<uint16_t> offsets;  // of packed floats; column numbers for Config::vector
    Array<Group> groups;
    Array<int32_t> row_ids;  // rows for each group; sparse Config::vector: lanes for each panel
    Array<int32_t> chunks;   // first group of each (block, chunk), and the number of groups
    Array<int64_t> starts;   // Config::vector: first weight of every panel, and the number of weights
    int64_t stored = 0;      // weights, padding included

    int64_t bytes() const {
        return values.bytes() + offsets.bytes() + groups.bytes() + row_ids.bytes() + chunks.bytes() + starts.bytes();
    }
};

inline int32_t ceil_div(int32_t a, int32_t b) { return (a + b - 1) / b; }

// Every row's weights, sorted by channel and position: those that are not zero, or all.
Entries entries_of(const Matrix &matrix, const float *weight, bool all);

// The most channels of a block whose offsets have 16 bits.
int32_t largest_block(const Config &config, const Layout &layout);

// Dense configs take all entries of every row. A config that is not tiled needs nothing of the layout but its lanes.
Weights make_weights(const Matrix &matrix, const Entries &entries, const Config &config, const Layout &layout);

// The entries that checked weights were made of, sorted, padding left out; for another instruction set.
Entries entries_of(const Matrix &matrix, const Weights &weights, const Config &config, const Layout &layout);

// An empty string, or why entries are not of this matrix: each weight at most once, in its own group of channels; all
// of them for a dense config.
std::string check_entries(const Matrix &matrix, const Entries &entries, const Config &config);

// An empty string, or what is wrong with weights that were read from a file: whatever holds here makes every access of
// the kernels fall inside their buffers.
std::string check_weights(const Matrix &matrix, const Weights &weights, const Config &config, const Layout &layout);

uint16_t to_bf16(float value);
float from_bf16(uint16_t half);

}  // namespace rarefy::engine

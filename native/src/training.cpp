// The three products of a training step with sparse weights, y = W x, dx = W^T dy and dW = dy x^T where W lives, of
// linear layers and convolutions. Built once for each instruction set. rarefy_training.h says what lies where.
//
// Positions lie in the lanes: a tensor is transposed into planes, one a channel, and an entry of W takes a whole tile
// of a plane, T vectors, with one weight. A tile's sums of one row stay in registers over all its entries.
#include <stddef.h>

#include "isa.h"
#include "mode.h"
#include "parallel.h"
#include "rarefy_training.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace rarefy {
namespace RAREFY_ISA {
namespace {

#include "engine/vec-inl.h"

#define RAREFY_UNROLL _Pragma("GCC unroll 32")

#include "engine/transpose-inl.h"

constexpr int MOST = RAREFY_TILE;  // vectors of a tile
constexpr int LINE = 16;           // floats of a cache line
constexpr int AHEAD = 32;          // rows that are fetched ahead, by hand: they are too many streams for the machine

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- transposing

alignas(64) const float ZEROS[L] = {};

// n positions of a tensor, one every `step` floats, into planes; zeros behind them up to a whole vector.
void pack_run(const float *from, int64_t step, int64_t n, int64_t channels, int64_t channel_step, float *to,
              int64_t plane) {
    const int64_t end = up(n, L) * L;
    if (channel_step != 1) {
        for (int64_t c = 0; c < channels; ++c) {
            const float *x = from + c * channel_step;
            float *out = to + c * plane;
            if (step == 1) __builtin_memcpy(out, x, static_cast<size_t>(n) * sizeof *x);
            else
                for (int64_t p = 0; p < n; ++p) out[p] = x[p * step];
            for (int64_t p = n; p < end; ++p) out[p] = 0.0f;
        }
        return;
    }
    for (int64_t p = 0; p < end; p += L) {
        int64_t c = 0;
        for (; c + L <= channels; c += L) {
            const auto row = [=](int i) { return p + i < n ? from + (p + i) * step + c : ZEROS; };
            if (c % LINE == 0)
                RAREFY_UNROLL for (int i = 0; i < L; ++i) __builtin_prefetch(row(i) + AHEAD * step, 0, 2);
            transpose_square(row, [=](int i) { return to + (c + i) * plane + p; });
        }
        for (; c < channels; ++c)
            for (int i = 0; i < L; ++i) to[c * plane + p + i] = p + i < n ? from[(p + i) * step + c] : 0.0f;
    }
}

// The way back: n positions of sums, [channels][row], to a tensor.
void unpack_run(const float *from, int64_t row, int64_t n, int64_t channels, float *to, int64_t step,
                int64_t channel_step) {
    if (channel_step != 1) {
        for (int64_t c = 0; c < channels; ++c) {
            const float *sums = from + c * row;
            float *y = to + c * channel_step;
            if (step == 1) __builtin_memcpy(y, sums, static_cast<size_t>(n) * sizeof *y);
            else
                for (int64_t p = 0; p < n; ++p) y[p * step] = sums[p];
        }
        return;
    }
    float waste[L];
    for (int64_t p = 0; p < n; p += L) {
        int64_t c = 0;
        for (; c + L <= channels; c += L) {
            const auto place = [=, &waste](int i) { return p + i < n ? to + (p + i) * step + c : waste; };
            if (c % LINE == 0)
                RAREFY_UNROLL for (int i = 0; i < L; ++i) __builtin_prefetch(place(i) + AHEAD * step, 1, 2);
            transpose_square([=](int i) { return from + (c + i) * row + p; }, place);
        }
        for (; c < channels; ++c)
            for (int i = 0; i < L && p + i < n; ++i) to[(p + i) * step + c] = from[c * row + p + i];
    }
}

typedef rarefy_planes Planes;

// Which of a tensor's rows or columns a phase has: those from `first` on, `count` of them, one every `stride`, at place
// `at` and the following of its plane, which has `size` places.
struct Span {
    int64_t first, count, at;
};
inline Span span(int64_t size, int64_t stride, int64_t phase, int64_t low, int64_t places) {
    const int64_t count = phase < size ? up(size - phase, stride) : 0, at = -low;
    const int64_t room = places - at;
    return {phase, count < room ? count : room < 0 ? 0 : room, at};
}

// One image, or one run of rows `width` long.
void pack(const Planes &g, const float *x, int64_t width, float *planes) {
    for (int64_t phase = 0; phase < g.phases; ++phase) {
        const Span rows = span(g.height, g.stride_y, g.phase[2 * phase], g.low_y, g.rows);
        const Span columns = span(width, g.stride_x, g.phase[2 * phase + 1], g.low_x, g.columns);
        for (int64_t i = 0; i < rows.count; ++i)
            pack_run(x + (rows.first + i * g.stride_y) * g.step_y + columns.first * g.step_x, g.stride_x * g.step_x,
                     columns.count, g.channels, g.step_c,
                     planes + phase * g.phase_size + (rows.at + i) * g.columns + columns.at, g.plane);
    }
}

// The sums of positions [begin, begin + size) of every phase's channels to one image.
void unpack(const Planes &g, const float *sums, int64_t row, int64_t begin, int64_t size, int64_t width, float *y) {
    for (int64_t phase = 0; phase < g.phases; ++phase) {
        const Span rows = span(g.height, g.stride_y, g.phase[2 * phase], 0, g.height);
        const Span columns = span(width, g.stride_x, g.phase[2 * phase + 1], 0, width);
        const float *from = sums + phase * g.channels * row;
        for (int64_t i = begin / g.columns; i < rows.count && i * g.columns < begin + size; ++i) {
            const int64_t line = i * g.columns, end = least(line + columns.count, begin + size);
            const int64_t at = line < begin ? begin : line;
            if (at >= end) continue;
            unpack_run(
                from + (at - begin), row, end - at, g.channels,
                y + (rows.first + i * g.stride_y) * g.step_y + (columns.first + (at - line) * g.stride_x) * g.step_x,
                g.stride_x * g.step_x, g.step_c);
        }
    }
}

// ---- products

struct Tile {
    const float *planes;  // from the tile's place on
    const int32_t *rows;  // of one block: a row and its number of entries, again and again
    const int32_t *offset;
    int64_t count;
    bool first;
    // sums of rows
    const float *weights, *bias;
    float *sums;
    int64_t sums_row;
    // products of rows
    const float *others;
    int64_t others_row;
    float *products;
};

// Rows come in no order of memory that the machine would see.
inline int64_t next_row(const Tile &t, int64_t i) { return t.rows[i + 1 < t.count ? 2 * i + 2 : 2 * i]; }
template <int T>
inline void fetch(const float *row) {
    RAREFY_UNROLL for (int v = 0; v < T * L; v += LINE) __builtin_prefetch(row + v);
}

// sums[row] (+)= sum over entries of w * planes[offset].
template <int T>
void add_rows(const Tile &t) {
    const float *w = t.weights;
    const int32_t *offset = t.offset;
    const float *const planes = t.planes;
    for (int64_t i = 0; i < t.count; ++i) {
        const int32_t row = t.rows[2 * i], entries = t.rows[2 * i + 1];
        float *const to = t.sums + row * t.sums_row;
        V a[T];
        if (t.first) {
            const V bias = all(t.bias ? t.bias[row] : 0.0f);
            RAREFY_UNROLL for (int v = 0; v < T; ++v) a[v] = bias;
        } else {
            if (entries == 0) return;  // the rows with the most entries come first
            RAREFY_UNROLL for (int v = 0; v < T; ++v) a[v] = loadu(to + v * L);
        }
        fetch<T>(t.sums + next_row(t, i) * t.sums_row);
        for (const float *const stop = w + entries; w != stop; ++w, ++offset) {
            const V weight = all(*w);
            const float *x = planes + *offset;
            RAREFY_UNROLL for (int v = 0; v < T; ++v) a[v] = fma(weight, loadu(x + v * L), a[v]);
        }
        RAREFY_UNROLL for (int v = 0; v < T; ++v) storeu(to + v * L, a[v]);
    }
}

// out[i] += the sum of the lanes of a[i].
inline void add_totals(const V (&a)[4], float *out) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
    __m256 h[4];
    RAREFY_UNROLL for (int i = 0; i < 4; ++i) h[i] =
        _mm256_add_ps(_mm512_castps512_ps256(a[i]), _mm512_extractf32x8_ps(a[i], 1));
#else
    const V(&h)[4] = a;
#endif
    const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(h[0], h[1]), _mm256_hadd_ps(h[2], h[3]));
    const __m128 sum = _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm_loadu_ps(out), sum));
#else
    for (int i = 0; i < 4; ++i) out[i] += total(a[i]);
#endif
}

// products[entry] += sum over the tile of others[row] * planes[offset].
template <int T>
void multiply_rows(const Tile &t) {
    float *out = t.products;
    const int32_t *offset = t.offset;
    const float *const planes = t.planes;
    for (int64_t i = 0; i < t.count; ++i) {
        const int32_t row = t.rows[2 * i], entries = t.rows[2 * i + 1];
        if (entries == 0) return;
        const float *from = t.others + row * t.others_row;
        V y[T];
        RAREFY_UNROLL for (int v = 0; v < T; ++v) y[v] = loadu(from + v * L);
        fetch<T>(t.others + next_row(t, i) * t.others_row);
        int32_t k = 0;
        for (; k + 4 <= entries; k += 4) {
            V a[4];
            RAREFY_UNROLL for (int j = 0; j < 4; ++j) {
                const float *x = planes + offset[k + j];
                a[j] = mul(y[0], loadu(x));
                RAREFY_UNROLL for (int v = 1; v < T; ++v) a[j] = fma(y[v], loadu(x + v * L), a[j]);
            }
            add_totals(a, out + k);
        }
        for (; k < entries; ++k) {
            const float *x = planes + offset[k];
            V a = mul(y[0], loadu(x));
            RAREFY_UNROLL for (int v = 1; v < T; ++v) a = fma(y[v], loadu(x + v * L), a);
            out[k] += total(a);
        }
        out += entries, offset += entries;
    }
}

typedef void Rows(const Tile &);
#define RAREFY_EACH(f) f<1>, f<2>, f<3>, f<4>, f<5>, f<6>, f<7>, f<8>, f<9>, f<10>, f<11>, f<12>
Rows *const ADD[] = {RAREFY_EACH(add_rows)};
Rows *const MULTIPLY[] = {RAREFY_EACH(multiply_rows)};
static_assert(sizeof ADD / sizeof *ADD == MOST, "one function for every number of vectors");

typedef rarefy_entries Entries;

// How positions [0, size) are cut into tiles.
struct Tiles {
    int64_t count, vectors;
    explicit Tiles(int64_t size, int64_t most) {
        const int64_t n = up(size, L);
        count = up(n, most);
        vectors = up(n, count);
    }
    int64_t width() const { return vectors * L; }
};

// Every block of one tile.
void tile(Rows *rows, const Entries &e, Tile t) {
    for (int64_t block = 0; block < e.blocks; ++block) {
        t.first = block == 0;
        t.rows = e.rows + 2 * block * e.count;
        t.count = e.count;
        rows(t);
        const int64_t entries = e.begin[block + 1] - e.begin[block];
        t.offset += entries;
        if (t.weights) t.weights += entries;
        if (t.products) t.products += entries;
    }
}

// The sums of all rows, tile by tile, to an image: positions are those of the grid that `out` is laid out in.
void sums(const Entries &e, const float *weights, const float *bias, const float *planes, const Planes &out,
          int64_t width, int64_t most, float *scratch, float *y) {
    // positions run from the first of the first phase's to the last of any phase's
    int64_t rows = 0, columns = 0;
    for (int64_t phase = 0; phase < out.phases; ++phase) {
        const int64_t r = span(out.height, out.stride_y, out.phase[2 * phase], 0, out.height).count;
        const int64_t c = span(width, out.stride_x, out.phase[2 * phase + 1], 0, width).count;
        rows = r > rows ? r : rows;
        columns = c > columns ? c : columns;
    }
    if (rows == 0 || columns == 0) return;
    const int64_t size = (rows - 1) * out.columns + columns;
    const Tiles tiles(size, most);
    const int64_t row = tiles.width() + LINE;  // so that rows begin in different sets of the cache
    for (int64_t i = 0; i < tiles.count; ++i) {
        Tile t = {};
        t.planes = planes + i * tiles.width();
        t.offset = e.offset;
        t.weights = weights, t.bias = bias;
        t.sums = scratch, t.sums_row = row;
        tile(ADD[tiles.vectors - 1], e, t);
        unpack(out, scratch, row, i * tiles.width(), tiles.width(), width, y);
    }
}

// ---- whole layers

inline void in_order(const Entries &e, const float *values, float *out) {
    for (int64_t i = 0; i < e.begin[e.blocks]; ++i) out[i] = values[e.which[i]];
}

// A dense weight is passed over once, part by part: it is larger than the caches, its live values are not.
constexpr int64_t PART = 4096;

void take(const float *weight, int64_t n, const int32_t *place, int64_t entries, float *values, int64_t *counts) {
    counts[0] = counts[1] = 0;
    int64_t i = 0;
    for (int64_t begin = 0; begin < n; begin += PART) {
        const int64_t end = least(n, begin + PART);
        int32_t some = 0, taken = 0;
        for (int64_t k = begin; k < end; ++k) some += weight[k] != 0.0f;
        for (; i < entries && place[i] < end; ++i) {
            values[i] = weight[place[i]];
            taken += values[i] != 0.0f;
        }
        counts[0] += some, counts[1] += taken;
    }
}

// The way back, for the weights from `begin` to `end`; 0 where none lives.
void put(const float *values, const int32_t *place, int64_t entries, int64_t begin, int64_t end, float *weight) {
    int64_t i = 0;
    for (int64_t step = entries; step > 0; step /= 2)  // the first place from `begin` on
        while (i + step <= entries && place[i + step - 1] < begin) i += step;
    for (; begin < end; begin += PART) {
        const int64_t stop = least(end, begin + PART);
        __builtin_memset(weight + begin, 0, static_cast<size_t>(stop - begin) * sizeof *weight);
        for (; i < entries && place[i] < stop; ++i) weight[place[i]] = values[i];
    }
}

// A unit of work is an image, or some rows of a linear layer. Each slice takes some of them, with memory of its own.
struct Work {
    const rarefy_layer_step *op;
    int64_t units, slices;
};

struct Unit {
    int64_t x, y, width_x, width_y;
};
inline Unit unit(const rarefy_layer_step &op, int64_t i) {
    if (op.chunk == 0) return {i * op.x.step_n, i * op.y.step_n, op.x.width, op.y.width};
    const int64_t chunks = up(op.x.width, op.chunk), n = i / chunks, begin = i % chunks * op.chunk;
    const int64_t width = least(op.chunk, op.x.width - begin);
    return {n * op.x.step_n + begin * op.x.step_x, n * op.y.step_n + begin * op.y.step_x, width, width};
}

Work work(const rarefy_layer_step &op) {
    const int64_t units = op.batch * (op.chunk ? up(op.x.width, op.chunk) : 1);
    return {&op, units, least(op.slices, units)};
}

// Planes have zeros where a tensor has no place. Where every unit fills them there is none.
inline void clear(const rarefy_layer_step &op, float *begin, const float *end) {
    if (op.chunk == 0 || op.x.width % op.chunk != 0)
        __builtin_memset(begin, 0, static_cast<size_t>(end - begin) * sizeof *begin);
}

void forward_slice(void *context, int64_t slice) {
    const DefaultMode mode;
    const Work &w = *static_cast<const Work *>(context);
    const rarefy_layer_step &op = *w.op;
    float *planes = op.scratch + slice * op.scratch_size, *scratch = planes + op.x.channels * op.x.plane;
    clear(op, planes, scratch);
    for (int64_t i = slice * w.units / w.slices; i < (slice + 1) * w.units / w.slices; ++i) {
        const Unit u = unit(op, i);
        pack(op.x, op.input + u.x, u.width_x, planes);
        sums(op.forward, op.forward_weights, op.bias, planes, op.out, u.width_y, op.tile, scratch, op.output + u.y);
    }
}

void forward(const rarefy_layer_step *op) {
    const DefaultMode mode;
    in_order(op->forward, op->values, op->forward_weights);
    Work w = work(*op);
    parallel_for(op->slices, w.slices, forward_slice, &w);
}

void backward_slice(void *context, int64_t slice) {
    const DefaultMode mode;
    const Work &w = *static_cast<const Work *>(context);
    const rarefy_layer_step &op = *w.op;
    float *x = op.scratch + slice * op.scratch_size, *y = x + op.x.channels * op.x.plane;
    float *scratch = y + op.y.channels * op.y.plane;
    clear(op, x, scratch);
    const int64_t entries = op.forward.begin[op.forward.blocks];
    float *products = op.products ? op.products + slice * entries : nullptr;
    if (products) __builtin_memset(products, 0, static_cast<size_t>(entries) * sizeof *products);
    for (int64_t i = slice * w.units / w.slices; i < (slice + 1) * w.units / w.slices; ++i) {
        const Unit u = unit(op, i);
        pack(op.y, op.output_gradient + u.y, u.width_y, y);
        if (op.input_gradient)
            sums(op.backward, op.backward_weights, nullptr, y, op.in, u.width_x, op.tile, scratch,
                 op.input_gradient + u.x);
        if (!products) continue;
        pack(op.x, op.input + u.x, u.width_x, x);
        const Tiles tiles((op.out.height - 1) * op.out.columns + u.width_y, op.tile);
        for (int64_t k = 0; k < tiles.count; ++k) {
            Tile t = {};
            t.planes = x + k * tiles.width();
            t.offset = op.forward.offset;
            t.others = y + op.y_begin + k * tiles.width(), t.others_row = op.y.plane;
            t.products = products;
            tile(MULTIPLY[tiles.vectors - 1], op.forward, t);
        }
    }
}

void gradient_slice(void *context, int64_t slice) {
    const Work &w = *static_cast<const Work *>(context);
    const rarefy_layer_step &op = *w.op;
    put(op.gradients, op.place, op.forward.begin[op.forward.blocks], slice * op.weights / w.slices,
        (slice + 1) * op.weights / w.slices, op.weight_gradient);
}

void backward(const rarefy_layer_step *op) {
    const DefaultMode mode;
    if (op->input_gradient) in_order(op->backward, op->values, op->backward_weights);
    Work w = work(*op);
    parallel_for(op->slices, w.slices, backward_slice, &w);
    if (!op->products) return;
    const int64_t entries = op->forward.begin[op->forward.blocks];
    for (int64_t i = 0; i < entries; ++i) {
        float sum = op->products[i];
        for (int64_t slice = 1; slice < w.slices; ++slice) sum += op->products[slice * entries + i];
        op->gradients[op->forward.which[i]] = sum;
    }
    w.slices = op->slices;
    parallel_for(op->slices, w.slices, gradient_slice, &w);
}

// ---- which weights live

// The live weights, in the order of their memory; without `place` only how many there are.
template <bool MASK, bool WRITE>
int64_t live_of(const float *weight, const uint8_t *mask, int64_t n, int32_t *place) {
    int64_t count = 0;
    for (int64_t i = 0; i < n; ++i) {
        if (WRITE) place[count] = static_cast<int32_t>(i);  // without a branch: the next one overwrites it
        count += (weight[i] != 0.0f) | (MASK && mask[i] != 0);
    }
    return count;
}

int64_t live(const float *weight, const uint8_t *mask, int64_t n, int32_t *place) {
    if (place) return mask ? live_of<true, true>(weight, mask, n, place) : live_of<false, true>(weight, mask, n, place);
    return mask ? live_of<true, false>(weight, mask, n, place) : live_of<false, false>(weight, mask, n, place);
}

// Rows of each block in the order of their number of entries, most first; `next` becomes where each row's begin.
void order(int64_t blocks, int64_t rows, int32_t *counts, int32_t *sorted, int64_t *begin, int32_t *next,
           int32_t *heads, int64_t most) {
    int64_t at = 0;
    for (int64_t block = 0; block < blocks; ++block) {
        const int32_t *count = counts + block * rows;
        int32_t *out = sorted + 2 * block * rows;
        __builtin_memset(heads, 0, static_cast<size_t>(most + 2) * sizeof *heads);
        for (int64_t r = 0; r < rows; ++r) ++heads[most - count[r] + 1];
        for (int64_t k = 0; k <= most; ++k) heads[k + 1] += heads[k];
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t to = heads[most - count[r]]++;
            out[2 * to] = static_cast<int32_t>(r);
            out[2 * to + 1] = count[r];
        }
        begin[block] = at;
        for (int64_t k = 0; k < rows; ++k) {
            next[block * rows + out[2 * k]] = static_cast<int32_t>(at);
            at += out[2 * k + 1];
        }
    }
    begin[blocks] = at;
}

void index(const rarefy_index *op) {
    const int64_t rows = op->rows, columns = op->columns;
    const int64_t blocks = op->forward_blocks, others = op->backward_rows, other_blocks = op->backward_blocks;
    const int64_t most = blocks * rows > other_blocks * others ? blocks * rows : other_blocks * others;
    const int32_t *const place = op->place;
    int32_t *const counts = op->scratch, *const next = counts + most, *const heads = next + most;
    int32_t *const start = heads + (columns > op->most ? columns : op->most) + 2;
    int64_t at = 0;
    for (int64_t row = 0; row < rows; ++row) {
        start[row] = static_cast<int32_t>(at);
        while (at < op->entries && place[at] < (row + 1) * columns) ++at;
    }
    start[rows] = static_cast<int32_t>(at);
    const auto each = [=](auto f) {
        for (int64_t row = 0; row < rows; ++row)
            for (int32_t i = start[row]; i < start[row + 1]; ++i) f(i, row, place[i] - row * columns);
    };
    // forward: row o, in the block of its column
    __builtin_memset(counts, 0, static_cast<size_t>(blocks * rows) * sizeof *counts);
    const int32_t *const block = op->column_block, *const offset = op->column_offset;
    each([=](int32_t, int64_t row, int64_t column) { ++counts[block[column] * rows + row]; });
    order(blocks, rows, counts, op->forward_rows, op->forward_begin, next, heads, columns);
    int32_t *out = op->forward_which, *to = op->forward_offset;
    each([=](int32_t i, int64_t row, int64_t column) {
        const int32_t k = next[block[column] * rows + row]++;
        out[k] = i;
        to[k] = offset[column];
    });
    // backward: the row of its column, in the block of o
    __builtin_memset(counts, 0, static_cast<size_t>(other_blocks * others) * sizeof *counts);
    const int32_t *const other = op->column_row, *const tap = op->column_tap;
    const int64_t a_block = op->rows_a_block, plane = op->plane;
    each([=](int32_t, int64_t row, int64_t column) { ++counts[row / a_block * others + other[column]]; });
    order(other_blocks, others, counts, op->backward_entry_rows, op->backward_begin, next, heads, op->most);
    out = op->backward_which, to = op->backward_offset;
    each([=](int32_t i, int64_t row, int64_t column) {
        const int32_t k = next[row / a_block * others + other[column]]++;
        out[k] = i;
        to[k] = static_cast<int32_t>(row * plane) + tap[column];
    });
}

int64_t lanes() { return L; }

}  // namespace

extern const rarefy_kernel training_kernels[] = {
    RAREFY_KERNEL("sparse_forward_f32", forward), RAREFY_KERNEL("sparse_backward_f32", backward),
    RAREFY_KERNEL("sparse_index", index),         RAREFY_KERNEL("sparse_live_f32", live),
    RAREFY_KERNEL("sparse_take_f32", take),       RAREFY_KERNEL("sparse_lanes", lanes),
};
extern const int64_t training_kernel_count = sizeof training_kernels / sizeof *training_kernels;

}  // namespace RAREFY_ISA
}  // namespace rarefy

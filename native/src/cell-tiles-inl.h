// Products of a cell by AMX: of bfloat16 numbers, by eight tiles of 16 rows of 64 bytes. Sums are float; TDPBF16PS
// takes subnormal numbers for zeros and gives none, and rounds to nearest, whatever the mode. Included by cell.cpp; see
// cell-panels-inl.h for what both define.
#pragma once

typedef uint16_t Factor;

constexpr int64_t TILE_ROWS = 16, TILE_DEPTH = 32, TILE_UNITS = 16;  // of a product: [rows, depth] [depth, units]
constexpr int64_t TILE_FACTORS = TILE_DEPTH * TILE_UNITS;
constexpr int64_t TILE_PANEL = 16;  // tiles of the depth at a time: those of two columns stay in the first cache
constexpr int64_t ROWS = 128, GROUP = TILE_ROWS, PANEL = TILE_UNITS;

inline int64_t width(int64_t depth) { return rounded_up(depth, TILE_DEPTH); }

struct alignas(64) Configuration {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
};
constexpr Configuration WHOLE_TILES{1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

// While one lives, every tile of this thread has 16 rows of 64 bytes.
class Unit {
 public:
    Unit() { _tile_loadconfig(&WHOLE_TILES); }
    ~Unit() { _tile_release(); }
    Unit(const Unit &) = delete;
    Unit &operator=(const Unit &) = delete;
};

// out += a b for one or two tiles of rows and of columns; rows of a lie `a_row` numbers from one another, rows and
// columns of tiles of out `out_row` and `out_column`, columns of tiles of b `b_column`.
template <bool TWO_ROWS, bool TWO_COLUMNS>
inline void tile_block(const uint16_t *a, int64_t a_row, const uint16_t *b, int64_t b_column, int64_t depth, float *out,
                       int64_t out_row, int64_t out_column) {
    const int64_t a_stride = 2 * a_row, stride = 4 * out_row;
    float *below = out + TILE_ROWS * out_row;
    __asm__ volatile("" : : : "memory");  // the compiler does not know what tiles read
    _tile_loadd(0, out, stride);
    if constexpr (TWO_COLUMNS) _tile_loadd(1, out + out_column, stride);
    if constexpr (TWO_ROWS) _tile_loadd(2, below, stride);
    if constexpr (TWO_ROWS && TWO_COLUMNS) _tile_loadd(3, below + out_column, stride);
    for (int64_t k = 0; k < depth; ++k, a += TILE_DEPTH, b += TILE_FACTORS) {
        _tile_loadd(6, b, 64);
        _tile_loadd(4, a, a_stride);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (TWO_COLUMNS) {
            _tile_loadd(7, b + b_column, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if constexpr (TWO_ROWS) {
            _tile_loadd(5, a + TILE_ROWS * a_row, a_stride);
            _tile_dpbf16ps(2, 5, 6);
        }
        if constexpr (TWO_ROWS && TWO_COLUMNS) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, out, stride);
    if constexpr (TWO_COLUMNS) _tile_stored(1, out + out_column, stride);
    if constexpr (TWO_ROWS) _tile_stored(2, below, stride);
    if constexpr (TWO_ROWS && TWO_COLUMNS) _tile_stored(3, below + out_column, stride);
}

// The same for whole tiles of rows, so many columns of tiles, and so many tiles of the depth. b: columns of tiles, each
// [depth][TILE_DEPTH / 2][TILE_UNITS][2].
inline void tile_product(int64_t rows, const uint16_t *a, int64_t a_row, const uint16_t *b, int64_t columns,
                         int64_t depth, float *out, int64_t out_row, int64_t out_column) {
    const int64_t b_column = depth * TILE_FACTORS;
    for (int64_t k = 0; k < depth; k += TILE_PANEL) {
        const int64_t some = depth - k < TILE_PANEL ? depth - k : TILE_PANEL;
        for (int64_t n = 0; n < columns; n += 2)
            for (int64_t r = 0; r < rows; r += 2 * TILE_ROWS) {
                const bool two_rows = r + TILE_ROWS < rows, two_columns = n + 1 < columns;
                const auto block = two_rows      ? two_columns ? tile_block<true, true> : tile_block<true, false>
                                   : two_columns ? tile_block<false, true>
                                                 : tile_block<false, false>;
                block(a + r * a_row + k * TILE_DEPTH, a_row, b + n * b_column + k * TILE_FACTORS, b_column, some,
                      out + r * out_row + n * out_column, out_row, out_column);
            }
    }
}

// Columns of tiles: packed[unit / 16][gate's place], zeros beyond the last unit and the last k.
template <class S, int G>
void pack_forward(const rarefy_recurrent &op, Factor *packed) {
    const int64_t H = op.hidden, K = width(H);
    const S *weights = static_cast<const S *>(op.weights);
    for (int64_t u = 0; u < H; u += TILE_UNITS)
        for (int64_t gate = 0; gate < G; ++gate) {
            Factor *out = packed + (u * G + place<G>(gate) * TILE_UNITS) * K;
            const S *rows = weights + (gate * H + u) * H;
            const int64_t units = least(TILE_UNITS, H - u);
            for (int64_t k = 0; k < K; k += 2, out += 2 * TILE_UNITS) {
                if (units < TILE_UNITS || k + 1 >= H) {
                    for (int64_t i = 0; i < 2 * TILE_UNITS; ++i)
                        out[i] = i / 2 < units && k + i % 2 < H ? rows[i / 2 * H + k + i % 2] : 0;
                    continue;
                }
                for (int64_t i = 0; i < TILE_UNITS; ++i) __builtin_memcpy(out + 2 * i, rows + i * H + k, 4);
            }
        }
}

// Columns of tiles: packed[unit / 16], zeros beyond the last unit and the last k. A tile after the other, since rows of
// weights may lie where they drive one another out of a cache.
template <class S, int G>
void pack_backward(const rarefy_recurrent &op, Factor *packed) {
    const int64_t H = op.hidden, K = width(G * H);
    for (int64_t tile = 0; tile < K; tile += TILE_DEPTH)
        for (int64_t u = 0; u < H; u += TILE_UNITS) {
            Factor *out = packed + u * K + tile * TILE_UNITS;
            const int64_t units = least(TILE_UNITS, H - u);
            for (int64_t k = tile; k < tile + TILE_DEPTH; k += 2, out += 2 * TILE_UNITS) {
                const S *row = static_cast<const S *>(op.weights) + k * H + u;
                if (units < TILE_UNITS || k + 1 >= G * H) {
                    for (int64_t i = 0; i < 2 * TILE_UNITS; ++i)
                        out[i] = i / 2 < units && k + i % 2 < G * H ? row[i % 2 * H + i / 2] : 0;
                    continue;
                }
                for (int64_t i = 0; i < TILE_UNITS; ++i) out[2 * i] = row[i], out[2 * i + 1] = row[H + i];
            }
        }
}

template <int G>
void forward_product(int64_t H, int64_t rows, const Factor *h, const Factor *packed, int64_t first, int64_t stride,
                     float *out, int64_t gap) {
    const int64_t K = width(H);
    for (int64_t u = 0; u < stride; u += TILE_UNITS)
        tile_product(rounded_up(rows, TILE_ROWS), h, K, packed + (first + u) * G * K, G, K / TILE_DEPTH, out + u,
                     stride, gap);
}

inline void backward_product(int64_t rows, const Factor *d, int64_t depth, const Factor *packed, int64_t units,
                             float *out) {
    const int64_t K = width(depth);
    tile_product(rounded_up(rows, TILE_ROWS), d, K, packed, units / TILE_UNITS, K / TILE_DEPTH, out, units, TILE_UNITS);
}

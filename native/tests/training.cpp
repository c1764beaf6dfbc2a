// The products with sparse weights on every instruction set that this CPU has, against sums in double: linear layers of
// odd sizes, and convolutions of 3x3 in both orders of a tensor. Without Python, for sanitizers and emulators; the
// shapes, strides and paddings that the planes allow are tests/kernels/test_sparse_layers.py's.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "rarefy_training.h"

namespace {

std::mt19937 random_bits(1);
float draw() { return static_cast<float>(random_bits() % 2001) / 1000.0f - 1.0f; }

template <class F>
F *find(const char *name, const std::string &isa) {
    const rarefy_kernel *table;
    const int64_t count = rarefy_kernels(&table);
    for (int64_t i = 0; i < count; ++i)
        if (isa == table[i].isa && !std::strcmp(name, table[i].name)) return reinterpret_cast<F *>(table[i].entry);
    std::printf("no %s of %s\n", name, isa.c_str());
    std::exit(1);
}

int64_t odd_lines(int64_t n) { return ((n + 15) / 16 | 1) * 16; }

struct Layer {
    int64_t batch, inputs, outputs, size, kernel;
    bool channels_last;
    double density;
};

bool close(const std::vector<float> &found, const std::vector<double> &expected, const char *what) {
    double largest = 1e-6;
    for (double e : expected) largest = std::fmax(largest, std::fabs(e));
    for (size_t i = 0; i < found.size(); ++i)
        if (!(std::fabs(found[i] - expected[i]) <= 4e-6 * largest)) {
            std::printf("%s[%zu] is %g, not %g\n", what, i, static_cast<double>(found[i]), expected[i]);
            return false;
        }
    return true;
}

bool check(const std::string &isa, const Layer &l, int32_t threads) {
    const int64_t L = find<rarefy_sparse_lanes>("sparse_lanes", isa)(), tile = 8;
    const bool flat = l.kernel == 1;
    const int64_t pad = l.kernel / 2, S = l.size, taps = l.kernel * l.kernel, columns = l.inputs * taps;
    // a linear layer is one row of batch * size positions
    const int64_t images = flat ? 1 : l.batch, height = flat ? 1 : S, width = flat ? l.batch * S : S;
    const int64_t area = height * width, chunk = flat ? tile * L : 0;
    const int64_t grid = flat ? chunk : S + 1, reach = flat ? 0 : 2 * grid + 2,
                  positions = flat ? chunk : height * grid;
    const int64_t plane = odd_lines(positions + reach + 2 * tile * L + 2 * grid);
    const int64_t step_c = l.channels_last || flat ? 1 : area;
    std::vector<float> weight(l.outputs * columns), bias(l.outputs), x(images * area * l.inputs),
        g(images * area * l.outputs), y(g.size(), NAN), to_x(x.size(), NAN), to_weight(weight.size(), NAN);
    for (float &w : weight) w = random_bits() % 1000 < l.density * 1000 ? draw() : 0.0f;
    for (auto *values : {&bias, &x, &g})
        for (float &v : *values) v = draw();
    const auto at = [&](int64_t n, int64_t p, int64_t c, int64_t channels) {
        return static_cast<size_t>(n * area * channels + (step_c == 1 ? p * channels + c : c * area + p));
    };
    std::vector<double> right_y(g.size()), right_x(x.size()), right_weight(weight.size());
    for (int64_t n = 0; n < images; ++n)
        for (int64_t i = 0; i < height; ++i)
            for (int64_t j = 0; j < width; ++j)
                for (int64_t o = 0; o < l.outputs; ++o) {
                    const size_t to = at(n, i * width + j, o, l.outputs);
                    right_y[to] += bias[o];
                    for (int64_t k = 0; k < columns; ++k) {
                        const float w = weight[o * columns + k];
                        const int64_t c = k / taps, a = i + k % taps / l.kernel - pad, b = j + k % l.kernel - pad;
                        if (w == 0.0f || a < 0 || b < 0 || a >= height || b >= width) continue;
                        const size_t from = at(n, a * width + b, c, l.inputs);
                        right_y[to] += static_cast<double>(w) * x[from];
                        right_x[from] += static_cast<double>(w) * g[to];
                        right_weight[o * columns + k] += static_cast<double>(g[to]) * x[from];
                    }
                }

    std::vector<int32_t> place(weight.size() + 1);
    const int64_t entries =
        find<rarefy_sparse_live_f32>("sparse_live_f32", isa)(weight.data(), nullptr, weight.size(), place.data());
    int64_t counts[2];
    std::vector<float> live(entries), gradients(entries);
    find<rarefy_sparse_take_f32>("sparse_take_f32", isa)(weight.data(), weight.size(), place.data(), entries,
                                                         live.data(), counts);
    if (counts[0] != entries || counts[1] != entries)
        return std::printf("%ld weights are not 0\n", long(counts[0])), false;
    const int64_t some = 10, blocks = (l.inputs + some - 1) / some, inner = (l.outputs + some - 1) / some;
    std::vector<int32_t> block(columns), offset(columns), row(columns), tap(columns);
    for (int64_t k = 0; k < columns; ++k) {
        const int64_t c = k / taps, down = k % taps / l.kernel, across = k % l.kernel;
        block[k] = static_cast<int32_t>(c / some);
        offset[k] = static_cast<int32_t>(c * plane + down * grid + across);
        row[k] = static_cast<int32_t>(c);
        tap[k] = static_cast<int32_t>((2 * pad - down) * grid + 2 * pad - across);
    }
    const int64_t lists = std::max(blocks * l.outputs, inner * l.inputs), most = some * taps;
    std::vector<int32_t> rows(2 * blocks * l.outputs), inner_rows(2 * inner * l.inputs),
        scratch(2 * lists + std::max(columns, most) + 2 + l.outputs + 1);
    std::vector<int64_t> begin(blocks + 1), inner_begin(inner + 1);
    std::vector<int32_t> offsets(entries), which(entries), inner_offsets(entries), inner_which(entries);
    const rarefy_index index{l.outputs,
                             columns,
                             entries,
                             blocks,
                             l.inputs,
                             inner,
                             some,
                             plane,
                             most,
                             place.data(),
                             block.data(),
                             offset.data(),
                             row.data(),
                             tap.data(),
                             rows.data(),
                             inner_rows.data(),
                             begin.data(),
                             inner_begin.data(),
                             offsets.data(),
                             which.data(),
                             inner_offsets.data(),
                             inner_which.data(),
                             scratch.data()};
    find<rarefy_sparse_index>("sparse_index", isa)(&index);

    const int64_t phase[2] = {0, 0}, low = -pad, high = flat ? 1 : height + 2 * pad;
    const auto planes = [&](int64_t channels, int64_t lows, int64_t lines) {
        const int64_t step_x = step_c == 1 ? channels : 1;
        return rarefy_planes{channels, height, width, area * channels, width * step_x, step_x, step_c, 1, 1, lows,
                             lows,     lines,  grid,  plane,           plane,          1,      phase};
    };
    std::vector<float> values(2 * entries + 1), products(threads * entries + 4);
    rarefy_layer_step op = {};
    op.batch = images, op.chunk = chunk, op.tile = tile, op.slices = threads;
    op.x = planes(l.inputs, low, high), op.y = planes(l.outputs, low, high);
    op.out = planes(l.outputs, 0, height), op.in = planes(l.inputs, 0, height);
    op.y_begin = pad * grid + pad;
    op.forward = {l.outputs, blocks, rows.data(), begin.data(), offsets.data(), which.data()};
    op.backward = {l.inputs, inner, inner_rows.data(), inner_begin.data(), inner_offsets.data(), inner_which.data()};
    op.values = live.data(), op.place = place.data(), op.weights = to_weight.size(), op.gradients = gradients.data();
    op.bias = bias.data(), op.input = x.data(), op.output_gradient = g.data();
    op.output = y.data(), op.input_gradient = to_x.data(), op.weight_gradient = to_weight.data();
    op.forward_weights = values.data(), op.backward_weights = values.data() + entries;
    op.products = products.data();
    op.scratch_size = (l.inputs + l.outputs) * (plane + RAREFY_TILE * L + 16);
    std::vector<float> memory(threads * op.scratch_size);
    op.scratch = memory.data();
    find<rarefy_layer_step_f32>("sparse_forward_f32", isa)(&op);
    find<rarefy_layer_step_f32>("sparse_backward_f32", isa)(&op);
    return close(y, right_y, "output") && close(to_x, right_x, "input gradient") &&
           close(to_weight, right_weight, "weight gradient");
}

}  // namespace

int main() {
    const Layer layers[] = {
        {1, 1, 1, 1, 1, true, 1.0},     {3, 17, 9, 5, 1, true, 0.3}, {40, 33, 50, 7, 1, true, 0.1},
        {1, 24, 16, 1, 1, true, 0.5},   {2, 9, 12, 7, 3, true, 0.2}, {2, 16, 8, 9, 3, false, 0.1},
        {1, 33, 20, 14, 3, true, 0.05}, {5, 8, 8, 3, 3, false, 0.0}, {1, 8, 24, 16, 3, true, 1.0},
    };
    const rarefy_kernel *table;
    const int64_t count = rarefy_kernels(&table);
    for (int64_t i = 0; i < count; ++i) {
        if (std::strcmp(table[i].name, "sparse_forward_f32")) continue;
        if (!table[i].supported) {
            std::printf("%s: not on this CPU\n", table[i].isa);
            continue;
        }
        for (const Layer &layer : layers)
            for (int32_t threads : {1, 2})
                if (!check(table[i].isa, layer, threads))
                    return std::printf("%s: wrong at %ld to %ld, %ldx%ld\n", table[i].isa, long(layer.inputs),
                                       long(layer.outputs), long(layer.kernel), long(layer.kernel)),
                           1;
        std::printf("%s: right\n", table[i].isa);
    }
    return 0;
}

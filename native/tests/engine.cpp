// The engine against sums in double, under every instruction set of this CPU; saved programs, whole, cut and altered;
// threads. For sanitizers: every input and output ends where its numbers end. Usage: engine [cases [kernels]]; with
// "kernels" no files and no threads, which take an emulated processor too long.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "engine/program.h"
#include "rarefy.h"
#include "rarefy_engine.h"

namespace {

typedef std::vector<float> Floats;
typedef std::unique_ptr<rarefy_program, void (*)(rarefy_program *)> Program;

std::minstd_rand generator(7);
int64_t below(int64_t n) { return static_cast<int64_t>(generator() % static_cast<uint64_t>(n)); }
int32_t one_of(std::initializer_list<int32_t> all) { return all.begin()[below(static_cast<int64_t>(all.size()))]; }
float number() { return static_cast<float>(below(2001) - 1000) * 1e-3f; }
Floats numbers(int64_t n) {
    Floats all(static_cast<size_t>(n));
    for (float &v : all) v = number();
    return all;
}

int failures = 0;
void expect(bool good, const std::string &what) {
    if (good) return;
    std::printf("wrong: %s\n", what.c_str());
    ++failures;
}

struct Builder {
    rarefy_builder *b = rarefy_builder_new();
    char error[256] = "";
    ~Builder() { rarefy_builder_free(b); }
    int32_t input(int32_t c, int32_t h, int32_t w, int32_t layout = 0) {
        return check(rarefy_builder_input(b, c, h, w, layout, "x", error, 256));
    }
    int32_t conv(rarefy_conv c, const Floats &weight, const Floats &bias = {}) {
        c.weight = weight.data();
        c.weights = static_cast<int64_t>(weight.size());
        c.bias = bias.empty() ? nullptr : bias.data();
        c.biases = static_cast<int64_t>(bias.size());
        return check(rarefy_builder_conv(b, &c, "conv", error, 256));
    }
    void output(int32_t x, int32_t layout = 0) { check(rarefy_builder_output(b, x, layout, error, 256)); }
    int32_t check(int32_t id) {
        expect(id >= 0, error);
        return id;
    }
    Program finish(const char *isa, int32_t batch = 1, int32_t threads = 1, double seconds = 0.0) {
        const rarefy_options options = {isa, batch, threads, seconds, nullptr};
        Program p(rarefy_builder_finish(b, &options, error, 256), rarefy_program_free);
        expect(p != nullptr, error);
        return p;
    }
};

// The last float of the memory is the last number: what reads on is seen.
Floats run(const rarefy_program *p, const std::vector<Floats> &inputs, int64_t outputs, int64_t batch,
           int32_t threads) {
    std::vector<std::unique_ptr<float[]>> held;
    std::vector<rarefy_buffer> in;
    for (const Floats &x : inputs) {
        held.emplace_back(new float[x.size()]);
        std::memcpy(held.back().get(), x.data(), x.size() * sizeof(float));
        in.push_back({held.back().get(), static_cast<int64_t>(x.size())});
    }
    std::unique_ptr<float[]> out(new float[static_cast<size_t>(outputs)]);
    const rarefy_buffer to = {out.get(), outputs};
    char error[256] = "";
    expect(rarefy_program_run(p, in.data(), static_cast<int32_t>(in.size()), &to, 1, batch, threads, nullptr, 0, error,
                              256) == 0,
           error);
    return Floats(out.get(), out.get() + outputs);
}

bool close(const Floats &a, const Floats &b, double tolerance) {
    if (a.size() != b.size()) return false;
    for (size_t i = 0; i < a.size(); ++i) {
        if (std::isnan(a[i]) && std::isnan(b[i])) continue;
        if (a[i] != b[i] && !(std::fabs(static_cast<double>(a[i]) - b[i]) <= tolerance * (1.0 + std::fabs(b[i]))))
            return false;
    }
    return true;
}

float rounded(float v) {
    const uint32_t bits = static_cast<uint32_t>(rarefy::engine::to_bf16(v)) << 16;
    std::memcpy(&v, &bits, sizeof v);
    return v;
}

struct Sizes {
    int32_t channels, d, h, w;
};

// The results of a convolution, by its definition; an empty residual is none.
Floats convolution(const rarefy_conv &c, const Sizes &in, const int32_t (&out)[3], const Floats &x,
                   const Floats &weight, const Floats &bias, const Floats &residual) {
    const rarefy_depth &d = c.depth;
    const int64_t deep = std::max(1, d.kernel), taps = deep * c.kernel[0] * c.kernel[1], each = in.channels / c.groups;
    const int64_t batch = static_cast<int64_t>(x.size()) / (int64_t{in.channels} * in.d * in.h * in.w);
    Floats wanted;
    for (int64_t n = 0; n < batch; ++n)
        for (int32_t o = 0; o < c.out_channels; ++o)
            for (int64_t pixel = 0; pixel < int64_t{out[0]} * out[1] * out[2]; ++pixel) {
                const int64_t oz = pixel / out[2] / out[1], oy = pixel / out[2] % out[1], ox = pixel % out[2];
                double sum = bias[o];
                for (int64_t i = 0; i < each; ++i)
                    for (int64_t k = 0; k < taps; ++k) {
                        const int64_t ky = k / c.kernel[1] % c.kernel[0], kx = k % c.kernel[1];
                        const int64_t z = oz * d.stride + k / c.kernel[1] / c.kernel[0] * d.dilation - d.padding[0],
                                      y = oy * c.stride[0] + ky * c.dilation[0] - c.padding[0],
                                      xx = ox * c.stride[1] + kx * c.dilation[1] - c.padding[2];
                        float v = weight[(o * each + i) * taps + k];
                        if (c.storage == RAREFY_BF16) v = rounded(v);
                        if (v == 0.0f || z < 0 || y < 0 || xx < 0 || z >= in.d || y >= in.h || xx >= in.w) continue;
                        const int64_t plane = (n * in.channels + o / (c.out_channels / c.groups) * each + i) * in.d;
                        sum += static_cast<double>(v) * x[((plane + z) * in.h + y) * in.w + xx];
                    }
                if (!residual.empty()) sum += residual[wanted.size()];
                if (c.activation != RAREFY_NONE && sum < 0.0) sum = 0.0;
                if (c.activation == RAREFY_RELU6 && sum > 6.0) sum = 6.0;
                wanted.push_back(static_cast<float>(sum));
            }
    return wanted;
}

// One convolution of a random shape.
void conv_case(const char *isa, int64_t number_of_case) {
    rarefy_conv c = {};
    c.residual = -1;
    c.groups = one_of({1, 1, 1, 2, 3});
    int32_t channels = c.groups * one_of({1, 2, 5, 17, 40});
    c.out_channels = c.groups * one_of({1, 3, 7, 23, 70});
    if (below(5) == 0) c.out_channels = (c.groups = channels = one_of({3, 19})) * one_of({1, 1, 3});
    int32_t h = one_of({1, 2, 5, 7, 8, 14, 17, 28}), w = one_of({1, 3, 4, 7, 8, 14, 15, 16, 17, 28, 40});
    const bool point = below(3) == 0;
    for (int axis = 0; axis < 2; ++axis) {
        c.kernel[axis] = point ? 1 : one_of({1, 2, 3, 3, 5});
        c.stride[axis] = point ? 1 : one_of({1, 1, 2, 3});
        c.dilation[axis] = one_of({1, 1, 2});
    }
    for (int32_t &p : c.padding) p = point ? 0 : one_of({0, 1, 2});
    if (point && below(3) == 0) h = w = 1;
    const int32_t out_h = (h + c.padding[0] + c.padding[1] - c.dilation[0] * (c.kernel[0] - 1) - 1) / c.stride[0] + 1;
    const int32_t out_w = (w + c.padding[2] + c.padding[3] - c.dilation[1] * (c.kernel[1] - 1) - 1) / c.stride[1] + 1;
    if (h + c.padding[0] + c.padding[1] <= c.dilation[0] * (c.kernel[0] - 1) ||
        w + c.padding[2] + c.padding[3] <= c.dilation[1] * (c.kernel[1] - 1))
        return;
    rarefy_depth &d = c.depth;
    if (below(3) == 0)
        d = {one_of({1, 2, 3, 4, 7}), one_of({1, 2, 3, 3}), one_of({1, 1, 2, 3}), one_of({1, 1, 2}), {0, 0}};
    if (d.planes)
        for (int32_t &p : d.padding) p = one_of({0, 0, 1, 2});
    const int32_t planes = std::max(1, d.planes), room = planes + d.padding[0] + d.padding[1] - 1;
    if (room < d.dilation * (d.kernel - 1)) return;
    const int32_t out_d = d.planes ? (room - d.dilation * (d.kernel - 1)) / d.stride + 1 : 1;
    c.activation = one_of({RAREFY_NONE, RAREFY_RELU, RAREFY_RELU6});
    c.storage = one_of({RAREFY_F32, RAREFY_BF16});
    const bool special = below(6) == 0;
    c.choice = special ? RAREFY_SPARSE : one_of({RAREFY_MEASURE, RAREFY_SPARSE, RAREFY_DENSE});
    const int64_t batch = one_of({1, 1, 2, 3, 5, 9, 17}), each = channels / c.groups,
                  taps = int64_t{std::max(1, d.kernel)} * c.kernel[0] * c.kernel[1];
    Floats weight = numbers(c.out_channels * each * taps), bias = numbers(c.out_channels);
    const int32_t keep = one_of({0, 2, 10, 50, 100});
    for (float &v : weight)
        if (below(100) >= keep) v = 0.0f;
    Floats x = numbers(batch * channels * planes * h * w),
           residual = numbers(batch * c.out_channels * out_d * out_h * out_w);
    if (special)
        for (const float v : {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()})
            x[static_cast<size_t>(below(static_cast<int64_t>(x.size())))] = v;
    const bool add = below(2);

    const Floats wanted =
        convolution(c, {channels, planes, h, w}, {out_d, out_h, out_w}, x, weight, bias, add ? residual : Floats());
    Builder b;
    c.x = b.input(channels, planes * h, w);
    if (add) c.residual = b.input(c.out_channels, out_d * out_h, out_w);
    b.output(b.conv(c, weight, bias));
    const int32_t threads = one_of({1, 1, 2, 3});
    const Program p = b.finish(isa, one_of({1, static_cast<int32_t>(batch)}), threads, below(8) == 0 ? 0.02 : 0.0);
    if (!p) return;
    std::vector<Floats> inputs{x};
    if (add) inputs.push_back(residual);
    const Floats got = run(p.get(), inputs, static_cast<int64_t>(wanted.size()), batch, threads);
    rarefy_step_info info;
    rarefy_program_step(p.get(), add ? 2 : 1, &info);
    const double tolerance = std::max(1e-5, 3e-8 * static_cast<double>(each * taps));
    expect(close(got, wanted, tolerance),
           std::string(isa) + " case " + std::to_string(number_of_case) + ", " + info.kernel);
}

// Curved activation functions of lines of every length up to some vectors.
void activations(const char *isa) {
    const double root = std::sqrt(0.5), pi = 3.14159265358979323846;
    for (const int32_t activation : {RAREFY_SILU, RAREFY_GELU, RAREFY_GELU_TANH, RAREFY_TANH, RAREFY_SIGMOID})
        for (int32_t n = 1; n <= 40; ++n) {
            Floats x = numbers(n), wanted;
            for (float &v : x) {
                v *= one_of({1, 5, 20});
                const double a = v, logistic = 1.0 / (1.0 + std::exp(-a)),
                             cubed = 2.0 * std::sqrt(2.0 / pi) * (a + 0.044715 * a * a * a);
                wanted.push_back(static_cast<float>(activation == RAREFY_SILU        ? a * logistic
                                                    : activation == RAREFY_GELU      ? 0.5 * a * std::erfc(-a * root)
                                                    : activation == RAREFY_GELU_TANH ? a / (1.0 + std::exp(-cubed))
                                                    : activation == RAREFY_TANH      ? std::tanh(a)
                                                                                     : logistic));
            }
            Builder b;
            b.output(b.check(rarefy_builder_affine(b.b, b.input(1, 1, n), nullptr, nullptr, 0, activation, "activation",
                                                   b.error, 256)));
            const Program p = b.finish(isa);
            if (p)
                expect(close(run(p.get(), {x}, n, 1, 1), wanted, 4e-7),
                       std::string(isa) + " activation " + std::to_string(activation));
        }
}

// A network with every kind of step: layers in bands, two branches that meet again, a concatenation in place and one
// that is copied.
Program network(const char *isa, int32_t batch, int32_t threads) {
    Builder b;
    const Floats wide = numbers(4 * 3 * 9), deep_wise = numbers(4 * 9), w3 = numbers(8 * 8 * 9), w1 = numbers(8 * 24),
                 scale = numbers(8), shift = numbers(8), stem = numbers(8 * 4 * 9);
    rarefy_conv c = {};
    c.residual = -1;
    c.out_channels = 4;
    c.groups = 1;
    for (int axis = 0; axis < 2; ++axis) c.kernel[axis] = 3, c.stride[axis] = c.dilation[axis] = 1;
    for (int32_t &p : c.padding) p = 1;
    c.activation = RAREFY_RELU;
    c.x = b.input(3, 36, 36, RAREFY_CHANNELS_LAST);
    c.x = b.conv(c, wide);
    c.groups = 4;
    c.x = b.conv(c, deep_wise);
    c.out_channels = 8;
    c.groups = 1;
    const int32_t x = c.x = b.conv(c, stem);
    rarefy_pool pool = {};
    pool.x = x;
    for (int axis = 0; axis < 2; ++axis) pool.kernel[axis] = 3, pool.stride[axis] = 2, pool.dilation[axis] = 1;
    for (int32_t &p : pool.padding) p = 1;
    const int32_t small = b.check(rarefy_builder_pool(b.b, &pool, "pool", b.error, 256));
    pool.average = 1;
    const int32_t mean = b.check(rarefy_builder_pool(b.b, &pool, "pool", b.error, 256));
    c.x = small;
    c.residual = mean;
    const int32_t deep = b.conv(c, w3);
    const int32_t up = b.check(rarefy_builder_upsample(b.b, deep, 2, 2, "up", b.error, 256));
    const int32_t scaled =
        b.check(rarefy_builder_affine(b.b, x, scale.data(), shift.data(), 8, RAREFY_SILU, "affine", b.error, 256));
    const int32_t parts[] = {up, scaled, x};
    c.x = b.check(rarefy_builder_concat(b.b, parts, 3, "concat", b.error, 256));
    c.residual = -1;
    c.kernel[0] = c.kernel[1] = 1;
    for (int32_t &p : c.padding) p = 0;
    c.activation = RAREFY_TANH;
    const int32_t joined = b.conv(c, w1);
    const int32_t gate = b.check(rarefy_builder_global_average(b.b, joined, "mean", b.error, 256));
    const int32_t gated = b.check(rarefy_builder_binary(b.b, joined, gate, 1, RAREFY_GELU, "gate", b.error, 256));
    pool.x = gated;
    pool.kernel[0] = pool.kernel[1] = pool.stride[0] = pool.stride[1] = 18;
    for (int32_t &p : pool.padding) p = 0;
    const int32_t last = b.check(rarefy_builder_pool(b.b, &pool, "pool", b.error, 256));
    const int32_t flat = b.check(rarefy_builder_flatten(b.b, last, "flatten", b.error, 256));
    const int32_t two[] = {flat, gate};
    (void)two;
    c.x = flat;
    c.out_channels = 5;
    c.activation = RAREFY_NONE;
    b.output(b.conv(c, numbers(5 * 32)));
    return b.finish(isa, batch, threads);
}

struct Aligned {
    explicit Aligned(int64_t size)
        : bytes(static_cast<uint8_t *>(std::aligned_alloc(64, static_cast<size_t>((size + 63) / 64 * 64)))) {}
    ~Aligned() { std::free(bytes); }
    uint8_t *bytes;
};

void files(const std::vector<std::string> &isas) {
    const int64_t batch = 3;
    const Floats x = numbers(batch * 3 * 36 * 36);
    for (const std::string &isa : isas) {
        const Program p = network(isa.c_str(), 2, 1);
        const Floats wanted = run(p.get(), {x}, batch * 5, batch, 1);
        const int64_t size = rarefy_program_size(p.get());
        const Aligned saved(size);
        rarefy_program_save(p.get(), saved.bytes);
        char error[256] = "";
        for (const std::string &other : isas) {
            const Program q(rarefy_program_load(saved.bytes, size, other.c_str(), error, 256), rarefy_program_free);
            expect(q != nullptr, error);
            if (!q) continue;
            const Floats got = run(q.get(), {x}, batch * 5, batch, 2);
            expect(isa == other ? got == wanted : close(got, wanted, 1e-5),
                   "a program of " + isa + " loaded under " + other);
        }
        for (int64_t cut = 0; cut < size; cut += 1 + size / 97) {
            const Aligned part(cut);
            std::memcpy(part.bytes, saved.bytes, static_cast<size_t>(cut));
            const Program q(rarefy_program_load(part.bytes, cut, nullptr, error, 256), rarefy_program_free);
            expect(!q, "a cut file is taken");
        }
        const Aligned altered(size);
        for (int64_t i = 0; i < size; i += isa == isas[0] ? 1 : 61) {
            std::memcpy(altered.bytes, saved.bytes, static_cast<size_t>(size));
            altered.bytes[i] = static_cast<uint8_t>(altered.bytes[i] ^ (1u << below(8)));
            const Program q(rarefy_program_load(altered.bytes, size, nullptr, error, 256), rarefy_program_free);
            expect(!q, "an altered file is taken, byte " + std::to_string(i));
        }
        // with a checksum that fits, what is altered is refused, or runs inside its buffers
        int64_t taken = 0;
        for (int64_t k = 0; k < 400; ++k) {
            std::memcpy(altered.bytes, saved.bytes, static_cast<size_t>(size));
            const int64_t at = 64 + below(size - 64);
            altered.bytes[at] = static_cast<uint8_t>(below(2) ? below(256) : altered.bytes[at] ^ (1u << below(8)));
            const uint64_t sum = rarefy::engine::block_sum(altered.bytes, static_cast<size_t>(size));
            std::memcpy(altered.bytes + rarefy::engine::CHECKSUM_AT, &sum, sizeof sum);
            const Program q(rarefy_program_load(altered.bytes, size, isa.c_str(), error, 256), rarefy_program_free);
            rarefy_program_info info = {};
            if (q) rarefy_program_describe(q.get(), &info);
            int32_t in[3] = {0, 0, 0}, out[3] = {0, 0, 0}, layout;
            if (q && info.inputs == 1 && info.outputs == 1 && info.scratch_bytes < 1 << 24) {
                rarefy_program_port(q.get(), 0, 0, in, &layout);
                rarefy_program_port(q.get(), 1, 0, out, &layout);
                if (int64_t{in[0]} * in[1] * in[2] > 1 << 20 || int64_t{out[0]} * out[1] * out[2] > 1 << 20) continue;
                run(q.get(), {numbers(2 * in[0] * in[1] * in[2])}, 2 * out[0] * out[1] * out[2], 2, 1);
                ++taken;
            }
        }
        expect(taken > 20, "most alterations of weights should be harmless");
    }
}

void threads(const std::string &isa) {
    const Program one = network(isa.c_str(), 1, 2), two = network(isa.c_str(), 4, 2);
    const Floats x = numbers(6 * 3 * 36 * 36);
    const Floats first = run(one.get(), {x}, 30, 6, 1), second = run(two.get(), {x}, 30, 6, 1);
    std::vector<std::thread> users;
    std::vector<int> good(8, 1);
    for (int u = 0; u < 8; ++u)
        users.emplace_back([&, u] {
            for (int k = 0; k < 6; ++k) {
                Floats out(30);
                const int64_t batch = u % 4 < 2 ? 6 : 1;  // apart, and together on one image
                const Program &p = u % 2 ? one : two;
                const Floats &wanted = u % 2 ? first : second;
                const rarefy_buffer read = {const_cast<float *>(x.data()), batch * 3 * 36 * 36},
                                    to = {out.data(), batch * 5};
                good[u] &= rarefy_program_run(p.get(), &read, 1, &to, 1, batch, 3, nullptr, 0, nullptr, 0) == 0;
                good[u] &= std::memcmp(out.data(), wanted.data(), static_cast<size_t>(batch * 5) * sizeof(float)) == 0;
            }
        });
    for (std::thread &u : users) u.join();
    for (const int g : good) expect(g, "programs in several threads");
}

// A program for so many images gives each of any number what it gives it alone.
void groups(const char *isa) {
    const int32_t kernels[] = {3, 1, 3, 1, 3}, features[] = {50, 70, 10};
    Builder b;
    int32_t y = b.input(3, 10, 10), channels = 3;
    rarefy_conv c = {};
    c.residual = -1;
    c.groups = c.dilation[0] = c.dilation[1] = 1;
    const auto layer = [&](int32_t out, int32_t kernel, int32_t stride) {
        c.x = y;
        c.out_channels = out;
        c.kernel[0] = c.kernel[1] = kernel;
        c.stride[0] = c.stride[1] = stride;
        for (int32_t &p : c.padding) p = kernel / 2;
        Floats weight = numbers(int64_t{out} * channels * kernel * kernel);
        for (float &w : weight) w = below(2) ? 0.0f : 0.2f * w;
        y = b.conv(c, weight);
        channels = out;
    };
    layer(16, 3, 2);
    for (const int32_t kernel : kernels) layer(16, kernel, 1);
    y = b.check(rarefy_builder_flatten(b.b, y, "flatten", b.error, 256));
    channels = 16 * 25;
    for (const int32_t out : features) layer(out, 1, 1);
    b.output(y);
    const Floats x = numbers(16 * 300);
    const Floats wanted = run(b.finish(isa).get(), {x}, 160, 16, 1);
    for (const int32_t expected : {2, 4, 8, 16}) {
        const Program p = b.finish(isa, expected);
        for (int64_t batch = 1; batch <= expected; ++batch)
            for (const int32_t threads : {1, 3})
                expect(close(run(p.get(), {Floats(x.begin(), x.begin() + batch * 300)}, batch * 10, batch, threads),
                             Floats(wanted.begin(), wanted.begin() + batch * 10), 1e-5),
                       std::to_string(batch) + " images of a program for " + std::to_string(expected));
    }
}

// Gates of an LSTM and of a GRU against double; every size leaves lanes over.
void gates(const char *isa) {
    const int32_t n = 11;
    const auto sigmoid = [](double v) { return 1.0 / (1.0 + std::exp(-v)); };
    for (const int32_t batch : {1, 3, 16}) {
        Builder b;
        const int32_t x = b.input(4 * n, 1, 1), c = b.input(n, 1, 1);
        const int32_t cell = b.check(rarefy_builder_lstm_cell(b.b, x, c, "cell", b.error, 256));
        b.output(b.check(rarefy_builder_lstm_hidden(b.b, x, cell, "hidden", b.error, 256)));
        const Floats xs = numbers(int64_t{batch} * 4 * n), h0 = numbers(int64_t{batch} * n);
        Floats wanted;
        for (int32_t i = 0; i < batch; ++i)
            for (int32_t u = 0; u < n; ++u) {
                const float *g = xs.data() + i * 4 * n + u;
                const double made = sigmoid(g[n]) * h0[i * n + u] + sigmoid(g[0]) * std::tanh(g[2 * n]);
                wanted.push_back(static_cast<float>(sigmoid(g[3 * n]) * std::tanh(made)));
            }
        expect(close(run(b.finish(isa, batch).get(), {xs, h0}, int64_t{batch} * n, batch, 2), wanted, 1e-5),
               "an LSTM's gates");

        Builder other;
        const int32_t from_x = other.input(3 * n, 1, 1), from_h = other.input(3 * n, 1, 1),
                      state = other.input(n, 1, 1);
        other.output(other.check(rarefy_builder_gru(other.b, from_x, from_h, state, "gru", other.error, 256)));
        const Floats a = numbers(int64_t{batch} * 3 * n), w = numbers(int64_t{batch} * 3 * n);
        Floats expected;
        for (int32_t i = 0; i < batch; ++i)
            for (int32_t u = 0; u < n; ++u) {
                const float *p1 = a.data() + i * 3 * n + u, *p2 = w.data() + i * 3 * n + u;
                const double r = sigmoid(double{p1[0]} + p2[0]), z = sigmoid(double{p1[n]} + p2[n]);
                const double fresh = std::tanh(p1[2 * n] + r * p2[2 * n]);
                expected.push_back(static_cast<float>((h0[i * n + u] - fresh) * z + fresh));
            }
        expect(close(run(other.finish(isa, batch).get(), {a, w, h0}, int64_t{batch} * n, batch, 2), expected, 1e-5),
               "a GRU's gates");
    }
}

// A layer of random sizes through its whole sequence, and what it computes in double.
struct Recurrence {
    int32_t hidden = one_of({1, 3, 8, 16, 17, 40}), steps = one_of({1, 2, 7, 16, 17, 35}), gates = one_of({3, 4});
    bool reverse = below(2), given = below(2), cells = gates == 4 && below(2), biased = below(2);
    int32_t storage = one_of({RAREFY_F32, RAREFY_F32, RAREFY_BF16}),
            choice = one_of({RAREFY_MEASURE, RAREFY_SPARSE, RAREFY_DENSE});
    Floats weight = numbers(int64_t{gates} * hidden * hidden), bias = numbers(int64_t{gates} * hidden);
    int64_t batch = one_of({1, 1, 2, 5, 9, 17});
    Floats x = numbers(batch * gates * hidden * steps), h = numbers(batch * hidden), c = numbers(batch * hidden);

    Recurrence() {
        const int32_t keep = one_of({0, 10, 50, 100});
        for (float &v : weight)
            if (below(100) >= keep) v = 0.0f;
    }
    int64_t channels() const { return cells ? 2 * hidden : hidden; }
    std::vector<Floats> inputs() const {
        if (!given) return {x};
        return gates == 4 ? std::vector<Floats>{x, h, c} : std::vector<Floats>{x, h};
    }
    void add(Builder &b) const {
        rarefy_recurrence r = {};
        r.x = b.input(gates * hidden, 1, steps, RAREFY_CHANNELS_LAST);
        r.h = given ? b.input(hidden, 1, 1) : -1;
        r.c = given && gates == 4 ? b.input(hidden, 1, 1) : -1;
        r.hidden = hidden, r.reverse = reverse, r.cells = cells, r.storage = storage, r.choice = choice;
        r.weight = weight.data(), r.weights = static_cast<int64_t>(weight.size());
        r.bias = biased ? bias.data() : nullptr, r.biases = biased ? static_cast<int64_t>(bias.size()) : 0;
        b.output(b.check(rarefy_builder_recurrence(b.b, &r, "recurrence", b.error, 256)), RAREFY_CHANNELS_LAST);
    }
    Floats wanted() const {
        const auto sigmoid = [](double v) { return 1.0 / (1.0 + std::exp(-v)); };
        Floats all(static_cast<size_t>(batch * steps * channels()));
        for (int64_t i = 0; i < batch; ++i) {
            std::vector<double> hs(hidden), cs(hidden), sums(static_cast<size_t>(gates * hidden));
            for (int32_t u = 0; given && u < hidden; ++u) hs[u] = h[i * hidden + u], cs[u] = c[i * hidden + u];
            for (int32_t step = 0; step < steps; ++step) {
                const int32_t now = reverse ? steps - 1 - step : step;
                const float *at = x.data() + (i * steps + now) * gates * hidden;
                for (int32_t row = 0; row < gates * hidden; ++row) {
                    sums[row] = biased ? bias[row] : 0.0;
                    for (int32_t k = 0; k < hidden; ++k) {
                        const float w = weight[row * hidden + k];
                        sums[row] += hs[k] * (storage == RAREFY_BF16 ? rounded(w) : w);
                    }
                }
                for (int32_t u = 0; u < hidden; ++u) {
                    const auto sum = [&](int32_t gate) { return sums[gate * hidden + u]; };
                    const auto both = [&](int32_t gate) { return sum(gate) + at[gate * hidden + u]; };
                    if (gates == 4) {
                        cs[u] = sigmoid(both(1)) * cs[u] + sigmoid(both(0)) * std::tanh(both(2));
                        hs[u] = sigmoid(both(3)) * std::tanh(cs[u]);
                    } else {
                        const double fresh = std::tanh(at[2 * hidden + u] + sigmoid(both(0)) * sum(2));
                        hs[u] = (hs[u] - fresh) * sigmoid(both(1)) + fresh;
                    }
                    float *to = all.data() + (i * steps + now) * channels() + u;
                    to[0] = static_cast<float>(hs[u]);
                    if (cells) to[hidden] = static_cast<float>(cs[u]);
                }
            }
        }
        return all;
    }
};

void recurrences(const char *isa, int64_t cases) {
    for (int64_t i = 0; i < cases; ++i) {
        const Recurrence r;
        Builder b;
        r.add(b);
        const Program p =
            b.finish(isa, one_of({1, static_cast<int32_t>(r.batch)}), one_of({1, 2, 3}), below(8) == 0 ? 0.02 : 0.0);
        if (!p) continue;
        rarefy_step_info info;
        rarefy_program_step(p.get(), r.given ? r.gates - 1 : 1, &info);
        const Floats wanted = r.wanted();
        const Floats got = run(p.get(), r.inputs(), static_cast<int64_t>(wanted.size()), r.batch, one_of({1, 1, 2, 3}));
        expect(close(got, wanted, 2e-5), std::string(isa) + " recurrence " + std::to_string(i) + ", " + info.kernel);
    }
}

// A layer in a file is the same under every instruction set.
void recurrences_in_files(const std::vector<std::string> &isas) {
    for (const std::string &isa : isas)
        for (int32_t i = 0; i < 20; ++i) {
            const Recurrence r;
            Builder b;
            r.add(b);
            const Program p = b.finish(isa.c_str(), static_cast<int32_t>(r.batch));
            const Floats wanted = r.wanted();
            const Aligned saved(rarefy_program_size(p.get()));
            rarefy_program_save(p.get(), saved.bytes);
            for (const std::string &other : isas) {
                const Program again(
                    rarefy_program_load(saved.bytes, rarefy_program_size(p.get()), other.c_str(), b.error, 256),
                    rarefy_program_free);
                expect(again && close(run(again.get(), r.inputs(), static_cast<int64_t>(wanted.size()), r.batch, 1),
                                      wanted, 2e-5),
                       "a recurrence in a file of " + isa + " under " + other + ": " + b.error);
            }
        }
}

// K-TanH as the paper's table has it (arXiv 1909.07729) where only the form matters: rows of any shifts and bases.
rarefy_shift32 some_table() {
    rarefy_shift32 t = {0x3E800000, 0x406FFFFF, 0x3F800000, 0x7F800000, 20, 0x7FFFFF, {0, 0}, {}, {}};
    for (uint32_t row = 0; row < 32; ++row) {
        t.shift[row] = row % 5;
        t.base[row] = (124 + row / 11) << 23 | row << 17;
    }
    return t;
}

uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

float tanh_by(const rarefy_shift32 &t, float x) {
    const uint32_t u = bits_of(x) & 0x7FFFFFFF, row = u >> t.index_shift & 31;
    uint32_t y = ((u & t.mantissa_mask) >> t.shift[row]) + t.base[row];
    if (u < t.identity_below) y = u;
    if (u > t.saturate_above) y = t.one;
    if (u > t.last) y = u;
    return float_of((bits_of(x) & 0x80000000) | y);
}

float relu6(float x) { return x < 0.0f ? 0.0f : x > 6.0f ? 6.0f : x; }

// What a function is in a mode, by the definitions of rarefy.act.spec.reference.
float by_mode(int32_t mode, const rarefy_shift32 &t, int32_t activation, float x) {
    const bool tanh = activation == RAREFY_TANH, sigmoid = activation == RAREFY_SIGMOID,
               gelu = activation != RAREFY_SILU;
    if (std::isinf(x) && x < 0.0f && !tanh && !sigmoid) return -0.0f;
    if (mode == RAREFY_HARD) {
        if (tanh) return x < -1.0f ? -1.0f : x > 1.0f ? 1.0f : x;
        if (sigmoid) return relu6(x + 3.0f) / 6.0f;
        const float inner = gelu ? 1.702f * x : x;
        return x * (relu6(inner + 3.0f) / 6.0f);
    }
    const float half = 0.5f * x;
    if (tanh) return tanh_by(t, x);
    if (sigmoid) return 0.5f + 0.5f * tanh_by(t, half);
    const float square = x * x, cube = 0.0356774069f * square, factor = 0.797884583f + cube, z = x * factor;
    return half * (1.0f + tanh_by(t, gelu ? z : half));
}

bool same(const Floats &a, const Floats &b) {
    for (size_t i = 0; i < a.size(); ++i)
        if (bits_of(a[i]) != bits_of(b[i]) && !(std::isnan(a[i]) && std::isnan(b[i]))) return false;
    return a.size() == b.size();
}

// Activations and gates of the modes, bit by bit: numbers of every exponent, infinities, NaN, signed zeros, subnormals.
void modes(const char *isa) {
    const rarefy_shift32 table = some_table();
    Floats x = numbers(100);
    for (float &v : x) v *= 5.0f;
    for (uint32_t u = 0; u <= 0x7FC00000; u += 0x00311111) x.insert(x.end(), {float_of(u), float_of(u | 0x80000000)});
    for (const uint32_t u : {0u, 1u, 0x7FFFFFu, 0x7F800000u, 0x7FC00000u, table.identity_below, table.saturate_above})
        x.insert(x.end(), {float_of(u), float_of(u | 0x80000000), float_of(u + 1)});
    const int32_t n = static_cast<int32_t>(x.size());
    const auto set = [&](Builder &b, int32_t value, int32_t mode) {
        expect(rarefy_builder_mode(b.b, value, mode, mode == RAREFY_KTANH ? &table : nullptr, b.error, 256) == 0,
               b.error);
    };
    for (const int32_t mode : {RAREFY_HARD, RAREFY_KTANH}) {
        for (int32_t activation = RAREFY_SILU; activation <= RAREFY_SIGMOID; ++activation) {
            Builder b;
            const int32_t given = b.input(1, 1, n);
            const int32_t y =
                b.check(rarefy_builder_affine(b.b, given, nullptr, nullptr, 0, activation, "y", b.error, 256));
            set(b, y, mode);
            b.output(y);
            Floats wanted;
            for (const float v : x) wanted.push_back(by_mode(mode, table, activation, v));
            expect(same(run(b.finish(isa).get(), {x}, n, 1, 1), wanted),
                   "activation " + std::to_string(activation) + " of mode " + std::to_string(mode));

            Builder layer;  // a product behind whose sums the activation stands
            const int32_t in = layer.input(1, 3, 50);
            rarefy_conv c = {in, -1,      2, {1, 1},  {1, 1}, {1, 1}, {0, 0, 0, 0}, 1, activation, 0,
                             0,  nullptr, 0, nullptr, 0,      {}};
            const int32_t out = layer.conv(c, {2.0f, -0.5f});
            set(layer, out, mode);
            layer.output(out);
            const Floats some(x.begin(), x.begin() + 150);
            wanted.clear();
            for (const float weight : {2.0f, -0.5f})
                for (const float v : some) wanted.push_back(by_mode(mode, table, activation, weight * v + 0.0f));
            expect(same(run(layer.finish(isa).get(), {some}, 300, 1, 1), wanted),
                   "a layer before activation " + std::to_string(activation) + " of mode " + std::to_string(mode));
        }
        const auto sigmoid = [&](float v) { return by_mode(mode, table, RAREFY_SIGMOID, v); };
        const auto tanh = [&](float v) { return by_mode(mode, table, RAREFY_TANH, v); };
        const int32_t size = 29;
        Builder b;
        const int32_t gates = b.input(4 * size, 1, 1), c = b.input(size, 1, 1);
        const int32_t cell = b.check(rarefy_builder_lstm_cell(b.b, gates, c, "cell", b.error, 256));
        const int32_t hidden = b.check(rarefy_builder_lstm_hidden(b.b, gates, c, "hidden", b.error, 256));
        const int32_t xs = b.input(3 * size, 1, 1), hs = b.input(3 * size, 1, 1);
        const int32_t fresh = b.check(rarefy_builder_gru(b.b, xs, hs, c, "gru", b.error, 256));
        for (const int32_t value : {cell, hidden, fresh}) set(b, value, mode);
        const int32_t all[] = {cell, hidden, fresh};
        b.output(b.check(rarefy_builder_concat(b.b, all, 3, "all", b.error, 256)));
        Floats g = numbers(4 * size), s = numbers(size), p = numbers(3 * size), q = numbers(3 * size), wanted;
        for (Floats *each : {&g, &s, &p, &q})
            for (float &v : *each) v *= 3.0f;
        for (int32_t i = 0; i < size; ++i) {
            const float kept = sigmoid(g[size + i]) * s[i], taken = sigmoid(g[i]) * tanh(g[2 * size + i]);
            wanted.push_back(kept + taken);
        }
        for (int32_t i = 0; i < size; ++i) wanted.push_back(sigmoid(g[3 * size + i]) * tanh(s[i]));
        for (int32_t i = 0; i < size; ++i) {
            const float r = sigmoid(p[i] + q[i]), z = sigmoid(p[size + i] + q[size + i]), inner = r * q[2 * size + i],
                        f = tanh(p[2 * size + i] + inner), moved = (s[i] - f) * z;
            wanted.push_back(moved + f);
        }
        expect(same(run(b.finish(isa).get(), {g, s, p, q}, 3 * size, 1, 1), wanted),
               "gates of mode " + std::to_string(mode));
    }
}

// A table in a file: it is there again, and one that was altered, checksum and all, is refused.
void tables_in_files(const char *isa) {
    rarefy_shift32 table = some_table();
    Builder b;
    const int32_t y =
        b.check(rarefy_builder_affine(b.b, b.input(1, 1, 100), nullptr, nullptr, 0, RAREFY_SILU, "y", b.error, 256));
    b.check(rarefy_builder_mode(b.b, y, RAREFY_KTANH, &table, b.error, 256));
    b.output(y);
    const Program p = b.finish(isa);
    const size_t size = static_cast<size_t>(rarefy_program_size(p.get()));
    std::unique_ptr<uint8_t, void (*)(void *)> memory(
        static_cast<uint8_t *>(std::aligned_alloc(64, (size + 63) / 64 * 64)), std::free);
    uint8_t *data = memory.get();
    const auto load = [&] {
        const uint64_t sum = rarefy::engine::block_sum(data, size);
        std::memcpy(data + rarefy::engine::CHECKSUM_AT, &sum, sizeof sum);
        return Program(rarefy_program_load(data, static_cast<int64_t>(size), isa, b.error, 256), rarefy_program_free);
    };
    rarefy_program_save(p.get(), data);
    const Floats x = numbers(100);
    const Program again = load();
    expect(again && same(run(p.get(), {x}, 100, 1, 1), run(again.get(), {x}, 100, 1, 1)), "a table in a file");
    const std::vector<int64_t> numbers = rarefy::engine::numbers_of(table);
    const uint8_t *first = reinterpret_cast<const uint8_t *>(numbers.data()), *end = first + numbers.size() * 8;
    uint8_t *at = std::search(data, data + size, first, end);
    expect(at != data + size, "the numbers of a table");
    // identity_below, saturate_above, one, last, index_shift, mantissa_mask; shifts; none of them fits
    for (const auto &[field, value] : std::initializer_list<std::pair<int32_t, int64_t>>{
             {0, 0}, {1, 0}, {2, 1}, {3, 1}, {4, 40}, {5, -1}, {8, 32}, {39, -1}, {71, int64_t{1} << 32}}) {
        rarefy_program_save(p.get(), data);
        std::memcpy(at + 8 * field, &value, sizeof value);
        expect(load() == nullptr, "a table with another number " + std::to_string(field));
    }
}

// Modes that a builder refuses.
void refused_modes() {
    Builder b;
    const int32_t x = b.input(4, 1, 1);
    const int32_t relu = b.check(rarefy_builder_affine(b.b, x, nullptr, nullptr, 0, RAREFY_RELU, "y", b.error, 256));
    const int32_t tanh = b.check(rarefy_builder_affine(b.b, x, nullptr, nullptr, 0, RAREFY_TANH, "y", b.error, 256));
    const rarefy_shift32 table = some_table();
    rarefy_shift32 wide = table, turned = table;
    wide.shift[7] = 32;
    turned.saturate_above = turned.identity_below - 1;
    const auto refused = [&](int32_t value, int32_t mode, const rarefy_shift32 *given) {
        return rarefy_builder_mode(b.b, value, mode, given, b.error, 256) == -1;
    };
    expect(refused(99, RAREFY_HARD, nullptr) && refused(x, RAREFY_HARD, nullptr) && refused(relu, RAREFY_HARD, nullptr),
           "a mode of what has none");
    expect(refused(tanh, RAREFY_MODES, nullptr) && refused(tanh, -1, nullptr), "a mode that is none");
    expect(refused(tanh, RAREFY_KTANH, nullptr) && refused(tanh, RAREFY_KTANH, &wide) &&
               refused(tanh, RAREFY_KTANH, &turned),
           "a table that is none");
    expect(!refused(tanh, RAREFY_KTANH, &table) && !refused(tanh, RAREFY_PLAIN, nullptr), "a mode");
}

}  // namespace

int main(int argc, char **argv) {
    const int64_t cases = argc > 1 ? std::atoll(argv[1]) : 200;
    const bool all = argc < 3 || std::string(argv[2]) != "kernels";
    std::vector<std::string> isas;
    const rarefy_kernel *table = nullptr;
    const int64_t count = rarefy_kernels(&table);
    for (int64_t i = 0; i < count; ++i)
        if (std::string(table[i].name) == "engine" && table[i].supported) isas.push_back(table[i].isa);
    for (const std::string &isa : isas) {
        for (int64_t i = 0; i < cases; ++i) conv_case(isa.c_str(), i);
        activations(isa.c_str());
        gates(isa.c_str());
        recurrences(isa.c_str(), cases);
        modes(isa.c_str());
        if (all) {
            tables_in_files(isa.c_str());
            threads(isa);
            groups(isa.c_str());
        }
        std::printf("%s: %lld convolutions\n", isa.c_str(), static_cast<long long>(cases));
    }
    refused_modes();
    if (all) files(isas);
    if (all) recurrences_in_files(isas);
    std::printf("%d failures\n", failures);
    return failures != 0 || isas.empty();
}

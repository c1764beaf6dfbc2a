// Random int8 programs under every instruction set of this CPU: each must give the bytes of "portable", with one thread
// and with two, for one image and for several. For sanitizers: every input and output ends where its numbers end.
// Usage: int8 [programs [isa ...]]; an instruction set that is named must be there.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "engine/int8/program.h"
#include "rarefy.h"
#include "rarefy_int8.h"

namespace {

typedef std::vector<float> Floats;
typedef std::unique_ptr<rarefy_int8_program, void (*)(rarefy_int8_program *)> Program;

std::minstd_rand generator(11);
int64_t below(int64_t n) { return static_cast<int64_t>(generator() % static_cast<uint64_t>(n)); }
int32_t one_of(std::initializer_list<int32_t> all) { return all.begin()[below(static_cast<int64_t>(all.size()))]; }
bool chance(int64_t percent) { return below(100) < percent; }

int64_t failures = 0;
void expect(bool good, const std::string &what) {
    if (good) return;
    std::printf("wrong: %s\n", what.c_str());
    ++failures;
}

constexpr int64_t MOST_NUMBERS = 6000, MOST_WEIGHTS = 6000;  // of a value and of a convolution

// Bytes as the numbers of an input: any, or only the smallest and the largest, or all the largest.
Floats bytes(int64_t n) {
    const int32_t kind = one_of({0, 0, 1, 2});
    Floats all(static_cast<size_t>(n));
    for (float &v : all) v = static_cast<float>(kind == 0 ? below(256) : kind == 1 ? 255 * below(2) : 255);
    return all;
}

// Weights of `rows` rows of channels x taps: single ones, blocks of four channels, all of them; any, or small, or the
// extremes.
Floats weights(int64_t rows, int64_t channels, int64_t taps) {
    const int32_t keep = one_of({0, 5, 10, 10, 30, 100, 100}), kind = one_of({0, 4, 4, 1, 2, 3});
    const bool blocks = chance(50);
    Floats all;
    for (int64_t row = 0; row < rows; ++row) {
        std::vector<uint8_t> kept(static_cast<size_t>((channels / 4 + 1) * taps));
        for (uint8_t &k : kept) k = chance(keep);
        for (int64_t i = 0; i < channels * taps; ++i) {
            const bool there = blocks ? kept[static_cast<size_t>(i / taps / 4 * taps + i % taps)] : chance(keep);
            const int64_t v = kind == 0   ? below(256) - 128
                              : kind == 4 ? below(101) - 50
                              : kind == 1 ? 127
                              : kind == 2 ? -128
                                          : 255 * below(2) - 128;
            all.push_back(there ? static_cast<float>(v) : 0.0f);
        }
    }
    return all;
}

// A network that grows step by step, with what its results become.
class Network {
 public:
    ~Network() { rarefy_builder_free(builder_); }

    // Any network of some steps, of convolutions for the most part.
    void grow() {
        input(shape(one_of({1, 3, 4, 8, 17, 40, 70})));
        for (int64_t left = 1 + below(6); left > 0 && !values_[last_].floats; --left) step();
        for (size_t i = 0; i < values_.size(); ++i)
            if (i == last_ || chance(60)) output(i);
    }

    Program finish(const std::string &isa, int32_t batch, int32_t threads) const {
        const rarefy_options options = {isa.c_str(), batch, threads, 0.0, nullptr};
        char error[256] = "";
        Program p(
            rarefy_int8_finish(builder_, results_.data(), static_cast<int64_t>(results_.size()), &options, error, 256),
            rarefy_int8_free);
        expect(p != nullptr, isa + ": " + error);
        return p;
    }

    // What the program makes of these inputs, which are as long as they have to be, and no longer.
    Floats run(const rarefy_int8_program *program, const std::vector<Floats> &given, int64_t batch,
               int32_t threads) const {
        std::vector<std::unique_ptr<float[]>> held;
        const auto hold = [&](int64_t n) {
            held.emplace_back(new float[static_cast<size_t>(n)]);
            return rarefy_buffer{held.back().get(), n};
        };
        std::vector<rarefy_buffer> in, out;
        for (const Floats &x : given) {
            in.push_back(hold(static_cast<int64_t>(x.size())));
            std::copy(x.begin(), x.end(), in.back().data);
        }
        for (const int64_t n : outputs_) out.push_back(hold(batch * n));
        char error[256] = "";
        const int32_t wrong = rarefy_int8_run(program, in.data(), static_cast<int32_t>(in.size()), out.data(),
                                              static_cast<int32_t>(out.size()), batch, threads, nullptr, 0, error, 256);
        expect(wrong == 0, error);
        Floats all;
        for (const rarefy_buffer &b : out) all.insert(all.end(), b.data, b.data + b.floats);
        return all;
    }

    std::vector<Floats> examples(int64_t batch) const {
        std::vector<Floats> all;
        for (const int64_t n : inputs_) all.push_back(bytes(batch * n));
        return all;
    }

 private:
    struct Made {
        int32_t id, c, h, w, zero;
        bool floats;
        int64_t numbers() const { return int64_t{c} * h * w; }
    };

    Made shape(int32_t channels) const {
        Made m = {0, channels, one_of({1, 1, 2, 5, 7, 9, 14}), one_of({1, 1, 3, 4, 7, 8, 15, 16, 17, 33, 65}),
                  0, false};
        if (chance(40)) m.h = m.w = 1, m.c = one_of({channels, 64, 200, 333});
        else if (chance(30))  // lines that are longer than two vectors
            m.h = one_of({1, 2, 5}), m.w = one_of({130, 131, 200, 261}), m.c = one_of({1, 3, 4});
        while (m.numbers() > MOST_NUMBERS) m.h = (m.h + 1) / 2, m.w = (m.w + 1) / 2;
        return m;
    }

    // Takes what a builder's function gave, the id of a value of this zero point; whether it did.
    bool made(int32_t id, int32_t zero, const rarefy_int8_result &result) {
        if (id < 0) return false;  // of this shape there is none
        int32_t s[3];
        rarefy_builder_shape(builder_, id, s, nullptr, 0);
        values_.push_back({id, s[0], s[1], s[2], zero, result.floats != 0});
        results_.push_back(result);
        last_ = values_.size() - 1;
        return true;
    }

    // A result of any zero point, clamped to all bytes or to some.
    static rarefy_int8_result any() {
        rarefy_int8_result r = {};
        r.zero_point = one_of({0, 0, 128, 255, static_cast<int32_t>(below(256))});
        r.low = static_cast<float>(chance(80) ? 0 : below(100));
        r.high = static_cast<float>(chance(80) ? 255 : 155 + below(100));
        return r;
    }

    // A factor that makes a byte of so large a number: a power of two, which gives ties, or another; at times too
    // large.
    static float factor(double most) {
        double f = 1.0;
        while (f * most > 255.0) f /= 2.0;
        return static_cast<float>(chance(50) ? f : f * 0.001 * static_cast<double>(1 + below(20000)));
    }

    void input(Made m) {
        rarefy_int8_result r = any();
        r.multiplier = 1.0f;
        r.low = 0.0f;
        r.high = 255.0f;
        made(rarefy_builder_input(builder_, m.c, m.h, m.w, one_of({0, 1}), "x", nullptr, 0), r.zero_point, r);
        inputs_.push_back(values_.back().numbers());
    }

    void output(size_t i) {
        rarefy_int8_result r = {};
        r.multiplier = 1.0f;
        rarefy_builder_output(builder_, values_[i].id, one_of({0, 1}), nullptr, 0);
        results_.push_back(r);
        outputs_.push_back(values_[i].numbers());
    }

    void step() {
        const Made x = values_[last_];
        const int64_t kind = below(17);
        rarefy_int8_result r = any();
        if (kind < 8) {
            conv(x);
        } else if (kind < 10) {
            pool(x);
        } else if (kind == 10) {
            r.ratio = 0.01 * static_cast<double>(1 + below(200));
            made(rarefy_builder_global_average(builder_, x.id, "mean", nullptr, 0), r.zero_point, r);
        } else if (kind == 11) {
            binary(x);
        } else if (kind == 12 || kind == 16) {
            tables_.emplace_back(256);
            for (uint8_t &v : tables_.back()) v = static_cast<uint8_t>(below(256));
            r.table = tables_.back().data();
            made(rarefy_builder_affine(builder_, x.id, nullptr, nullptr, 0, RAREFY_NONE, "table", nullptr, 0),
                 r.zero_point, r);
        } else if (kind == 13) {
            const Made y = like(x, x.c), z = like(x, 3);
            const int32_t parts[] = {x.id, y.id, z.id};
            r.zero_point = x.zero;
            made(rarefy_builder_concat(builder_, parts, 3, "concat", nullptr, 0), x.zero, r);
        } else if (kind == 14 && 4 * x.numbers() <= MOST_NUMBERS) {
            r.zero_point = x.zero;
            made(rarefy_builder_upsample(builder_, x.id, one_of({1, 2}), 2, "up", nullptr, 0), x.zero, r);
        } else if (kind == 15) {
            r.zero_point = x.zero;
            made(rarefy_builder_flatten(builder_, x.id, "flatten", nullptr, 0), x.zero, r);
        }
    }

    // A value of the size of x: one that is there, or else another input.
    Made like(const Made &x, int32_t channels) {
        for (const Made &m : values_)
            if (m.c == channels && m.h == x.h && m.w == x.w && !m.floats && chance(50)) return m;
        input({0, channels, x.h, x.w, 0, false});
        return values_.back();
    }

    void conv(const Made &x) {
        rarefy_conv c = {};
        c.x = x.id;
        c.residual = -1;
        const bool vector = x.h * x.w == 1;
        c.groups = vector && chance(90) ? 1 : one_of({1, 1, 1, 1, x.c, x.c % 2 ? 1 : 2});
        c.out_channels = c.groups * (c.groups > 4 ? one_of({1, 1, 2}) : one_of({1, 3, 4, 9, 24}));
        const bool point = chance(vector ? 90 : 35);
        for (int axis = 0; axis < 2; ++axis) {
            c.kernel[axis] = point ? 1 : one_of({1, 2, 3, 3, 5});
            c.stride[axis] = x.w >= 130 ? one_of({1, 2, 2}) : point && chance(80) ? 1 : one_of({1, 1, 2, 3});
            c.dilation[axis] = one_of({1, 1, 1, 2});
            const int32_t reach = c.dilation[axis] * (c.kernel[axis] - 1);
            const bool same = chance(vector ? 95 : 60);
            c.padding[2 * axis] = same ? reach / 2 : one_of({0, 1, 2});
            c.padding[2 * axis + 1] = same ? reach - reach / 2 : one_of({0, 1, 2});
        }
        const int64_t channels = x.c / c.groups, taps = int64_t{c.kernel[0]} * c.kernel[1];
        while (c.out_channels > c.groups && c.out_channels * channels * taps > MOST_WEIGHTS) c.out_channels -= c.groups;
        const Floats weight = weights(c.out_channels, channels, taps);
        c.weight = weight.data();
        c.weights = static_cast<int64_t>(weight.size());
        rarefy_int8_result r = any();
        r.rows = c.out_channels;
        r.layout = one_of({0, 1, 2, 3, 4, 5});
        r.other = factor(255.0);
        Floats multipliers, biases;
        for (int64_t row = 0; row < r.rows; ++row) {
            double most = 1.0, squares = 1.0;
            for (int64_t i = 0; i < channels * taps; ++i) {
                const double w = weight[row * channels * taps + i];
                most += 255.0 * std::fabs(w);
                squares += 128.0 * 128.0 * w * w;
            }
            // as large as sums can be, or as they are for the most part
            multipliers.push_back(factor(chance(30) ? most : std::sqrt(squares)) * (chance(30) ? -1.0f : 1.0f));
            biases.push_back(static_cast<float>(chance(50) ? 128 : r.zero_point) +
                             0.5f * static_cast<float>(below(41) - 20));
        }
        r.multipliers = hold(multipliers);
        r.biases = hold(biases);
        // a residual has the shape of what the convolution makes
        const int32_t h = size(x.h, c, 0), w = size(x.w, c, 1);
        if (h < 1 || w < 1 || int64_t{c.out_channels} * h * w > MOST_NUMBERS) return;
        if (chance(35)) c.residual = like({0, 0, h, w, 0, false}, c.out_channels).id;
        if (chance(20)) {
            r.floats = 1;
            r.low = -100.25f;
            r.high = 300.5f;
        }
        expect(made(rarefy_builder_conv(builder_, &c, "conv", nullptr, 0), r.zero_point, r),
               "a convolution is refused");
    }

    static int32_t size(int32_t from, const rarefy_conv &c, int axis) {
        const int32_t room =
            from + c.padding[2 * axis] + c.padding[2 * axis + 1] - c.dilation[axis] * (c.kernel[axis] - 1) - 1;
        return room < 0 ? 0 : room / c.stride[axis] + 1;
    }

    void pool(const Made &x) {
        rarefy_pool p = {};
        p.x = x.id;
        p.average = one_of({0, 1});
        p.count_padding = one_of({0, 1});
        for (int axis = 0; axis < 2; ++axis) {
            p.kernel[axis] = one_of({1, 2, 3});
            p.stride[axis] = one_of({1, 2, 3});
            p.dilation[axis] = 1;
            p.padding[2 * axis] = one_of({0, p.kernel[axis] / 2});
            p.padding[2 * axis + 1] = one_of({0, p.kernel[axis] / 2});
        }
        rarefy_int8_result r = any();
        if (p.average) r.ratio = 0.01 * static_cast<double>(1 + below(200));
        else r.zero_point = x.zero;
        made(rarefy_builder_pool(builder_, &p, "pool", nullptr, 0), r.zero_point, r);
    }

    void binary(const Made &x) {
        const bool multiply = chance(50);
        Made y = like(x, x.c);
        if (chance(40)) {
            input({0, x.c, 1, 1, 0, false});
            y = values_.back();
        }
        rarefy_int8_result r = any();
        r.multiplier = factor(multiply ? 65025.0 : 255.0);
        r.other = factor(255.0);
        r.bias = static_cast<float>(below(256)) - 64.0f;
        made(rarefy_builder_binary(builder_, x.id, y.id, multiply, RAREFY_NONE, "binary", nullptr, 0), r.zero_point, r);
    }

    const float *hold(const Floats &numbers) {
        held_.push_back(numbers);
        return held_.back().data();
    }

    rarefy_builder *builder_ = rarefy_builder_new();
    std::vector<rarefy_int8_result> results_;
    std::vector<Made> values_;
    std::vector<int64_t> inputs_, outputs_;
    size_t last_ = 0;
    std::deque<Floats> held_;
    std::deque<std::vector<uint8_t>> tables_;
};

// What a program does with kernels of its instruction set: convolutions in each way that there is, and what else goes
// by whole vectors.
enum Way {
    SINGLE,
    BLOCKS,
    DENSE,
    DENSE_VECTOR,
    SINGLE_VECTOR,
    BLOCK_VECTOR,
    WINDOW_VECTOR,
    BITMASK_VECTOR,
    STRIDE,
    TABLE,
    INPUT,
    OUTPUT,
    WAYS
};
const char *const WAY_NAMES[WAYS] = {"of single weights",
                                     "of blocks",
                                     "of all weights",
                                     "of a vector and all weights",
                                     "of a vector and single weights",
                                     "of a vector and blocks",
                                     "of vectors and windows",
                                     "of vectors and a bitmask",
                                     "copies of every second pixel",
                                     "tables",
                                     "inputs with their channels last",
                                     "outputs with their channels last"};

struct Counts {
    int64_t comparisons = 0, ran[WAYS] = {};
    bool has_blocks = false;

    void add(const rarefy_int8_program *program) {
        using rarefy::engine::Kind;
        has_blocks = program->kernels->rows[rarefy::int8::BLOCKS][rarefy::int8::QUARTERS] != nullptr;
        for (const rarefy::int8::Step &s : program->steps) {
            const Kind kind = s.node.kind;
            const bool blocks = s.layout == rarefy::int8::BLOCKS, dense = s.layout == rarefy::int8::DENSE;
            const auto whole = [&](int64_t n) { return n >= program->kernels->pixels; };
            const rarefy::int8::Shape &x = program->values[s.node.x >= 0 ? s.node.x : s.node.out].shape;
            const bool last = s.node.layout == RAREFY_CHANNELS_LAST && x.pixels() > 1 && whole(x.channels);
            if (s.copy) ran[STRIDE] += s.node.window.stride[1] == 2 && whole(s.node.window.out_w);
            else if (s.layout == rarefy::int8::WINDOWS) ++ran[WINDOW_VECTOR];
            else if (s.layout == rarefy::int8::BITMASK) ++ran[BITMASK_VECTOR];
            else if (kind == Kind::CONV && !s.vector) ++ran[dense ? DENSE : blocks ? BLOCKS : SINGLE];
            else if (kind == Kind::CONV) ++ran[dense ? DENSE_VECTOR : blocks ? BLOCK_VECTOR : SINGLE_VECTOR];
            else if (kind == Kind::AFFINE) ran[TABLE] += whole(x.width);
            else if (kind == Kind::INPUT) ran[INPUT] += last;
            else if (kind == Kind::OUTPUT) ran[OUTPUT] += last;
        }
    }
};

}  // namespace

int main(int argc, char **argv) {
    const int64_t programs = argc > 1 ? std::atoll(argv[1]) : 300;
    std::vector<std::string> isas;
    const rarefy_kernel *table = nullptr;
    const int64_t count = rarefy_kernels(&table);
    for (int64_t i = 0; i < count; ++i)
        if (std::string(table[i].name) == "int8" && table[i].supported) isas.push_back(table[i].isa);
    for (int i = 2; i < argc; ++i)
        expect(std::find(isas.begin(), isas.end(), argv[i]) != isas.end(),
               std::string("there is no instruction set ") + argv[i] + " here");
    std::map<std::string, Counts> counts;
    for (int64_t number = 0; number < programs; ++number) {
        Network network;
        network.grow();
        const int32_t batch = one_of({1, 3, 6}), expected = one_of({1, 1, 5});
        const std::vector<Floats> x = network.examples(batch);
        const Program first = network.finish("portable", expected, 1);
        if (!first) continue;
        const Floats wanted = network.run(first.get(), x, batch, 1);
        for (const std::string &isa : isas)
            for (const int32_t threads : {1, one_of({2, 3, 5})}) {
                const Program p = network.finish(isa, expected, threads);
                if (!p) continue;
                const Floats got = network.run(p.get(), x, batch, threads);
                expect(std::memcmp(got.data(), wanted.data(), wanted.size() * sizeof(float)) == 0,
                       isa + " of program " + std::to_string(number) + ", " + std::to_string(threads) + " threads");
                ++counts[isa].comparisons;
                counts[isa].add(p.get());
            }
    }
    for (const std::string &isa : isas) {
        const Counts &c = counts[isa];
        std::printf("%s: %lld comparisons; convolutions and steps of whole vectors:", isa.c_str(),
                    static_cast<long long>(c.comparisons));
        for (int32_t way = 0; way < WAYS; ++way) {
            std::printf("%s %lld %s", way ? "," : "", static_cast<long long>(c.ran[way]), WAY_NAMES[way]);
            expect(c.ran[way] || ((way == BLOCKS || way == DENSE) && !c.has_blocks),
                   isa + ": there were none " + WAY_NAMES[way]);
        }
        std::printf("\n");
    }
    std::printf("%lld failures\n", static_cast<long long>(failures));
    return failures != 0 || isas.empty();
}

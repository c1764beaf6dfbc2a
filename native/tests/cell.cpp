// The recurrent kernels of every instruction set that this CPU has against those in plain C, which the Python tests
// hold against PyTorch: all outputs and gradients, at sizes around those of vectors, tiles and blocks.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "rarefy.h"

namespace {

struct Case {
    int64_t hidden, batch, steps;
    bool packed, reverse;
};

const Case CASES[] = {{1, 1, 3, false, false},   {8, 2, 2, false, true},   {17, 5, 3, true, false},
                      {33, 70, 2, false, false}, {130, 3, 2, true, true},  {16, 1, 1, false, false},
                      {65, 2, 3, false, true},   {64, 67, 2, true, false}, {5, 3, 1, false, false},
                      {31, 16, 3, false, false}, {48, 130, 4, true, true}, {320, 33, 3, true, false}};

uint16_t narrow(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

float wide(uint16_t value) {
    const uint32_t bits = static_cast<uint32_t>(value) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

// Numbers in the format of a kernel, exactly as many bytes as they take: a sanitizer sees what lies beyond.
struct Values {
    bool half;
    std::vector<float> floats;
    std::vector<uint16_t> halves;

    Values(bool half_, int64_t n) : half(half_), floats(half_ ? 0 : n), halves(half_ ? n : 0) {}
    void *data() { return half ? static_cast<void *>(halves.data()) : static_cast<void *>(floats.data()); }
    int64_t size() const { return static_cast<int64_t>(half ? halves.size() : floats.size()); }
    float at(int64_t i) const { return half ? wide(halves[i]) : floats[i]; }
    void set(int64_t i, float value) {
        if (half) halves[i] = narrow(value);
        else floats[i] = value;
    }
};

Values random_values(std::mt19937 &source, bool half, int64_t n, float scale) {
    std::normal_distribution<float> normal(0.0f, scale);
    Values result(half, n);
    for (int64_t i = 0; i < n; ++i) result.set(i, normal(source));
    return result;
}

typedef std::map<std::string, rarefy_kernel> Kernels;  // of one instruction set

// All outputs of one case, in one row.
std::vector<float> run(const Kernels &kernels, const std::string &kind, bool half, bool narrow_products, const Case &c,
                       int threads) {
    const std::string suffix = half ? "_bf16" : "_f32";
    const int64_t gates = kind == "lstm" ? 4 : 3, H = c.hidden;
    std::mt19937 source(7);
    std::vector<int64_t> offsets(1, 0);
    for (int64_t s = 0; s < c.steps; ++s)
        offsets.push_back(offsets.back() + (c.packed ? (c.batch - s > 1 ? c.batch - s : 1) : c.batch));
    const int64_t rows = offsets.back();
    std::vector<float> bias(H);
    std::normal_distribution<float> normal(0.0f, 1.0f);
    Values products = random_values(source, half && narrow_products, rows * gates * H, 1.0f);
    for (float &b : bias) b = normal(source);
    Values weights = random_values(source, half, gates * H * H, 1.0f / std::sqrt(static_cast<float>(H)));
    const Values h0 = random_values(source, half, c.batch * H, 1.0f),
                 c0 = random_values(source, half, c.batch * H, 1.0f);
    Values h = h0, state = c0, y(half, rows * H), kept(half, rows * 4 * H), cells(half, rows * 2 * H);
    // clamped activations: in bfloat16 by their answers
    static std::vector<uint16_t> sixth, unit;
    if (sixth.empty())
        for (int64_t i = 0; i < 1 << 16; ++i) {
            const float x = wide(static_cast<uint16_t>(i));
            sixth.push_back(narrow(std::fmin(std::fmax(x + 3.0f, 0.0f), 6.0f) / 6.0f));
            unit.push_back(narrow(std::fmin(std::fmax(x, -1.0f), 1.0f)));
        }
    rarefy_recurrent op = {};
    op.steps = c.steps, op.batch = c.batch, op.hidden = H, op.reverse = c.reverse, op.threads = threads;
    op.offsets = c.packed ? offsets.data() : nullptr;
    op.sigmoid.kind = RAREFY_GATE_CLAMP_SIXTH, op.tanh.kind = RAREFY_GATE_CLAMP;
    if (half) {
        void *entry = kernels.at("act_lut16").entry;
        op.sigmoid = {entry, sixth.data(), RAREFY_GATE_ENTRY}, op.tanh = {entry, unit.data(), RAREFY_GATE_ENTRY};
    }
    op.products = products.data(), op.weights = weights.data(), op.bias = gates == 3 ? bias.data() : nullptr;
    op.h = h.data(), op.c = state.data(), op.y = y.data(), op.gates = kept.data(), op.cells = cells.data();
    op.narrow = products.half;
    const int64_t padded = c.batch + 15, depth = gates * H + 31;
    std::vector<float> scratch((gates * (H + 15) + padded) * (H + 31));
    op.scratch = scratch.data();
    reinterpret_cast<rarefy_recurrent_forward *>(kernels.at(kind + suffix).entry)(&op);

    Values dy = random_values(source, half, rows * H, 1.0f), dh = random_values(source, half, c.batch * H, 1.0f);
    Values d(half, rows * gates * H), through(half, rows * gates * H);
    std::vector<float> dh0(c.batch * H), dc(c.batch * H, 0.5f);
    Values first_h = h0, first_c = c0;
    op.h = first_h.data(), op.c = first_c.data();
    std::vector<float> more((padded + depth) * (H + 63) + padded * depth);
    op.scratch = more.data();
    rarefy_recurrent_gradients to = {dy.data(), dh.data(), d.data(), through.data(), dh0.data(), dc.data(), 1};
    reinterpret_cast<rarefy_recurrent_backward *>(kernels.at(kind + "_backward" + suffix).entry)(&op, &to);

    std::vector<float> all;
    for (const Values *values : {&y, &h, &kept, &d})
        for (int64_t i = 0; i < values->size(); ++i) all.push_back(values->at(i));
    if (gates == 4)
        for (const Values *values : {&state, &cells})
            for (int64_t i = 0; i < values->size(); ++i) all.push_back(values->at(i));
    else
        for (int64_t i = 0; i < through.size(); ++i) all.push_back(through.at(i));
    for (const std::vector<float> *values : {&dh0, &dc}) all.insert(all.end(), values->begin(), values->end());
    return all;
}

}  // namespace

int main() {
    const rarefy_kernel *table;
    const int64_t count = rarefy_kernels(&table);
    std::map<std::string, Kernels> found;
    for (int64_t i = 0; i < count; ++i)
        if (table[i].supported) found[table[i].isa].emplace(table[i].name, table[i]);
    int wrong = 0;
    for (auto &[isa, kernels] : found) {
        if (kernels.count("lstm_bf16") == 0) continue;
        kernels.insert(found.at("portable").begin(), found.at("portable").end());  // what it has no use for
        double largest = 0.0;
        for (const Case &c : CASES)
            for (const char *kind : {"lstm", "gru"})
                for (const bool half : {false, true})
                    for (const int threads : {1, 3}) {
                        const bool narrow_products = threads == 3;
                        const std::vector<float> ours = run(kernels, kind, half, narrow_products, c, threads);
                        const std::vector<float> plain = run(found.at("portable"), kind, half, narrow_products, c, 1);
                        // sums in another order may round a bfloat16 to the other side, and that goes on
                        const double bound = half ? 0.06 : 2e-5;
                        for (size_t i = 0; i < ours.size(); ++i) {
                            const double error =
                                std::fabs(static_cast<double>(ours[i]) - plain[i]) / (1.0 + std::fabs(plain[i]));
                            if (!(error <= bound)) ++wrong;
                            if (!half) largest = std::fmax(largest, error);
                        }
                    }
        std::printf("recurrent kernels, %s: largest difference in float32 %.1e, %d wrong\n", isa.c_str(), largest,
                    wrong);
    }
    return wrong != 0;
}

// Normalisation over the channels of every pixel, and over the pixels of some channels.
#include <cmath>
#include <limits>

#include "engine/tensor.h"

namespace rarefy::engine {

namespace {

std::string check_norm(const Given &given, const Shape &out) {
    const double eps = number(given.numbers, 0);
    if (!(eps >= 0.0 && std::isfinite(eps))) return "eps must be at least 0";
    if (given.constants != 2 * int64_t{out.channels})
        return "there must be " + std::to_string(2 * int64_t{out.channels}) + " factors and summands, got " +
               std::to_string(given.constants);
    return "";
}

std::string infer_norm(const Graph &, const Node &, const Given &given, Shape *out) {
    if (given.numbers.size() != 1 || !given.operands.empty()) return "a norm has one value and one number, eps";
    return check_norm(given, *out);
}

std::string infer_group_norm(const Graph &, const Node &, const Given &given, Shape *out) {
    if (given.numbers.size() != 2 || !given.operands.empty())
        return "a group norm has one value and two numbers, eps and the groups";
    const int64_t groups = given.numbers[1];
    if (groups < 1 || groups > out->channels || out->channels % groups)
        return std::to_string(out->channels) + " channels are no " + std::to_string(groups) + " groups";
    return check_norm(given, *out);
}

int64_t no_scratch(const Graph &, const Step &) { return 0; }

// Pixels that a thread takes at a time: whole lines of the cache.
constexpr int64_t LINE = 16;

void run_norm(const Frame &f, const Step &s, int64_t image) {
    const View x = view(f, s.node.x, image), y = view(f, s.node.out, image);
    const Shape &shape = f.plan->values[s.node.out].shape;
    const int64_t pixels = shape.pixels();
    const Share mine(f, (pixels + LINE - 1) / LINE);
    const int64_t from = mine.from * LINE, to = std::min(pixels, mine.to * LINE);
    if (from >= to) return;
    NormCall call = {};
    call.x = x.at + from;
    call.y = y.at + from;
    call.x_stride = x.stride;
    call.y_stride = y.stride;
    call.channels = shape.channels;
    call.pixels = to - from;
    call.scale = s.constants.data();
    call.shift = s.constants.data() + shape.channels;
    call.eps = static_cast<float>(number(s.numbers, 0));
    call.centred = s.node.function == RAREFY_LAYER_NORM;
    f.program->kernels->norm(&call);
}

// Numbers whose sum is taken in float32; these sums are added in double.
constexpr int64_t SPAN = 1 << 14;

template <class F>
double over_spans(const View &x, int64_t first, int64_t last, int64_t pixels, const F &sum) {
    double all = 0.0;
    for (int64_t c = first; c < last; ++c)
        for (int64_t p = 0; p < pixels; p += SPAN) all += sum(x.at + c * x.stride + p, std::min(SPAN, pixels - p));
    return all;
}

void run_group_norm(const Frame &f, const Step &s, int64_t image) {
    const Kernels &k = *f.program->kernels;
    const View x = view(f, s.node.x, image), y = view(f, s.node.out, image);
    const Shape &shape = f.plan->values[s.node.out].shape;
    const int64_t groups = s.numbers[1], each = shape.channels / groups, pixels = shape.pixels();
    const float *scale = s.constants.data(), *shift = scale + shape.channels;
    const double count = static_cast<double>(each * pixels), eps = number(s.numbers, 0);
    constexpr float END = std::numeric_limits<float>::infinity();
    const Share mine(f, groups);
    for (int64_t group = mine.from; group < mine.to; ++group) {
        const int64_t first = group * each, last = first + each;
        const float mean = static_cast<float>(over_spans(x, first, last, pixels, k.sum) / count);
        const double squares =
            over_spans(x, first, last, pixels, [&](const float *at, int64_t n) { return k.squares(at, mean, n); });
        const float factor = static_cast<float>(1.0 / std::sqrt(squares / count + eps));
        for (int64_t c = first; c < last; ++c) {
            const float slope = factor * scale[c];
            k.affine(x.at + c * x.stride, slope, std::fma(-mean, slope, shift[c]), y.at + c * y.stride, pixels, -END,
                     END);
        }
    }
}

}  // namespace

const Function LAYER_NORM = {"layer norm", infer_norm, no_scratch, run_norm};
const Function RMS_NORM = {"rms norm", infer_norm, no_scratch, run_norm};
const Function GROUP_NORM = {"group norm", infer_group_norm, no_scratch, run_group_norm};

}  // namespace rarefy::engine

// Normalisation over the channels of every pixel.
#include <cmath>

#include "engine/tensor.h"

namespace rarefy::engine {

namespace {

std::string infer_norm(const Graph &, const Node &, const Given &given, Shape *out) {
    if (given.numbers.size() != 1 || !given.operands.empty()) return "a norm has one value and one number, eps";
    const double eps = number(given.numbers, 0);
    if (!(eps >= 0.0 && std::isfinite(eps))) return "eps must be at least 0";
    if (given.constants != 2 * int64_t{out->channels})
        return "there must be " + std::to_string(2 * int64_t{out->channels}) + " factors and summands, got " +
               std::to_string(given.constants);
    return "";
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

}  // namespace

const Function LAYER_NORM = {"layer norm", infer_norm, no_scratch, run_norm};
const Function RMS_NORM = {"rms norm", infer_norm, no_scratch, run_norm};

}  // namespace rarefy::engine

// A layer of an LSTM or a GRU over a sequence. Its steps come one after the other: of each the product of the weights
// with the state, then the gates. The numbers of a step lie together in scratch memory, where those of the values lie
// by channels: some steps at a time are turned.
#include <algorithm>
#include <cstring>

#include "engine/tensor.h"

namespace rarefy::engine {

namespace {

// Steps that are turned at a time: a line of a cache.
constexpr int64_t TURNED = 16;

struct Sizes {
    int64_t hidden, gates, channels, images;  // gates: of all of a step, channels: of a step's result

    Sizes(const Graph &graph, const Node &node, int64_t images)
        : hidden(node.out_channels), gates(graph.values[node.x].channels), channels(graph.values[node.out].channels),
          images(images) {}
    bool lstm() const { return gates == 4 * hidden; }
};

constexpr int64_t rounded(int64_t floats) { return (floats + 15) / 16 * 16; }

// What a step of the sequence reads and writes, numbers of the images side by side.
struct Scratch {
    float *h, *c;         // hidden x images
    float *products;      // gates x images: of the weights with h
    float *given, *made;  // TURNED x gates x images, TURNED x channels x images

    Scratch(float *at, const Sizes &s)
        : h(at), c(h + rounded(s.hidden * s.images)), products(c + rounded(s.hidden * s.images)),
          given(products + rounded(s.gates * s.images)), made(given + TURNED * s.gates * s.images) {}
    static int64_t floats(const Sizes &s) {
        return 2 * rounded(s.hidden * s.images) + rounded(s.gates * s.images) +
               TURNED * (s.gates + s.channels) * s.images;
    }
};

// The states of some images to begin with: zeros, or values.
void begin(const Frame &f, const Sizes &s, int32_t id, int64_t at, float *state) {
    if (id < 0) return std::fill(state, state + s.hidden * s.images, 0.0f);
    for (int64_t i = 0; i < s.images; ++i) {
        const View v = view(f, id, at + i);
        for (int64_t u = 0; u < s.hidden; ++u) state[u * s.images + i] = v.at[u * v.stride];
    }
}

// Some images, one after the other in the values, through all steps. f: of one thread.
void run_images(const Frame &f, const Step &step, const Sizes &s, int64_t at) {
    const Kernels &k = *f.program->kernels;
    const Scratch own(f.scratch + f.program->scratch_floats() - f.program->state_floats, s);
    const int64_t steps = f.plan->values[step.node.x].shape.pixels(), numbers = s.hidden * s.images;
    const View x = view(f, step.node.x, at), y = view(f, step.node.out, at);
    begin(f, s, step.node.other_operand, at, own.h);
    if (s.lstm()) begin(f, s, step.operands.empty() ? -1 : step.operands[0], at, own.c);
    const int64_t blocks = (steps + TURNED - 1) / TURNED;
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t first = (step.node.reverse ? blocks - 1 - block : block) * TURNED,
                      some = std::min(TURNED, steps - first);
        if (s.images == 1) k.transpose(x.at + first, x.stride, s.gates, some, own.given, s.gates);
        else  // channel by channel: images lie one after the other
            for (int64_t r = 0; r < s.gates; ++r)
                k.transpose(x.at + r * x.stride + first, steps, s.images, some, own.given + r * s.images,
                            s.gates * s.images);
        for (int64_t t = 0; t < some; ++t) {
            const int64_t now = step.node.reverse ? some - 1 - t : t;
            const float *given = own.given + now * s.gates * s.images;
            float *made = own.made + now * s.channels * s.images;
            const auto gate = [&](const float *all, int64_t i) { return all + i * numbers; };
            // there and back again
            Operands o = {{own.h, s.images}, {own.products, s.images}, {nullptr, 0}, t % 2 != 0};
            if (s.lstm()) o.residual = {const_cast<float *>(given), s.images};
            if (step.config.vector) multiply_vector(f, step, o);
            else multiply_tiles(f, step, o, s.images, 0, static_cast<int64_t>(step.tiling(s.images).tiles.size()));
            if (s.lstm()) {
                const float *all = own.products;
                k.lstm_cell(step.mode(), gate(all, 0), gate(all, 1), gate(all, 2), own.c, own.c, numbers);
                k.lstm_hidden(step.mode(), gate(all, 3), own.c, own.h, numbers);
            } else {
                const float *xs[] = {gate(given, 0), gate(given, 1), gate(given, 2)},
                            *hs[] = {gate(own.products, 0), gate(own.products, 1), gate(own.products, 2)};
                k.gru(step.mode(), xs, hs, own.h, own.h, numbers);
            }
            std::memcpy(made, own.h, static_cast<size_t>(numbers) * sizeof(float));
            if (step.node.cells) std::memcpy(made + numbers, own.c, static_cast<size_t>(numbers) * sizeof(float));
        }
        if (s.images == 1) k.transpose(own.made, s.channels, some, s.channels, y.at + first, y.stride);
        else
            for (int64_t u = 0; u < s.channels; ++u)
                k.transpose(own.made + u * s.images, s.channels * s.images, some, s.images, y.at + u * y.stride + first,
                            steps);
    }
}

}  // namespace

int64_t recurrence_floats(const rarefy_program &program, const Step &step) {
    if (step.node.kind != Kind::RECURRENCE) return 0;
    return Scratch::floats(Sizes(program.graph, step.node, step.group));
}

void run_recurrence(const Frame &f, const Step &step, int64_t at, int64_t images) {
    if (f.part > 0) return;  // a step waits for the one before
    Frame alone = f;
    alone.parts = 1;
    const int64_t together = step.config.vector ? 1 : images;
    for (int64_t i = 0; i < images; i += together)
        run_images(alone, step, Sizes(f.program->graph, step.node, together), at + i);
}

}  // namespace rarefy::engine

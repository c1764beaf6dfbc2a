// Runs a program: hands out images, or the parts of one image's steps, to threads.
#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "engine/tensor.h"
#include "engine/threads.h"

namespace rarefy::engine {

namespace {

struct Runner {
    Frame frame;
    std::vector<int64_t> *begins;  // the frame's
    Barrier *barrier;
    double *seconds;

    template <class F>
    void timed(int32_t step, const F &body) {
        const double before = seconds ? thread_seconds() : 0.0;
        body();
        if (seconds) seconds[step] += thread_seconds() - before;
    }

    void steps(const Stage &stage, int64_t at, int64_t images) {
        const auto &chains = frame.plan->chains;
        auto next = std::find_if(chains.begin(), chains.end(), [&](const Chain &c) { return c.first >= stage.first; });
        for (int32_t i = stage.first; i < stage.last;) {
            if (next != chains.end() && next->first == i) {
                chain(*next, at);
                i = next++->last;
                continue;
            }
            over_images(stage.group, at, images, [&](int64_t first, int64_t some) {
                timed(i, [&] { run_step(frame, frame.program->steps[i], first, some); });
                barrier->wait();
            });
            ++i;
        }
    }

    void chain(const Chain &c, int64_t at) {
        for (int32_t i = c.first; i < c.last; ++i) (*begins)[frame.program->steps[i].node.out] = 0;
        for (const Run &run : c.runs) {
            timed(run.step, [&] {
                for (const Move &move : run.moves) this->move(move);
                run_units(frame, frame.program->steps[run.step], at, 1, run.from, run.to);
            });
        }
    }

    void move(const Move &move) {
        const Value &v = frame.plan->values[move.value];
        float *window = frame.arena + v.offset;
        for (int64_t c = 0; c < v.shape.channels; ++c, window += v.stride)
            std::memmove(window, window + (move.low - move.begin),
                         static_cast<size_t>(move.done - move.low) * sizeof(float));
        (*begins)[move.value] = move.low;
    }

    void run_all(int64_t images) {
        over_stages(frame.plan->stages, images,
                    [this](const Stage &stage, int64_t at, int64_t some) { steps(stage, at, some); });
    }
};

}  // namespace

Workspace Pool::take(int64_t scratch_floats, int64_t arena_floats) {
    const int64_t floats = (arena_floats + scratch_floats + 1023) / 1024 * 1024;
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        const auto found =
            std::find_if(idle_.begin(), idle_.end(), [=](const Workspace &w) { return w.floats >= floats; });
        if (found != idle_.end()) {
            Workspace w = std::move(*found);
            idle_.erase(found);
            return w;
        }
    }
    Workspace w;
    float *memory = static_cast<float *>(std::aligned_alloc(4096, static_cast<size_t>(floats) * sizeof(float)));
    if (!memory) return w;
    std::fill(memory, memory + floats, 0.0f);
    w.memory = {memory, std::free};
    w.floats = floats;
    w.scratch = memory;
    w.arena = memory + scratch_floats;
    return w;
}

void Pool::give(std::vector<Workspace> &&spaces) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (Workspace &w : spaces) idle_.push_back(std::move(w));
}

Workspace take(const rarefy_program &program, const Plan &plan) {
    return program.pool.take(program.scratch_floats(), plan.arena_floats);
}

}  // namespace rarefy::engine

using namespace rarefy::engine;

extern "C" __attribute__((visibility("default"))) int32_t
rarefy_program_run(const rarefy_program *program, const rarefy_buffer *read, int32_t input_count,
                   const rarefy_buffer *written, int32_t output_count, int64_t batch, int32_t threads, double *seconds,
                   int64_t second_count, char *error, int64_t size) {
    const auto sizes = [&](const std::vector<int32_t> &ports) {
        std::vector<int64_t> all;
        for (const int32_t port : ports) {
            const Node &node = program->steps[port].node;
            all.push_back(program->graph.values[node.kind == Kind::INPUT ? node.out : node.x].size());
        }
        return all;
    };
    const Call call{read, input_count, written, output_count, batch, threads, seconds, second_count};
    try {
        const std::string wrong = check_call(call, static_cast<int64_t>(program->steps.size()), sizes(program->inputs),
                                             sizes(program->outputs));
        if (!wrong.empty()) return fail(error, size, wrong);
        for (const auto &[step, input] : program->looked_up) {
            const std::string none = check_rows(program->steps[step], read[input].data, read[input].floats);
            if (!none.empty()) return fail(error, size, none);
        }
        const Plan &plan = program->plan_for(batch, seconds ? 1 : threads);
        std::vector<std::vector<int64_t>> begins(static_cast<size_t>(threads),
                                                 std::vector<int64_t>(plan.values.size(), 0));
        const auto run = [&](const Part &part) {
            std::vector<int64_t> &own = begins[part.thread];
            const Frame frame{program,     &plan,        own.data(),       part.arena, part.scratch,
                              part.inputs, part.outputs, part.first_image, part.part,  part.parts};
            Runner{frame, &own, part.barrier, seconds}.run_all(part.images);
        };
        return share_out(call, program->pool, [&] { return take(*program, plan); }, run) ? 0 : 1;
    } catch (const std::bad_alloc &) {
        return 1;
    }
}

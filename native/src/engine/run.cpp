// Runs a program: hands out images, or the parts of one image's steps, to threads.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <system_error>
#include <thread>

#include "engine/program.h"

namespace rarefy::engine {

namespace {

// So many times a waiting thread looks before it lets others run. Not measured apart.
constexpr int32_t SPINS = 4000;

// Where threads wait for one another.
class Barrier {
 public:
    explicit Barrier(int32_t count) : count_(count) {}
    void wait() {
        if (count_ == 1) return;
        const int32_t round = round_.load(std::memory_order_relaxed);
        if (waiting_.fetch_add(1, std::memory_order_acq_rel) + 1 == count_) {
            waiting_.store(0, std::memory_order_relaxed);
            round_.store(round + 1, std::memory_order_release);
            return;
        }
        for (int32_t spin = 0; round_.load(std::memory_order_acquire) == round; ++spin)
            if (spin > SPINS) std::this_thread::yield();
    }

 private:
    const int32_t count_;
    std::atomic<int32_t> waiting_{0}, round_{0};
};

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
            timed(i, [&] { run_step(frame, frame.program->steps[i], at, images); });
            barrier->wait();
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

    // All steps up to stage k for `images` images.
    void run(int64_t k, int64_t at, int64_t images) {
        const auto &stages = frame.plan->stages;
        if (k > 0) {
            const int64_t group = stages[k - 1].group;
            for (int64_t i = 0; i < images; i += group) run(k - 1, at + i, std::min(group, images - i));
        }
        if (images == stages[k].group) return steps(stages[k], at, images);
        for (int64_t i = 0; i < images; ++i) steps(stages[k], at + i, 1);
    }

    void run_all(int64_t images) {
        const auto &stages = frame.plan->stages;
        const int64_t last = static_cast<int64_t>(stages.size()) - 1, group = stages[last].group;
        for (int64_t i = 0; i < images; i += group) run(last, i, std::min(group, images - i));
    }
};

// Calls body(i) for i in [0, count) at the same time, each on a thread of its own; returns how many ran. Threads that
// the system does not give are left out: body(i, n) learns how many there are.
template <class F>
void together(int32_t count, const F &body) {
    std::atomic<int32_t> started{0};
    std::vector<std::thread> helpers;
    try {
        for (int32_t i = 1; i < count; ++i) {
            helpers.emplace_back([&, i] {
                int32_t n;
                while ((n = started.load(std::memory_order_acquire)) == 0) std::this_thread::yield();
                body(i, n);
            });
        }
    } catch (const std::system_error &) {
        // fewer do the work
    }
    const int32_t n = static_cast<int32_t>(helpers.size()) + 1;
    started.store(n, std::memory_order_release);
    body(0, n);
    for (std::thread &helper : helpers) helper.join();
}

// An empty string, or which of the caller's buffers does not hold what the program's ports take.
std::string check_buffers(const rarefy_program &program, const std::vector<int32_t> &ports,
                          const rarefy_buffer *buffers, int32_t count, int64_t batch, const std::string &what) {
    if (count != static_cast<int32_t>(ports.size()))
        return "there must be " + std::to_string(ports.size()) + " " + what + "s, got " + std::to_string(count);
    for (int32_t i = 0; i < count; ++i) {
        const Node &node = program.steps[ports[i]].node;
        const int64_t each = program.graph.values[node.kind == Kind::INPUT ? node.out : node.x].size(),
                      floats = buffers[i].floats;
        if (floats < 0 || floats % each || floats / each != batch || (floats && !buffers[i].data))
            return what + " " + std::to_string(i) + " must have " + std::to_string(each) + " numbers for each of " +
                   std::to_string(batch) + " images, got " + std::to_string(floats);
    }
    return "";
}

}  // namespace

Workspace take(const rarefy_program &program, const Plan &plan) {
    const int64_t floats = (plan.arena_floats + program.scratch_floats() + 1023) / 1024 * 1024;
    {
        const std::lock_guard<std::mutex> lock(program.mutex);
        const auto found = std::find_if(program.idle.begin(), program.idle.end(),
                                        [=](const Workspace &w) { return w.floats >= floats; });
        if (found != program.idle.end()) {
            Workspace w = std::move(*found);
            program.idle.erase(found);
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
    w.arena = memory + program.scratch_floats();
    return w;
}

}  // namespace rarefy::engine

using namespace rarefy::engine;

extern "C" __attribute__((visibility("default"))) int32_t
rarefy_program_run(const rarefy_program *program, const rarefy_buffer *read, int32_t input_count,
                   const rarefy_buffer *written, int32_t output_count, int64_t batch, int32_t threads, double *seconds,
                   int64_t second_count, char *error, int64_t size) {
    if (batch < 0 || threads < 1 || threads > MOST_THREADS)
        return fail(error, size, "batch must be at least 0 and threads between 1 and 1024");
    if (seconds && second_count != static_cast<int64_t>(program->steps.size()))
        return fail(error, size, "there must be a number of seconds for each step");
    std::string wrong = check_buffers(*program, program->inputs, read, input_count, batch, "input");
    if (wrong.empty()) wrong = check_buffers(*program, program->outputs, written, output_count, batch, "output");
    if (!wrong.empty()) return fail(error, size, wrong);
    if (batch == 0) return 0;
    if (seconds) threads = 1;
    try {
        std::vector<const float *> inputs;
        std::vector<float *> outputs;
        for (int32_t i = 0; i < input_count; ++i) inputs.push_back(read[i].data);
        for (int32_t i = 0; i < output_count; ++i) outputs.push_back(written[i].data);
        const bool apart = rarefy_program::threads_own_images(batch, threads);
        const Plan &plan = program->plan_for(batch, threads);
        std::vector<Workspace> spaces;
        for (int32_t i = 0; i < threads; ++i) {
            spaces.push_back(take(*program, plan));
            if (!spaces.back().memory) return 1;
        }
        std::vector<std::vector<int64_t>> begins(static_cast<size_t>(threads),
                                                 std::vector<int64_t>(plan.values.size(), 0));
        std::atomic<Barrier *> shared{nullptr};
        std::unique_ptr<Barrier> barrier;
        together(threads, [&](int32_t i, int32_t n) {
            Barrier alone(1);
            Frame frame{program,
                        &plan,
                        begins[i].data(),
                        spaces[apart ? i : 0].arena,
                        spaces[i].scratch,
                        inputs.data(),
                        outputs.data(),
                        0,
                        0,
                        1};
            if (apart) {
                const int64_t first = batch * i / n, last = batch * (i + 1) / n;
                frame.first_image = first;
                Runner{frame, &begins[i], &alone, seconds}.run_all(last - first);
                return;
            }
            if (i == 0) {
                barrier = std::make_unique<Barrier>(n);
                shared.store(barrier.get(), std::memory_order_release);
            }
            Barrier *all;
            while (!(all = shared.load(std::memory_order_acquire))) std::this_thread::yield();
            frame.part = i;
            frame.parts = n;
            Runner{frame, &begins[i], all, seconds}.run_all(batch);
        });
        const std::lock_guard<std::mutex> lock(program->mutex);
        for (Workspace &w : spaces) program->idle.push_back(std::move(w));
    } catch (const std::bad_alloc &) {
        return 1;
    }
    return 0;
}

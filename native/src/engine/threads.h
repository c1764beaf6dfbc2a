// What running any program takes: threads that wait for one another, the order of stages, checked buffers.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "engine/program.h"
#include "rarefy_engine.h"

namespace rarefy::engine {

// A number that threads wait for to change: they look at it for a while, and then sleep.
class Round {
 public:
    int32_t now() const { return number_.load(std::memory_order_acquire); }
    // Returns once the number is no longer what now() gave.
    void wait(int32_t before);
    void next();

 private:
    std::atomic<int32_t> number_{0}, sleeping_{0};
    std::mutex mutex_;
    std::condition_variable changed_;
};

// Where threads wait for one another.
class Barrier {
 public:
    explicit Barrier(int32_t count) : count_(count) {}
    void wait() {
        if (count_ == 1) return;
        const int32_t round = round_.now();
        if (waiting_.fetch_add(1, std::memory_order_acq_rel) + 1 < count_) return round_.wait(round);
        waiting_.store(0, std::memory_order_relaxed);
        round_.next();
    }

 private:
    const int32_t count_;
    std::atomic<int32_t> waiting_{0};
    Round round_;
};

struct Helper;

// This thread and others, which are kept asleep for the next team when this one is done.
class Team {
 public:
    // Of so many threads, or of fewer where the system gives no more.
    explicit Team(int32_t count);
    ~Team();
    int32_t size() const { return static_cast<int32_t>(helpers_.size()) + 1; }

    // Calls body(i) for i in [0, size()) at the same time, of 0 on this thread.
    template <class F>
    void run(const F &body) {
        start([](const void *context, int32_t i) { (*static_cast<const F *>(context))(i); }, &body);
        body(0);
        finish();
    }

 private:
    void start(void (*body)(const void *context, int32_t i), const void *context);
    void finish();

    std::vector<std::shared_ptr<Helper>> helpers_;
};

// Calls steps(stage, first image, images) for all stages and so many images: before a stage that takes several images
// at once runs, those before it run as often as it needs.
template <class F>
void over_stages(const std::vector<Stage> &stages, int64_t k, int64_t at, int64_t images, const F &steps) {
    if (k > 0) {
        const int64_t group = stages[k - 1].group;
        for (int64_t i = 0; i < images; i += group)
            over_stages(stages, k - 1, at + i, std::min(group, images - i), steps);
    }
    steps(stages[k], at, images);
}
template <class F>
void over_stages(const std::vector<Stage> &stages, int64_t images, const F &steps) {
    const int64_t last = static_cast<int64_t>(stages.size()) - 1, group = stages[last].group;
    for (int64_t i = 0; i < images; i += group) over_stages(stages, last, i, std::min(group, images - i), steps);
}

// Calls step(first image, images) for a step that takes `group` images at once, or else one after the other. Not the
// stage's steps for one image after the other: what a step makes may lie where an earlier one still has images to read.
template <class F>
void over_images(int64_t group, int64_t at, int64_t images, const F &step) {
    if (images == group) return step(at, images);
    for (int64_t i = 0; i < images; ++i) step(at + i, int64_t{1});
}

// The arguments of a run (rarefy_program_run).
struct Call {
    const rarefy_buffer *read;
    int32_t input_count;
    const rarefy_buffer *written;
    int32_t output_count;
    int64_t batch;
    int32_t threads;
    double *seconds;
    int64_t second_count;
};

// What one thread does of a run: images of its own, or a part of every step on all of them.
struct Part {
    int32_t thread;
    float *arena, *scratch;  // the arena is its own, or that of all
    const float *const *inputs;
    float *const *outputs;
    int64_t first_image, images;
    int32_t part, parts;  // this thread among those that work on the same images
    Barrier *barrier;     // of these
};

// An empty string, or what is wrong with a call of a program of so many steps, whose ports take so many numbers an
// image.
std::string check_call(const Call &call, int64_t steps, const std::vector<int64_t> &inputs,
                       const std::vector<int64_t> &outputs);

// Calls body(part) at the same time for the parts of a checked call; take() gives a workspace of the pool. False where
// there is no memory.
template <class Take, class F>
bool share_out(const Call &call, Pool &pool, const Take &take, const F &body) {
    if (call.batch == 0) return true;
    const int32_t threads = call.seconds ? 1 : call.threads;
    const bool apart = rarefy_program::threads_own_images(call.batch, threads);
    std::vector<Workspace> spaces;
    std::vector<const float *> inputs;
    std::vector<float *> outputs;
    for (int32_t i = 0; i < threads; ++i) {
        spaces.push_back(take());
        if (!spaces.back().memory) return false;
    }
    for (int32_t i = 0; i < call.input_count; ++i) inputs.push_back(call.read[i].data);
    for (int32_t i = 0; i < call.output_count; ++i) outputs.push_back(call.written[i].data);
    Team team(threads);
    Barrier all(team.size()), alone(1);
    team.run([&](int32_t i) {
        const int32_t n = team.size();
        const int64_t first = apart ? call.batch * i / n : 0, last = apart ? call.batch * (i + 1) / n : call.batch;
        body(Part{i, spaces[apart ? i : 0].arena, spaces[i].scratch, inputs.data(), outputs.data(), first, last - first,
                  apart ? 0 : i, apart ? 1 : n, apart ? &alone : &all});
    });
    pool.give(std::move(spaces));
    return true;
}

}  // namespace rarefy::engine

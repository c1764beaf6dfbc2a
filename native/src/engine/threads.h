// What running any program takes: threads that wait for one another, the order of stages, checked buffers.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "engine/program.h"
#include "rarefy_engine.h"

namespace rarefy::engine {

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

// What one thread does of a run: images of its own, or a part of every step on all of them.
struct Part {
    int32_t thread;
    int64_t first_image, images;
    int32_t part, parts;  // this thread among those that work on the same images
};

// Calls body(part, barrier) at the same time for so many threads, which have images of their own, or not.
template <class F>
void share_out(int64_t batch, int32_t threads, bool apart, const F &body) {
    std::atomic<Barrier *> shared{nullptr};
    std::unique_ptr<Barrier> barrier;
    together(threads, [&](int32_t i, int32_t n) {
        if (apart) {
            Barrier alone(1);
            const int64_t first = batch * i / n, last = batch * (i + 1) / n;
            return body(Part{i, first, last - first, 0, 1}, alone);
        }
        if (i == 0) {
            barrier = std::make_unique<Barrier>(n);
            shared.store(barrier.get(), std::memory_order_release);
        }
        Barrier *all;
        while (!(all = shared.load(std::memory_order_acquire))) std::this_thread::yield();
        body(Part{i, 0, batch, i, n}, *all);
    });
}

// An empty string, or which of the caller's buffers does not hold what ports of these sizes take.
inline std::string check_buffers(const std::vector<int64_t> &sizes, const rarefy_buffer *buffers, int32_t count,
                                 int64_t batch, const std::string &what) {
    if (count != static_cast<int32_t>(sizes.size()))
        return "there must be " + std::to_string(sizes.size()) + " " + what + "s, got " + std::to_string(count);
    for (int32_t i = 0; i < count; ++i) {
        const int64_t floats = buffers[i].floats;
        if (floats < 0 || floats % sizes[i] || floats / sizes[i] != batch || (floats && !buffers[i].data))
            return what + " " + std::to_string(i) + " must have " + std::to_string(sizes[i]) + " numbers for each of " +
                   std::to_string(batch) + " images, got " + std::to_string(floats);
    }
    return "";
}

}  // namespace rarefy::engine

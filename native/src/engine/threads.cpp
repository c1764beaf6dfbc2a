// Threads that run programs, and wait for one another.
#include "engine/threads.h"

#include <pthread.h>

#include <system_error>
#include <thread>

namespace rarefy::engine {

namespace {

// So many times a waiting thread looks before it sleeps, for 0.2 to 1 ms: steps of a network take less, so a thread
// only sleeps in the middle of a run where another one has lost its processor. Not measured apart.
constexpr int32_t LOOKS = 20000;

void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("isb");
#endif
}

}  // namespace

void Round::wait(int32_t before) {
    for (int32_t look = 0; look < LOOKS; ++look) {
        if (now() != before) return;
        pause();
    }
    // Either next() sees who sleeps, or who is about to sleep sees the new number.
    std::unique_lock<std::mutex> lock(mutex_);
    sleeping_.fetch_add(1);
    while (number_.load() == before) changed_.wait(lock);
    sleeping_.fetch_sub(1);
}

void Round::next() {
    number_.fetch_add(1);
    if (sleeping_.load() == 0) return;
    {
        const std::lock_guard<std::mutex> lock(mutex_);
    }
    changed_.notify_all();
}

// A thread that waits for work; without a body it ends.
struct Helper {
    Round given, done;
    void (*body)(const void *context, int32_t i) = nullptr;
    const void *context = nullptr;
    int32_t number = 0;  // in the team
    int32_t ran = 0;     // bodies, as the team knows

    static void live(const std::shared_ptr<Helper> &self) {
        for (int32_t round = 0;; ++round) {
            self->given.wait(round);
            if (!self->body) return;
            self->body(self->context, self->number);
            self->done.next();
        }
    }
};

namespace {

// The threads that belong to no team. They are never joined: what ends the process ends them.
struct Idle {
    std::mutex mutex;
    std::vector<std::shared_ptr<Helper>> helpers;

    static Idle &all() {
        static Idle &idle = *made();
        return idle;
    }

 private:
    // A child of a fork has none of them.
    static Idle *made() {
        pthread_atfork([] { all().mutex.lock(); }, [] { all().mutex.unlock(); },
                       [] {
                           all().helpers.clear();
                           all().mutex.unlock();
                       });
        return new Idle;
    }
};

}  // namespace

Team::Team(int32_t count) {
    if (count == 1) return;
    {
        Idle &idle = Idle::all();
        const std::lock_guard<std::mutex> lock(idle.mutex);
        for (; size() < count && !idle.helpers.empty(); idle.helpers.pop_back())
            helpers_.push_back(std::move(idle.helpers.back()));
    }
    try {
        while (size() < count) {
            const auto helper = std::make_shared<Helper>();
            helpers_.reserve(helpers_.size() + 1);
            std::thread([helper] { Helper::live(helper); }).detach();
            helpers_.push_back(helper);
        }
    } catch (const std::system_error &) {
        // fewer do the work
    }
    for (int32_t i = 1; i < size(); ++i) helpers_[i - 1]->number = i;
}

Team::~Team() {
    if (helpers_.empty()) return;
    const size_t most = std::thread::hardware_concurrency();  // more are of use to nobody
    Idle &idle = Idle::all();
    {
        const std::lock_guard<std::mutex> lock(idle.mutex);
        for (; !helpers_.empty() && idle.helpers.size() < most; helpers_.pop_back())
            idle.helpers.push_back(std::move(helpers_.back()));
    }
    start(nullptr, nullptr);
}

void Team::start(void (*body)(const void *context, int32_t i), const void *context) {
    for (const auto &helper : helpers_) {
        helper->body = body;
        helper->context = context;
        helper->given.next();
    }
}

void Team::finish() {
    for (const auto &helper : helpers_) helper->done.wait(helper->ran++);
}

std::string check_call(const Call &call, int64_t steps, const std::vector<int64_t> &inputs,
                       const std::vector<int64_t> &outputs) {
    if (call.batch < 0 || call.threads < 1 || call.threads > MOST_THREADS)
        return "batch must be at least 0 and threads between 1 and 1024";
    if (call.seconds && call.second_count != steps) return "there must be a number of seconds for each step";
    const auto wrong = [&](const std::vector<int64_t> &sizes, const rarefy_buffer *buffers, int32_t count,
                           const std::string &what) -> std::string {
        if (count != static_cast<int32_t>(sizes.size()))
            return "there must be " + std::to_string(sizes.size()) + " " + what + "s, got " + std::to_string(count);
        for (int32_t i = 0; i < count; ++i) {
            const int64_t floats = buffers[i].floats;
            if (floats < 0 || floats % sizes[i] || floats / sizes[i] != call.batch || (floats && !buffers[i].data))
                return what + " " + std::to_string(i) + " must have " + std::to_string(sizes[i]) +
                       " numbers for each of " + std::to_string(call.batch) + " images, got " + std::to_string(floats);
        }
        return "";
    };
    const std::string first = wrong(inputs, call.read, call.input_count, "input");
    return first.empty() ? wrong(outputs, call.written, call.output_count, "output") : first;
}

}  // namespace rarefy::engine

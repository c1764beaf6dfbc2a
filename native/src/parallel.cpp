#include "parallel.h"

#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

namespace rarefy {

void parallel_for(int32_t threads, int64_t count, void (*body)(void *, int64_t), void *context) {
    if (threads > count) threads = static_cast<int32_t>(count);
    if (threads <= 1) {
        for (int64_t i = 0; i < count; ++i) body(context, i);
        return;
    }
    std::atomic<int64_t> next{0};
    auto work = [&] {
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) body(context, i);
    };
    std::vector<std::thread> helpers;
    helpers.reserve(threads - 1);
    try {
        while (static_cast<int32_t>(helpers.size()) < threads - 1) helpers.emplace_back(work);
    } catch (const std::system_error &) {
        // The system gives no more threads: the ones that started, and this one, do the work.
    }
    work();
    for (auto &helper : helpers) helper.join();
}

}  // namespace rarefy

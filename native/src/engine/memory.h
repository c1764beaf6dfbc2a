// Memory of what is large and read from end to end: on large pages, where the system gives them to who asks. A page of
// 2 MiB is one entry of the processor's tables in place of 512, and what runs ahead of the reads stops at its end.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <cstdlib>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace rarefy::engine {

constexpr size_t LARGE_PAGE = size_t{1} << 21;

// So many bytes, for std::free; null where there are none left. What is smaller than two pages is not worth one.
inline void *allocate(size_t bytes) {
    if (bytes < 2 * LARGE_PAGE) return std::malloc(bytes);
    const size_t whole = (bytes + LARGE_PAGE - 1) / LARGE_PAGE * LARGE_PAGE;
    void *memory = std::aligned_alloc(LARGE_PAGE, whole);
#if defined(MADV_HUGEPAGE)
    if (memory) madvise(memory, bytes / LARGE_PAGE * LARGE_PAGE, MADV_HUGEPAGE);  // a wish: it need not be granted
#endif
    return memory;
}

template <class T>
struct Pages {
    using value_type = T;
    Pages() = default;
    template <class U>
    Pages(const Pages<U> &) {}
    T *allocate(size_t n) {
        void *memory = n > SIZE_MAX / sizeof(T) - LARGE_PAGE ? nullptr : engine::allocate(n * sizeof(T));
        if (!memory) throw std::bad_alloc();
        return static_cast<T *>(memory);
    }
    void deallocate(T *memory, size_t) { std::free(memory); }
    bool operator==(const Pages &) const { return true; }
    bool operator!=(const Pages &) const { return false; }
};

// An array on such pages.
template <class T>
using Buffer = std::vector<T, Pages<T>>;

}  // namespace rarefy::engine

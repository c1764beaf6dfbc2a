// A kernel over one span as a kernel over chunks on several threads. Included by act.cpp and act32.cpp.
#pragma once

constexpr int64_t CHUNK = 1 << 15;  // values a unit of work: from 2^14 to 2^16 it made no difference

// Below this many values a call stays on one thread. To start and to join another took 30 to 55 us on an AMD EPYC;
// these are some 150 us of work of 32 bits, by the kernels' median time, and of shorter ones.
#ifdef __AVX512BW__
template <class T>
constexpr int64_t SERIAL = sizeof(T) == 4 ? 1 << 19 : 1 << 21;
#else
template <class T>
constexpr int64_t SERIAL = sizeof(T) == 4 ? 1 << 17 : 1 << 19;
#endif

template <class T>
struct Job {
    const T *x;
    T *y;
    int64_t n;
    const void *table;
};

template <class T, void block(const T *, T *, int64_t, const void *)>
void over_chunks(const T *x, T *y, int64_t n, const void *table, int32_t threads) {
    if (threads <= 1 || n < SERIAL<T>) {
        const DefaultMode mode;
        block(x, y, n, table);
        return;
    }
    Job<T> job{x, y, n, table};
    auto chunk = [](void *context, int64_t index) {
        const Job<T> &j = *static_cast<const Job<T> *>(context);
        const int64_t begin = index * CHUNK, size = j.n - begin < CHUNK ? j.n - begin : CHUNK;
        const DefaultMode mode;
        block(j.x + begin, j.y + begin, size, j.table);
    };
    parallel_for(threads, (n + CHUNK - 1) / CHUNK, chunk, &job);
}

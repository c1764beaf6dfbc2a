// What the activation kernels are measured against, and the clock: built by the benchmark, never part of the package.
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

#ifdef PEER_SLEEF
#include <sleef.h>
#endif

typedef void kernel(const void *x, void *y, int64_t n, const void *table, int32_t threads);

// Nanoseconds of this thread's processor time for `rounds` calls of a kernel.
double peer_clock(kernel *f, const void *x, void *y, int64_t n, const void *table, int64_t rounds) {
    struct timespec a, b;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &a);
    for (int64_t i = 0; i < rounds; ++i) f(x, y, n, table, 1);
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &b);
    return (double)(b.tv_sec - a.tv_sec) * 1e9 + (double)(b.tv_nsec - a.tv_nsec);
}

void peer_memcpy16(const void *x, void *y, int64_t n, const void *table, int32_t threads) {
    (void)table, (void)threads;
    memcpy(y, x, 2 * (size_t)n);
}

void peer_memcpy32(const void *x, void *y, int64_t n, const void *table, int32_t threads) {
    (void)table, (void)threads;
    memcpy(y, x, 4 * (size_t)n);
}

#ifdef __AVX512BW__
void peer_hard32(const void *x, void *y, int64_t n, const void *table, int32_t threads) {
    (void)table, (void)threads;
    const float *p = x;
    float *q = y;
    const __m512 one = _mm512_set1_ps(1.0f), minus = _mm512_set1_ps(-1.0f);
    for (int64_t i = 0; i + 64 <= n; i += 64)
        for (int k = 0; k < 64; k += 16)
            _mm512_storeu_ps(q + i + k, _mm512_max_ps(_mm512_min_ps(_mm512_loadu_ps(p + i + k), one), minus));
}

#ifdef PEER_SLEEF
#define PEER(name, call)                                                                                 \
    void name(const void *x, void *y, int64_t n, const void *table, int32_t threads) {                   \
        (void)table, (void)threads;                                                                      \
        const float *p = x;                                                                              \
        float *q = y;                                                                                    \
        for (int64_t i = 0; i + 16 <= n; i += 16) _mm512_storeu_ps(q + i, call(_mm512_loadu_ps(p + i))); \
    }
PEER(peer_sleef_u10, Sleef_tanhf16_u10avx512f)
PEER(peer_sleef_u35, Sleef_tanhf16_u35avx512f)
#endif
#endif

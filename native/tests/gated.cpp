// Runs the kernels of gated units of every instruction set on random bits and compares with those of plain C, which the
// tests in Python compare with PyTorch: all lengths of tail, strides, one thread and more, in place. For sanitizers and
// for CPUs without PyTorch. Usage: gated [few]   (few: without the large cases, for slow emulators)
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "rarefy.h"

namespace {

const rarefy_kernel *kernels;
int64_t kernel_count;

void *find(const std::string &name, const char *isa) {
    for (int64_t i = 0; i < kernel_count; ++i)
        if (name == kernels[i].name && std::strcmp(kernels[i].isa, isa) == 0) return kernels[i].entry;
    return nullptr;
}

// Stands for an activation: any function of the bits.
template <class T>
void act(const T *x, T *y, int64_t n, const void *, int32_t) {
    for (int64_t i = 0; i < n; ++i) y[i] = static_cast<T>(x[i] ^ (x[i] >> 1));
}

template <class T>
void slope(const T *x, float *y, int64_t n, const void *, int32_t) {
    for (int64_t i = 0; i < n; ++i) y[i] = static_cast<float>(x[i] & 1023) / 512.0f - 0.5f;
}

std::mt19937 random_bits;

// n values in memory that ends where they end, so that a sanitizer sees one step beyond.
template <class T>
std::unique_ptr<T[]> values(int64_t n) {
    std::unique_ptr<T[]> x(new T[static_cast<size_t>(n)]);
    for (int64_t i = 0; i < n; ++i) x[i] = static_cast<T>(random_bits());
    return x;
}

template <class T>
bool is_nan(T x, const char *format) {
    const uint32_t u = sizeof(T) == 4 ? x & 0x7FFFFFFFu : x & 0x7FFFu;
    return u > (sizeof(T) == 4 ? 0x7F800000u : std::strcmp(format, "bf16") ? 0x7C00u : 0x7F80u);
}

template <class T>
bool same(const T *x, const T *y, int64_t n, const char *format) {
    for (int64_t i = 0; i < n; ++i)
        if (x[i] != y[i] && !(is_nan(x[i], format) && is_nan(y[i], format))) return false;
    return true;
}

template <class T>
using Forward = void(const T *, const T *, T *, int64_t, int64_t, int64_t, int64_t,
                     void (*)(const T *, T *, int64_t, const void *, int32_t), const void *, int32_t);
template <class T>
using Backward = void(const T *, const T *, const T *, T *, T *, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                      void (*)(const T *, T *, int64_t, const void *, int32_t), const void *,
                      void (*)(const T *, float *, int64_t, const void *, int32_t), const void *, int32_t);

// Gate and up side by side in rows of 2 * columns, as in one tensor.
template <class T>
bool right(const char *format, const char *isa, int64_t rows, int64_t columns, int32_t threads) {
    const int64_t n = rows * columns;
    const auto x = values<T>(2 * n), upstream = values<T>(n);
    const auto y = values<T>(n), want = values<T>(n), dx = values<T>(2 * n), want_dx = values<T>(2 * n);
    const std::string names[] = {std::string("gated_") + format, std::string("gated_backward_") + format};
    auto run = [&](const char *which, T *out, T *gradient, int32_t t) {
        reinterpret_cast<Forward<T> *>(find(names[0], which))(x.get(), x.get() + columns, out, rows, columns,
                                                              2 * columns, 2 * columns, act<T>, nullptr, t);
        reinterpret_cast<Backward<T> *>(find(names[1], which))(
            upstream.get(), x.get(), x.get() + columns, gradient, gradient + columns, rows, columns, 2 * columns,
            2 * columns, 2 * columns, 2 * columns, act<T>, nullptr, slope<T>, nullptr, t);
    };
    run("portable", want.get(), want_dx.get(), 1);
    run(isa, y.get(), dx.get(), threads);
    bool good = same(y.get(), want.get(), n, format) && same(dx.get(), want_dx.get(), 2 * n, format);
    if (rows == 1) {  // over the gate, and over up
        for (T *out : {x.get() + columns, x.get()}) {
            const auto kept = values<T>(2 * n);
            std::memcpy(kept.get(), x.get(), sizeof(T) * static_cast<size_t>(2 * n));
            reinterpret_cast<Forward<T> *>(find(names[0], isa))(x.get(), x.get() + columns, out, 1, columns, columns,
                                                                columns, act<T>, nullptr, 1);
            good = good && same(out, want.get(), n, format);
            std::memcpy(x.get(), kept.get(), sizeof(T) * static_cast<size_t>(2 * n));
        }
    }
    return good;
}

bool right_slopes(const char *name, const char *isa, int64_t n) {
    const auto x = values<uint32_t>(n);
    const auto y = values<uint32_t>(n), want = values<uint32_t>(n);
    for (int64_t i = 0; i < n; i += 2) x[i] = (x[i] & 0x807FFFFFu) | (0x3C000000u + (x[i] >> 3 & 0x07800000u));
    auto run = [&](const char *which, uint32_t *out) {
        reinterpret_cast<rarefy_slope32 *>(find(name, which))(x.get(), reinterpret_cast<float *>(out), n, nullptr, 1);
    };
    run("portable", want.get());
    run(isa, y.get());
    return same(y.get(), want.get(), n, "fp32");
}

}  // namespace

int main(int argc, char **) {
    kernel_count = rarefy_kernels(&kernels);
    int64_t runs = 0, wrong = 0;
    auto judge = [&](bool good, const char *name, const char *isa) {
        ++runs;
        if (good) return;
        std::printf("%s (%s) is wrong\n", name, isa);
        ++wrong;
    };
    for (int64_t k = 0; k < kernel_count; ++k) {
        const char *name = kernels[k].name, *isa = kernels[k].isa;
        if (!kernels[k].supported) continue;
        if (std::strncmp(name, "slope_", 6) == 0)
            for (int64_t n : {1, 7, 8, 33, 4001}) judge(right_slopes(name, isa, n), name, isa);
        if (std::strncmp(name, "gated_", 6) != 0 || std::strncmp(name, "gated_backward_", 15) == 0) continue;
        const char *format = name + 6;
        auto one = [&](int64_t rows, int64_t columns, int32_t threads) {
            const bool wide = std::strcmp(format, "fp32") == 0;
            judge(wide ? right<uint32_t>(format, isa, rows, columns, threads)
                       : right<uint16_t>(format, isa, rows, columns, threads),
                  name, isa);
        };
        for (int64_t columns = 1; columns <= 130; ++columns) one(columns % 3 + 1, columns, 1);
        for (int64_t columns : {1023, 1024, 1025, 5000}) one(1, columns, 1);
        if (argc > 1) continue;
        one(70001, 4, 3);
        one(3, 100003, 3);
    }
    std::printf("%lld runs of gated units, %lld wrong\n", static_cast<long long>(runs), static_cast<long long>(wrong));
    return runs == 0 || wrong ? 1 : 0;
}

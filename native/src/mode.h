// The floating-point mode of a kernel, whatever its caller set: subnormal numbers are numbers, sums round to nearest.
// (PyTorch's set_flush_denormal changes the mode of the thread that calls us.)
#pragma once

#include <stdint.h>

#if defined(__x86_64__) || defined(_M_X64)
#include <xmmintrin.h>
#endif

namespace rarefy {
namespace {

class DefaultMode {
#if defined(__x86_64__) || defined(_M_X64)
    typedef unsigned int Register;
    static constexpr Register OTHER = 0x8000 | 0x0040 | 0x6000;  // flush to zero, denormals are zeros, rounding
    static Register get() { return _mm_getcsr(); }
    static void set(Register value) { _mm_setcsr(value); }
#elif defined(__aarch64__)
    typedef uint64_t Register;
    static constexpr Register OTHER =
        uint64_t{0x3} << 22 | uint64_t{1} << 24 | uint64_t{1} << 19;  // rounding, FZ, FZ16
    static Register get() {
        Register value;
        __asm__ volatile("mrs %0, fpcr" : "=r"(value));
        return value;
    }
    static void set(Register value) { __asm__ volatile("msr fpcr, %0" : : "r"(value)); }
#else
    typedef unsigned int Register;
    static constexpr Register OTHER = 0;
    static Register get() { return 0; }
    static void set(Register) {}
#endif
    const Register before = get();

    // no number is read or written across a change of the mode
    static void change(Register value) {
        __asm__ volatile("" : : : "memory");
        set(value);
        __asm__ volatile("" : : : "memory");
    }

 public:
    DefaultMode() {
        if (before & OTHER) change(before & ~OTHER);
    }
    ~DefaultMode() {
        if (before & OTHER) change(before);
    }
    DefaultMode(const DefaultMode &) = delete;
    DefaultMode &operator=(const DefaultMode &) = delete;
};

}  // namespace
}  // namespace rarefy

// Threads for kernels, compiled once for the baseline CPU: the files built for one instruction set include no C++
// library, since the linker may keep their copy of an inline function for every caller.
#pragma once

#include <stdint.h>

namespace rarefy {

// Calls body(context, i) for every i in [0, count), on at most `threads` threads; returns when all are done.
void parallel_for(int32_t threads, int64_t count, void (*body)(void *, int64_t), void *context);

}  // namespace rarefy

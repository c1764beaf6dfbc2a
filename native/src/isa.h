// What every file built once for each instruction set sees: RAREFY_ISA names the build (avx512, avx2, portable, ...).
#pragma once

#include "rarefy.h"

#define RAREFY_PASTE_(a, b) a##b
#define RAREFY_PASTE(a, b) RAREFY_PASTE_(a, b)
#define RAREFY_TEXT_(a) #a
#define RAREFY_TEXT(a) RAREFY_TEXT_(a)
#define RAREFY_KERNEL(name, function) {name, RAREFY_TEXT(RAREFY_ISA), 0, reinterpret_cast<void *>(&function)}

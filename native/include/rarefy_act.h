// The activation functions on registers, for kernels that fuse them: load a table once, then apply it to vectors.
//
//   const rarefy::TanhLinear f(table);   // a rarefy_linear16, from rarefy.act
//   __m512i y = f(x);                    // 32 bf16 numbers in, 32 out
//
// What is defined depends on the instruction set of the including file: 32 lanes for AVX-512 and AVX2 (two registers),
// 16 for NEON (two registers). Everything has internal linkage: files built for several instruction sets can be linked.
#pragma once

#include "rarefy.h"

#if defined(__AVX512BW__)
#include "rarefy_act_avx512.h"
#include "rarefy_act_gate_avx512.h"
#elif defined(__AVX2__)
#include "rarefy_act_avx2.h"
#elif defined(__aarch64__)
#include "rarefy_act_neon.h"
#endif

// The kernels for x86-64 processors with AVX2.
#if defined(__x86_64__)

// What the standard library defines is compiled for any processor: the linker may keep this copy for all files.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "kernels.h"
#include "../words.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#include <immintrin.h>

#define HF_GALORE_ISA avx2
#define HF_GALORE_NAME "avx2"
#define HF_GALORE_LANES 8
#define HF_GALORE_TILE_ROWS 6
#include "isa.h"

namespace hf_galore {
HF_GALORE_KERNELS(avx2_kernels);
}

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__

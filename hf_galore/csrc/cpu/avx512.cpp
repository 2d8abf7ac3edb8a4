// The kernels for x86-64 processors with AVX-512.
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
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif
#include <immintrin.h>

#define HF_GALORE_ISA avx512
#define HF_GALORE_NAME "avx512"
#define HF_GALORE_LANES 16
#define HF_GALORE_TILE_ROWS 12
#include "isa.h"

namespace hf_galore {
HF_GALORE_KERNELS(avx512_kernels);
}

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__

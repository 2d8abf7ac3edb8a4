// float32 and bfloat16 on the device, and the rounding of hf_galore/rounding.py, bit for bit.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "../words.h"

namespace hf_galore {

// Whence the random bits of a bfloat16 matrix come (words.h): the keys of the words of its rows and columns, and the
// number that its row 0 has within its parameter.
struct Keys {
  uint64_t rows, cols;
  int64_t first_row;
};

__device__ __forceinline__ float as_float(float value) { return value; }
__device__ __forceinline__ float as_float(__nv_bfloat16 value) { return __bfloat162float(value); }

// How a float becomes what is kept; `bits` are the 16 random ones of the element.
struct Exactly {
  using Kept = float;
  static constexpr bool takes_bits = false;
  static __device__ __forceinline__ float convert(float value, uint32_t) { return value; }
};

struct ToNearest {
  using Kept = __nv_bfloat16;
  static constexpr bool takes_bits = false;
  static __device__ __forceinline__ __nv_bfloat16 convert(float value, uint32_t) { return __float2bfloat16_rn(value); }
};

// Away from zero with the probability of the part that is cut off; NaN stays NaN.
struct Stochastically {
  using Kept = __nv_bfloat16;
  static constexpr bool takes_bits = true;
  static __device__ __forceinline__ __nv_bfloat16 convert(float value, uint32_t bits) {
    const uint32_t word = __float_as_uint(value);
    const uint32_t rounded = value == value ? word + bits : word | 0x400000u;
    return __ushort_as_bfloat16(static_cast<unsigned short>(rounded >> 16));
  }
};

__device__ __forceinline__ uint32_t bits_of(uint32_t row_word, uint32_t col_word) {
  return (row_word * col_word) >> 16;
}

// COUNT consecutive values in registers, read and written as whole vectors where their address allows it.
template <class T, int COUNT>
struct alignas(sizeof(T) * COUNT) Pack {
  T values[COUNT];
};

template <class T, int COUNT>
__device__ __forceinline__ bool is_aligned(const T* address) {
  return reinterpret_cast<uintptr_t>(address) % sizeof(Pack<T, COUNT>) == 0;
}

// The first `count` of COUNT values at `address`; the rest are zero.
template <class T, int COUNT>
__device__ __forceinline__ Pack<T, COUNT> load(const T* address, int64_t count) {
  if (count >= COUNT && is_aligned<T, COUNT>(address)) return *reinterpret_cast<const Pack<T, COUNT>*>(address);
  Pack<T, COUNT> pack;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) pack.values[i] = i < count ? address[i] : T(0.0f);
  return pack;
}

template <class T, int COUNT>
__device__ __forceinline__ void store(T* address, const Pack<T, COUNT>& pack, int64_t count) {
  if (count >= COUNT && is_aligned<T, COUNT>(address)) {
    *reinterpret_cast<Pack<T, COUNT>*>(address) = pack;
    return;
  }
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    if (i < count) address[i] = pack.values[i];
  }
}

// What one launch goes for: blockIdx.z chooses. By value, so that it lies in a kernel's constant memory (4 KB of it).
template <class Item>
struct Group {
  static constexpr int MOST = 24;
  Item items[MOST];
  static_assert(sizeof(Item) * MOST <= 3840, "a group and what comes with it must fit into a kernel's parameters");
};

}  // namespace hf_galore

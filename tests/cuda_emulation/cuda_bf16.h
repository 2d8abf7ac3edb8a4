// bfloat16 of CUDA on the CPU.
#pragma once

#include "cuda_runtime.h"

struct __nv_bfloat16 {
  unsigned short word;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float value);
};

inline float __bfloat162float(__nv_bfloat16 value) {
  const uint32_t word = static_cast<uint32_t>(value.word) << 16;
  float result;
  std::memcpy(&result, &word, sizeof result);
  return result;
}

inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short word) {
  __nv_bfloat16 value;
  value.word = word;
  return value;
}

inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  const uint32_t word = __float_as_uint(value);
  if (value != value) return __ushort_as_bfloat16(0x7FFF);
  return __ushort_as_bfloat16(static_cast<unsigned short>((word + 0x7FFFu + ((word >> 16) & 1u)) >> 16));
}

inline __nv_bfloat16::__nv_bfloat16(float value) { *this = __float2bfloat16_rn(value); }

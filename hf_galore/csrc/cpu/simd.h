// Vectors of one instruction set, by the vector extensions of GCC and Clang. HF_GALORE_LANES is set by the file that
// includes this one; the compiler's target is set there too.
#pragma once

#include <cstdint>
#include <cstring>

namespace hf_galore {
namespace HF_GALORE_ISA {

constexpr int64_t LANES = HF_GALORE_LANES;

typedef float vfloat __attribute__((vector_size(4 * HF_GALORE_LANES)));
typedef uint32_t vuint __attribute__((vector_size(4 * HF_GALORE_LANES)));
typedef int32_t vint __attribute__((vector_size(4 * HF_GALORE_LANES)));
typedef uint16_t vhalf __attribute__((vector_size(2 * HF_GALORE_LANES)));

#define HF_GALORE_INLINE inline __attribute__((always_inline))

template <class V>
HF_GALORE_INLINE V load(const void* from) {
  V value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <class V>
HF_GALORE_INLINE void store(void* to, V value) {
  std::memcpy(to, &value, sizeof value);
}

HF_GALORE_INLINE vfloat fill(float value) { return value - vfloat{}; }
HF_GALORE_INLINE vuint fill_words(uint32_t value) { return value - vuint{}; }

HF_GALORE_INLINE vfloat root(vfloat x) {
#if HF_GALORE_LANES == 16
  return (vfloat)_mm512_maskz_sqrt_ps(0xFFFF, (__m512)x);  // GCC 12 warns of the header of the plain one
#elif HF_GALORE_LANES == 8
  return (vfloat)_mm256_sqrt_ps((__m256)x);
#else
  for (int64_t lane = 0; lane < LANES; ++lane) x[lane] = __builtin_sqrtf(x[lane]);
  return x;
#endif
}

// a * b + c, rounded once where the processor can. All that is to be rounded so is written so: the compiler fuses nothing by
// itself (-ffp-contract=off), and the kernels of all instruction sets but the generic one give the same bits.
HF_GALORE_INLINE vfloat multiply_add(vfloat a, vfloat b, vfloat c) {
#if HF_GALORE_LANES == 16
  return (vfloat)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif HF_GALORE_LANES == 8
  return (vfloat)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__FP_FAST_FMAF)
  for (int64_t lane = 0; lane < LANES; ++lane) a[lane] = __builtin_fmaf(a[lane], b[lane], c[lane]);
  return a;
#else
  return a * b + c;
#endif
}

HF_GALORE_INLINE vuint choose(vuint mask, vuint yes, vuint no) { return (mask & yes) | (~mask & no); }

// bfloat16 is the upper half of a float32. (The compiler makes five instructions of what is one in the first.)
HF_GALORE_INLINE vfloat widen(vhalf x) {
#if HF_GALORE_LANES == 16
  return (vfloat)((vuint)_mm512_maskz_cvtepu16_epi32(0xFFFF, (__m256i)x) << 16);
#elif HF_GALORE_LANES == 8
  return (vfloat)((vuint)_mm256_cvtepu16_epi32((__m128i)x) << 16);
#else
  return (vfloat)(__builtin_convertvector(x, vuint) << 16);
#endif
}
HF_GALORE_INLINE vhalf upper_half(vuint x) {
#if HF_GALORE_LANES == 16
  return (vhalf)_mm512_maskz_cvtepi32_epi16(0xFFFF, (__m512i)(x >> 16));
#elif HF_GALORE_LANES == 8
  const __m256i halves = (__m256i)(x >> 16), packed = _mm256_packus_epi32(halves, halves);
  return (vhalf)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#else
  return __builtin_convertvector(x >> 16, vhalf);
#endif
}

// To the nearest bfloat16, of two equally near ones to the even one; NaN stays NaN.
HF_GALORE_INLINE vhalf round_nearest(vfloat x) {
  const vuint word = (vuint)x;
  const vuint rounded = word + 0x7FFFu + ((word >> 16) & 1u);
  return upper_half(choose((vuint)(x != x), word | 0x400000u, rounded));
}

// Away from zero with the probability of the part that is cut off, given 16 random bits; NaN stays NaN.
HF_GALORE_INLINE vhalf round_stochastic(vfloat x, vuint bits) {
  const vuint word = (vuint)x;
  return upper_half(choose((vuint)(x != x), word | 0x400000u, word + bits));
}

HF_GALORE_INLINE float as_float(float value) { return value; }
HF_GALORE_INLINE float as_float(uint16_t value) {
  const uint32_t word = static_cast<uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &word, sizeof result);
  return result;
}

HF_GALORE_INLINE vfloat load_as_float(const float* from) { return load<vfloat>(from); }
HF_GALORE_INLINE vfloat load_as_float(const uint16_t* from) { return widen(load<vhalf>(from)); }

// How a float becomes what is kept: `bits` are the element's random ones.
struct Exactly {
  using Kept = float;
  static constexpr bool takes_bits = false;
  static HF_GALORE_INLINE vfloat convert(vfloat x, vuint) { return x; }
};
struct ToNearest {
  using Kept = uint16_t;
  static constexpr bool takes_bits = false;
  static HF_GALORE_INLINE vhalf convert(vfloat x, vuint) { return round_nearest(x); }
};
struct Stochastically {
  using Kept = uint16_t;
  static constexpr bool takes_bits = true;
  static HF_GALORE_INLINE vhalf convert(vfloat x, vuint bits) { return round_stochastic(x, bits); }
};

// The random bits of LANES elements of a row; `cols` points to the words of their columns.
template <class Rounding>
HF_GALORE_INLINE vuint bits_of(uint32_t row_word, const uint32_t* cols) {
  if constexpr (Rounding::takes_bits) return (load<vuint>(cols) * row_word) >> 16;
  return vuint{};
}

}  // namespace HF_GALORE_ISA
}  // namespace hf_galore

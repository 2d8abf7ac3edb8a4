// The hashed words of hf_galore/rounding.py, number for number.
#pragma once

#include <cstdint>
#include <initializer_list>

namespace hf_galore {

// A 64-bit hash of a few integers.
inline uint64_t mix64(std::initializer_list<uint64_t> numbers) {
  uint64_t state = 0;
  for (const uint64_t number : numbers) {
    state += number + 0x9E3779B97F4A7C15u;
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9u;
    state = (state ^ (state >> 27)) * 0x94D049BB133111EBu;
    state ^= state >> 31;
  }
  return state;
}

// The word of row or column `number`: odd, 32 bits. Element (i, j) of a matrix gets the upper half of
// row_word(i) * col_word(j) mod 2^32 as its 16 random bits. (constexpr, so that CUDA has it on the device too.)
constexpr uint32_t random_word(uint64_t key, int64_t number) {
  uint64_t z = static_cast<uint64_t>(number) * 0x9E3779B97F4A7C15u + key;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return static_cast<uint32_t>(z >> 32) | 1u;
}

}  // namespace hf_galore

// Bases that are kept as integers (hf_galore/basis_store.py): a code times the scale of its block of 128 numbers.
#pragma once

#include <algorithm>

#include "kernels.h"

namespace hf_galore {
namespace HF_GALORE_ISA {

// The numbers [first, last) of a matrix of codes, counted as they lie in memory, as floats.
void decode(const Matrix& from, int64_t first, int64_t last, float* to) {
  constexpr int64_t block = 128;
  while (first < last) {
    const bool high = from.type == Type::codes4 && first >= from.half;
    const uint8_t* codes = static_cast<const uint8_t*>(from.data) + (high ? first - from.half : first);
    const int64_t number = (from.before + first) / block;
    int64_t end = std::min(last, (number + 1) * block - from.before);
    if (from.type == Type::codes4 && !high) end = std::min(end, from.half);
    const int64_t count = end - first;
    const float scale = from.scales[number];
    if (from.type == Type::codes8) {
      for (int64_t i = 0; i < count; ++i) to[i] = static_cast<int8_t>(codes[i]) * scale;
    } else if (high) {
      for (int64_t i = 0; i < count; ++i) to[i] = (static_cast<int8_t>(codes[i]) >> 4) * scale;
    } else {
      for (int64_t i = 0; i < count; ++i) to[i] = (static_cast<int8_t>(codes[i] << 4) >> 4) * scale;
    }
    first = end;
    to += count;
  }
}

// Lines of a matrix of codes (its rows or its columns, whichever are contiguous), some numbers at a time:
// body(line, first, count, values) for the numbers `first` to `first + count`, relative to `begin`, of each line.
template <class Body>
inline void each_run(const Matrix& from, int64_t first_line, int64_t lines, int64_t begin, int64_t length,
                     const Body& body) {
  constexpr int64_t at_a_time = 256;
  float values[at_a_time];
  const int64_t stride = from.col_stride == 1 ? from.row_stride : from.col_stride;
  for (int64_t line = 0; line < lines; ++line) {
    const int64_t start = (first_line + line) * stride + begin;
    for (int64_t first = 0; first < length; first += at_a_time) {
      const int64_t count = std::min(at_a_time, length - first);
      decode(from, start + first, start + first + count, values);
      body(line, first, count, values);
    }
  }
}

}  // namespace HF_GALORE_ISA
}  // namespace hf_galore

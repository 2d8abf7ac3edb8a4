// Bases that are kept as integers (hf_galore/basis_store.py): a code times the scale of its block of 128.
#pragma once

#include <algorithm>

#include "kernels.h"

namespace hf_galore {
namespace HF_GALORE_ISA {

// The rows [first, last), counted over all matrices, as floats.
void decode(const CodedBasis& basis, int64_t first_row, int64_t last_row, float* to) {
  constexpr int64_t block = 128;
  const int64_t stored = basis.bits == 4 ? (basis.rows + 1) / 2 : basis.rows;
  for (int64_t row = first_row; row < last_row; ++row) {
    const int64_t matrix = row / basis.rows, inside = row % basis.rows, begin = row * basis.cols;
    const bool high = inside >= stored;  // in the upper half of a byte
    const uint8_t* codes = basis.codes + (matrix * stored + inside - (high ? stored : 0)) * basis.cols;
    float* values = to + begin;
    for (int64_t col = 0; col < basis.cols;) {
      const int64_t end = std::min(basis.cols, ((begin + col) / block + 1) * block - begin);
      const float scale = basis.scales[(begin + col) / block];
      if (basis.bits == 8) {
        for (; col < end; ++col) values[col] = static_cast<int8_t>(codes[col]) * scale;
      } else if (high) {
        for (; col < end; ++col) values[col] = (static_cast<int8_t>(codes[col]) >> 4) * scale;
      } else {
        for (; col < end; ++col) values[col] = (static_cast<int8_t>(codes[col] << 4) >> 4) * scale;
      }
    }
  }
}

}  // namespace HF_GALORE_ISA
}  // namespace hf_galore

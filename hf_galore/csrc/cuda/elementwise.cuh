// weight <- beta * weight + alpha * delta, and target <- values, element by element, rounded to the dtype of the first.
#pragma once

#include "numbers.cuh"

namespace hf_galore {
namespace elementwise {

constexpr int THREADS = 128, WIDTH = 4, ROWS = 16;  // a block has ROWS x (THREADS * WIDTH) elements

// A thread has WIDTH columns, whose words it hashes once, and goes down the rows.
template <class Rounding, class Delta, bool REPLACE>
__global__ void __launch_bounds__(THREADS)
    add_kernel(typename Rounding::Kept* weight, int64_t weight_stride, const Delta* delta, int64_t delta_stride,
               int64_t rows, int64_t cols, float alpha, float beta, Keys keys) {
  using Kept = typename Rounding::Kept;
  const int64_t col = (static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x) * WIDTH;
  if (col >= cols) return;
  uint32_t col_words[WIDTH] = {};
  if (Rounding::takes_bits) {
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) col_words[i] = random_word(keys.cols, col + i);
  }
  for (int64_t first = static_cast<int64_t>(blockIdx.y) * ROWS; first < rows; first += int64_t(gridDim.y) * ROWS) {
    for (int64_t row = first; row < min(first + ROWS, rows); ++row) {
      const uint32_t row_word = Rounding::takes_bits ? random_word(keys.rows, keys.first_row + row) : 0;
      const Pack<Delta, WIDTH> change = load<Delta, WIDTH>(delta + row * delta_stride + col, cols - col);
      Kept* address = weight + row * weight_stride + col;
      Pack<Kept, WIDTH> kept;
      if (!REPLACE) kept = load<Kept, WIDTH>(address, cols - col);
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) {
        float value = as_float(change.values[i]);
        if (!REPLACE) value = beta * as_float(kept.values[i]) + alpha * value;
        kept.values[i] = Rounding::convert(value, bits_of(row_word, col_words[i]));
      }
      store(address, kept, cols - col);
    }
  }
}

}  // namespace elementwise
}  // namespace hf_galore

// AdamW's rule, element by element, and its write-back:
//
//   M <- M + (1 - beta1) (R - M);  V <- beta2 V + (1 - beta2) R^2;  W <- decay * W - size * M / (sqrt(V) + eps)
//
// on moments kept as float32 or bfloat16 (adamw_kernel), or block-wise in 8 bits (adamw_blocks_kernel; arXiv 2110.02861,
// hf_galore/optim/blockwise.py).
#pragma once

#include "numbers.cuh"

namespace hf_galore {
namespace adamw {

// beta1, beta2 and the rest as floats of what the reference computes in double; size = lr sqrt(1 - beta2^t) / (1 - beta1^t).
struct Rule {
  float beta1, beta2, one_minus_beta1, one_minus_beta2, eps, size;

  // The moments, in place; returns what is added to the weight.
  __device__ __forceinline__ float operator()(float grad, float& first, float& second) const {
    const float difference = grad - first;
    // The form that is exact at the nearer end, as torch.lerp has it.
    first = one_minus_beta1 < 0.5f ? first + one_minus_beta1 * difference : grad - beta1 * difference;
    second = beta2 * second + one_minus_beta2 * (grad * grad);
    return -size * first / (sqrtf(second) + eps);
  }
};

// weight <- decay * weight + delta, contiguous; `delta` is what the rule returns.
template <class Rounding>
struct Weight {
  typename Rounding::Kept* data;
  float decay;
  Keys keys;

  __device__ __forceinline__ void add(int64_t row, int64_t col, int64_t cols, float delta) const {
    uint32_t bits = 0;
    if (Rounding::takes_bits) bits = bits_of(random_word(keys.rows, keys.first_row + row), random_word(keys.cols, col));
    auto& kept = data[row * cols + col];
    kept = Rounding::convert(decay * as_float(kept) + delta, bits);
  }
};

constexpr int THREADS = 128, WIDTH = 4, ROWS = 16;  // as in elementwise.cuh

// One matrix: grad, first and second (rows, cols), contiguous.
template <class Rounding, class Grad, class OfWeight>
struct Floats {
  const Grad* grad;
  typename Rounding::Kept *first, *second;
  Weight<OfWeight> weight;
  int64_t rows, cols;
  Keys of_first, of_second;
};

template <class Rounding, class Grad, class OfWeight>
__global__ void __launch_bounds__(THREADS)
    adamw_kernel(const __grid_constant__ Group<Floats<Rounding, Grad, OfWeight>> group, const Rule rule) {
  using Kept = typename Rounding::Kept;
  const auto& [grad, first, second, weight, rows, cols, of_first, of_second] = group.items[blockIdx.z];
  const int64_t col = (static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x) * WIDTH;
  if (col >= cols) return;
  uint32_t first_cols[WIDTH] = {}, second_cols[WIDTH] = {};
  if (Rounding::takes_bits) {
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
      first_cols[i] = random_word(of_first.cols, col + i);
      second_cols[i] = random_word(of_second.cols, col + i);
    }
  }
  for (int64_t start = static_cast<int64_t>(blockIdx.y) * ROWS; start < rows; start += int64_t(gridDim.y) * ROWS) {
    for (int64_t row = start; row < min(start + ROWS, rows); ++row) {
      uint32_t first_row = 0, second_row = 0;
      if (Rounding::takes_bits) {
        first_row = random_word(of_first.rows, of_first.first_row + row);
        second_row = random_word(of_second.rows, of_second.first_row + row);
      }
      const int64_t at = row * cols + col, count = cols - col;
      const Pack<Grad, WIDTH> g = load<Grad, WIDTH>(grad + at, count);
      Pack<Kept, WIDTH> m = load<Kept, WIDTH>(first + at, count), v = load<Kept, WIDTH>(second + at, count);
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) {
        float now = as_float(m.values[i]), squared = as_float(v.values[i]);
        const float delta = rule(as_float(g.values[i]), now, squared);
        m.values[i] = Rounding::convert(now, bits_of(first_row, first_cols[i]));
        v.values[i] = Rounding::convert(squared, bits_of(second_row, second_cols[i]));
        if (i < count) weight.add(row, col + i, cols, delta);
      }
      store(first + at, m, count);
      store(second + at, v, count);
    }
  }
}

constexpr int BLOCK = 256, WARPS = BLOCK / 32;  // of 8-bit codes with one scale

struct Moment {
  uint8_t* codes;
  float* scales;
  const float* book;  // 256 ascending values
  bool is_signed;
};

// The larger number, or NaN if one of them is.
__device__ __forceinline__ float larger(float a, float b) { return a > b || a != a ? a : b; }

// The largest of the block's values, the same for all of its threads.
__device__ __forceinline__ float largest_of_block(float value, float (&of_warps)[WARPS]) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value = larger(value, __shfl_xor_sync(0xFFFFFFFFu, value, offset));
  __syncthreads();  // all have read what the last call left, and the scale that is replaced next
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = value;
  __syncthreads();
#pragma unroll
  for (int warp = 0; warp < WARPS; ++warp) value = larger(value, of_warps[warp]);
  return value;
}

// How many of the boundaries halfway between two values of the book are below the value; all of them for NaN.
__device__ __forceinline__ int code_of(float value, const float* book) {
  int low = 0, high = BLOCK - 1;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (value <= (book[middle] + book[middle + 1]) / 2.0f) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

// The thread's value as a code, with the scale of the block: its largest magnitude.
__device__ __forceinline__ void quantize(float value, bool is_there, int64_t at, int64_t scale, const Moment& moment,
                                         float (&of_warps)[WARPS]) {
  const float largest = largest_of_block(is_there ? fabsf(value) : 0.0f, of_warps);
  if (threadIdx.x == 0) moment.scales[scale] = largest;
  if (!is_there) return;
  const float smallest = 1.17549435e-38f;  // of a scale that is divided by
  const int code = code_of(value / (largest < smallest ? smallest : largest), moment.book);
  moment.codes[at] = static_cast<uint8_t>(moment.is_signed || code > 0 || !(value > 0.0f) ? code : 1);
}

// One matrix: grad is contiguous, in `lines` of `length`; no block of codes crosses a line. `cols` is the length of a row.
template <class Grad, class OfWeight>
struct Blocks {
  const Grad* grad;
  Moment first, second;
  Weight<OfWeight> weight;
  int64_t lines, length, cols;
};

// A block of threads has a block of codes, one thread a value.
template <class Grad, class OfWeight>
__global__ void __launch_bounds__(BLOCK)
    adamw_blocks_kernel(const __grid_constant__ Group<Blocks<Grad, OfWeight>> group, const Rule rule) {
  const auto& [grad, first, second, weight, lines, length, cols] = group.items[blockIdx.z];
  __shared__ float of_warps[WARPS];
  const int64_t in_line = (length + BLOCK - 1) / BLOCK;
  for (int64_t block = blockIdx.x; block < lines * in_line; block += gridDim.x) {
    const int64_t start = block % in_line * BLOCK + threadIdx.x, at = block / in_line * length + start;
    const bool is_there = start < length;
    float m = 0.0f, v = 0.0f;
    if (is_there) {
      m = first.book[first.codes[at]] * first.scales[block];
      v = second.book[second.codes[at]] * second.scales[block];
      weight.add(at / cols, at % cols, cols, rule(as_float(grad[at]), m, v));
    }
    quantize(m, is_there, at, block, first, of_warps);
    quantize(v, is_there, at, block, second, of_warps);
  }
}

}  // namespace adamw
}  // namespace hf_galore

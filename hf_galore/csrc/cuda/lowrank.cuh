// W (m, n) <- beta * W + alpha * A (m, k) B (k, n) for bfloat16 W, in one pass over W: the product is summed in float32 by
// tensor cores and added to W before it is rounded, once. No m x n temporary.
//
// A block of 8 warps makes a tile of 128 x 128. Tiles of A and B go from memory through registers into shared memory, the
// next ones while the present ones are multiplied. Sums then go through shared memory once, so that W is read and written
// in whole sectors.
#pragma once

#include <mma.h>

#include <type_traits>

#include "numbers.cuh"

namespace hf_galore {
namespace lowrank {

using nvcuda::wmma::accumulator;
using nvcuda::wmma::col_major;
using nvcuda::wmma::fragment;
using nvcuda::wmma::matrix_a;
using nvcuda::wmma::matrix_b;
using nvcuda::wmma::row_major;

constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int BLOCK_M = 128, BLOCK_N = 128, BLOCK_K = 32;
constexpr int WARP_M = 32, WARP_N = 64;  // of the 4 x 2 warps
constexpr int UNIT = 16;                 // of a tensor core's product
constexpr int ROWS_OF_UNITS = WARP_M / UNIT, COLS_OF_UNITS = WARP_N / UNIT;
constexpr int WIDTH = 8;   // bfloat16s in 16 bytes
constexpr int PADDING = 8;  // against conflicts of the banks of shared memory
constexpr int PATCH = UNIT + 4;

// A factor whose rows, or else columns, are contiguous.
struct Factor {
  const __nv_bfloat16* data;
  int64_t stride;  // from one contiguous line to the next
};

// A tile of LINES contiguous lines of LENGTH elements, in registers on its way from memory to shared memory.
template <int LINES, int LENGTH>
struct Tile {
  static constexpr int CHUNKS = LENGTH / WIDTH, EACH = LINES * CHUNKS / THREADS;
  static constexpr int PITCH = LENGTH + PADDING, SIZE = LINES * PITCH;
  static_assert(LINES * CHUNKS % THREADS == 0, "every thread moves as many chunks");
  Pack<__nv_bfloat16, WIDTH> chunks[EACH];

  // Elements from (first_line, first) on of a factor of `lines` lines of `length`; zero beyond them.
  __device__ __forceinline__ void read(const Factor& from, int64_t first_line, int64_t lines, int64_t first,
                                       int64_t length) {
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const int index = threadIdx.x + i * THREADS;
      const int64_t line = first_line + index / CHUNKS, start = first + index % CHUNKS * WIDTH;
      const int64_t count = line < lines ? max(int64_t(0), min(int64_t(WIDTH), length - start)) : 0;
      chunks[i] = load<__nv_bfloat16, WIDTH>(from.data + (count ? line * from.stride + start : 0), count);
    }
  }

  __device__ __forceinline__ void write(__nv_bfloat16* shared) const {
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const int index = threadIdx.x + i * THREADS;
      __nv_bfloat16* address = shared + index / CHUNKS * PITCH + index % CHUNKS * WIDTH;
      *reinterpret_cast<Pack<__nv_bfloat16, WIDTH>*>(address) = chunks[i];
    }
  }
};

// A tile of the left factor (BLOCK_M x BLOCK_K), of the right one (BLOCK_K x BLOCK_N), and how a tensor core reads each:
// BY_ROWS if rows are contiguous.
template <bool BY_ROWS>
struct Left {
  using Registers = std::conditional_t<BY_ROWS, Tile<BLOCK_M, BLOCK_K>, Tile<BLOCK_K, BLOCK_M>>;
  using Unit = fragment<matrix_a, UNIT, UNIT, UNIT, __nv_bfloat16, std::conditional_t<BY_ROWS, row_major, col_major>>;
  static __device__ __forceinline__ void read(Registers& tile, const Factor& from, int64_t row, int64_t m, int64_t inner,
                                              int64_t k) {
    if constexpr (BY_ROWS) {
      tile.read(from, row, m, inner, k);
    } else {
      tile.read(from, inner, k, row, m);
    }
  }
  static __device__ __forceinline__ void unit(Unit& to, const __nv_bfloat16* shared, int row, int inner) {
    const int at = BY_ROWS ? row * Registers::PITCH + inner : inner * Registers::PITCH + row;
    nvcuda::wmma::load_matrix_sync(to, shared + at, Registers::PITCH);
  }
};

template <bool BY_ROWS>
struct Right {
  using Registers = std::conditional_t<BY_ROWS, Tile<BLOCK_K, BLOCK_N>, Tile<BLOCK_N, BLOCK_K>>;
  using Unit = fragment<matrix_b, UNIT, UNIT, UNIT, __nv_bfloat16, std::conditional_t<BY_ROWS, row_major, col_major>>;
  static __device__ __forceinline__ void read(Registers& tile, const Factor& from, int64_t col, int64_t n, int64_t inner,
                                              int64_t k) {
    if constexpr (BY_ROWS) {
      tile.read(from, inner, k, col, n);
    } else {
      tile.read(from, col, n, inner, k);
    }
  }
  static __device__ __forceinline__ void unit(Unit& to, const __nv_bfloat16* shared, int col, int inner) {
    const int at = BY_ROWS ? inner * Registers::PITCH + col : col * Registers::PITCH + inner;
    nvcuda::wmma::load_matrix_sync(to, shared + at, Registers::PITCH);
  }
};

// One matrix W and its factors.
struct Product {
  __nv_bfloat16* weight;
  int64_t weight_stride;
  Factor left, right;
  int64_t m, n, k;
  Keys keys;
};

// The grid is as large as the largest of the matrices.
template <class Rounding, bool LEFT_BY_ROWS, bool RIGHT_BY_ROWS>
__global__ void __launch_bounds__(THREADS, 2)
    add_lowrank_kernel(const __grid_constant__ Group<Product> group, const float alpha, const float beta) {
  const auto& [weight, weight_stride, left, right, m, n, k, keys] = group.items[blockIdx.z];
  using A = Left<LEFT_BY_ROWS>;
  using B = Right<RIGHT_BY_ROWS>;
  constexpr int SIZE_A = A::Registers::SIZE, SIZE_B = B::Registers::SIZE;
  alignas(128) __shared__ __nv_bfloat16 shared[2 * (SIZE_A + SIZE_B)];
  __shared__ uint32_t row_words[BLOCK_M], col_words[BLOCK_N];
  static_assert(WARPS * UNIT * PATCH * sizeof(float) <= sizeof(shared), "the sums go through the memory of the tiles");

  const int64_t first_row = static_cast<int64_t>(blockIdx.y) * BLOCK_M;
  const int64_t first_col = static_cast<int64_t>(blockIdx.x) * BLOCK_N;
  if (first_row >= m || first_col >= n) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_row = warp / (BLOCK_N / WARP_N) * WARP_M, warp_col = warp % (BLOCK_N / WARP_N) * WARP_N;
  if (Rounding::takes_bits && threadIdx.x < BLOCK_M) {
    row_words[threadIdx.x] = random_word(keys.rows, keys.first_row + first_row + threadIdx.x);
  } else if (Rounding::takes_bits && threadIdx.x < BLOCK_M + BLOCK_N) {
    col_words[threadIdx.x - BLOCK_M] = random_word(keys.cols, first_col + threadIdx.x - BLOCK_M);
  }

  fragment<accumulator, UNIT, UNIT, UNIT, float> sums[ROWS_OF_UNITS][COLS_OF_UNITS];
#pragma unroll
  for (int i = 0; i < ROWS_OF_UNITS; ++i) {
#pragma unroll
    for (int j = 0; j < COLS_OF_UNITS; ++j) nvcuda::wmma::fill_fragment(sums[i][j], 0.0f);
  }

  typename A::Registers next_a;
  typename B::Registers next_b;
  A::read(next_a, left, first_row, m, 0, k);
  B::read(next_b, right, first_col, n, 0, k);
  int buffer = 0;
  for (int64_t inner = 0; inner < k; inner += BLOCK_K, buffer ^= 1) {
    __nv_bfloat16* tile_a = shared + buffer * (SIZE_A + SIZE_B);
    __nv_bfloat16* tile_b = tile_a + SIZE_A;
    next_a.write(tile_a);
    next_b.write(tile_b);
    __syncthreads();  // one is enough: the other buffer was read before the last one
    if (inner + BLOCK_K < k) {
      A::read(next_a, left, first_row, m, inner + BLOCK_K, k);
      B::read(next_b, right, first_col, n, inner + BLOCK_K, k);
    }
#pragma unroll
    for (int part = 0; part < BLOCK_K; part += UNIT) {
      typename A::Unit units_a[ROWS_OF_UNITS];
#pragma unroll
      for (int i = 0; i < ROWS_OF_UNITS; ++i) A::unit(units_a[i], tile_a, warp_row + i * UNIT, part);
#pragma unroll
      for (int j = 0; j < COLS_OF_UNITS; ++j) {
        typename B::Unit unit_b;
        B::unit(unit_b, tile_b, warp_col + j * UNIT, part);
#pragma unroll
        for (int i = 0; i < ROWS_OF_UNITS; ++i) nvcuda::wmma::mma_sync(sums[i][j], units_a[i], unit_b, sums[i][j]);
      }
    }
  }
  __syncthreads();  // the tiles' memory is the sums' from here on

  // A unit at a time: a lane has 8 elements of a row.
  float* patch = reinterpret_cast<float*>(shared) + warp * UNIT * PATCH;
  const int row_in_unit = lane / 2, col_in_unit = lane % 2 * WIDTH;
#pragma unroll
  for (int i = 0; i < ROWS_OF_UNITS; ++i) {
#pragma unroll
    for (int j = 0; j < COLS_OF_UNITS; ++j) {
      nvcuda::wmma::store_matrix_sync(patch, sums[i][j], PATCH, nvcuda::wmma::mem_row_major);
      __syncwarp();
      const int row_in_block = warp_row + i * UNIT + row_in_unit, col_in_block = warp_col + j * UNIT + col_in_unit;
      const int64_t row = first_row + row_in_block, col = first_col + col_in_block;
      if (row < m && col < n) {
        __nv_bfloat16* address = weight + row * weight_stride + col;
        auto kept = load<__nv_bfloat16, WIDTH>(address, n - col);
        const uint32_t row_word = Rounding::takes_bits ? row_words[row_in_block] : 0;
#pragma unroll
        for (int e = 0; e < WIDTH; ++e) {
          const float value = beta * as_float(kept.values[e]) + alpha * patch[row_in_unit * PATCH + col_in_unit + e];
          const uint32_t bits = Rounding::takes_bits ? bits_of(row_word, col_words[col_in_block + e]) : 0;
          kept.values[e] = Rounding::convert(value, bits);
        }
        store(address, kept, n - col);
      }
      __syncwarp();
    }
  }
}

}  // namespace lowrank
}  // namespace hf_galore

// The matrix products of a warp on the CPU: every lane has the whole of a fragment, and computes it.
#pragma once

#include "cuda_bf16.h"

namespace nvcuda::wmma {

struct matrix_a;
struct matrix_b;
struct accumulator;
struct row_major;
struct col_major;
enum layout_t { mem_row_major };

template <class Use, int M, int N, int K, class T, class Layout = row_major>
struct fragment {
  static_assert(M == 16 && N == 16 && K == 16, "the shape that the kernels use");
  T values[16][16];
};

template <class Use, class T, class Layout>
void load_matrix_sync(fragment<Use, 16, 16, 16, T, Layout>& to, const T* from, unsigned stride) {
  for (int row = 0; row < 16; ++row) {
    for (int col = 0; col < 16; ++col) {
      to.values[row][col] = std::is_same_v<Layout, row_major> ? from[row * stride + col] : from[col * stride + row];
    }
  }
}

template <class T>
void fill_fragment(fragment<accumulator, 16, 16, 16, T>& to, T value) {
  for (auto& row : to.values) std::fill(std::begin(row), std::end(row), value);
}

template <class A, class B>
void mma_sync(fragment<accumulator, 16, 16, 16, float>& to, const fragment<matrix_a, 16, 16, 16, __nv_bfloat16, A>& a,
              const fragment<matrix_b, 16, 16, 16, __nv_bfloat16, B>& b,
              const fragment<accumulator, 16, 16, 16, float>&) {
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      const float value = __bfloat162float(a.values[row][k]);
      for (int col = 0; col < 16; ++col) to.values[row][col] += value * __bfloat162float(b.values[k][col]);
    }
  }
}

inline void store_matrix_sync(float* to, const fragment<accumulator, 16, 16, 16, float>& from, unsigned stride, layout_t) {
  for (int row = 0; row < 16; ++row) {
    for (int col = 0; col < 16; ++col) to[row * stride + col] = from.values[row][col];
  }
}

}  // namespace nvcuda::wmma

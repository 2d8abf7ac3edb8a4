// The CPU ops that hf_galore/ops.py and basis_store.py define, through torch's stable ABI.
#include "library.h"

#include <cstdlib>
#include <cstring>

namespace hf_galore {
namespace {

const Kernels& choose_kernels() {
  const char* name = std::getenv("HF_GALORE_CPU_KERNELS");
  const auto wanted = [&](const Kernels& table) { return name == nullptr || std::strcmp(name, table.name) == 0; };
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && wanted(avx512_kernels)) return avx512_kernels;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && wanted(avx2_kernels)) return avx2_kernels;
#endif
  return generic_kernels;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose_kernels();
  return chosen;
}

void add_or_replace(const Tensor& weight, const Tensor& delta, float alpha, float beta, bool replace, const Key& key,
                    int64_t first_row) {
  const Matrix target = dense_rows(weight, "weight");
  check_shape(delta, target.rows, target.cols, "delta");
  const ColumnWords words(key, 0, target, first_row);
  const Addition step{target, dense_rows(delta, "delta"), 0, alpha, beta, replace, words.words()};
  divide(workers_for(target.rows, target.cols), target.rows, 1,
         [&](int64_t, int64_t first, int64_t last) { kernels().add(step, first, last); });
}

Tensor product_of(const Matrix& a, const Matrix& b) {
  STD_TORCH_CHECK(a.cols == b.rows, "left and right do not go together");
  Tensor product = torch::stable::empty({a.rows, b.cols}, ScalarType::Float);
  const Matrix c = matrix_of(product, "product");
  if (a.cols == 0) {
    torch::stable::zero_(product);
    return product;
  }
  const int64_t tile_rows = kernels().tile_rows, tile_cols = kernels().tile_cols;
  if (a.rows >= b.cols) {  // the low-rank factor is on the right: each worker takes some rows
    PackedRight packed(b);
    const int64_t workers = workers_for(a.rows, a.cols * b.cols), each = kernels().left_scratch(256);
    Scratch scratch(workers * each);
    divide(workers, a.rows, tile_rows, [&](int64_t worker, int64_t first, int64_t last) {
      kernels().matmul_rows(a, packed.floats(), c, first, last, scratch.floats() + worker * each);
    });
    return product;
  }
  // It is on the left: each worker takes some columns.
  const int64_t rows = (a.rows + tile_rows - 1) / tile_rows * tile_rows;
  Scratch widened(rows * a.cols);
  kernels().widen(a, widened.floats());
  const int64_t panels = (b.cols + tile_cols - 1) / tile_cols;
  const int64_t workers = workers_for(panels, a.rows * a.cols * tile_cols), each = kernels().right_scratch();
  Scratch scratch(workers * each);
  divide(workers, panels, 1, [&](int64_t worker, int64_t first, int64_t last) {
    kernels().matmul_cols(widened.floats(), b, c, first, last, scratch.floats() + worker * each);
  });
  return product;
}

namespace {

void add_(Tensor weight, Tensor delta, double alpha, double beta, Key key, int64_t first_row) {
  add_or_replace(weight, delta, static_cast<float>(alpha), static_cast<float>(beta), false, key, first_row);
}

void round_into_(Tensor target, Tensor values, Key key, int64_t first_row) {
  add_or_replace(target, values, 1.0f, 0.0f, true, key, first_row);
}

void add_lowrank_(Tensor weight, Tensor left, Tensor right, double alpha, double beta, Key key, int64_t first_row) {
  const Matrix target = dense_rows(weight, "weight");
  check_shape(right, left.size(1), target.cols, "right");
  check_shape(left, target.rows, right.size(0), "left");
  const int64_t depth = right.size(0);
  PackedRight packed(matrix_of(right, "right"));
  const ColumnWords words(key, 0, target, first_row);
  const LowRankAddition step{target, matrix_of(left, "left"), 0, packed.floats(), depth, static_cast<float>(alpha),
                             static_cast<float>(beta), words.words()};
  const int64_t workers = workers_for(target.rows, target.cols * (depth + 1));
  const int64_t each = kernels().left_scratch(depth);
  Scratch scratch(workers * each);
  divide(workers, target.rows, kernels().tile_rows, [&](int64_t worker, int64_t first, int64_t last) {
    kernels().add_lowrank(step, first, last, scratch.floats() + worker * each);
  });
}

Tensor matmul(Tensor left, Tensor right) { return product_of(matrix_of(left, "left"), matrix_of(right, "right")); }

Tensor decode_basis(Tensor codes, Tensor scale, int64_t bits, int64_t rows) {
  STD_TORCH_CHECK(codes.dim() == 3, "codes must be (matrices, rows, cols)");
  const int64_t count = codes.size(0), cols = codes.size(2);
  Tensor values = torch::stable::empty({count, rows, cols}, ScalarType::Float);
  float* to = static_cast<float*>(values.data_ptr());
  const CodedBases bases(codes, scale, bits, rows);
  divide(workers_for(count * rows, cols), count * rows, 1, [&](int64_t, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const int64_t begin = row % rows * cols;
      kernels().decode(bases.matrix(row / rows), begin, begin + cols, to + row * cols);
    }
  });
  return values;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hf_galore, CPU, library) {
  library.impl("add_", TORCH_BOX(&add_));
  library.impl("round_into_", TORCH_BOX(&round_into_));
  library.impl("add_lowrank_", TORCH_BOX(&add_lowrank_));
  library.impl("matmul", TORCH_BOX(&matmul));
  library.impl("decode_basis", TORCH_BOX(&decode_basis));
}

}  // namespace hf_galore

extern "C" __attribute__((visibility("default"))) const char* hf_galore_cpu_kernels() { return hf_galore::kernels().name; }

// The CUDA kernels of the ops that hf_galore/native.py and its siblings define, through torch's stable ABI.
#include "elementwise.cuh"
#include "launch.h"
#include "lowrank.cuh"

namespace hf_galore {
namespace {

constexpr int64_t GRID_Y = 65535;  // what a grid can have downwards

template <bool REPLACE>
void add_or_replace(const Tensor& weight, const Tensor& delta, double alpha, double beta, const OptionalKeys& keys,
                    int64_t first_row) {
  check_type(weight, "weight");
  check_type(delta, "delta");
  check_dense_rows(weight, "weight");
  check_dense_rows(delta, "delta");
  const int64_t rows = weight.size(0), cols = weight.size(1);
  check_matrix(delta, rows, cols, "delta");
  if (rows == 0 || cols == 0) return;
  const OnDevice device(weight);
  using namespace elementwise;
  const dim3 grid(blocks_for(cols, THREADS * WIDTH, INT32_MAX), blocks_for(rows, ROWS, GRID_Y));
  with_rounding(weight, keys, [&](auto rounding) {
    with_type(delta, [&](auto value) {
      using Rounding = decltype(rounding);
      using Kept = typename Rounding::Kept;
      using Delta = decltype(value);
      launch(add_kernel<Rounding, Delta, REPLACE>, grid, THREADS, device, static_cast<Kept*>(weight.data_ptr()),
             weight.stride(0), static_cast<const Delta*>(delta.data_ptr()), delta.stride(0), rows, cols,
             static_cast<float>(alpha), static_cast<float>(beta), keys_of(keys, 0, first_row));
    });
  });
}

void add_(Tensor weight, Tensor delta, double alpha, double beta, OptionalKeys keys, int64_t first_row) {
  add_or_replace<false>(weight, delta, alpha, beta, keys, first_row);
}

void round_into_(Tensor target, Tensor values, OptionalKeys keys, int64_t first_row) {
  add_or_replace<true>(target, values, 1.0, 0.0, keys, first_row);
}

// A factor in bfloat16 with contiguous rows or columns, and the tensor that has its memory.
struct Operand {
  Tensor tensor;
  bool by_rows;
  lowrank::Factor factor;

  explicit Operand(const Tensor& given) : tensor(prepared(given)), by_rows(tensor.stride(1) == 1) {
    factor = {static_cast<const __nv_bfloat16*>(tensor.data_ptr()), tensor.stride(by_rows ? 0 : 1)};
  }

 private:
  static Tensor prepared(const Tensor& given) {
    const Tensor narrow = is_bfloat16(given) ? given : torch::stable::to(given, ScalarType::BFloat16);
    const bool has_lines = narrow.stride(0) == 1 || narrow.stride(1) == 1;
    return has_lines ? narrow : torch::stable::contiguous(narrow);
  }
};

// float32 weights: one GEMM of torch's library, which adds into W itself.
void add_product_(const Tensor& weight, const Tensor& left, const Tensor& right, double alpha, double beta) {
  std::array<StableIValue, 5> stack{torch::stable::detail::from(weight), torch::stable::detail::from(left),
                                    torch::stable::detail::from(right), torch::stable::detail::from(beta),
                                    torch::stable::detail::from(alpha)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::addmm_", "", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}

void add_lowrank_(Tensor weight, Tensor left, Tensor right, double alpha, double beta, OptionalKeys keys,
                  int64_t first_row) {
  check_type(weight, "weight");
  check_type(left, "left");
  check_type(right, "right");
  check_dense_rows(weight, "weight");
  STD_TORCH_CHECK(left.dim() == 2 && right.dim() == 2, "left and right must be matrices");
  const int64_t m = weight.size(0), n = weight.size(1), k = right.size(0);
  check_matrix(left, m, k, "left");
  check_matrix(right, k, n, "right");
  if (m == 0 || n == 0) return;
  const OnDevice device(weight);
  if (!is_bfloat16(weight)) {
    add_product_(weight, left, right, alpha, beta);
    return;
  }
  using namespace lowrank;
  STD_TORCH_CHECK(m <= GRID_Y * BLOCK_M, "weight must have at most ", GRID_Y * BLOCK_M, " rows");
  const Operand a(left), b(right);
  const dim3 grid(blocks_for(n, BLOCK_N, INT32_MAX), blocks_for(m, BLOCK_M, GRID_Y));
  with_rounding(weight, keys, [&](auto rounding) {
    using Rounding = decltype(rounding);
    if constexpr (!std::is_same_v<Rounding, Exactly>) {
      with_flag(a.by_rows, [&](auto left_by_rows) {
        with_flag(b.by_rows, [&](auto right_by_rows) {
          launch(add_lowrank_kernel<Rounding, decltype(left_by_rows)::value, decltype(right_by_rows)::value>, grid,
                 THREADS, device, static_cast<__nv_bfloat16*>(weight.data_ptr()), weight.stride(0), a.factor, b.factor,
                 m, n, k, static_cast<float>(alpha), static_cast<float>(beta), keys_of(keys, 0, first_row));
        });
      });
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hf_galore, CUDA, library) {
  library.impl("add_", TORCH_BOX(&add_));
  library.impl("round_into_", TORCH_BOX(&round_into_));
  library.impl("add_lowrank_", TORCH_BOX(&add_lowrank_));
}

}  // namespace hf_galore

// The CUDA kernels of the ops that hf_galore/native.py and its siblings define, through torch's stable ABI.
#include <cmath>

#include "adamw.cuh"
#include "elementwise.cuh"
#include "launch.h"
#include "lowrank.cuh"

namespace hf_galore {
namespace {

constexpr int64_t GRID_Y = 65535;  // what a grid can have downwards

template <bool REPLACE>
void add_or_replace(const Tensor& weight, const Tensor& delta, double alpha, double beta, const Key& key,
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
  with_rounding(weight, key, [&](auto rounding) {
    with_type(delta, [&](auto value) {
      using Rounding = decltype(rounding);
      using Kept = typename Rounding::Kept;
      using Delta = decltype(value);
      launch(add_kernel<Rounding, Delta, REPLACE>, grid, THREADS, device, static_cast<Kept*>(weight.data_ptr()),
             weight.stride(0), static_cast<const Delta*>(delta.data_ptr()), delta.stride(0), rows, cols,
             static_cast<float>(alpha), static_cast<float>(beta), keys_of(key, 0, first_row));
    });
  });
}

void add_(Tensor weight, Tensor delta, double alpha, double beta, Key key, int64_t first_row) {
  add_or_replace<false>(weight, delta, alpha, beta, key, first_row);
}

void round_into_(Tensor target, Tensor values, Key key, int64_t first_row) {
  add_or_replace<true>(target, values, 1.0, 0.0, key, first_row);
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

void add_bfloat16_lowrank_(Tensor weight, Tensor left, Tensor right, double alpha, double beta, Key key,
                           int64_t first_row) {
  check_type(left, "left");
  check_type(right, "right");
  check_dense_rows(weight, "weight");
  STD_TORCH_CHECK(is_bfloat16(weight), "weight must be bfloat16");
  STD_TORCH_CHECK(left.dim() == 2 && right.dim() == 2, "left and right must be matrices");
  const int64_t m = weight.size(0), n = weight.size(1), k = right.size(0);
  check_matrix(left, m, k, "left");
  check_matrix(right, k, n, "right");
  if (m == 0 || n == 0) return;
  using namespace lowrank;
  STD_TORCH_CHECK(m <= GRID_Y * BLOCK_M, "weight must have at most ", GRID_Y * BLOCK_M, " rows");
  const OnDevice device(weight);
  const Operand a(left), b(right);
  const dim3 grid(blocks_for(n, BLOCK_N, INT32_MAX), blocks_for(m, BLOCK_M, GRID_Y));
  with_flag(key.has_value(), [&](auto stochastic) {
    using Rounding = std::conditional_t<decltype(stochastic)::value, Stochastically, ToNearest>;
    with_flag(a.by_rows, [&](auto left_by_rows) {
      with_flag(b.by_rows, [&](auto right_by_rows) {
        launch(add_lowrank_kernel<Rounding, decltype(left_by_rows)::value, decltype(right_by_rows)::value>, grid,
               THREADS, device, static_cast<__nv_bfloat16*>(weight.data_ptr()), weight.stride(0), a.factor, b.factor, m,
               n, k, static_cast<float>(alpha), static_cast<float>(beta), keys_of(key, 0, first_row));
      });
    });
  });
}

// How an 8-bit moment is kept.
adamw::Moment moment_of(const Tensor& codes, const std::optional<Tensor>& scales, const std::optional<Tensor>& book,
                        int64_t blocks, bool is_signed) {
  STD_TORCH_CHECK(scales && book, "8-bit moments need their scales and code books");
  STD_TORCH_CHECK(scales->numel() == blocks && scales->is_contiguous() && scales->scalar_type() == ScalarType::Float,
                  "8-bit moments need a float32 scale for each block of ", adamw::BLOCK);
  STD_TORCH_CHECK(book->scalar_type() == ScalarType::Float && book->numel() == adamw::BLOCK && book->is_contiguous(),
                  "a code book must have ", adamw::BLOCK, " float32 numbers");
  return {static_cast<uint8_t*>(codes.data_ptr()), static_cast<float*>(scales->data_ptr()),
          static_cast<const float*>(book->data_ptr()), is_signed};
}

void check_contiguous(const Tensor& tensor, int64_t rows, int64_t cols, const char* name) {
  check_matrix(tensor, rows, cols, name);
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
}

void adamw_(Tensor weight, Tensor grad, Tensor first, Tensor second, std::optional<Tensor> first_scales,
            std::optional<Tensor> second_scales, std::optional<Tensor> signed_codes,
            std::optional<Tensor> unsigned_codes, double lr, double beta1, double beta2, double eps, double steps,
            double decay, Key key, int64_t first_row) {
  const int64_t rows = weight.size(0), cols = weight.size(1);
  check_type(weight, "weight");
  check_type(grad, "grad");
  check_contiguous(weight, rows, cols, "weight");
  check_contiguous(grad, rows, cols, "grad");
  check_contiguous(first, rows, cols, "exp_avg");
  check_contiguous(second, rows, cols, "exp_avg_sq");
  STD_TORCH_CHECK(first.scalar_type() == second.scalar_type(), "exp_avg and exp_avg_sq must have one dtype");
  if (rows == 0 || cols == 0) return;
  using namespace adamw;
  const Rule rule{static_cast<float>(beta1),
                  static_cast<float>(beta2),
                  static_cast<float>(1.0 - beta1),
                  static_cast<float>(1.0 - beta2),
                  static_cast<float>(eps),
                  static_cast<float>(lr * std::sqrt(1.0 - std::pow(beta2, steps)) / (1.0 - std::pow(beta1, steps)))};
  const OnDevice device(weight);
  with_rounding(weight, key, [&](auto of_weight) {
    with_type(grad, [&](auto value) {
      using OfWeight = decltype(of_weight);
      using Grad = decltype(value);
      const auto* gradient = static_cast<const Grad*>(grad.data_ptr());
      const Weight<OfWeight> target{static_cast<typename OfWeight::Kept*>(weight.data_ptr()), static_cast<float>(decay),
                                    keys_of(key, 0, first_row)};
      if (first.scalar_type() == ScalarType::Byte) {
        const bool end_with_rows = first_scales && first_scales->dim() == 2;  // no block crosses a row
        const int64_t lines = end_with_rows ? rows : 1, length = end_with_rows ? cols : rows * cols;
        const int64_t blocks = lines * ((length + BLOCK - 1) / BLOCK);
        launch(adamw_blocks_kernel<Grad, OfWeight>, dim3(blocks_for(blocks, 1, INT32_MAX)), BLOCK, device, gradient,
               moment_of(first, first_scales, signed_codes, blocks, true),
               moment_of(second, second_scales, unsigned_codes, blocks, false), target, lines, length, cols, rule);
        return;
      }
      check_type(first, "exp_avg");
      const dim3 grid(blocks_for(cols, THREADS * WIDTH, INT32_MAX), blocks_for(rows, ROWS, GRID_Y));
      with_rounding(first, key, [&](auto rounding) {
        using Rounding = decltype(rounding);
        using Kept = typename Rounding::Kept;
        launch(adamw_kernel<Rounding, Grad, OfWeight>, grid, THREADS, device, gradient,
               static_cast<Kept*>(first.data_ptr()), static_cast<Kept*>(second.data_ptr()), target, rows, cols, rule,
               keys_of(key, 1, first_row), keys_of(key, 2, first_row));
      });
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hf_galore, CUDA, library) {
  library.impl("add_", TORCH_BOX(&add_));
  library.impl("round_into_", TORCH_BOX(&round_into_));
  library.impl("add_bfloat16_lowrank_", TORCH_BOX(&add_bfloat16_lowrank_));
  library.impl("adamw_", TORCH_BOX(&adamw_));
}

}  // namespace hf_galore

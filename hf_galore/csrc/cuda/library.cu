// The CUDA ops that hf_galore/ops.py defines, through torch's stable ABI.
#include "elementwise.cuh"
#include "launch.h"
#include "lowrank.cuh"

namespace hf_galore {
namespace {

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

// Matrices that one launch goes for, and the memory of their factors.
class Products {
 public:
  Products(bool stochastic, double alpha, double beta)
      : stochastic_(stochastic), alpha_(static_cast<float>(alpha)), beta_(static_cast<float>(beta)) {}

  void add(const Tensor& weight, const Tensor& left, const Tensor& right, const Keys& keys) {
    Operand a(left), b(right);
    if (count_ > 0 && (count_ == group_.MOST || a.by_rows != left_by_rows_ || b.by_rows != right_by_rows_)) launch_all();
    left_by_rows_ = a.by_rows;
    right_by_rows_ = b.by_rows;
    group_.items[count_++] = {static_cast<__nv_bfloat16*>(weight.data_ptr()), weight.stride(0), a.factor, b.factor,
                              weight.size(0), weight.size(1), right.size(0), keys};
    rows_ = std::max(rows_, weight.size(0));
    cols_ = std::max(cols_, weight.size(1));
    kept_.insert(kept_.end(), {weight, a.tensor, b.tensor});
  }

  void launch_all() {
    if (count_ == 0) return;
    using namespace lowrank;
    const OnDevice device(kept_.front());
    const dim3 grid(blocks_for(cols_, BLOCK_N, INT32_MAX), blocks_for(rows_, BLOCK_M, GRID_Y), count_);
    with_flag(stochastic_, [&](auto stochastic) {
      using Rounding = std::conditional_t<decltype(stochastic)::value, Stochastically, ToNearest>;
      with_flag(left_by_rows_, [&](auto left_by_rows) {
        with_flag(right_by_rows_, [&](auto right_by_rows) {
          launch(add_lowrank_kernel<Rounding, decltype(left_by_rows)::value, decltype(right_by_rows)::value>, grid,
                 THREADS, device, group_, alpha_, beta_);
        });
      });
    });
    count_ = rows_ = cols_ = 0;
    kept_.clear();
  }

 private:
  bool stochastic_, left_by_rows_ = false, right_by_rows_ = false;
  float alpha_, beta_;
  int64_t count_ = 0, rows_ = 0, cols_ = 0;
  Group<lowrank::Product> group_ = {};
  std::vector<Tensor> kept_;
};

void add_bfloat16_lowrank_(std::vector<Tensor> weights, std::vector<Tensor> lefts, std::vector<Tensor> rights,
                           double alpha, double beta, Key key, std::vector<int64_t> parameters,
                           std::vector<int64_t> first_rows) {
  check_lists(weights.size(), {&lefts, &rights}, {}, {&parameters, &first_rows});
  Products products(key.has_value(), alpha, beta);
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor &weight = weights[i], &left = lefts[i], &right = rights[i];
    check_type(left, "left");
    check_type(right, "right");
    check_dense_rows(weight, "weight");
    STD_TORCH_CHECK(is_bfloat16(weight), "weight must be bfloat16");
    STD_TORCH_CHECK(left.dim() == 2 && right.dim() == 2, "left and right must be matrices");
    const int64_t m = weight.size(0), n = weight.size(1), k = right.size(0);
    check_matrix(left, m, k, "left");
    check_matrix(right, k, n, "right");
    STD_TORCH_CHECK(m <= GRID_Y * lowrank::BLOCK_M, "weight must have at most ", GRID_Y * lowrank::BLOCK_M, " rows");
    STD_TORCH_CHECK(weight.get_device_index() == weights[0].get_device_index(), "the weights must be on one device");
    if (m > 0 && n > 0) products.add(weight, left, right, keys_of(key_of(key, parameters[i]), 0, first_rows[i]));
  }
  products.launch_all();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hf_galore, CUDA, library) {
  library.impl("add_", TORCH_BOX(&add_));
  library.impl("round_into_", TORCH_BOX(&round_into_));
  library.impl("add_bfloat16_lowrank_", TORCH_BOX(&add_bfloat16_lowrank_));
}

}  // namespace hf_galore

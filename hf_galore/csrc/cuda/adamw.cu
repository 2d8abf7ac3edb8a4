// The CUDA op adamw_ that hf_galore/optim/adamw_ops.py defines, through torch's stable ABI.
#include "adamw.cuh"

#include <cmath>

#include "launch.h"

namespace hf_galore {
namespace {

using namespace adamw;

void check_contiguous(const Tensor& tensor, int64_t rows, int64_t cols, const char* name) {
  check_matrix(tensor, rows, cols, name);
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
}

void check_like(const Tensor& tensor, const Tensor& first, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == first.scalar_type(), "all ", name, " must have one dtype");
  STD_TORCH_CHECK(tensor.get_device_index() == first.get_device_index(), "all ", name, " must be on one device");
}

// What an op is given, checked.
struct Given {
  std::vector<Tensor> weights, grads, first, second, first_scales, second_scales;
  std::optional<Tensor> signed_codes, unsigned_codes;
  float decay;
  Key key;
  std::vector<int64_t> parameters, first_rows;

  void check() const {
    check_lists(weights.size(), {&grads, &first, &second}, {&first_scales, &second_scales}, {&parameters, &first_rows});
    for (size_t i = 0; i < weights.size(); ++i) {
      const int64_t rows = weights[i].size(0), cols = weights[i].size(1);
      check_type(grads[i], "grad");
      check_type(weights[i], "weight");
      check_contiguous(weights[i], rows, cols, "weight");
      check_contiguous(grads[i], rows, cols, "grad");
      check_contiguous(first[i], rows, cols, "exp_avg");
      check_contiguous(second[i], rows, cols, "exp_avg_sq");
      check_like(weights[i], weights[0], "weights");
      check_like(grads[i], grads[0], "gradients");
      check_like(first[i], first[0], "moments");
      check_like(second[i], first[0], "moments");
    }
  }

  Keys keys(size_t index, uint64_t moment) const {
    return keys_of(key_of(key, parameters[index]), moment, first_rows[index]);
  }

  template <class OfWeight>
  Weight<OfWeight> target(size_t index) const {
    return {static_cast<typename OfWeight::Kept*>(weights[index].data_ptr()), decay, keys(index, 0)};
  }
};

// How an 8-bit moment is kept.
Moment moment_of(const Tensor& codes, const std::optional<Tensor>& scales, const std::optional<Tensor>& book,
                 int64_t blocks, bool is_signed) {
  STD_TORCH_CHECK(scales && book, "8-bit moments need their scales and code books");
  STD_TORCH_CHECK(scales->numel() == blocks && scales->is_contiguous() && scales->scalar_type() == ScalarType::Float,
                  "8-bit moments need a float32 scale for each block of ", BLOCK);
  STD_TORCH_CHECK(book->scalar_type() == ScalarType::Float && book->numel() == BLOCK && book->is_contiguous(),
                  "a code book must have ", BLOCK, " float32 numbers");
  return {static_cast<uint8_t*>(codes.data_ptr()), static_cast<float*>(scales->data_ptr()),
          static_cast<const float*>(book->data_ptr()), is_signed};
}

template <class Grad, class OfWeight>
struct InBlocks {
  using Item = Blocks<Grad, OfWeight>;
  static Item item(const Given& given, size_t i) {
    const Tensor& grad = given.grads[i];
    const int64_t rows = grad.size(0), cols = grad.size(1);
    const std::optional<Tensor> first_scales = element(given.first_scales, i);
    const bool end_with_rows = first_scales && first_scales->dim() == 2;  // no block crosses a row
    const int64_t lines = end_with_rows ? rows : 1, length = end_with_rows ? cols : rows * cols;
    const int64_t blocks = lines * ((length + BLOCK - 1) / BLOCK);
    return {static_cast<const Grad*>(grad.data_ptr()),
            moment_of(given.first[i], first_scales, given.signed_codes, blocks, true),
            moment_of(given.second[i], element(given.second_scales, i), given.unsigned_codes, blocks, false),
            given.target<OfWeight>(i), lines, length, cols};
  }
  static dim3 grid(const Item& item) {
    return dim3(blocks_for(item.lines * ((item.length + BLOCK - 1) / BLOCK), 1, INT32_MAX));
  }
  static void start(dim3 grid, const OnDevice& device, const Group<Item>& group, const Rule& rule) {
    launch(adamw_blocks_kernel<Grad, OfWeight>, grid, BLOCK, device, group, rule);
  }
};

template <class Rounding, class Grad, class OfWeight>
struct InFloats {
  using Item = Floats<Rounding, Grad, OfWeight>;
  static Item item(const Given& given, size_t i) {
    using Kept = typename Rounding::Kept;
    const Tensor& grad = given.grads[i];
    return {static_cast<const Grad*>(grad.data_ptr()),
            static_cast<Kept*>(given.first[i].data_ptr()),
            static_cast<Kept*>(given.second[i].data_ptr()),
            given.target<OfWeight>(i),
            grad.size(0),
            grad.size(1),
            given.keys(i, 1),
            given.keys(i, 2)};
  }
  static dim3 grid(const Item& item) {
    return dim3(blocks_for(item.cols, THREADS * WIDTH, INT32_MAX), blocks_for(item.rows, ROWS, GRID_Y));
  }
  static void start(dim3 grid, const OnDevice& device, const Group<Item>& group, const Rule& rule) {
    launch(adamw_kernel<Rounding, Grad, OfWeight>, grid, THREADS, device, group, rule);
  }
};

// One launch for as many matrices as fit into a group, on a grid that is large enough for each of them.
template <class How>
void step_all(const Given& given, const Rule& rule) {
  using Items = Group<typename How::Item>;
  const OnDevice device(given.weights[0]);
  Items group = {};
  dim3 grid(1, 1, 0);
  for (size_t i = 0; i < given.weights.size(); ++i) {
    if (given.weights[i].numel() > 0) {
      const auto item = How::item(given, i);
      const dim3 own = How::grid(item);
      grid.x = std::max(grid.x, own.x);
      grid.y = std::max(grid.y, own.y);
      group.items[grid.z++] = item;
    }
    if (grid.z == Items::MOST || (grid.z > 0 && i + 1 == given.weights.size())) {
      How::start(grid, device, group, rule);
      grid = dim3(1, 1, 0);
    }
  }
}

void adamw_(std::vector<Tensor> weights, std::vector<Tensor> grads, std::vector<Tensor> first,
            std::vector<Tensor> second, std::vector<Tensor> first_scales, std::vector<Tensor> second_scales,
            std::optional<Tensor> signed_codes, std::optional<Tensor> unsigned_codes, double lr, double beta1,
            double beta2, double eps, double steps, double decay, Key key, std::vector<int64_t> parameters,
            std::vector<int64_t> first_rows) {
  const Given given{weights,        grads, first,      second,    first_scales, second_scales, signed_codes,
                    unsigned_codes, static_cast<float>(decay), key, parameters, first_rows};
  given.check();
  if (weights.empty()) return;
  const Rule rule{static_cast<float>(beta1),
                  static_cast<float>(beta2),
                  static_cast<float>(1.0 - beta1),
                  static_cast<float>(1.0 - beta2),
                  static_cast<float>(eps),
                  static_cast<float>(lr * std::sqrt(1.0 - std::pow(beta2, steps)) / (1.0 - std::pow(beta1, steps)))};
  const bool in_blocks = first[0].scalar_type() == ScalarType::Byte;
  if (!in_blocks) check_type(first[0], "exp_avg");
  with_rounding(weights[0], key, [&](auto of_weight) {
    with_type(grads[0], [&](auto value) {
      using OfWeight = decltype(of_weight);
      using Grad = decltype(value);
      if (in_blocks) {
        step_all<InBlocks<Grad, OfWeight>>(given, rule);
      } else {
        with_rounding(first[0], key, [&](auto rounding) {
          step_all<InFloats<decltype(rounding), Grad, OfWeight>>(given, rule);
        });
      }
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hf_galore, CUDA, library) {
  library.impl("adamw_", TORCH_BOX(&adamw_));
}

}  // namespace hf_galore

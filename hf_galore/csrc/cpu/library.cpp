// The CPU kernels of the ops that hf_galore/ops.py, basis_store.py and optim/adamw_ops.py define, through torch's stable ABI.
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <numeric>

#include "code_book.h"
#include "tensors.h"

namespace hf_galore {
namespace {

// The kernels of the widest instruction set that the processor has, or those that HF_GALORE_CPU_KERNELS names.
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

const Kernels& kernels() {
  static const Kernels& chosen = choose_kernels();
  return chosen;
}

// A right factor (k, n), packed.
class PackedRight {
 public:
  explicit PackedRight(const Matrix& right)
      : panels_((right.cols + kernels().tile_cols - 1) / kernels().tile_cols),
        scratch_(panels_ * kernels().tile_cols * right.rows) {
    const int64_t workers = workers_for(panels_, right.rows * kernels().tile_cols);
    divide(workers, panels_, 1, [&](int64_t, int64_t first, int64_t last) {
      kernels().pack_right(right, first, last, scratch_.floats());
    });
  }
  const float* floats() { return scratch_.floats(); }

 private:
  int64_t panels_;
  Scratch scratch_;
};

void add_or_replace(const Tensor& weight, const Tensor& delta, float alpha, float beta, bool replace, const Key& key,
                    int64_t first_row) {
  const Matrix target = dense_rows(weight, "weight");
  check_shape(delta, target.rows, target.cols, "delta");
  const ColumnWords words(key, 0, target, first_row);
  const Addition step{target, dense_rows(delta, "delta"), 0, alpha, beta, replace, words.words()};
  divide(workers_for(target.rows, target.cols), target.rows, 1,
         [&](int64_t, int64_t first, int64_t last) { kernels().add(step, first, last); });
}

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

Tensor matmul(Tensor left, Tensor right) {
  const Matrix a = matrix_of(left, "left"), b = matrix_of(right, "right");
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

Tensor decode_basis(Tensor codes, Tensor scale, int64_t bits, int64_t rows) {
  STD_TORCH_CHECK(bits == 4 || bits == 8, "bits must be 4 or 8");
  const int64_t stored = bits == 4 ? (rows + 1) / 2 : rows;
  STD_TORCH_CHECK(codes.dim() == 3 && codes.size(1) == stored && codes.is_contiguous(), "codes must be (matrices, ", stored,
                  ", cols), contiguous");
  STD_TORCH_CHECK(codes.scalar_type() == (bits == 4 ? ScalarType::Byte : ScalarType::Char), "codes of 4 bits are uint8, of 8 "
                  "bits int8");
  const int64_t count = codes.size(0) * rows, cols = codes.size(2);
  STD_TORCH_CHECK(scale.scalar_type() == ScalarType::Float && scale.is_contiguous() &&
                  scale.numel() == (count * cols + 127) / 128, "one float32 scale for each block of 128");
  Tensor values = torch::stable::empty({codes.size(0), rows, cols}, ScalarType::Float);
  const CodedBasis basis{static_cast<const uint8_t*>(codes.data_ptr()), static_cast<const float*>(scale.data_ptr()), bits,
                         rows, cols};
  divide(workers_for(count, cols), count, 1, [&](int64_t, int64_t first, int64_t last) {
    kernels().decode(basis, first, last, static_cast<float*>(values.data_ptr()));
  });
  return values;
}

// AdamW's rule on one parameter: its gradient (rows, cols) and its moments, wherever the update goes.
class AdamWRule {
 public:
  AdamWRule(const Tensor& grad, const Tensor& first, const Tensor& second, const std::optional<Tensor>& first_scales,
            const std::optional<Tensor>& second_scales, const std::optional<Tensor>& signed_codes,
            const std::optional<Tensor>& unsigned_codes, double lr, double beta1, double beta2, double eps,
            double steps, const Key& key, int64_t first_row)
      : grad_(dense_rows(grad, "grad")), first_words_(key, 1, moment_of(first, grad_), first_row),
        second_words_(key, 2, moment_of(second, grad_), first_row) {
    for (const Tensor* tensor : {&grad, &first, &second}) {
      STD_TORCH_CHECK(tensor->is_contiguous(), "gradient and moments must be contiguous");
    }
    STD_TORCH_CHECK(first.scalar_type() == second.scalar_type(), "exp_avg and exp_avg_sq must have one dtype");
    check_shape(first, grad_.rows, grad_.cols, "exp_avg");
    check_shape(second, grad_.rows, grad_.cols, "exp_avg_sq");
    const bool blocks = first.scalar_type() == ScalarType::Byte;
    step_.grad = grad_;
    step_.first = {first.data_ptr(), nullptr, nullptr, first_words_.words()};
    step_.second = {second.data_ptr(), nullptr, nullptr, second_words_.words()};
    step_.blocks_end_with_rows = false;
    if (blocks) {
      STD_TORCH_CHECK(first_scales && second_scales && signed_codes && unsigned_codes,
                      "8-bit moments need scales and code books");
      step_.format = Format::blocks;
      step_.blocks_end_with_rows = first_scales->dim() == 2;
      const int64_t per_row = (grad_.cols + 255) / 256;
      const int64_t count = step_.blocks_end_with_rows ? grad_.rows * per_row : (grad_.rows * grad_.cols + 255) / 256;
      for (const Tensor* scales : {&*first_scales, &*second_scales}) {
        STD_TORCH_CHECK(scales->scalar_type() == ScalarType::Float && scales->is_contiguous() && scales->numel() == count,
                        "one float32 scale for each block of 256");
      }
      first_book_ = book_of(*signed_codes, true);
      second_book_ = book_of(*unsigned_codes, false);
      step_.first.scales = static_cast<float*>(first_scales->data_ptr());
      step_.second.scales = static_cast<float*>(second_scales->data_ptr());
      step_.first.book = &first_book_;
      step_.second.book = &second_book_;
    } else {
      step_.format = type_of(first, "exp_avg") == Type::float32 ? Format::float32 : Format::bfloat16;
    }
    step_.beta1 = static_cast<float>(beta1);
    step_.beta2 = static_cast<float>(beta2);
    step_.one_minus_beta1 = static_cast<float>(1.0 - beta1);
    step_.one_minus_beta2 = static_cast<float>(1.0 - beta2);
    step_.eps = static_cast<float>(eps);
    step_.size = static_cast<float>(lr * std::sqrt(1.0 - std::pow(beta2, steps)) / (1.0 - std::pow(beta1, steps)));
  }
  AdamWRule(const AdamWRule&) = delete;

  int64_t rows() const { return grad_.rows; }
  int64_t cols() const { return grad_.cols; }

  // Rows that begin and end with whole blocks: what can be stepped alone.
  int64_t unit() const {
    const bool cross = step_.format == Format::blocks && !step_.blocks_end_with_rows;
    return cross ? 256 / std::gcd<int64_t>(256, std::max<int64_t>(1, grad_.cols)) : 1;
  }

  void operator()(int64_t first_row, int64_t last_row, float* delta) const {
    kernels().adamw(step_, first_row, last_row, delta);
  }

 private:
  static Matrix moment_of(const Tensor& moment, const Matrix& grad) {
    Matrix matrix = grad;
    matrix.type = moment.scalar_type() == ScalarType::BFloat16 ? Type::bfloat16 : Type::float32;
    return matrix;
  }
  static CodeBook book_of(const Tensor& codes, bool is_signed) {
    STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Float && codes.is_contiguous() && codes.numel() == 256,
                    "256 float32 codes");
    return make_code_book(static_cast<const float*>(codes.data_ptr()), is_signed);
  }

  Matrix grad_;
  ColumnWords first_words_, second_words_;
  CodeBook first_book_, second_book_;
  AdamW step_;
};

// Rows of the update that are kept in the cache between the rule and the write-back: whole units.
int64_t rows_at_a_time(const AdamWRule& rule, int64_t tile_rows) {
  const int64_t unit = std::lcm(rule.unit(), tile_rows);
  return std::max<int64_t>(1, 24 * 1024 / std::max<int64_t>(1, rule.cols()) / unit) * unit;
}

void adamw_(Tensor weight, Tensor grad, Tensor first, Tensor second, std::optional<Tensor> first_scales,
            std::optional<Tensor> second_scales, std::optional<Tensor> signed_codes, std::optional<Tensor> unsigned_codes,
            double lr, double beta1, double beta2, double eps, double steps, double decay,
            Key key, int64_t first_row) {
  const AdamWRule rule(grad, first, second, first_scales, second_scales, signed_codes, unsigned_codes, lr, beta1, beta2,
                       eps, steps, key, first_row);
  const Matrix target = dense_rows(weight, "weight");
  check_shape(weight, rule.rows(), rule.cols(), "weight");
  const ColumnWords words(key, 0, target, first_row);
  const int64_t height = rows_at_a_time(rule, 1), workers = workers_for(target.rows, 8 * target.cols);
  Scratch deltas(workers * height * rule.cols());
  divide(workers, target.rows, rule.unit(), [&](int64_t worker, int64_t first_of_all, int64_t last) {
    float* values = deltas.floats() + worker * height * rule.cols();
    const Matrix delta{values, Type::float32, height, rule.cols(), rule.cols(), 1};
    for (int64_t row = first_of_all; row < last; row += height) {
      const int64_t end = std::min(row + height, last);
      rule(row, end, values);
      kernels().add({target, delta, row, 1.0f, static_cast<float>(decay), false, words.words()}, row, end);
    }
  });
}

void lowrank_adamw_(Tensor weight, Tensor grad, Tensor first, Tensor second, std::optional<Tensor> first_scales,
                    std::optional<Tensor> second_scales, std::optional<Tensor> signed_codes,
                    std::optional<Tensor> unsigned_codes, Tensor basis, bool right, double lr, double beta1, double beta2,
                    double eps, double steps, double scale, double decay, Key key,
                    int64_t first_row, int64_t first_moment_row) {
  const AdamWRule rule(grad, first, second, first_scales, second_scales, signed_codes, unsigned_codes, lr, beta1, beta2,
                       eps, steps, key, first_moment_row);
  const Matrix target = dense_rows(weight, "weight"), given = matrix_of(basis, "basis");
  const int64_t rank = given.cols, tile_rows = kernels().tile_rows;
  check_shape(grad, right ? target.rows : rank, right ? rank : target.cols, "grad");
  check_shape(basis, right ? target.cols : target.rows, rank, "basis");
  const ColumnWords words(key, 0, target, first_row);
  LowRankAddition step{target, given, 0, nullptr, rank, static_cast<float>(scale), static_cast<float>(decay),
                       words.words()};
  const int64_t each = kernels().left_scratch(rank);
  if (right) {  // W <- decay W + scale N Qt: the rows of N are made just before those of W are changed
    PackedRight packed({given.data, given.type, given.cols, given.rows, given.col_stride, given.row_stride});
    step.right = packed.floats();
    const int64_t height = rows_at_a_time(rule, tile_rows);
    const int64_t workers = workers_for(target.rows, target.cols * (rank + 1));
    Scratch scratch(workers * (each + height * rank));
    divide(workers, target.rows, std::lcm(rule.unit(), tile_rows), [&](int64_t worker, int64_t begin, int64_t last) {
      float* values = scratch.floats() + worker * (each + height * rank);
      LowRankAddition part = step;
      part.left = {values, Type::float32, height, rank, rank, 1};
      for (int64_t row = begin; row < last; row += height) {
        const int64_t end = std::min(row + height, last);
        rule(row, end, values);
        part.left_row = row;
        kernels().add_lowrank(part, row, end, values + height * rank);
      }
    });
    return;
  }
  // W <- decay W + scale P N: all of N (r, n), then W
  Scratch update(rule.rows() * rule.cols());
  divide(workers_for(rule.rows(), 8 * rule.cols()), rule.rows(), rule.unit(), [&](int64_t, int64_t begin, int64_t last) {
    rule(begin, last, update.floats() + begin * rule.cols());
  });
  PackedRight packed({update.floats(), Type::float32, rule.rows(), rule.cols(), rule.cols(), 1});
  step.right = packed.floats();
  const int64_t workers = workers_for(target.rows, target.cols * (rank + 1));
  Scratch scratch(workers * each);
  divide(workers, target.rows, tile_rows, [&](int64_t worker, int64_t begin, int64_t last) {
    kernels().add_lowrank(step, begin, last, scratch.floats() + worker * each);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hf_galore, CPU, library) {
  library.impl("add_", TORCH_BOX(&add_));
  library.impl("round_into_", TORCH_BOX(&round_into_));
  library.impl("add_lowrank_", TORCH_BOX(&add_lowrank_));
  library.impl("matmul", TORCH_BOX(&matmul));
  library.impl("decode_basis", TORCH_BOX(&decode_basis));
  library.impl("adamw_", TORCH_BOX(&adamw_));
  library.impl("lowrank_adamw_", TORCH_BOX(&lowrank_adamw_));
}

}  // namespace hf_galore

extern "C" __attribute__((visibility("default"))) const char* hf_galore_cpu_kernels() { return hf_galore::kernels().name; }

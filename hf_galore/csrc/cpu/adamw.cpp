// The CPU ops that hf_galore/optim/adamw_ops.py defines, through torch's stable ABI.
#include <cmath>
#include <cstring>
#include <numeric>

#include "code_book.h"
#include "library.h"

namespace hf_galore {
namespace {

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
      step_.first.scales = static_cast<float*>(first_scales->data_ptr());
      step_.second.scales = static_cast<float*>(second_scales->data_ptr());
      step_.first.book = &book_of(*signed_codes, true);
      step_.second.book = &book_of(*unsigned_codes, false);
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

  // All rows, on torch's threads.
  void all(float* delta) const {
    divide(workers_for(rows(), 8 * cols()), rows(), unit(), [&](int64_t, int64_t first, int64_t last) {
      (*this)(first, last, delta + first * cols());
    });
  }

 private:
  static Matrix moment_of(const Tensor& moment, const Matrix& grad) {
    Matrix matrix = grad;
    matrix.type = moment.scalar_type() == ScalarType::BFloat16 ? Type::bfloat16 : Type::float32;
    return matrix;
  }
  // Made once for as long as the codes are the same: a call for each parameter asks for it.
  static const CodeBook& book_of(const Tensor& codes, bool is_signed) {
    STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Float && codes.is_contiguous() && codes.numel() == 256,
                    "256 float32 codes");
    thread_local std::optional<CodeBook> books[2];
    std::optional<CodeBook>& book = books[is_signed];
    const float* values = static_cast<const float*>(codes.data_ptr());
    if (!book || std::memcmp(book->codes, values, sizeof book->codes) != 0) book = make_code_book(values, is_signed);
    return *book;
  }

  Matrix grad_;
  ColumnWords first_words_, second_words_;
  AdamW step_;
};

// Rows of the update that are kept in the cache between the rule and the write-back: whole units.
int64_t rows_at_a_time(const AdamWRule& rule, int64_t tile_rows) {
  const int64_t unit = std::lcm(rule.unit(), tile_rows);
  return std::max<int64_t>(1, 24 * 1024 / std::max<int64_t>(1, rule.cols()) / unit) * unit;
}

// W <- decay W - lr N, all of N's rows that fit into the cache just before those of W.
void step_(const AdamWRule& rule, const Matrix& target, const Words& words, double decay) {
  const int64_t height = rows_at_a_time(rule, 1), workers = workers_for(target.rows, 8 * target.cols);
  Scratch deltas(workers * height * rule.cols());
  divide(workers, target.rows, rule.unit(), [&](int64_t worker, int64_t first_of_all, int64_t last) {
    float* values = deltas.floats() + worker * height * rule.cols();
    const Matrix delta{values, Type::float32, height, rule.cols(), rule.cols(), 1};
    for (int64_t row = first_of_all; row < last; row += height) {
      const int64_t end = std::min(row + height, last);
      rule(row, end, values);
      kernels().add({target, delta, row, 1.0f, static_cast<float>(decay), false, words}, row, end);
    }
  });
}

void adamw_(std::vector<Tensor> weights, std::vector<Tensor> grads, std::vector<Tensor> first,
            std::vector<Tensor> second, std::vector<Tensor> first_scales, std::vector<Tensor> second_scales,
            std::optional<Tensor> signed_codes, std::optional<Tensor> unsigned_codes, double lr, double beta1,
            double beta2, double eps, double steps, double decay, Key key, std::vector<int64_t> parameters,
            std::vector<int64_t> first_rows) {
  check_lists(weights.size(), {&grads, &first, &second}, {&first_scales, &second_scales}, {&parameters, &first_rows});
  for (size_t i = 0; i < weights.size(); ++i) {
    const Key own = key_of(key, parameters[i]);
    const AdamWRule rule(grads[i], first[i], second[i], element(first_scales, i), element(second_scales, i),
                         signed_codes, unsigned_codes, lr, beta1, beta2, eps, steps, own, first_rows[i]);
    const Matrix target = dense_rows(weights[i], "weight");
    check_shape(weights[i], rule.rows(), rule.cols(), "weight");
    const ColumnWords words(own, 0, target, first_rows[i]);
    step_(rule, target, words.words(), decay);
  }
}

// What the matrices of one call of lowrank_adamw_ have in common.
struct Together {
  bool right, in_bfloat16;
  double scale, decay;
};

// A basis as it is given: floats, or codes.
class Basis {
 public:
  Basis(const Tensor& values, const std::optional<Tensor>& scale, int64_t bits, int64_t rows)
      : values_(values), scale_(scale), bits_(bits), rows_(rows) {
    STD_TORCH_CHECK(values.dim() == 2 && (bits != 0 || values.size(0) == rows), "a basis must have ", rows, " rows");
    STD_TORCH_CHECK(bits == 0 || scale, "a basis of ", bits, " bits needs its scales");
  }

  Matrix matrix() const {
    return bits_ == 0 ? matrix_of(values_, "basis") : CodedBases(values_, *scale_, bits_, rows_).matrix(0);
  }
  bool is_float32() const { return bits_ == 0 && values_.scalar_type() == ScalarType::Float; }
  const Tensor& floats() const { return values_; }  // where it is not of codes

  Tensor in_bfloat16() const {
    if (bits_ == 0) return torch::stable::to(values_, ScalarType::BFloat16);
    const Matrix basis = matrix();
    Tensor narrow = torch::stable::empty({basis.rows, basis.cols}, ScalarType::BFloat16);
    Scratch row(basis.cols);
    const Matrix target = dense_rows(narrow, "basis"), source{row.floats(), Type::float32, 1, basis.cols, basis.cols, 1};
    for (int64_t i = 0; i < basis.rows; ++i) {
      kernels().decode(basis, i * basis.cols, (i + 1) * basis.cols, row.floats());
      kernels().add({target, source, i, 1.0f, 0.0f, true, {}}, i, i + 1);
    }
    return narrow;
  }

 private:
  Tensor values_;
  std::optional<Tensor> scale_;
  int64_t bits_, rows_;
};

// G Q or PtG.
Tensor multiplied(const Tensor& grad, const Tensor& basis, bool right) {
  return right ? torch::stable::matmul(grad, basis) : torch::stable::matmul(torch::stable::transpose(basis, 0, 1), grad);
}

// R: of two float32 matrices by torch's library, else by our own kernels, which widen and decode as they go.
Tensor projected(const Tensor& grad, const Basis& basis, bool right) {
  if (grad.scalar_type() == ScalarType::Float && basis.is_float32()) return multiplied(grad, basis.floats(), right);
  const Matrix given = matrix_of(grad, "grad");
  return right ? product_of(given, basis.matrix()) : product_of(transposed(basis.matrix()), given);
}

// W <- decay W + scale back(N), in float32.
void write_back(const AdamWRule& rule, const Matrix& target, const Words& words, const Matrix& basis, const Together& all) {
  const int64_t rank = basis.cols, tile_rows = kernels().tile_rows;
  LowRankAddition step{target, basis, 0, nullptr, rank, static_cast<float>(all.scale), static_cast<float>(all.decay), words};
  const int64_t each = kernels().left_scratch(rank);
  if (all.right) {  // N Qt: the rows of N are made just before those of W are changed
    PackedRight packed(transposed(basis));
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
  Scratch update(rule.rows() * rule.cols());  // P N: all of N (r, n), then W
  rule.all(update.floats());
  PackedRight packed({update.floats(), Type::float32, rule.rows(), rule.cols(), rule.cols(), 1});
  step.right = packed.floats();
  const int64_t workers = workers_for(target.rows, target.cols * (rank + 1));
  Scratch scratch(workers * each);
  divide(workers, target.rows, tile_rows, [&](int64_t worker, int64_t begin, int64_t last) {
    kernels().add_lowrank(step, begin, last, scratch.floats() + worker * each);
  });
}

// The same where the processor multiplies bfloat16: torch's library does, some rows of W at a time.
void write_back_in_bfloat16(const AdamWRule& rule, const Tensor& weight, const Words& words, const Tensor& basis,
                            const Together& all) {
  Tensor update = torch::stable::empty({rule.rows(), rule.cols()}, ScalarType::BFloat16);
  {
    Tensor wide = torch::stable::empty({rule.rows(), rule.cols()}, ScalarType::Float);
    rule.all(static_cast<float*>(wide.data_ptr()));
    add_or_replace(update, wide, 1.0f, 0.0f, true, {}, 0);
  }
  const Matrix target = dense_rows(weight, "weight");
  Tensor left = all.right ? update : basis;
  const Tensor right = all.right ? torch::stable::transpose(basis, 0, 1) : update;
  const int64_t step = std::max<int64_t>(1, (1 << 18) / std::max<int64_t>(1, target.cols));
  for (int64_t row = 0; row < target.rows; row += step) {
    const int64_t count = std::min(step, target.rows - row);
    const Tensor product = torch::stable::matmul(torch::stable::narrow(left, 0, row, count), right);
    const Addition addition{target, dense_rows(product, "product"), row, static_cast<float>(all.scale),
                            static_cast<float>(all.decay), false, words};
    divide(workers_for(count, target.cols), count, 1, [&](int64_t, int64_t first, int64_t last) {
      kernels().add(addition, row + first, row + last);
    });
  }
}

void lowrank_adamw_(std::vector<Tensor> weights, std::vector<Tensor> grads, std::vector<Tensor> first,
                    std::vector<Tensor> second, std::vector<Tensor> first_scales, std::vector<Tensor> second_scales,
                    std::optional<Tensor> signed_codes, std::optional<Tensor> unsigned_codes, std::vector<Tensor> bases,
                    std::vector<Tensor> basis_scales, int64_t basis_bits, bool right, bool in_bfloat16, double lr,
                    double beta1, double beta2, double eps, double steps, double scale, double decay, Key key,
                    std::vector<int64_t> parameters, std::vector<int64_t> first_rows,
                    std::vector<int64_t> first_moment_rows) {
  check_lists(weights.size(), {&grads, &first, &second, &bases}, {&first_scales, &second_scales, &basis_scales},
              {&parameters, &first_rows, &first_moment_rows});
  const Together all{right, in_bfloat16, scale, decay};
  for (size_t i = 0; i < weights.size(); ++i) {
    const Matrix target = dense_rows(weights[i], "weight");
    check_shape(grads[i], target.rows, target.cols, "grad");
    const Basis basis(bases[i], element(basis_scales, i), basis_bits, right ? target.cols : target.rows);
    const Key own = key_of(key, parameters[i]);
    const ColumnWords words(own, 0, target, first_rows[i]);
    const auto rule_of = [&](const Tensor& low) {
      return AdamWRule(low, first[i], second[i], element(first_scales, i), element(second_scales, i), signed_codes,
                       unsigned_codes, lr, beta1, beta2, eps, steps, own, first_moment_rows[i]);
    };
    if (in_bfloat16) {
      const Tensor narrow = basis.in_bfloat16();
      const bool given_so = grads[i].scalar_type() == ScalarType::BFloat16;
      const Tensor low = given_so ? multiplied(grads[i], narrow, right) : projected(grads[i], basis, right);
      write_back_in_bfloat16(rule_of(low), weights[i], words.words(), narrow, all);
    } else {
      const Tensor low = projected(grads[i], basis, right);
      write_back(rule_of(low), target, words.words(), basis.matrix(), all);
    }
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hf_galore, CPU, library) {
  library.impl("adamw_", TORCH_BOX(&adamw_));
  library.impl("lowrank_adamw_", TORCH_BOX(&lowrank_adamw_));
}

}  // namespace hf_galore

// From torch's stable tensors to the structures of kernels.h, and torch's threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "../lists.h"
#include "../words.h"
#include "kernels.h"

namespace hf_galore {

using torch::headeronly::ScalarType;

inline Type type_of(const Tensor& tensor, const char* name) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16, name, " must be float32 or bfloat16");
  return type == ScalarType::Float ? Type::float32 : Type::bfloat16;
}

inline Matrix matrix_of(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 2, name, " must be a matrix");
  return {tensor.data_ptr(), type_of(tensor, name),  tensor.size(0),
          tensor.size(1),    tensor.stride(0),       tensor.stride(1)};
}

inline Matrix dense_rows(const Tensor& tensor, const char* name) {
  const Matrix matrix = matrix_of(tensor, name);
  STD_TORCH_CHECK(matrix.col_stride == 1 || matrix.cols <= 1, name, " must have contiguous rows");
  return matrix;
}

inline void check_shape(const Tensor& tensor, int64_t rows, int64_t cols, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == cols, name, " must be (", rows, ", ",
                  cols, ")");
}

inline Matrix transposed(Matrix matrix) {
  std::swap(matrix.rows, matrix.cols);
  std::swap(matrix.row_stride, matrix.col_stride);
  return matrix;
}

// Bases of `rows` rows that are kept as integers of 8 or 4 bits (hf_galore/basis_store.py), one or a batch of them.
class CodedBases {
 public:
  CodedBases(const Tensor& codes, const Tensor& scale, int64_t bits, int64_t rows)
      : first_{codes.data_ptr(), bits == 8 ? Type::codes8 : Type::codes4, rows, codes.size(codes.dim() - 1), 0, 1} {
    STD_TORCH_CHECK(bits == 4 || bits == 8, "bits must be 4 or 8");
    const int64_t cols = first_.cols, count = codes.dim() == 3 ? codes.size(0) : 1;
    stored_ = bits == 4 ? (rows + 1) / 2 : rows;
    STD_TORCH_CHECK(codes.scalar_type() == (bits == 4 ? ScalarType::Byte : ScalarType::Char),
                    "codes of 4 bits are uint8, of 8 bits int8");
    STD_TORCH_CHECK(codes.size(codes.dim() - 2) == stored_ && codes.is_contiguous(), "codes must be (matrices, ", stored_,
                    ", cols), contiguous");
    STD_TORCH_CHECK(scale.scalar_type() == ScalarType::Float && scale.is_contiguous() &&
                    scale.numel() == (count * rows * cols + 127) / 128, "one float32 scale for each block of 128");
    first_.row_stride = cols;
    first_.scales = static_cast<const float*>(scale.data_ptr());
    first_.half = stored_ * cols;
  }

  Matrix matrix(int64_t index) const {
    Matrix matrix = first_;
    matrix.data = static_cast<uint8_t*>(first_.data) + index * stored_ * first_.cols;
    matrix.before = index * first_.rows * first_.cols;
    return matrix;
  }

 private:
  Matrix first_;
  int64_t stored_;
};

// Memory of torch's own allocator, so that torch's counters see it.
class Scratch {
 public:
  explicit Scratch(int64_t floats) {
    if (floats > 0) tensor_ = torch::stable::empty({floats}, ScalarType::Float);
  }
  float* floats() { return static_cast<float*>(data()); }
  uint32_t* words() { return static_cast<uint32_t*>(data()); }

 private:
  void* data() { return tensor_ ? tensor_->data_ptr() : nullptr; }
  std::optional<Tensor> tensor_;
};

// The random words of a matrix's columns, and what those of its rows are made of; none where it is rounded to nearest.
// `moment` is 0 for a parameter itself, and counts its moments from 1. A kernel may read 64 words too many.
class ColumnWords {
 public:
  ColumnWords(const Key& key, uint64_t moment, const Matrix& matrix, int64_t first_row)
      : scratch_(wanted(key, matrix) ? matrix.cols + 64 : 0), words_{nullptr, 0, first_row} {
    if (!wanted(key, matrix)) return;
    STD_TORCH_CHECK(key->size() == 3, "key must have three numbers: seed, step, parameter");
    const uint64_t seed = (*key)[0], step = (*key)[1], number = (*key)[2];
    const uint64_t parameter = moment == 0 ? number : mix64({number, moment});
    uint32_t* words = scratch_.words();
    const uint64_t col_key = mix64({seed, step, parameter, 1});
    for (int64_t col = 0; col < matrix.cols; ++col) words[col] = random_word(col_key, col);
    std::fill(words + matrix.cols, words + matrix.cols + 64, 0);
    words_.cols = words;
    words_.row_key = mix64({seed, step, parameter, 0});
  }
  const Words& words() const { return words_; }

 private:
  static bool wanted(const Key& key, const Matrix& matrix) {
    return key.has_value() && matrix.type == Type::bfloat16;
  }
  Scratch scratch_;
  Words words_;
};

// How many workers `items` of `cost` elements each are divided among: of torch's threads those that have enough to do.
inline int64_t workers_for(int64_t items, int64_t cost) {
  constexpr int64_t enough = 1 << 15;
  const int64_t threads = torch::stable::get_num_threads();
  return std::max<int64_t>(1, std::min({threads, items, items * cost / enough}));
}

// body(worker, first, last) for `workers` parts of the items [0, items), each a multiple of `unit` but for the last, on
// torch's threads.
template <class Body>
void divide(int64_t workers, int64_t items, int64_t unit, const Body& body) {
  const int64_t units = (items + unit - 1) / unit;
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      const int64_t first = units * worker / workers * unit, last = units * (worker + 1) / workers * unit;
      if (first < std::min(last, items)) body(worker, first, std::min(last, items));
    }
  });
}

}  // namespace hf_galore

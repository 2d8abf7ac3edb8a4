// What the files of this library have from one another.
#pragma once

#include "tensors.h"

namespace hf_galore {

// The kernels of the widest instruction set that the processor has, or those that HF_GALORE_CPU_KERNELS names.
const Kernels& kernels();

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

// weight <- beta * weight + alpha * delta, or weight <- delta where `replace`; in rows, on torch's threads.
void add_or_replace(const Tensor& weight, const Tensor& delta, float alpha, float beta, bool replace, const Key& key,
                    int64_t first_row);

// left (m, k) right (k, n) in float32, whatever they are kept in.
Tensor product_of(const Matrix& left, const Matrix& right);

}  // namespace hf_galore

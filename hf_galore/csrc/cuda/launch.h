// Tensors of torch's stable ABI as kernels take them, on the current stream of their device.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <type_traits>
#include <vector>

#include "../lists.h"
#include "numbers.cuh"

namespace hf_galore {

using torch::headeronly::ScalarType;

constexpr int64_t GRID_Y = 65535;  // what a grid can have downwards

// Makes a tensor's device the current one while it lives, and knows the stream that torch uses there.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

// Starts a kernel, and throws what the start failed of.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, int threads, const OnDevice& device, Arguments... arguments) {
  kernel<<<grid, threads, 0, device.stream()>>>(arguments...);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// How many blocks a dimension of a grid has for `items`, `each` to a block.
inline unsigned blocks_for(int64_t items, int64_t each, int64_t limit) {
  return static_cast<unsigned>(std::min((items + each - 1) / each, limit));
}

inline void check_type(const Tensor& tensor, const char* name) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16, name, " must be float32 or bfloat16");
}

inline void check_matrix(const Tensor& tensor, int64_t rows, int64_t cols, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == cols, name, " must be (", rows, ", ",
                  cols, ")");
}

inline void check_dense_rows(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 2 && (tensor.stride(1) == 1 || tensor.size(1) <= 1), name,
                  " must be a matrix with contiguous rows");
}

inline bool is_bfloat16(const Tensor& tensor) { return tensor.scalar_type() == ScalarType::BFloat16; }

// The keys of the words of a parameter, or of its moment number `moment`, counted from 1.
inline Keys keys_of(const Key& key, uint64_t moment, int64_t first_row) {
  if (!key.has_value()) return {0, 0, first_row};
  STD_TORCH_CHECK(key->size() == 3, "key must have three numbers: seed, step, parameter");
  const uint64_t seed = (*key)[0], step = (*key)[1], number = (*key)[2];
  const uint64_t parameter = moment == 0 ? number : mix64({number, moment});
  return {mix64({seed, step, parameter, 0}), mix64({seed, step, parameter, 1}), first_row};
}

// body(Rounding{}) with the rounding of a tensor: a key rounds bfloat16 stochastically.
template <class Body>
void with_rounding(const Tensor& tensor, const Key& key, const Body& body) {
  if (!is_bfloat16(tensor)) {
    body(Exactly{});
  } else if (key.has_value()) {
    body(Stochastically{});
  } else {
    body(ToNearest{});
  }
}

// body(T{}) with the type of a tensor's elements.
template <class Body>
void with_type(const Tensor& tensor, const Body& body) {
  if (is_bfloat16(tensor)) {
    body(__nv_bfloat16{});
  } else {
    body(float{});
  }
}

// body(true or false, as a type).
template <class Body>
void with_flag(bool flag, const Body& body) {
  if (flag) {
    body(std::true_type{});
  } else {
    body(std::false_type{});
  }
}

}  // namespace hf_galore

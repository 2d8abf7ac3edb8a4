// The lists that ops for several matrices take, on every device.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <vector>

namespace hf_galore {

using torch::stable::Tensor;
using Key = std::optional<std::vector<int64_t>>;  // seed, step, parameter; none rounds to nearest

// Throws unless there is one of everything for each matrix; of scales there may be none at all.
inline void check_lists(size_t matrices, std::initializer_list<const std::vector<Tensor>*> tensors,
                        std::initializer_list<const std::vector<Tensor>*> scales,
                        std::initializer_list<const std::vector<int64_t>*> numbers) {
  for (const auto* list : tensors) {
    STD_TORCH_CHECK(list->size() == matrices, "the lists must have one tensor for each weight");
  }
  for (const auto* list : scales) {
    STD_TORCH_CHECK(list->empty() || list->size() == matrices, "lists of scales must be empty or as long as the others");
  }
  for (const auto* list : numbers) {
    STD_TORCH_CHECK(list->size() == matrices, "the lists must have one number for each weight");
  }
}

inline std::optional<Tensor> element(const std::vector<Tensor>& tensors, size_t index) {
  return tensors.empty() ? std::nullopt : std::optional<Tensor>(tensors[index]);
}

// The key of one parameter, of the seed and the step that all have in common.
inline Key key_of(const Key& common, int64_t parameter) {
  if (!common) return {};
  STD_TORCH_CHECK(common->size() == 2, "key must have two numbers: seed, step");
  return Key({(*common)[0], (*common)[1], parameter});
}

}  // namespace hf_galore

// The CPU op that hf_galore/attention/decoding.py defines, through torch's stable ABI.
#include <cmath>

#include "tensors.h"

namespace hf_galore {
namespace {

// The heads of one decoding step: `out` and `lse` (B, O, Q) have them in O groups of Q, `query` in one row.
template <class T>
struct Step {
  const Tensor &out, &lse, &query, &key, &value;
  const std::optional<Tensor>& gate;
  double scale;
  T* merged;  // (B, H, value length)

  void operator()(int64_t first, int64_t last) const {
    const int64_t heads = query.size(1), shared = heads / key.size(0), grouped = out.size(2);
    for (int64_t index = first; index < last; ++index) {
      const int64_t batch = index / heads, head = index % heads, outer = head / grouped, inner = head % grouped;
      const T* keys = data(key) + head / shared * key.size(2);
      const T* queries = data(query) + batch * query.stride(0) + head * query.stride(1);
      double score = 0.0;
      for (int64_t i = 0; i < key.size(2); ++i) {
        score += static_cast<double>(queries[i * query.stride(3)]) * static_cast<double>(keys[i]);
      }
      const double mass = data(lse)[batch * lse.stride(0) + outer * lse.stride(1) + inner * lse.stride(2)];
      double share = 1.0 / (1.0 + std::exp(mass - scale * score));
      if (gate) share *= static_cast<double>(data(*gate)[head]);
      const T* from = data(out) + batch * out.stride(0) + outer * out.stride(1) + inner * out.stride(2);
      const T* values = data(value) + head / shared * value.size(2);
      T* to = merged + index * value.size(2);
      for (int64_t i = 0; i < value.size(2); ++i) {
        const T own = from[i * out.stride(3)];
        to[i] = own + static_cast<T>(share) * (values[i] - own);
      }
    }
  }

  static const T* data(const Tensor& tensor) { return static_cast<const T*>(tensor.data_ptr()); }
};

template <class T>
Tensor merged_as(const Tensor& out, const Tensor& lse, const Tensor& query, const Tensor& key, const Tensor& value,
                 const std::optional<Tensor>& gate, double scale) {
  const int64_t batch = query.size(0), heads = query.size(1), length = value.size(2);
  Tensor merged = torch::stable::new_empty(query, {batch, 1, heads, length});
  const Step<T> step{out, lse, query, key, value, gate, scale, static_cast<T*>(merged.data_ptr())};
  divide(workers_for(batch * heads, key.size(2) + length), batch * heads, 1,
         [&](int64_t, int64_t first, int64_t last) { step(first, last); });
  return merged;
}

Tensor merge_step(Tensor out, Tensor lse, Tensor query, Tensor key, Tensor value, std::optional<Tensor> gate,
                  double scale) {
  STD_TORCH_CHECK(query.dim() == 4 && query.size(2) == 1, "query must be (batch, heads, 1, key length)");
  const int64_t batch = query.size(0), heads = query.size(1);
  STD_TORCH_CHECK(key.dim() == 3 && key.size(1) == 1 && key.size(2) == query.size(3) && key.is_contiguous() &&
                      key.size(0) > 0 && heads % key.size(0) == 0,
                  "key must be (heads of keys, 1, key length), contiguous");
  STD_TORCH_CHECK(value.dim() == 3 && value.size(0) == key.size(0) && value.size(1) == 1 && value.is_contiguous(),
                  "value must be (heads of keys, 1, value length), contiguous");
  STD_TORCH_CHECK(out.dim() == 4 && out.size(0) == batch && out.size(1) * out.size(2) == heads &&
                      out.size(3) == value.size(2),
                  "out must have the heads of the query, and vectors as long as value's");
  STD_TORCH_CHECK(lse.dim() == 3 && lse.size(0) == batch && lse.size(1) == out.size(1) && lse.size(2) == out.size(2),
                  "lse must be of the shape of out, without its last dimension");
  STD_TORCH_CHECK(!gate || (gate->dim() == 1 && gate->size(0) == heads && gate->is_contiguous()),
                  "gate must be (heads,), contiguous");
  const ScalarType type = query.scalar_type();
  for (const Tensor* tensor : {&out, &lse, &key, &value, gate ? &*gate : &out}) {
    STD_TORCH_CHECK(tensor->scalar_type() == type, "all tensors must have one dtype");
  }
  if (type == ScalarType::Float) return merged_as<float>(out, lse, query, key, value, gate, scale);
  STD_TORCH_CHECK(type == ScalarType::Double, "the tensors must be float32 or float64");
  return merged_as<double>(out, lse, query, key, value, gate, scale);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hf_galore, CPU, library) { library.impl("merge_step", TORCH_BOX(&merge_step)); }

}  // namespace hf_galore

// weight <- beta * weight + alpha * delta, rounded once.
#pragma once

#include "kernels.h"
#include "simd.h"
#include "../words.h"

namespace hf_galore {
namespace HF_GALORE_ISA {

// Copies of the last, incomplete vector of a row; the rest of the vector is zero.
template <class T>
struct Tail {
  T values[LANES] = {};
  Tail(const T* from, int64_t count) { std::memcpy(values, from, count * sizeof(T)); }
};

template <class Rounding, class Delta>
inline void add_row(typename Rounding::Kept* weight, const Delta* delta, int64_t count, const Addition& step,
                    uint32_t row_word, const uint32_t* cols) {
  using Kept = typename Rounding::Kept;
  const auto changed = [&](const Kept* w, const Delta* d, const uint32_t* words) __attribute__((always_inline)) {
    vfloat value = load_as_float(d);
    if (!step.replace) value = multiply_add(fill(step.alpha), value, step.beta * load_as_float(w));
    return Rounding::convert(value, bits_of<Rounding>(row_word, words));
  };
  int64_t col = 0;
  for (; col + LANES <= count; col += LANES) store(weight + col, changed(weight + col, delta + col, cols + col));
  if (col < count) {
    const int64_t rest = count - col;
    Tail<Kept> w(weight + col, rest);
    const Tail<Delta> d(delta + col, rest);
    store(w.values, changed(w.values, d.values, cols + col));
    std::memcpy(weight + col, w.values, rest * sizeof(Kept));
  }
}

template <class Rounding, class Delta>
void add_rows(const Addition& step, int64_t first_row, int64_t last_row) {
  auto* weights = static_cast<typename Rounding::Kept*>(step.weight.data);
  const auto* deltas = static_cast<const Delta*>(step.delta.data);
  for (int64_t row = first_row; row < last_row; ++row) {
    const uint32_t word = Rounding::takes_bits ? random_word(step.words.row_key, step.words.first_row + row) : 0;
    add_row<Rounding>(weights + row * step.weight.row_stride,
                      deltas + (row - step.delta_row) * step.delta.row_stride, step.weight.cols, step, word,
                      step.words.cols);
  }
}

template <class Rounding>
void add_rows_as(const Addition& step, int64_t first_row, int64_t last_row) {
  if (step.delta.type == Type::float32) {
    add_rows<Rounding, float>(step, first_row, last_row);
  } else {
    add_rows<Rounding, uint16_t>(step, first_row, last_row);
  }
}

void add(const Addition& step, int64_t first_row, int64_t last_row) {
  if (step.weight.type == Type::float32) {
    add_rows_as<Exactly>(step, first_row, last_row);
  } else if (step.words.cols == nullptr) {
    add_rows_as<ToNearest>(step, first_row, last_row);
  } else {
    add_rows_as<Stochastically>(step, first_row, last_row);
  }
}

}  // namespace HF_GALORE_ISA
}  // namespace hf_galore

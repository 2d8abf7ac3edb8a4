// AdamW's rule, element by element, on moments kept as float32, as bfloat16, or block-wise in 8 bits:
//
//   M <- M + (1 - beta1) (R - M);  V <- beta2 V + (1 - beta2) R^2;  delta <- -size * M / (sqrt(V) + eps)
//
// 8 bits (arXiv 2110.02861, hf_galore/optim/blockwise.py): a block of 256 values is divided by its largest magnitude, and
// each replaced by the index of the nearest of 256 ascending codes, that is by the number of boundaries below it. A positive
// value of an unsigned moment never gets the code of zero.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>

#include "elementwise.h"

namespace hf_galore {
namespace HF_GALORE_ISA {

constexpr int64_t BLOCK = 256;

struct Changed {
  vfloat first, second, delta;
};

HF_GALORE_INLINE Changed adamw_rule(vfloat grad, vfloat first, vfloat second, const AdamW& step) {
  const vfloat difference = grad - first;
  // The form that is exact at the nearer end, as torch.lerp has it.
  first = step.one_minus_beta1 < 0.5f ? multiply_add(fill(step.one_minus_beta1), difference, first)
                                      : multiply_add(fill(-step.beta1), difference, grad);
  second = multiply_add(fill(step.one_minus_beta2) * grad, grad, step.beta2 * second);
  return {first, second, fill(-step.size) * first / (root(second) + step.eps)};
}

template <class Rounding, class Grad>
void adamw_row(const AdamW& step, int64_t row, float* delta) {
  using Kept = typename Rounding::Kept;
  const int64_t width = step.grad.cols;
  const Grad* grad = static_cast<const Grad*>(step.grad.data) + row * width;
  Kept* first = static_cast<Kept*>(step.first.data) + row * width;
  Kept* second = static_cast<Kept*>(step.second.data) + row * width;
  uint32_t first_word = 0, second_word = 0;
  if (Rounding::takes_bits) {
    first_word = random_word(step.first.words.row_key, step.first.words.first_row + row);
    second_word = random_word(step.second.words.row_key, step.second.words.first_row + row);
  }
  const auto change = [&](const Grad* g, Kept* m, Kept* v, float* to, int64_t col) __attribute__((always_inline)) {
    const Changed now = adamw_rule(load_as_float(g), load_as_float(m), load_as_float(v), step);
    store(m, Rounding::convert(now.first, bits_of<Rounding>(first_word, step.first.words.cols + col)));
    store(v, Rounding::convert(now.second, bits_of<Rounding>(second_word, step.second.words.cols + col)));
    store(to, now.delta);
  };
  int64_t col = 0;
  for (; col + LANES <= width; col += LANES) change(grad + col, first + col, second + col, delta + col, col);
  if (col < width) {
    const int64_t rest = width - col;
    const Tail<Grad> g(grad + col, rest);
    Tail<Kept> m(first + col, rest), v(second + col, rest);
    float to[LANES];
    change(g.values, m.values, v.values, to, col);
    std::memcpy(first + col, m.values, rest * sizeof(Kept));
    std::memcpy(second + col, v.values, rest * sizeof(Kept));
    std::memcpy(delta + col, to, rest * sizeof(float));
  }
}

// The places in a code book's table of LANES numbers: 128 cells to an octave of the magnitude from 2^-23 to 1, one for all
// below, and one for NaN.
HF_GALORE_INLINE vuint places_of(vuint words) {
  constexpr uint32_t lowest = (127u - 23u) << 23, last = CodeBook::cells - 1;
  const vuint magnitude = words & 0x7FFFFFFFu;
  const vuint above = (magnitude - lowest) & (vuint)((vint)magnitude > static_cast<int32_t>(lowest));
  const vuint cell = above >> 16, too_far = (vuint)((vint)cell > static_cast<int32_t>(last));
  return choose(too_far, fill_words(last), cell) + ((vuint)((vint)words >> 31) & CodeBook::cells);
}

HF_GALORE_INLINE void dequantize(const uint8_t* codes, float scale, int64_t count, const CodeBook& book, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = book.codes[codes[i]] * scale;
}

// `values` are filled up with zeros to a whole number of vectors.
HF_GALORE_INLINE void quantize(const float* values, int64_t count, const CodeBook& book, uint8_t* codes, float& scale) {
  vfloat largest = {}, not_numbers = {};
  for (int64_t i = 0; i < count; i += LANES) {
    const vfloat value = load<vfloat>(values + i);
    const vfloat magnitude = (vfloat)((vuint)value & 0x7FFFFFFFu);
    largest = (vfloat)choose((vuint)(magnitude > largest), (vuint)magnitude, (vuint)largest);
    not_numbers = (vfloat)((vuint)not_numbers | (vuint)(value != value));
  }
  scale = 0.0f;
  for (int64_t lane = 0; lane < LANES; ++lane) {
    scale = std::max(scale, largest[lane]);
  }
  for (int64_t lane = 0; lane < LANES; ++lane) {
    if (((vuint)not_numbers)[lane] != 0) scale = NAN;
  }
  const float divisor = scale < FLT_MIN ? FLT_MIN : scale;  // NaN divides as NaN
  float scaled[BLOCK];
  uint32_t places[BLOCK];
  for (int64_t i = 0; i < count; i += LANES) {
    const vfloat value = load<vfloat>(values + i) / divisor;
    store(scaled + i, value);
    store(places + i, places_of((vuint)value));
  }
  for (int64_t i = 0; i < count; ++i) {
    const uint8_t below = book.start[places[i]];
    codes[i] = static_cast<uint8_t>(below + (scaled[i] > book.boundaries[below]));
  }
  if (!book.is_signed) {
    for (int64_t i = 0; i < count; ++i) codes[i] = std::max<uint8_t>(codes[i], values[i] > 0.0f);
  }
}

// `count` values from element `start` on, which begins a block; their scales from `scale` on.
template <class Grad>
void adamw_blocks(const AdamW& step, int64_t start, int64_t count, int64_t scale, float* delta) {
  const Grad* grad = static_cast<const Grad*>(step.grad.data) + start;
  uint8_t* first_codes = static_cast<uint8_t*>(step.first.data) + start;
  uint8_t* second_codes = static_cast<uint8_t*>(step.second.data) + start;
  for (int64_t done = 0; done < count; done += BLOCK, ++scale) {
    const int64_t size = std::min(BLOCK, count - done);
    float first[BLOCK], second[BLOCK], now[BLOCK];
    Grad padded[BLOCK];
    const Grad* values = grad + done;
    if (size < BLOCK) {
      std::fill(first, first + BLOCK, 0.0f);
      std::fill(second, second + BLOCK, 0.0f);
      std::fill(padded, padded + BLOCK, Grad{});
      std::copy(values, values + size, padded);
      values = padded;
    }
    dequantize(first_codes + done, step.first.scales[scale], size, *step.first.book, first);
    dequantize(second_codes + done, step.second.scales[scale], size, *step.second.book, second);
    for (int64_t i = 0; i < size; i += LANES) {
      const Changed changed = adamw_rule(load_as_float(values + i), load<vfloat>(first + i), load<vfloat>(second + i), step);
      store(first + i, changed.first);
      store(second + i, changed.second);
      store(now + i, changed.delta);
    }
    std::memcpy(delta + done, now, size * sizeof(float));
    quantize(first, size, *step.first.book, first_codes + done, step.first.scales[scale]);
    quantize(second, size, *step.second.book, second_codes + done, step.second.scales[scale]);
  }
}

template <class Grad>
void adamw_rows(const AdamW& step, int64_t first_row, int64_t last_row, float* delta) {
  const int64_t width = step.grad.cols;
  if (step.format == Format::blocks && !step.blocks_end_with_rows) {
    adamw_blocks<Grad>(step, first_row * width, (last_row - first_row) * width, first_row * width / BLOCK, delta);
    return;
  }
  const int64_t row_scales = (width + BLOCK - 1) / BLOCK;
  for (int64_t row = first_row; row < last_row; ++row, delta += width) {
    if (step.format == Format::blocks) {
      adamw_blocks<Grad>(step, row * width, width, row * row_scales, delta);
    } else if (step.format == Format::float32) {
      adamw_row<Exactly, Grad>(step, row, delta);
    } else if (step.first.words.cols == nullptr) {
      adamw_row<ToNearest, Grad>(step, row, delta);
    } else {
      adamw_row<Stochastically, Grad>(step, row, delta);
    }
  }
}

void adamw(const AdamW& step, int64_t first_row, int64_t last_row, float* delta) {
  if (step.grad.type == Type::float32) {
    adamw_rows<float>(step, first_row, last_row, delta);
  } else {
    adamw_rows<uint16_t>(step, first_row, last_row, delta);
  }
}

}  // namespace HF_GALORE_ISA
}  // namespace hf_galore

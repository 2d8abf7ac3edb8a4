// The table that finds the code of a number, made from the 256 codes.
#pragma once

#include <cmath>
#include <cstring>

#include "kernels.h"

namespace hf_galore {

// In each cell of `CodeBook::start`, 128 to an octave, lies one boundary at most: the code of a number is the code of its
// cell's lower end, plus one if it is above the next boundary.
inline CodeBook make_code_book(const float* codes, bool is_signed) {
  CodeBook book;
  book.is_signed = is_signed;
  std::memcpy(book.codes, codes, sizeof book.codes);
  for (int i = 0; i < 255; ++i) book.boundaries[i] = (codes[i] + codes[i + 1]) / 2;
  book.boundaries[255] = INFINITY;
  const auto edge = [](int cell) {  // the lower end of a cell of magnitudes; zero for the first, which takes all below
    const uint32_t word = ((127u - 23u) << 23) + (static_cast<uint32_t>(cell) << 16);
    float value;
    std::memcpy(&value, &word, sizeof value);
    return cell == 0 ? 0.0f : value;
  };
  const int last = CodeBook::cells - 1;  // NaN, which goes to the last code
  int positive = 0, negative = 255;
  for (int cell = 0; cell < last; ++cell) {
    while (positive < 255 && book.boundaries[positive] < edge(cell)) ++positive;
    while (negative > 0 && book.boundaries[negative - 1] > -edge(cell + 1)) --negative;
    book.start[cell] = static_cast<uint8_t>(positive);
    book.start[CodeBook::cells + cell] = static_cast<uint8_t>(negative);
  }
  book.start[last] = book.start[CodeBook::cells + last] = 255;
  return book;
}

}  // namespace hf_galore

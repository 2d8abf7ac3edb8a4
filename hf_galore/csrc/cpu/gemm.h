// Products of a tall or wide matrix with a low-rank factor, in float32, a tile of registers at a time.
//
// Element (i, j) is the sum over k of left(i, k) right(k, j), added up in the order of k by one accumulator (one for each
// DEPTH terms in matmul), wherever its tile lies: a row of the product depends on that row of `left` alone, bit for bit, so
// that rows which are spread over threads or over ranks come out as they do together.
#pragma once

#include <algorithm>

#include "codes.h"
#include "kernels.h"
#include "simd.h"
#include "../words.h"

namespace hf_galore {
namespace HF_GALORE_ISA {

constexpr int64_t TILE_ROWS = HF_GALORE_TILE_ROWS;
constexpr int64_t TILE_COLS = 2 * LANES;
constexpr int64_t DEPTH = 256;               // of what matmul multiplies at a time
constexpr int64_t LEFT_FLOATS = 24 * 1024;   // of the left factor's rows that are widened at a time
constexpr int64_t RIGHT_FLOATS = 48 * 1024;  // of the right factor's panels that stay in the second-level cache
typedef vfloat Tile[TILE_ROWS][2];

HF_GALORE_INLINE void multiply(const float* left, int64_t left_stride, const float* right, int64_t depth, Tile& tile) {
  vfloat sums[TILE_ROWS][2] = {};
  for (int64_t k = 0; k < depth; ++k) {
    const vfloat right0 = load<vfloat>(right + k * TILE_COLS);
    const vfloat right1 = load<vfloat>(right + k * TILE_COLS + LANES);
#pragma GCC unroll 16
    for (int64_t i = 0; i < TILE_ROWS; ++i) {
      const vfloat value = fill(left[i * left_stride + k]);
      sums[i][0] = multiply_add(value, right0, sums[i][0]);
      sums[i][1] = multiply_add(value, right1, sums[i][1]);
    }
  }
#pragma GCC unroll 16
  for (int64_t i = 0; i < TILE_ROWS; ++i) {
    tile[i][0] = sums[i][0];
    tile[i][1] = sums[i][1];
  }
}

// Asks for `count` bytes that are read (or, with `written`, changed) soon: processors do not foresee it where rows take turns.
template <bool written>
HF_GALORE_INLINE void prefetch(const void* first, int64_t count) {
  constexpr int64_t line = 64;
  for (int64_t at = 0; at < count; at += line) __builtin_prefetch(static_cast<const char*>(first) + at, written);
}

// `count` panels of TILE_COLS columns from `first_col` on, of `depth` rows, as floats (count, depth, TILE_COLS); columns that
// are not there are zero. The source is read row by row where its rows are contiguous.
template <class T>
void pack_panels(const Matrix& from, int64_t first_row, int64_t depth, int64_t first_col, int64_t count, float* packed) {
  const T* source = static_cast<const T*>(from.data) + first_row * from.row_stride + first_col * from.col_stride;
  const int64_t cols = std::min(count * TILE_COLS, from.cols - first_col);
  const int64_t whole = from.col_stride == 1 ? cols / TILE_COLS : 0, size = depth * TILE_COLS;
  for (int64_t k = 0; k < depth && whole > 0; ++k) {
    const T* row = source + k * from.row_stride;
    prefetch<false>(row + 8 * from.row_stride, cols * sizeof(T));
    float* to = packed + k * TILE_COLS;
    for (int64_t panel = 0; panel < whole; ++panel, row += TILE_COLS, to += size) {
      store(to, load_as_float(row));
      store(to + LANES, load_as_float(row + LANES));
    }
  }
  std::fill(packed + cols / TILE_COLS * size, packed + count * size, 0.0f);
  for (int64_t col = whole * TILE_COLS; col < cols; ++col) {
    float* to = packed + col / TILE_COLS * size + col % TILE_COLS;
    const T* values = source + col * from.col_stride;
    for (int64_t k = 0; k < depth; ++k) to[k * TILE_COLS] = as_float(values[k * from.row_stride]);
  }
}

// The same of codes.
void pack_codes(const Matrix& from, int64_t first_row, int64_t depth, int64_t first_col, int64_t count, float* packed) {
  const int64_t cols = std::min(count * TILE_COLS, from.cols - first_col), size = depth * TILE_COLS;
  const auto place = [=](int64_t k, int64_t col) { return packed + col / TILE_COLS * size + k * TILE_COLS + col % TILE_COLS; };
  std::fill(packed + cols / TILE_COLS * size, packed + count * size, 0.0f);
  if (from.col_stride == 1) {
    each_run(from, first_row, depth, first_col, cols, [&](int64_t k, int64_t first, int64_t many, const float* values) {
      for (int64_t i = 0; i < many; ++i) *place(k, first + i) = values[i];
    });
  } else {
    each_run(from, first_col, cols, first_row, depth, [&](int64_t col, int64_t first, int64_t many, const float* values) {
      for (int64_t i = 0; i < many; ++i) *place(first + i, col) = values[i];
    });
  }
}

HF_GALORE_INLINE void pack(const Matrix& from, int64_t first_row, int64_t depth, int64_t first_panel, int64_t count,
                           float* packed) {
  const auto panels = from.type == Type::float32    ? pack_panels<float>
                      : from.type == Type::bfloat16 ? pack_panels<uint16_t>
                                                    : pack_codes;
  panels(from, first_row, depth, first_panel * TILE_COLS, count, packed);
}

void pack_right(const Matrix& right, int64_t first, int64_t last, float* packed) {
  pack(right, 0, right.rows, first, last - first, packed + first * right.rows * TILE_COLS);
}

// Zeros below `rows` rows of `depth` floats, up to a whole tile.
HF_GALORE_INLINE void fill_tile(int64_t rows, int64_t depth, float* to) {
  const int64_t whole = (rows + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS;
  std::fill(to + rows * depth, to + whole * depth, 0.0f);
}

// Rows of a left factor as rows of `depth` floats; rows beyond `rows`, up to a whole tile, are zero. Columns of a transposed
// factor are read some at a time, so that the lines they share are still in the cache for the next row.
template <class T>
void widen_rows(const Matrix& from, int64_t first_row, int64_t rows, int64_t first_col, int64_t depth, float* to) {
  const T* source = static_cast<const T*>(from.data) + first_row * from.row_stride + first_col * from.col_stride;
  const int64_t step = from.col_stride == 1 ? depth : 64;
  for (int64_t begin = 0; begin < depth; begin += step) {
    const int64_t end = std::min(begin + step, depth);
    for (int64_t row = 0; row < rows; ++row) {
      const T* values = source + row * from.row_stride;
      if (from.col_stride == 1) prefetch<false>(values + TILE_ROWS * from.row_stride, depth * sizeof(T));
      float* wide = to + row * depth;
      int64_t k = begin;
      if (from.col_stride == 1) {
        for (; k + LANES <= end; k += LANES) store(wide + k, load_as_float(values + k));
      }
      for (; k < end; ++k) wide[k] = as_float(values[k * from.col_stride]);
    }
  }
  fill_tile(rows, depth, to);
}

// The same of codes.
void widen_codes(const Matrix& from, int64_t first_row, int64_t rows, int64_t first_col, int64_t depth, float* to) {
  if (from.col_stride == 1) {
    each_run(from, first_row, rows, first_col, depth, [&](int64_t row, int64_t first, int64_t many, const float* values) {
      std::copy(values, values + many, to + row * depth + first);
    });
  } else {
    each_run(from, first_col, depth, first_row, rows, [&](int64_t col, int64_t first, int64_t many, const float* values) {
      for (int64_t i = 0; i < many; ++i) to[(first + i) * depth + col] = values[i];
    });
  }
  fill_tile(rows, depth, to);
}

HF_GALORE_INLINE void widen_into(const Matrix& from, int64_t first_row, int64_t rows, int64_t first_col, int64_t depth,
                                 float* to) {
  const auto widened = from.type == Type::float32    ? widen_rows<float>
                       : from.type == Type::bfloat16 ? widen_rows<uint16_t>
                                                     : widen_codes;
  widened(from, first_row, rows, first_col, depth, to);
}

// Rows of a left factor to multiply with, at `stride` floats from one another: as they are, or widened into `scratch`.
struct LeftRows {
  const float* values;
  int64_t stride;

  LeftRows(const Matrix& left, int64_t first_row, int64_t rows, int64_t first_col, int64_t depth, float* scratch) {
    if (left.type == Type::float32 && left.col_stride == 1 && rows % TILE_ROWS == 0) {
      values = static_cast<const float*>(left.data) + first_row * left.row_stride + first_col;
      stride = left.row_stride;
      for (int64_t row = rows; row < 2 * rows; ++row) prefetch<false>(values + row * stride, depth * sizeof(float));
      return;
    }
    widen_into(left, first_row, rows, first_col, depth, scratch);
    values = scratch;
    stride = depth;
  }
};

// How many rows of `depth` numbers are taken at a time: whole tiles.
HF_GALORE_INLINE int64_t block_rows(int64_t depth) {
  return std::max<int64_t>(1, LEFT_FLOATS / std::max<int64_t>(1, depth) / TILE_ROWS) * TILE_ROWS;
}

int64_t left_scratch(int64_t depth) { return block_rows(depth) * depth; }

// One row of a tile into one row of the weight.
template <class Rounding>
HF_GALORE_INLINE void write_row(typename Rounding::Kept* weight, const vfloat (&sums)[2], const LowRankAddition& step,
                                uint32_t row_word, const uint32_t* cols) {
  for (int64_t half = 0; half < 2; ++half) {
    const int64_t col = half * LANES;
    const vfloat value = multiply_add(fill(step.alpha), sums[half], step.beta * load_as_float(weight + col));
    store(weight + col, Rounding::convert(value, bits_of<Rounding>(row_word, cols + col)));
  }
}

template <class Rounding>
void add_lowrank_rows(const LowRankAddition& step, int64_t first_row, int64_t last_row, float* scratch) {
  using Kept = typename Rounding::Kept;
  const int64_t depth = step.depth, n = step.weight.cols, height = block_rows(depth);
  const int64_t width = std::max<int64_t>(1, RIGHT_FLOATS / std::max<int64_t>(1, depth) / TILE_COLS) * TILE_COLS;
  for (int64_t block = first_row; block < last_row; block += height) {
    const int64_t rows = std::min(height, last_row - block);
    const LeftRows left(step.left, block - step.left_row, rows, 0, depth, scratch);
    for (int64_t begin = 0; begin < n; begin += width) {
      const int64_t end = std::min(begin + width, n);
      for (int64_t top = 0; top < rows; top += TILE_ROWS) {
        const int64_t tall = std::min(TILE_ROWS, rows - top);
        uint32_t words[TILE_ROWS] = {};
        for (int64_t i = 0; Rounding::takes_bits && i < tall; ++i) {
          words[i] = random_word(step.words.row_key, step.words.first_row + block + top + i);
        }
        Kept* weight = static_cast<Kept*>(step.weight.data) + (block + top) * step.weight.row_stride;
        for (int64_t col = begin; col < end; col += TILE_COLS) {
          for (int64_t i = TILE_ROWS; i < 2 * TILE_ROWS; ++i) {
            prefetch<true>(weight + i * step.weight.row_stride + col, TILE_COLS * sizeof(Kept));
          }
          Tile tile;
          multiply(left.values + top * left.stride, left.stride, step.right + col * depth, depth, tile);
          const int64_t wide = std::min(TILE_COLS, n - col);
          if (tall == TILE_ROWS && wide == TILE_COLS) {
#pragma GCC unroll 16
            for (int64_t i = 0; i < TILE_ROWS; ++i) {
              write_row<Rounding>(weight + i * step.weight.row_stride + col, tile[i], step, words[i],
                                  step.words.cols + col);
            }
            continue;
          }
          for (int64_t i = 0; i < tall; ++i) {
            Kept* place = weight + i * step.weight.row_stride + col;
            Kept edge[TILE_COLS] = {};
            std::memcpy(edge, place, wide * sizeof(Kept));
            write_row<Rounding>(edge, tile[i], step, words[i], step.words.cols + col);
            std::memcpy(place, edge, wide * sizeof(Kept));
          }
        }
      }
    }
  }
}

void add_lowrank(const LowRankAddition& step, int64_t first_row, int64_t last_row, float* scratch) {
  if (step.weight.type == Type::float32) {
    add_lowrank_rows<Exactly>(step, first_row, last_row, scratch);
  } else if (step.words.cols == nullptr) {
    add_lowrank_rows<ToNearest>(step, first_row, last_row, scratch);
  } else {
    add_lowrank_rows<Stochastically>(step, first_row, last_row, scratch);
  }
}

// A tile of a product, stored, or added to what is there.
HF_GALORE_INLINE void keep_tile(const Tile& tile, float* to, int64_t stride, int64_t tall, int64_t wide, bool added) {
  for (int64_t i = 0; i < tall; ++i, to += stride) {
    if (wide == TILE_COLS) {
      for (int64_t half = 0; half < 2; ++half) {
        float* place = to + half * LANES;
        store(place, added ? load<vfloat>(place) + tile[i][half] : tile[i][half]);
      }
    } else {
      float row[TILE_COLS];
      store(row, tile[i][0]);
      store(row + LANES, tile[i][1]);
      for (int64_t col = 0; col < wide; ++col) to[col] = added ? to[col] + row[col] : row[col];
    }
  }
}

void matmul_rows(const Matrix& left, const float* right, const Matrix& product, int64_t first_row, int64_t last_row,
                 float* scratch) {
  constexpr int64_t height = 16 * TILE_ROWS;
  const int64_t n = product.cols;
  float* products = static_cast<float*>(product.data);
  for (int64_t block = first_row; block < last_row; block += height) {
    const int64_t rows = std::min(height, last_row - block);
    for (int64_t start = 0; start < left.cols; start += DEPTH) {
      const int64_t depth = std::min(DEPTH, left.cols - start);
      for (int64_t top = 0; top < rows; top += TILE_ROWS) {
        const int64_t tall = std::min(TILE_ROWS, rows - top);
        const LeftRows values(left, block + top, tall, start, depth, scratch);
        for (int64_t col = 0; col < n; col += TILE_COLS) {
          Tile tile;
          const float* panel = right + col * left.cols + start * TILE_COLS;
          multiply(values.values, values.stride, panel, depth, tile);
          float* to = products + (block + top) * product.row_stride + col;
          keep_tile(tile, to, product.row_stride, tall, std::min(TILE_COLS, n - col), start > 0);
        }
      }
    }
  }
}

void widen(const Matrix& left, float* widened) {
  widen_into(left, 0, left.rows, 0, left.cols, widened);
}

int64_t right_scratch() { return RIGHT_FLOATS; }

void matmul_cols(const float* left, const Matrix& right, const Matrix& product, int64_t first_panel, int64_t last_panel,
                 float* scratch) {
  constexpr int64_t panels = RIGHT_FLOATS / (DEPTH * TILE_COLS);
  float* products = static_cast<float*>(product.data);
  for (int64_t block = first_panel; block < last_panel; block += panels) {
    const int64_t count = std::min(panels, last_panel - block);
    for (int64_t start = 0; start < right.rows; start += DEPTH) {
      const int64_t depth = std::min(DEPTH, right.rows - start);
      pack(right, start, depth, block, count, scratch);
      for (int64_t top = 0; top < product.rows; top += TILE_ROWS) {
        const int64_t tall = std::min(TILE_ROWS, product.rows - top);
        for (int64_t panel = 0; panel < count; ++panel) {
          const int64_t col = (block + panel) * TILE_COLS;
          Tile tile;
          multiply(left + top * right.rows + start, right.rows, scratch + panel * depth * TILE_COLS, depth, tile);
          float* to = products + top * product.row_stride + col;
          keep_tile(tile, to, product.row_stride, tall, std::min(TILE_COLS, product.cols - col), start > 0);
        }
      }
    }
  }
}

}  // namespace HF_GALORE_ISA
}  // namespace hf_galore

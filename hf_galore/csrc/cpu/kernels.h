// What the kernels of one instruction set offer. They know nothing of torch and of threads: each works on a range of rows
// (or columns) that its caller gives it, with memory that its caller gives it.
#pragma once

#include <cstdint>

namespace hf_galore {

enum class Type { float32, bfloat16, codes8, codes4 };  // codes: of bases that are kept as integers (codes.h)

// Strides count elements. A matrix of codes has one stride of one, and is only read.
struct Matrix {
  void* data;
  Type type;
  int64_t rows, cols;
  int64_t row_stride, col_stride;
  const float* scales = nullptr;  // of codes, one for each block of 128 numbers, the first of which have `before` others
  int64_t before = 0;
  int64_t half = 0;  // of codes of 4 bits: the numbers from this one on are in the upper halves of bytes
};

// Whence the random bits of a bfloat16 matrix come (rounding.h): a hashed word for each column, and the key of the words of
// the rows. `cols` is null where the matrix is rounded to nearest.
struct Words {
  const uint32_t* cols;
  uint64_t row_key;
  int64_t first_row;  // the number that row 0 has within its parameter
};

// weight <- beta * weight + alpha * delta, element by element; weight <- delta where `replace`.
struct Addition {
  Matrix weight;  // unit column stride
  Matrix delta;   // unit column stride; row 0 stands for the weight's row `delta_row`
  int64_t delta_row;
  float alpha, beta;
  bool replace;
  Words words;
};

// weight (m, n) <- beta * weight + alpha * left (m, k) right (k, n).
struct LowRankAddition {
  Matrix weight;  // unit column stride
  Matrix left;    // row 0 stands for the weight's row `left_row`
  int64_t left_row;
  const float* right;  // packed by `pack_right`
  int64_t depth;       // k
  float alpha, beta;
  Words words;
};

enum class Format { float32, bfloat16, blocks };  // `blocks`: 8-bit codes, a scale for each block of 256

// The 8-bit code book of one moment, and a table that finds the code of a number (moments.h).
struct CodeBook {
  static constexpr int cells = 24 * 128 + 2;
  float codes[256];
  float boundaries[256];  // the last one is never exceeded
  uint8_t start[2 * cells];  // of positive numbers, and of negative ones
  bool is_signed;
};

struct Moment {
  void* data;     // contiguous
  float* scales;  // of blocks
  const CodeBook* book;
  Words words;
};

// AdamW in the coordinates of the gradient (moments.h).
struct AdamW {
  Matrix grad;  // contiguous
  Format format;
  Moment first, second;
  bool blocks_end_with_rows;
  float beta1, beta2, one_minus_beta1, one_minus_beta2, eps;
  float size;  // lr * sqrt(1 - beta2^t) / (1 - beta1^t)
};

struct Kernels {
  const char* name;
  int64_t tile_rows, tile_cols;

  // The panels [first, last) of tile_cols columns of a right factor (k, n), as floats (panels, k, tile_cols), filled up
  // with zeros.
  void (*pack_right)(const Matrix& right, int64_t first, int64_t last, float* packed);

  // `scratch` of add_lowrank: left_scratch(k) floats.
  int64_t (*left_scratch)(int64_t depth);
  void (*add_lowrank)(const LowRankAddition& step, int64_t first_row, int64_t last_row, float* scratch);

  void (*add)(const Addition& step, int64_t first_row, int64_t last_row);

  // delta (rows, cols of the gradient) <- -size * M / (sqrt(V) + eps), and the moments.
  void (*adamw)(const AdamW& step, int64_t first_row, int64_t last_row, float* delta);

  // product (m, n) float32 = left (m, k) right (k, n), the rows [first, last); `scratch` as of add_lowrank.
  void (*matmul_rows)(const Matrix& left, const float* right, const Matrix& product, int64_t first_row, int64_t last_row,
                      float* scratch);

  // The same by panels of columns, with a left factor that `widen` has made rows of floats of, zeros up to a whole tile.
  void (*widen)(const Matrix& left, float* widened);
  int64_t (*right_scratch)();
  void (*matmul_cols)(const float* left, const Matrix& right, const Matrix& product, int64_t first_panel,
                      int64_t last_panel, float* scratch);

  // The numbers [first, last) of a matrix of codes, counted as they lie in memory, as floats.
  void (*decode)(const Matrix& basis, int64_t first, int64_t last, float* to);
};

extern const Kernels generic_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
#endif

}  // namespace hf_galore

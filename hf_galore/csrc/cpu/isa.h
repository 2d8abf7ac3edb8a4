// The kernels of one instruction set, HF_GALORE_ISA: what generic.cpp, avx2.cpp and avx512.cpp compile, each for its own.
#pragma once

#include "codes.h"
#include "gemm.h"
#include "moments.h"

#define HF_GALORE_KERNELS(variable)                                                               \
  const Kernels variable = {HF_GALORE_NAME,             HF_GALORE_ISA::TILE_ROWS,                 \
                            HF_GALORE_ISA::TILE_COLS,   HF_GALORE_ISA::pack_right,                \
                            HF_GALORE_ISA::left_scratch, HF_GALORE_ISA::add_lowrank,              \
                            HF_GALORE_ISA::add,         HF_GALORE_ISA::adamw,                     \
                            HF_GALORE_ISA::matmul_rows, HF_GALORE_ISA::widen,                     \
                            HF_GALORE_ISA::right_scratch, HF_GALORE_ISA::matmul_cols,             \
                            HF_GALORE_ISA::decode}

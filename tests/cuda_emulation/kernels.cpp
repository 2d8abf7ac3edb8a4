// The kernels of hf_galore/csrc/cuda, emulated, for test_cuda_kernels.py.
#include "cuda/adamw.cuh"
#include "cuda/elementwise.cuh"
#include "cuda/lowrank.cuh"

using namespace hf_galore;

namespace {

// body(rounding) for `rounding` 0 (float32), 1 (bfloat16, to nearest), 2 (bfloat16, stochastically).
template <class Body>
void with_rounding(int rounding, const Body& body) {
  if (rounding == 0) body(Exactly{});
  if (rounding == 1) body(ToNearest{});
  if (rounding == 2) body(Stochastically{});
}

template <class Body>
void with_type(bool is_bfloat16, const Body& body) {
  if (is_bfloat16) {
    body(__nv_bfloat16{});
  } else {
    body(float{});
  }
}

dim3 grid_for(int64_t across, int64_t width, int64_t down, int64_t height) {
  return {static_cast<unsigned>((across + width - 1) / width), static_cast<unsigned>((down + height - 1) / height)};
}

template <bool LEFT, bool RIGHT>
void add_lowrank(int rounding, dim3 grid, bool downwards, void* weight, int64_t stride, lowrank::Factor a,
                 lowrank::Factor b, int64_t m, int64_t n, int64_t k, float alpha, float beta, const Keys& keys) {
  with_rounding(rounding, [&](auto how) {
    using Rounding = decltype(how);
    if constexpr (!std::is_same_v<Rounding, Exactly>) {
      emulation::launch(lowrank::add_lowrank_kernel<Rounding, LEFT, RIGHT>, grid, lowrank::THREADS, downwards,
                        static_cast<__nv_bfloat16*>(weight), stride, a, b, m, n, k, alpha, beta, keys);
    }
  });
}

}  // namespace

extern "C" void emulate_add(int rounding, int replace, void* weight, int64_t stride, const void* delta,
                            int is_bfloat16, int64_t delta_stride, int64_t rows, int64_t cols, float alpha, float beta,
                            uint64_t row_key, uint64_t col_key, int64_t first_row) {
  using namespace elementwise;
  with_rounding(rounding, [&](auto how) {
    with_type(is_bfloat16, [&](auto value) {
      using Rounding = decltype(how);
      using Delta = decltype(value);
      const auto kernel = replace ? add_kernel<Rounding, Delta, true> : add_kernel<Rounding, Delta, false>;
      emulation::launch(kernel, grid_for(cols, THREADS * WIDTH, rows, ROWS), THREADS, false,
                        static_cast<typename Rounding::Kept*>(weight), stride, static_cast<const Delta*>(delta),
                        delta_stride, rows, cols, alpha, beta, Keys{row_key, col_key, first_row});
    });
  });
}

extern "C" void emulate_add_lowrank(int downwards, int rounding, void* weight, int64_t stride, const void* left,
                                    int64_t left_stride, int left_by_rows, const void* right, int64_t right_stride,
                                    int right_by_rows, int64_t m, int64_t n, int64_t k, float alpha, float beta,
                                    uint64_t row_key, uint64_t col_key, int64_t first_row) {
  using namespace lowrank;
  const Factor a{static_cast<const __nv_bfloat16*>(left), left_stride};
  const Factor b{static_cast<const __nv_bfloat16*>(right), right_stride};
  const auto add = left_by_rows ? (right_by_rows ? add_lowrank<true, true> : add_lowrank<true, false>)
                                : (right_by_rows ? add_lowrank<false, true> : add_lowrank<false, false>);
  add(rounding, grid_for(n, BLOCK_N, m, BLOCK_M), downwards, weight, stride, a, b, m, n, k, alpha, beta,
      Keys{row_key, col_key, first_row});
}

extern "C" void emulate_adamw(int rounding, int of_weight, void* weight, float decay, const void* grad, int is_bfloat16,
                              void* first, void* second, int64_t rows, int64_t cols, const float* rule,
                              const uint64_t* keys, int64_t first_row) {
  using namespace adamw;
  with_rounding(of_weight, [&](auto to) {
    with_rounding(rounding, [&](auto how) {
      with_type(is_bfloat16, [&](auto value) {
        using OfWeight = decltype(to);
        using Kept = typename decltype(how)::Kept;
        using Grad = decltype(value);
        const Weight<OfWeight> target{static_cast<typename OfWeight::Kept*>(weight), decay,
                                      {keys[0], keys[1], first_row}};
        emulation::launch(adamw_kernel<decltype(how), Grad, OfWeight>, grid_for(cols, THREADS * WIDTH, rows, ROWS),
                          THREADS, false, static_cast<const Grad*>(grad), static_cast<Kept*>(first),
                          static_cast<Kept*>(second), target, rows, cols,
                          Rule{rule[0], rule[1], rule[2], rule[3], rule[4], rule[5]},
                          Keys{keys[2], keys[3], first_row}, Keys{keys[4], keys[5], first_row});
      });
    });
  });
}

extern "C" void emulate_adamw_blocks(int downwards, int of_weight, void* weight, float decay, const void* grad,
                                     int is_bfloat16, uint8_t* first, float* first_scales, const float* signed_book,
                                     uint8_t* second, float* second_scales, const float* unsigned_book, int64_t lines,
                                     int64_t length, int64_t cols, const float* rule, const uint64_t* keys,
                                     int64_t first_row, unsigned blocks) {
  using namespace adamw;
  with_rounding(of_weight, [&](auto to) {
    with_type(is_bfloat16, [&](auto value) {
      using OfWeight = decltype(to);
      using Grad = decltype(value);
      const Weight<OfWeight> target{static_cast<typename OfWeight::Kept*>(weight), decay, {keys[0], keys[1], first_row}};
      emulation::launch(adamw_blocks_kernel<Grad, OfWeight>, dim3{blocks}, BLOCK, downwards,
                        static_cast<const Grad*>(grad), Moment{first, first_scales, signed_book, true},
                        Moment{second, second_scales, unsigned_book, false}, target, lines, length, cols,
                        Rule{rule[0], rule[1], rule[2], rule[3], rule[4], rule[5]});
    });
  });
}

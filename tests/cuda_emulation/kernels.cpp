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

// An item for each of the `count` structures that Python has filled in.
template <class Item, class Given, class Make>
Group<Item> group_of(const Given* given, int count, const Make& make) {
  Group<Item> group = {};
  for (int i = 0; i < count; ++i) group.items[i] = make(given[i]);
  return group;
}

// A grid for the largest of the `count` matrices.
template <class Given>
dim3 grid_for_all(const Given* given, int count, int64_t width, int64_t height) {
  int64_t rows = 0, cols = 0;
  for (int i = 0; i < count; ++i) {
    rows = std::max(rows, given[i].rows);
    cols = std::max(cols, given[i].cols);
  }
  dim3 grid = grid_for(cols, width, rows, height);
  grid.z = count;
  return grid;
}

template <bool LEFT, bool RIGHT>
void add_lowrank(int rounding, dim3 grid, bool downwards, const Group<lowrank::Product>& group, float alpha,
                 float beta) {
  with_rounding(rounding, [&](auto how) {
    using Rounding = decltype(how);
    if constexpr (!std::is_same_v<Rounding, Exactly>) {
      emulation::launch(lowrank::add_lowrank_kernel<Rounding, LEFT, RIGHT>, grid, lowrank::THREADS, downwards, group,
                        alpha, beta);
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

// The structures of test_cuda_kernels.py.

struct ProductArguments {
  void* weight;
  const void *left, *right;
  int64_t rows, cols, inner, stride, left_stride, right_stride, first_row;
  uint64_t keys[2];
};

extern "C" void emulate_add_lowrank(int downwards, int rounding, int left_by_rows, int right_by_rows,
                                    const ProductArguments* given, int count, float alpha, float beta) {
  using namespace lowrank;
  const auto group = group_of<Product>(given, count, [](const ProductArguments& one) {
    return Product{static_cast<__nv_bfloat16*>(one.weight),
                   one.stride,
                   {static_cast<const __nv_bfloat16*>(one.left), one.left_stride},
                   {static_cast<const __nv_bfloat16*>(one.right), one.right_stride},
                   one.rows,
                   one.cols,
                   one.inner,
                   {one.keys[0], one.keys[1], one.first_row}};
  });
  const auto add = left_by_rows ? (right_by_rows ? add_lowrank<true, true> : add_lowrank<true, false>)
                                : (right_by_rows ? add_lowrank<false, true> : add_lowrank<false, false>);
  add(rounding, grid_for_all(given, count, BLOCK_N, BLOCK_M), downwards, group, alpha, beta);
}

struct AdamWArguments {
  void* weight;
  const void* grad;
  void *first, *second;
  int64_t rows, cols, first_row;
  uint64_t keys[6];
};

extern "C" void emulate_adamw(int rounding, int of_weight, int is_bfloat16, const AdamWArguments* given, int count,
                              float decay, const float* rule) {
  using namespace adamw;
  with_rounding(of_weight, [&](auto to) {
    with_rounding(rounding, [&](auto how) {
      with_type(is_bfloat16, [&](auto value) {
        using Rounding = decltype(how);
        using OfWeight = decltype(to);
        using Kept = typename Rounding::Kept;
        using Grad = decltype(value);
        const auto group = group_of<Floats<Rounding, Grad, OfWeight>>(given, count, [&](const AdamWArguments& one) {
          const Weight<OfWeight> target{static_cast<typename OfWeight::Kept*>(one.weight), decay,
                                        {one.keys[0], one.keys[1], one.first_row}};
          return Floats<Rounding, Grad, OfWeight>{static_cast<const Grad*>(one.grad),
                                                  static_cast<Kept*>(one.first),
                                                  static_cast<Kept*>(one.second),
                                                  target,
                                                  one.rows,
                                                  one.cols,
                                                  {one.keys[2], one.keys[3], one.first_row},
                                                  {one.keys[4], one.keys[5], one.first_row}};
        });
        emulation::launch(adamw_kernel<Rounding, Grad, OfWeight>, grid_for_all(given, count, THREADS * WIDTH, ROWS),
                          THREADS, false, group, Rule{rule[0], rule[1], rule[2], rule[3], rule[4], rule[5]});
      });
    });
  });
}

struct BlocksArguments {
  void* weight;
  const void* grad;
  uint8_t* first;
  float* first_scales;
  const float* signed_book;
  uint8_t* second;
  float* second_scales;
  const float* unsigned_book;
  int64_t lines, length, cols, first_row;
  uint64_t keys[2];
};

extern "C" void emulate_adamw_blocks(int downwards, int of_weight, int is_bfloat16, const BlocksArguments* given,
                                     int count, float decay, const float* rule, unsigned blocks) {
  using namespace adamw;
  with_rounding(of_weight, [&](auto to) {
    with_type(is_bfloat16, [&](auto value) {
      using OfWeight = decltype(to);
      using Grad = decltype(value);
      const auto group = group_of<Blocks<Grad, OfWeight>>(given, count, [&](const BlocksArguments& one) {
        const Weight<OfWeight> target{static_cast<typename OfWeight::Kept*>(one.weight), decay,
                                      {one.keys[0], one.keys[1], one.first_row}};
        return Blocks<Grad, OfWeight>{static_cast<const Grad*>(one.grad),
                                      {one.first, one.first_scales, one.signed_book, true},
                                      {one.second, one.second_scales, one.unsigned_book, false},
                                      target,
                                      one.lines,
                                      one.length,
                                      one.cols};
      });
      emulation::launch(adamw_blocks_kernel<Grad, OfWeight>, dim3{blocks, 1, static_cast<unsigned>(count)}, BLOCK,
                        downwards, group, Rule{rule[0], rule[1], rule[2], rule[3], rule[4], rule[5]});
    });
  });
}

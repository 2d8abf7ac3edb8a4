// As much of CUDA as the kernels of hf_galore use, on the CPU: so that their arithmetic and their indexing can be tested
// without a GPU. A block's threads are fibres of one thread of the CPU, which change at barriers; blocks run one after
// another. Between two barriers the fibres run one by one, upwards or downwards: a kernel that lacks a barrier gives
// different results for the two orders.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static  // one block at a time

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

inline dim3 threadIdx, blockIdx, gridDim;

inline uint32_t __float_as_uint(float value) {
  uint32_t word;
  std::memcpy(&word, &value, sizeof word);
  return word;
}

template <class A, class B>
std::common_type_t<A, B> min(A a, B b) {
  return a < b ? a : b;
}
template <class A, class B>
std::common_type_t<A, B> max(A a, B b) {
  return a > b ? a : b;
}

namespace emulation {

// The threads of a block.
class Block {
 public:
  Block(unsigned threads, bool downwards, std::function<void()> kernel)
      : kernel_(std::move(kernel)), downwards_(downwards), fibres_(threads), exchanged_(threads) {}

  void run() {
    running() = this;
    for (Fibre& fibre : fibres_) start(fibre);
    while (left_ > 0) {  // one round is from one barrier to the next
      for (unsigned i = 0; i < fibres_.size(); ++i) {
        const unsigned index = downwards_ ? fibres_.size() - 1 - i : i;
        if (fibres_[index].done) continue;
        threadIdx.x = now_ = index;
        swapcontext(&rounds_, &fibres_[index].context);
      }
    }
  }

  void barrier() { swapcontext(&fibres_[now_].context, &rounds_); }

  float exchange(float value, unsigned other) {
    exchanged_[now_] = value;
    barrier();
    const float theirs = exchanged_[other];
    barrier();
    return theirs;
  }

  static Block*& running() {
    static Block* block = nullptr;
    return block;
  }

 private:
  struct Fibre {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    bool done = false;
  };

  void start(Fibre& fibre) {
    constexpr size_t size = 1 << 17;
    fibre.stack.reset(new char[size]);
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack.get();
    fibre.context.uc_stack.ss_size = size;
    fibre.context.uc_link = &rounds_;
    makecontext(&fibre.context, &Block::enter, 0);
    ++left_;
  }

  static void enter() {
    Block& block = *running();
    block.kernel_();
    block.fibres_[block.now_].done = true;
    --block.left_;
  }

  std::function<void()> kernel_;
  bool downwards_;
  std::vector<Fibre> fibres_;
  std::vector<float> exchanged_;
  ucontext_t rounds_;
  unsigned now_ = 0, left_ = 0;
};

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, unsigned threads, bool downwards, Arguments... arguments) {
  gridDim = grid;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = {x, y, z};
        Block(threads, downwards, [&] { kernel(arguments...); }).run();
      }
    }
  }
}

}  // namespace emulation

inline void __syncthreads() { emulation::Block::running()->barrier(); }
inline void __syncwarp() { __syncthreads(); }
inline float __shfl_xor_sync(uint32_t, float value, int mask) {
  return emulation::Block::running()->exchange(value, threadIdx.x ^ mask);
}

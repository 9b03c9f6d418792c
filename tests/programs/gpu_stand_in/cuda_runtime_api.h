#pragma once

#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

// Runs device code on the CPU: a block is a thread, and its CUDA threads are fibers of it, which
// give way to each other at barriers. So `__shared__` is what fibers of one thread share.

#define __device__
#define __host__
#define __forceinline__ inline
#define __global__
#define __shared__ static thread_local
#define __launch_bounds__(...)
#define __grid_constant__

using cudaStream_t = void*;

struct Dim {
  unsigned x;
};
inline thread_local Dim threadIdx, blockIdx, blockDim;

struct uint4 {
  uint32_t x, y, z, w;
};
struct longlong2 {
  long long x, y;
};

/// The fibers of this thread's block.
class Fibers {
 public:
  static thread_local Fibers* current;

  void run(unsigned num_threads, const std::function<void()>& body) {
    current = this;
    body_ = &body;
    blockDim.x = num_threads;
    fibers_ = std::vector<Fiber>(num_threads);
    for (Fiber& fiber : fibers_) {
      fiber.stack.reset(new char[kStackBytes]);
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStackBytes;
      fiber.context.uc_link = &main_;
      makecontext(&fiber.context, begin, 0);
    }
    // Every fiber up to the next barrier, in turn: all of them pass a barrier or none.
    for (bool is_running = true; is_running;) {
      is_running = false;
      for (unsigned i = 0; i < num_threads; ++i) {
        if (fibers_[i].is_over) continue;
        threadIdx.x = i;
        swapcontext(&main_, &fibers_[i].context);
        is_running |= !fibers_[i].is_over;
      }
    }
  }

  void barrier() {
    const unsigned own = threadIdx.x;
    swapcontext(&fibers_[own].context, &main_);
  }

 private:
  static constexpr size_t kStackBytes = 64 << 10;
  struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    bool is_over = false;
  };

  static void begin() {
    (*current->body_)();
    current->fibers_[threadIdx.x].is_over = true;
  }

  std::vector<Fiber> fibers_;
  const std::function<void()>* body_ = nullptr;
  ucontext_t main_;
};
inline thread_local Fibers* Fibers::current = nullptr;

inline void __syncthreads() { Fibers::current->barrier(); }
inline void __threadfence_system() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

template <typename T>
T __ldcg(const T* p) {
  return *p;
}

inline int atomicMin(int* word, int value) {
  const int before = *word;  // of fibers, which run one at a time
  if (value < before) *word = value;
  return before;
}
inline uint32_t atomicExch(uint32_t* word, uint32_t value) {
  return __atomic_exchange_n(word, value, __ATOMIC_SEQ_CST);
}

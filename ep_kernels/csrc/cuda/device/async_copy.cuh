#pragma once

#include <cstdint>

// Copies from global to shared memory that a thread starts and later waits for (sm_80 and newer).
// They take no registers, so more bytes can be under way than loads allow. A thread sees what it
// has copied itself without a barrier.

namespace ep::cuda {

/// Starts to copy sixteen bytes, past the L1 cache, as part of this thread's next group.
__device__ __forceinline__ void copy_async(uint4* shared, const uint4* global) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16;" ::"r"(address), "l"(global)
               : "memory");
}

/// Closes this thread's group of copies, which may be empty.
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

/// Waits until at most the `kNumLeft` last groups of this thread are under way.
template <int kNumLeft>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kNumLeft) : "memory");
}

}  // namespace ep::cuda

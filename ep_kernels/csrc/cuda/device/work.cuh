#pragma once

#include <cstdint>

#include "cuda/device/warp.cuh"

// Work that warps take from a common counter. A warp that is slow, since its SM is shared or its
// items are large, takes fewer items, and all warps end within one item of each other.

namespace ep::cuda {

/// Items 0, 1, ... of a launch. All lanes of a warp call each function.
struct WorkQueue {
  uint32_t* counter;  ///< in device memory, 0 when the kernel begins

  __device__ static int num_warps() {
    return static_cast<int>(gridDim.x) * static_cast<int>(blockDim.x / kWarpSize);
  }
  /// The item that the warp has without asking.
  __device__ static int64_t first() {
    return int64_t{blockIdx.x} * (blockDim.x / kWarpSize) + threadIdx.x / kWarpSize;
  }
  /// Asks for another item, without waiting for the answer.
  __device__ uint32_t ask() const {
    return threadIdx.x % kWarpSize == 0 ? atomicAdd(counter, 1u) : 0;
  }
  /// The item that an earlier ask() has got; past the end when there is none left.
  __device__ static int64_t answer(uint32_t asked) {
    return int64_t{num_warps()} + __shfl_sync(kAllLanes, asked, 0);
  }
};

}  // namespace ep::cuda

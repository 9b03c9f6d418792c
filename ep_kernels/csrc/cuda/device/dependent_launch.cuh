#pragma once

// Programmatic dependent launch (sm_90 and newer): the next kernel of a stream is put on the SMs
// while this one ends, and waits there. Saves most of the gap between two kernels.

namespace ep::cuda {

/// Lets the next kernel be launched. Called late, when nothing is left to wait for: blocks that
/// wait would hold SMs which others need.
__device__ __forceinline__ void let_next_kernel_launch() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/// Waits until the kernel before has ended and what it wrote can be seen.
__device__ __forceinline__ void wait_for_kernel_before() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace ep::cuda

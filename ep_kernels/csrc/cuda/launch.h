#pragma once

#include <cuda_runtime.h>

#include "cuda/check_cuda.h"

namespace ep::cuda {

struct LaunchShape {
  int num_blocks, num_threads, shared_bytes;
};

/// Whether the current device has what came with sm_90: early launches, bulk copies.
inline bool has_sm90_features() {
  thread_local int known_device = -1;
  thread_local bool has_them = false;
  int device = 0, major = 0;
  EP_CHECK_CUDA(cudaGetDevice(&device));
  if (device == known_device) return has_them;
  EP_CHECK_CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  known_device = device;
  return has_them = major >= 9;
}

/// Shared memory that a block can have on the current device.
inline int max_shared_bytes() {
  thread_local int known_device = -1, num_bytes = 0;
  int device = 0;
  EP_CHECK_CUDA(cudaGetDevice(&device));
  if (device == known_device) return num_bytes;
  EP_CHECK_CUDA(
      cudaDeviceGetAttribute(&num_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  known_device = device;
  return num_bytes;
}

/// Launches a kernel that may be put on the SMs while the kernel before it ends, which it has to
/// wait for (device/dependent_launch.cuh). Devices before sm_90 launch it after that kernel.
template <typename... Parameters, typename... Arguments>
void launch_early(void (*kernel)(Parameters...), const LaunchShape& shape, cudaStream_t stream,
                  const Arguments&... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(shape.num_blocks));
  config.blockDim = dim3(static_cast<unsigned>(shape.num_threads));
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = has_sm90_features() ? 1 : 0;
  EP_CHECK_CUDA(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
}

}  // namespace ep::cuda

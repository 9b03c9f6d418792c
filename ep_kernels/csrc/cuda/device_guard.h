#pragma once

#include <cuda_runtime_api.h>

namespace ep::cuda {

/// Makes a device current for a scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int device_;
  int previous_ = 0;
};

/// The capture that a stream takes part in, or 0.
unsigned long long capture_of(cudaStream_t stream);

}  // namespace ep::cuda

#pragma once

#include <cuda_runtime_api.h>

#include "core/check.h"

/// Throws DeviceError when a CUDA runtime call fails, and clears the last error if it is not
/// sticky.
#define EP_CHECK_CUDA(call)                                                              \
  do {                                                                                   \
    const cudaError_t status_ = (call);                                                  \
    if (status_ != cudaSuccess) {                                                        \
      (void)cudaGetLastError();                                                          \
      throw ::ep::DeviceError(::ep::concat(#call, ": ", cudaGetErrorName(status_), ", ", \
                                           cudaGetErrorString(status_)));                \
    }                                                                                    \
  } while (false)

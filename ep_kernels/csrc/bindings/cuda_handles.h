#pragma once

#include "cuda/buffer.h"

// What stands behind the opaque pointers of the CUDA interfaces.

struct EpCudaBuffer {
  explicit EpCudaBuffer(const ep::cuda::Buffer::Config& config) : impl(config) {}
  ep::cuda::Buffer impl;
};

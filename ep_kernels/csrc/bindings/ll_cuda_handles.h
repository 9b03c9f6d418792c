#pragma once

#include "cuda/low_latency.h"

// What the opaque handle of ll_cuda_api.h is.

struct EpCudaLowLatency {
  ep::cuda::LowLatency impl;
  int num_ranks;
};

#include "bindings/cuda_handles.h"
#include "bindings/ll_cuda_api.h"
#include "bindings/ll_cuda_handles.h"

using ep::guarded;
using ep::cuda::LowLatency;

int32_t ep_cuda_ll_create(EpCudaBuffer* buffer, int64_t region, int64_t region_bytes,
                          int32_t mask_silent_ranks, EpCudaLowLatency** low_latency,
                          EpError* error) {
  return guarded(error, [&] {
    const LowLatency::Config config{region, region_bytes, mask_silent_ranks != 0};
    *low_latency = new EpCudaLowLatency{{buffer->impl, config}, buffer->impl.group().num_ranks};
  });
}

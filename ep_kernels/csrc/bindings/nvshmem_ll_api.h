#pragma once

#include "bindings/ll_cuda_api.h"

// Low-latency calls over NVSHMEM: their memory. The calls themselves are those of ll_cuda_api.h,
// which the NVSHMEM part has, too, but for ep_cuda_ll_create().

struct EpNvshmemLlMemory;

struct EpNvshmemLlConfig {
  int32_t device, rank, num_ranks, num_local_ranks;
  int32_t num_experts, direct;  // direct: nvshmem::Direct
  int64_t region_bytes, timeout_us;
  const int32_t* pes;          // [num_ranks]
  const int32_t* expert_rank;  // [num_experts]
};

/// Size of EpNvshmemLlConfig, then as ep_cuda_ll_abi_sizes().
EP_API void ep_nvshmem_ll_abi_sizes(int32_t sizes[4]);

/// Collective. Out: the address of the region, and how many ranks are reached by puts.
EP_API int32_t ep_nvshmem_ll_memory_create(const EpNvshmemLlConfig* config,
                                           EpNvshmemLlMemory** memory, uint64_t* region,
                                           int32_t* num_far, EpError* error);
/// Collective, over ranks without far ones, too: memory for rows of far ranks, if there are any.
EP_API int32_t ep_nvshmem_ll_memory_add_far_rows(EpNvshmemLlMemory* memory, EpError* error);
/// Low-latency calls over it; to be deleted before it.
EP_API int32_t ep_nvshmem_ll_create(EpNvshmemLlMemory* memory, int64_t region_bytes,
                                    EpCudaLowLatency** low_latency, EpError* error);
/// Tells the peers that no more calls come. Waits for the device.
EP_API int32_t ep_nvshmem_ll_memory_leave(EpNvshmemLlMemory* memory, EpError* error);
/// Collective.
EP_API int32_t ep_nvshmem_ll_memory_destroy(EpNvshmemLlMemory* memory, EpError* error);
EP_API void ep_nvshmem_ll_memory_delete(EpNvshmemLlMemory* memory);

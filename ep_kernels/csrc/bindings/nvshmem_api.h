#pragma once

#include <stdint.h>

#include "bindings/status.h"
#include "nvshmem/lane_args.h"

// The C interface of the NVSHMEM part, called from Python through ctypes
// (ep_kernels/_native_nvshmem.py).

struct EpNvshmemLane;

struct EpNvshmemConfig {
  int32_t device, node, num_nodes;
  int32_t num_channels, num_slots, is_direct;
  int64_t staging_bytes, timeout_us;
  const int32_t* pes;    // [num_nodes] NVSHMEM's numbers of the lane's ranks
  const int32_t* ranks;  // [num_nodes] those of the user
};

/// Sizes of EpNvshmemConfig, LaneSection, LaneCounts, LaneExchangeArgs.
EP_API void ep_nvshmem_abi_sizes(int32_t sizes[4]);
/// Of NVSHMEM itself.
EP_API void ep_nvshmem_version(int32_t version[3]);

EP_API int32_t ep_nvshmem_unique_id(uint8_t id[128], EpError* error);
/// Collective, once per process.
EP_API int32_t ep_nvshmem_join(int32_t device, int32_t pe, int32_t num_pes, const uint8_t* id,
                               EpError* error);
EP_API int32_t ep_nvshmem_leave(EpError* error);

/// Collective. `slot_bytes`: out.
EP_API int32_t ep_nvshmem_lane_create(const EpNvshmemConfig* config, EpNvshmemLane** lane,
                                      int64_t* slot_bytes, EpError* error);
EP_API int32_t ep_nvshmem_lane_exchange(EpNvshmemLane* lane,
                                        const ep::nvshmem::LaneExchangeArgs* args, void* stream,
                                        EpError* error);
EP_API int32_t ep_nvshmem_lane_exchange_bytes(EpNvshmemLane* lane,
                                              const ep::nvshmem::LaneExchangeArgs* args,
                                              void* stream, EpError* error);
/// Reports what kernels have found wrong.
EP_API int32_t ep_nvshmem_lane_check(EpNvshmemLane* lane, EpError* error);
/// Collective, unless the lane has failed.
EP_API int32_t ep_nvshmem_lane_destroy(EpNvshmemLane* lane, EpError* error);
EP_API void ep_nvshmem_lane_delete(EpNvshmemLane* lane);

#pragma once

#include "bindings/cuda_api.h"
#include "core/lane_args.h"
#include "core/protocol.h"

// Work on rows over several nodes, on a GPU: the steps of bindings/lane_api.h that touch rows, for
// the buffer of the node's ranks. Called through ep_kernels/_native_cuda_lane.py. Steps enqueue on
// `stream`, a cudaStream_t, and return an EpStatus. `offers` is [ranks of all nodes], on the host.

struct EpCudaLane;

struct EpCudaLaneConfig {
  const int32_t* expert_rank;  // [num_experts] among all ranks
  int32_t num_experts, rank, num_local_ranks;
};

/// Sizes of EpCudaLaneConfig, LanePackArgs, LaneSums, LaneMergeArgs: Python compares.
EP_API void ep_cuda_lane_abi_sizes(int32_t sizes[4]);

/// `buffer` is that of the node's ranks, and must outlive it.
EP_API int32_t ep_cuda_lane_create(EpCudaBuffer* buffer, const EpCudaLaneConfig* config,
                                   EpCudaLane** lane, EpError* error);
EP_API void ep_cuda_lane_delete(EpCudaLane* lane);

EP_API int32_t ep_cuda_lane_pack(EpCudaLane* lane, const ep::LanePackArgs* args, void* stream,
                                 EpError* error);
EP_API int32_t ep_cuda_lane_send_rows(EpCudaLane* lane, const ep::HtDispatchArgs* args,
                                      const ep::Offer* offers, void* stream, EpError* error);
EP_API int32_t ep_cuda_lane_fill_padding(EpCudaLane* lane, const ep::HtDispatchArgs* args,
                                         void* stream, EpError* error);
EP_API int32_t ep_cuda_lane_stage_rows(EpCudaLane* lane, const ep::HtCombineArgs* args,
                                       void* stream, EpError* error);
EP_API int32_t ep_cuda_lane_reduce_rows(EpCudaLane* lane, const ep::HtCombineArgs* args,
                                        const ep::Offer* offers, void* stream, EpError* error);
EP_API int32_t ep_cuda_lane_merge(EpCudaLane* lane, const ep::LaneMergeArgs* args, void* stream,
                                  EpError* error);
/// Between host and device memory.
EP_API int32_t ep_cuda_lane_copy(EpCudaLane* lane, void* to, const void* of, int64_t num_bytes,
                                 void* stream, EpError* error);

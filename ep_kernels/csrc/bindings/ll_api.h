#pragma once

#include "bindings/c_api.h"
#include "core/ll_args.h"

// The C interface of low-latency mode on the CPU, called from Python through ctypes
// (ep_kernels/_native_ll.py). As in c_api.h, functions may block up to the buffer's timeout.

struct EpLowLatency;  // must be deleted before its buffer

/// Sizes of LlSizes, LlDispatchArgs, LlCombineArgs: Python compares.
EP_API void ep_ll_abi_sizes(int32_t sizes[3]);

/// Bytes of a region for calls of these sizes; `num_local_experts` is the largest of all ranks.
EP_API int64_t ep_ll_region_bytes(const ep::LlSizes* sizes, int32_t num_ranks, int32_t num_experts,
                                  int32_t num_local_experts);
/// Offsets in a half: x, scales, combine.
EP_API void ep_ll_half_offsets(const ep::LlSizes* sizes, int32_t num_ranks,
                               int32_t num_local_experts, int64_t offsets[3]);

/// For calls over several nodes, whose steps are in Python (nodes_ll.py): what the arguments of a
/// call and the fields of posts (core/ll_protocol.h) have to be.
EP_API int32_t ep_ll_check_dispatch(const ep::LlDispatchArgs* args, int32_t num_experts,
                                    EpError* error);
EP_API int32_t ep_ll_check_combine(const ep::LlCombineArgs* args, const ep::LlSizes* sizes,
                                   EpError* error);
EP_API int32_t ep_ll_check_agreed(int32_t field, int32_t rank, int64_t value, int32_t other,
                                  int64_t other_value, EpError* error);

/// `region`: pool offset of `region_bytes` zeroed bytes, the same on all ranks.
EP_API int32_t ep_ll_create(EpBuffer* buffer, int64_t region, int64_t region_bytes,
                            int32_t mask_silent_ranks, EpLowLatency** low_latency, EpError* error);
EP_API void ep_ll_delete(EpLowLatency* low_latency);

/// `receive`: 0 at once, 1 on the buffer's queue (then `op`), 2 when ep_ll_receive() is called.
EP_API int32_t ep_ll_dispatch(EpLowLatency* low_latency, const ep::LlDispatchArgs* args,
                              int32_t receive, uint64_t* number, int64_t* window, EpOp** op,
                              EpError* error);
EP_API int32_t ep_ll_combine(EpLowLatency* low_latency, const ep::LlCombineArgs* args,
                             int32_t receive, uint64_t* number, EpOp** op, EpError* error);
EP_API int32_t ep_ll_receive(EpLowLatency* low_latency, uint64_t number, EpError* error);
EP_API void ep_ll_release(EpLowLatency* low_latency, uint64_t dispatch);
EP_API int32_t ep_ll_barrier(EpLowLatency* low_latency, EpError* error);
EP_API int32_t ep_ll_refuse(EpLowLatency* low_latency, const char* reason, EpError* error);

EP_API int32_t ep_ll_mask(EpLowLatency* low_latency, int32_t rank, EpError* error);
/// rank -1: all that are masked.
EP_API int32_t ep_ll_unmask(EpLowLatency* low_latency, int32_t rank, EpError* error);
/// is_masked: [num_ranks].
EP_API int32_t ep_ll_query_mask(EpLowLatency* low_latency, uint8_t* is_masked, EpError* error);

#pragma once

#include "bindings/cuda_api.h"
#include "core/ll_args.h"

// The C interface of low-latency mode on CUDA, called from Python through ctypes
// (ep_kernels/_native_ll.py). As bindings/ll_api.h; calls are enqueued on `stream` (cudaStream_t)
// and have numbers of their own.

struct EpCudaLowLatency;  // must be deleted before its buffer

/// Sizes of LlSizes, LlDispatchArgs, LlCombineArgs: Python compares.
EP_API void ep_cuda_ll_abi_sizes(int32_t sizes[3]);

/// `region`: pool offset of `region_bytes` bytes, the same on all ranks; the first of the pool,
/// whose words were zeroed when it was made.
EP_API int32_t ep_cuda_ll_create(EpCudaBuffer* buffer, int64_t region, int64_t region_bytes,
                                 int32_t mask_silent_ranks, EpCudaLowLatency** low_latency,
                                 EpError* error);
EP_API void ep_cuda_ll_delete(EpCudaLowLatency* low_latency);

/// `receive`: 0 at once, 1 on a stream of the buffer, 2 when ep_cuda_ll_receive() is called.
EP_API int32_t ep_cuda_ll_dispatch(EpCudaLowLatency* low_latency, const ep::LlDispatchArgs* args,
                                   int32_t receive, void* stream, int64_t* number, int64_t* window,
                                   EpError* error);
EP_API int32_t ep_cuda_ll_combine(EpCudaLowLatency* low_latency, const ep::LlCombineArgs* args,
                                  int32_t receive, void* stream, int64_t* number, EpError* error);
EP_API int32_t ep_cuda_ll_receive(EpCudaLowLatency* low_latency, int64_t number, void* stream,
                                  EpError* error);
EP_API void ep_cuda_ll_release(EpCudaLowLatency* low_latency, int64_t dispatch);
EP_API int32_t ep_cuda_ll_barrier(EpCudaLowLatency* low_latency, void* stream, EpError* error);
EP_API int32_t ep_cuda_ll_refuse(EpCudaLowLatency* low_latency, const char* reason, void* stream,
                                 EpError* error);

EP_API int32_t ep_cuda_ll_mask(EpCudaLowLatency* low_latency, int32_t rank, void* stream,
                               EpError* error);
/// rank -1: all that are masked.
EP_API int32_t ep_cuda_ll_unmask(EpCudaLowLatency* low_latency, int32_t rank, void* stream,
                                 EpError* error);
/// is_masked: [num_ranks] in host memory.
EP_API int32_t ep_cuda_ll_query_mask(EpCudaLowLatency* low_latency, uint8_t* is_masked,
                                     void* stream, EpError* error);

/// stamps: [64, 12] uint64 in host memory, see cuda::LlStamp; call number n is in row n % 64.
EP_API int32_t ep_cuda_ll_stamps(EpCudaLowLatency* low_latency, uint64_t* stamps, void* stream,
                                 EpError* error);

EP_API int32_t ep_cuda_ll_is_finished(EpCudaLowLatency* low_latency, int64_t number);
/// Waits on the host, then reports the call's error.
EP_API int32_t ep_cuda_ll_wait(EpCudaLowLatency* low_latency, int64_t number, EpError* error);
/// Reports the error of a finished call.
EP_API int32_t ep_cuda_ll_check(EpCudaLowLatency* low_latency, int64_t number, EpError* error);
EP_API int32_t ep_cuda_ll_make_stream_wait(EpCudaLowLatency* low_latency, int64_t number,
                                           void* stream, EpError* error);

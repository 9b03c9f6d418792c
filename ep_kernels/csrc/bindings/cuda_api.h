#pragma once

#include <stdint.h>

#include "bindings/status.h"
#include "core/ht_args.h"

// The C interface of the CUDA core, called from Python through ctypes (ep_kernels/_native_cuda.py).
// Calls enqueue work on the buffer's communication stream and return their number.

struct EpCudaBuffer;
struct EpCudaBlock;

struct EpCudaConfig {
  int32_t device, rank, num_ranks, num_experts;
  const int32_t* expert_rank;  // [num_experts]
  int64_t pool_bytes;
  int64_t timeout_us;
  int64_t low_latency_bytes;  // first range of the pool, whose words are zeroed
};

struct EpCallOrder {
  void* caller;    // cudaStream_t
  void* previous;  // cudaEvent_t to wait for instead of `caller`, or null
  int32_t is_async;
};

/// Sizes of EpCallOrder, EpCudaConfig, HtSizes, HtRouting, HtDispatchArgs, HtCombineArgs.
EP_API void ep_cuda_abi_sizes(int32_t sizes[6]);

/// `handle`: 64 bytes that peers need to map this rank's memory.
EP_API int32_t ep_cuda_buffer_create(const EpCudaConfig* config, EpCudaBuffer** buffer,
                                     uint8_t* handle, EpError* error);
/// `handles`: [num_ranks, 64].
EP_API int32_t ep_cuda_buffer_attach(EpCudaBuffer* buffer, const uint8_t* handles, EpError* error);
EP_API int32_t ep_cuda_buffer_destroy(EpCudaBuffer* buffer, EpError* error);
EP_API void ep_cuda_buffer_delete(EpCudaBuffer* buffer);

EP_API int32_t ep_cuda_block_allocate(EpCudaBuffer* buffer, int64_t num_bytes, EpCudaBlock** block,
                                      void** address, int64_t* offset, EpError* error);
/// `stream` is the one whose work may still use the memory.
EP_API void ep_cuda_block_free(EpCudaBuffer* buffer, EpCudaBlock* block, void* stream);
EP_API void ep_cuda_pool_stats(EpCudaBuffer* buffer, int64_t stats[3]);

/// Fills args->routing and waits for the sizes: sizes as HtRouting::recv_sizes, then [L] and,
/// expert-major, [L + 1] as in HtRouting, in host memory.
EP_API int32_t ep_cuda_notify(EpCudaBuffer* buffer, const ep::HtDispatchArgs* args,
                              const EpCallOrder* order, int64_t* call, int64_t sizes[3],
                              int64_t* num_recv_tokens_per_expert, int64_t* expert_offsets,
                              EpError* error);
EP_API int32_t ep_cuda_send(EpCudaBuffer* buffer, int64_t call, const ep::HtDispatchArgs* args,
                            int32_t has_memory, const EpCallOrder* order, EpError* error);
EP_API int32_t ep_cuda_dispatch(EpCudaBuffer* buffer, const ep::HtDispatchArgs* args,
                                const EpCallOrder* order, int64_t* call, EpError* error);
EP_API int32_t ep_cuda_combine(EpCudaBuffer* buffer, const ep::HtCombineArgs* args,
                               const EpCallOrder* order, int64_t* call, EpError* error);
EP_API int32_t ep_cuda_barrier(EpCudaBuffer* buffer, const EpCallOrder* order, int64_t* call,
                               EpError* error);
EP_API int32_t ep_cuda_refuse(EpCudaBuffer* buffer, const char* reason, const EpCallOrder* order,
                              int64_t* call, EpError* error);

EP_API int32_t ep_cuda_is_finished(EpCudaBuffer* buffer, int64_t call);
/// Waits on the host, then reports the call's error.
EP_API int32_t ep_cuda_wait(EpCudaBuffer* buffer, int64_t call, EpError* error);
/// Reports the error of a finished call.
EP_API int32_t ep_cuda_check(EpCudaBuffer* buffer, int64_t call, EpError* error);
EP_API int32_t ep_cuda_make_stream_wait(EpCudaBuffer* buffer, int64_t call, void* stream,
                                        EpError* error);
/// The cudaEvent_t at the end of a call.
EP_API void* ep_cuda_end_event(EpCudaBuffer* buffer, int64_t call);

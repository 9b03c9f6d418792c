#pragma once

#include <stdint.h>

#include "bindings/status.h"
#include "core/ht_args.h"

// The C interface of the CUDA core, called from Python through ctypes (ep_kernels/_native_cuda.py).
// Calls enqueue work and return their number.

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
  void* previous;  // cudaEvent_t to wait for, or null
  int32_t is_async;
  int32_t follows_caller;  // waits for what `caller` has been given
};

/// Memory for one of the results of a dispatch.
struct EpReceivedRows {
  EpCudaBlock* block;  // to be freed by the caller; null if there is none or it is empty
  void* address;
  int64_t offset;  // in the pool
};

struct EpReceive {
  EpReceivedRows x, scales, topk_idx, topk_weights, chain;
};

/// What the host learns of a fresh dispatch: the number of rows; as in HtRouting, in host memory,
/// [L] and [L + 1], the latter expert-major.
struct EpFreshCounts {
  int64_t num_rows;
  int64_t* num_recv_tokens_per_expert;
  int64_t* expert_offsets;
};

/// Sizes of EpCallOrder, EpCudaConfig, HtSizes, HtRouting, HtDispatchArgs, HtCombineArgs,
/// EpReceive, EpFreshCounts.
EP_API void ep_cuda_abi_sizes(int32_t sizes[8]);

/// `handle`: 64 bytes that peers need to map this rank's memory.
EP_API int32_t ep_cuda_buffer_create(const EpCudaConfig* config, EpCudaBuffer** buffer,
                                     uint8_t* handle, EpError* error);
/// `handles`: [num_ranks, 64]. `remote_ranks`: a bit for each peer to which a row of an
/// expert-major dispatch crosses a link only once; the same on both sides.
EP_API int32_t ep_cuda_buffer_attach(EpCudaBuffer* buffer, const uint8_t* handles,
                                     uint64_t remote_ranks, EpError* error);
/// Whether expert-major results of this rank come with chain words.
EP_API int32_t ep_cuda_chains_rows(EpCudaBuffer* buffer);
EP_API int32_t ep_cuda_buffer_destroy(EpCudaBuffer* buffer, EpError* error);
EP_API void ep_cuda_buffer_delete(EpCudaBuffer* buffer);

EP_API int32_t ep_cuda_block_allocate(EpCudaBuffer* buffer, int64_t num_bytes, EpCudaBlock** block,
                                      void** address, int64_t* offset, EpError* error);
/// A tensor over a block has died while `stream`, whose work may still use it, was current.
EP_API void ep_cuda_note_free(EpCudaBuffer* buffer, void* stream);
/// Before `stream` writes to a block that is no call's.
EP_API int32_t ep_cuda_wait_for_freed(EpCudaBuffer* buffer, void* stream, EpError* error);
EP_API void ep_cuda_block_free(EpCudaBlock* block);
EP_API void ep_cuda_pool_stats(EpCudaBuffer* buffer, int64_t stats[3]);

/// A dispatch that takes its memory once the host knows how many rows come. Fills `receive` and
/// `counts`.
EP_API int32_t ep_cuda_dispatch_fresh(EpCudaBuffer* buffer, const ep::HtDispatchArgs* args,
                                      const EpCallOrder* order, EpReceive* receive,
                                      EpFreshCounts* counts, int64_t* call, EpError* error);
/// A dispatch into memory that `args` names: with a capacity or a cached handle.
EP_API int32_t ep_cuda_dispatch(EpCudaBuffer* buffer, const ep::HtDispatchArgs* args,
                                const EpCallOrder* order, int64_t* call, EpError* error);
EP_API int32_t ep_cuda_combine(EpCudaBuffer* buffer, const ep::HtCombineArgs* args,
                               const EpCallOrder* order, int64_t* call, EpError* error);
EP_API int32_t ep_cuda_barrier(EpCudaBuffer* buffer, const EpCallOrder* order, int64_t* call,
                               EpError* error);
EP_API int32_t ep_cuda_refuse(EpCudaBuffer* buffer, const char* reason, const EpCallOrder* order,
                              int64_t* call, EpError* error);

/// Bytes per second of a copy of num_bytes at `offset` of this rank's pool to offset + num_bytes of
/// the next rank's, by all ranks at once. Collective.
EP_API int32_t ep_cuda_copy_rate(EpCudaBuffer* buffer, int32_t num_blocks, int64_t num_bytes,
                                 int64_t offset, const EpCallOrder* order, double* bytes_per_s,
                                 EpError* error);

EP_API int32_t ep_cuda_is_finished(EpCudaBuffer* buffer, int64_t call);
/// Waits on the host, then reports the call's error.
EP_API int32_t ep_cuda_wait(EpCudaBuffer* buffer, int64_t call, EpError* error);
/// Reports the error of a finished call.
EP_API int32_t ep_cuda_check(EpCudaBuffer* buffer, int64_t call, EpError* error);
EP_API int32_t ep_cuda_make_stream_wait(EpCudaBuffer* buffer, int64_t call, void* stream,
                                        EpError* error);
/// Nanoseconds of the device's timer when a finished call reached each Stamp (cuda/group.h); 0 for
/// those that it does not have, or if it is too old.
EP_API void ep_cuda_stamps(EpCudaBuffer* buffer, int64_t call, uint64_t stamps[7]);
/// The cudaEvent_t at the end of a call.
EP_API void* ep_cuda_end_event(EpCudaBuffer* buffer, int64_t call);

#pragma once

#include <stdint.h>

#include "bindings/status.h"
#include "core/ht_args.h"

// The C interface of the CPU core, called from Python through ctypes (ep_kernels/_native.py): one
// library for every Python and torch. Functions return an EpStatus; on failure `error` tells more.
// They may block, but only up to the buffer's timeout, and hold no Python lock.

struct EpBuffer;  // a buffer of the host backend
struct EpBlock;   // a range of a buffer's pool; may outlive the buffer
struct EpOp;      // a call on its way

struct EpConfig {
  int32_t rank, num_ranks, num_experts, num_local_ranks;
  const int32_t* expert_rank;  // [num_experts]
  int64_t pool_bytes;
  int64_t timeout_us;
};

/// Sizes of EpError, EpConfig, HtSizes, HtRouting, HtDispatchArgs, HtCombineArgs: Python compares.
EP_API void ep_abi_sizes(int32_t sizes[6]);
EP_API const char* ep_simd_name();

EP_API int32_t ep_buffer_create(const EpConfig* config, EpBuffer** buffer, int32_t* fd,
                                EpError* error);
EP_API int32_t ep_buffer_attach(EpBuffer* buffer, const int64_t* pids, const int32_t* fds,
                                EpError* error);
EP_API void ep_buffer_close_files(EpBuffer* buffer);
/// Waits for calls under way and leaves the group; `delete` afterwards frees the object.
EP_API int32_t ep_buffer_destroy(EpBuffer* buffer, EpError* error);
EP_API void ep_buffer_delete(EpBuffer* buffer);

EP_API int32_t ep_block_allocate(EpBuffer* buffer, int64_t num_bytes, EpBlock** block,
                                 void** address, int64_t* offset, EpError* error);
EP_API void ep_block_free(EpBlock* block);
/// Live ranges, bytes in use, the most bytes that were in use.
EP_API void ep_pool_stats(EpBuffer* buffer, int64_t stats[3]);

/// counts: [num_ranks + num_experts]; is_token_in_rank: [num_tokens, num_ranks], zeroed.
EP_API int32_t ep_count_rows(EpBuffer* buffer, const int64_t* topk_idx, int64_t num_tokens,
                             int32_t num_topk, int32_t* counts, uint8_t* is_token_in_rank,
                             EpError* error);

EP_API int32_t ep_notify(EpBuffer* buffer, const ep::HtDispatchArgs* args, uint64_t* seq,
                         EpError* error);
/// `offer_error`: null, or why this rank has no memory for its rows.
EP_API int32_t ep_send(EpBuffer* buffer, uint64_t seq, const ep::HtDispatchArgs* args,
                       const char* offer_error, int32_t is_async, EpOp** op, EpError* error);
EP_API int32_t ep_dispatch(EpBuffer* buffer, const ep::HtDispatchArgs* args, int32_t is_async,
                           uint64_t* seq, EpOp** op, EpError* error);
EP_API int32_t ep_combine(EpBuffer* buffer, const ep::HtCombineArgs* args, int32_t is_async,
                          EpOp** op, EpError* error);
EP_API int32_t ep_barrier(EpBuffer* buffer, EpError* error);
EP_API int32_t ep_refuse(EpBuffer* buffer, const char* reason, EpError* error);

EP_API int32_t ep_op_is_finished(const EpOp* op);
/// Waits, then reports the call's error.
EP_API int32_t ep_op_wait(const EpOp* op, EpError* error);
/// Begin and end of a finished call, in nanoseconds of the monotonic clock.
EP_API void ep_op_interval(const EpOp* op, int64_t interval_ns[2]);
EP_API void ep_op_release(EpOp* op);

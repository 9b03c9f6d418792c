#pragma once

#include <cuda_runtime_api.h>

#include "core/ht_args.h"
#include "cuda/group.h"

// The kernels of the high-throughput mode. Each function enqueues on `stream` and returns. At most
// one block of a rank waits for peers at any time: kernels that do have one block, or do so in the
// block that comes last. So ranks which share a GPU cannot starve each other.
//
//   fresh dispatch   notify, plan, offer, send, copies
//   with capacity    notify, plan, send, copies
//   cached handle    post, send, copies
//   combine          post, reduce
//   barrier, refusal post, finish

namespace ep::cuda {

/// Scratch of a fresh dispatch: int32 [num_chunks(num_tokens) + 1, num_ranks + num_experts].
int64_t num_chunks(int64_t num_tokens);

/// Counts the choices of every chunk of tokens and notes the first bad one; exchanges the counts;
/// turns scratch into first rows; fills the receiver's part of the routing.
void launch_notify(const DeviceGroup& group, const HtDispatchArgs& args, const PostArgs& post,
                   int32_t* scratch, CallRecord* record, cudaStream_t stream);

/// Gives every choice its row.
void launch_plan(const DeviceGroup& group, const HtDispatchArgs& args, const int32_t* scratch,
                 cudaStream_t stream);

/// Announces a call and waits until all ranks have.
void launch_post(const DeviceGroup& group, const PostArgs& post, CallRecord* record,
                 cudaStream_t stream);

/// Tells the peers where this rank's memory is, and learns where theirs is.
void launch_offer(const DeviceGroup& group, const Offer& offer, CallRecord* record,
                  cudaStream_t stream);

/// Once for the current device, before launch_send() and launch_copies().
void prepare_send();
void prepare_copies();

/// Writes this rank's rows to their final place, fills what no peer writes in its own results, and
/// finishes the call, unless it has chains of rows to copy.
void launch_send(const DeviceGroup& group, const HtDispatchArgs& args, CallRecord* record,
                 cudaStream_t stream);

/// Copies rows that came once to the other places where they are wanted, and finishes the call.
/// After launch_send(), with chains only.
void launch_copies(const DeviceGroup& group, const HtDispatchArgs& args, CallRecord* record,
                   cudaStream_t stream);

/// Reads the rows of this rank's tokens from their ranks, sums them, and finishes the call.
void launch_reduce(const DeviceGroup& group, const HtCombineArgs& args, CallRecord* record,
                   cudaStream_t stream);

constexpr int64_t kCopyUnit = 4 << 10;

/// Copies a multiple of kCopyUnit the way launch_send() does.
void launch_copy(uint8_t* dst, const uint8_t* src, int64_t num_bytes, int num_blocks,
                 cudaStream_t stream);

/// Finishes a call: says that this rank is through, waits until all are, reports to the host.
void launch_finish(const DeviceGroup& group, CallRecord* record, cudaStream_t stream);

}  // namespace ep::cuda

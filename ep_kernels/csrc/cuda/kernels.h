#pragma once

#include <cuda_runtime_api.h>

#include "core/ht_args.h"
#include "cuda/group.h"

// The kernels of the high-throughput mode. Each function enqueues on `stream` and returns. Kernels
// that wait for peers have one block; those that move rows never wait, so that ranks which share a
// GPU cannot starve each other.
//
//   fresh dispatch   count, notify, plan, offer, send, pad, finish
//   with capacity    count, notify, plan, send, pad, finish
//   cached handle    post, send, pad, finish
//   combine          post, reduce, finish
//   barrier, refusal post, finish

namespace ep::cuda {

/// Scratch of a fresh dispatch: int32 [num_chunks(num_tokens) + 1, num_ranks + num_experts].
int64_t num_chunks(int64_t num_tokens);

/// Counts the choices of every chunk of tokens; notes the first bad one.
void launch_count(const DeviceGroup& group, const HtDispatchArgs& args, int32_t* scratch,
                  cudaStream_t stream);

/// Exchanges the counts; turns scratch into first rows; fills the receiver's part of the routing.
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

/// Writes this rank's rows to their final place.
void launch_send(const DeviceGroup& group, const HtDispatchArgs& args, cudaStream_t stream);

/// Fills what no peer writes in this rank's own results.
void launch_pad(const DeviceGroup& group, const HtDispatchArgs& args, cudaStream_t stream);

/// Reads the rows of this rank's tokens from their ranks and sums them.
void launch_reduce(const DeviceGroup& group, const HtCombineArgs& args, cudaStream_t stream);

/// Says that this rank is through with the call, waits until all are, reports to the host.
void launch_finish(const DeviceGroup& group, CallRecord* record, cudaStream_t stream);

}  // namespace ep::cuda

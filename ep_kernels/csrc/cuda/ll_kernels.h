#pragma once

#include <cuda_runtime_api.h>

#include "cuda/ll_group.h"

// The kernels of low-latency mode. Each function enqueues one kernel on `stream` and returns.
//
//   dispatch   send      count, post, agree on a view, place and send rows, done
//              receive   one block: wait for all done, zero what is missing, counts
//   combine    send      stage rows, post; one block if they are where they are read
//              receive   wait for all posts, reduce rows, look back
//
// Kernels that wait for peers hold their blocks meanwhile: ranks that share a GPU must all fit.

namespace ep::cuda {

void launch_ll_dispatch_send(const LlGroup& group, const LlDispatchCall& call, cudaStream_t stream);
void launch_ll_dispatch_receive(const LlGroup& group, const LlDispatchCall& call,
                                cudaStream_t stream);
void launch_ll_combine_send(const LlGroup& group, const LlCombineCall& call, cudaStream_t stream);
void launch_ll_combine_receive(const LlGroup& group, const LlCombineCall& call,
                               cudaStream_t stream);

/// A barrier or a refusal: posts, waits for the posts of all, compares.
void launch_ll_plain(const LlGroup& group, const LlPlainCall& call, cudaStream_t stream);

/// Masks ranks, or takes them back; the outcome is in LlState::answer.
void launch_ll_mask(const LlGroup& group, const LlMaskCall& call, cudaStream_t stream);

}  // namespace ep::cuda

#pragma once

#include "core/ht_args.h"
#include "core/recv_stats.h"
#include "cuda/group.h"

namespace ep::cuda {

/// All threads of one block: counts the tokens of a dispatch in its caller's statistics.
__device__ inline void add_recv_stats(const DeviceGroup& group, const HtDispatchArgs& args) {
  if (!args.cumulative_recv_stats) return;
  for (int local = threadIdx.x; local < group.num_local_experts; local += blockDim.x)
    add_recv_tokens(args.cumulative_recv_stats, args.cumulative_stats_bytes, local,
                    args.routing.num_recv_tokens_per_expert[local]);
}

}  // namespace ep::cuda

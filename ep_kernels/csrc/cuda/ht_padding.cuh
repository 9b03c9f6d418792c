#pragma once

#include "core/routing.h"
#include "core/types.h"
#include "cuda/group.h"

// What no peer writes in the results of a dispatch.

namespace ep::cuda {

template <typename T>
__device__ void fill_rows(uint8_t* base, int64_t words_per_row, int64_t begin, int64_t end,
                          T value) {
  auto* words = reinterpret_cast<T*>(base);
  for (int64_t i = begin * words_per_row + threadIdx.x; i < end * words_per_row; i += blockDim.x)
    words[i] = value;
}

/// The unused rows' choices, rank-major. All threads of all blocks.
__device__ inline void clear_unused_choices(const DeviceGroup& group, const HtDispatchArgs& args) {
  const HtSizes& sizes = args.sizes;
  if (sizes.capacity < 0) return;
  uint8_t* own = group.pool(group.rank);
  const int64_t begin = min(args.routing.recv_sizes[0], sizes.capacity) * sizes.num_topk;
  const int64_t end = sizes.capacity * sizes.num_topk, stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = begin + blockIdx.x * blockDim.x + threadIdx.x; i < end; i += stride) {
    if (args.recv_topk_idx >= 0) reinterpret_cast<int64_t*>(own + args.recv_topk_idx)[i] = -1;
    if (args.recv_topk_weights >= 0)
      for (int word = 0; word < sizes.weight_bytes / 4; ++word)
        reinterpret_cast<uint32_t*>(own + args.recv_topk_weights + i * sizes.weight_bytes)[word] =
            0;
  }
}

/// The padding of this rank's groups, expert-major; blocks take groups in turn. All threads.
__device__ inline void pad_groups(const DeviceGroup& group, const HtDispatchArgs& args) {
  const HtSizes& sizes = args.sizes;
  if (sizes.expert_alignment == 1) return;
  uint8_t* own = group.pool(group.rank);
  // Rows of side data are multiples of 4 bytes only.
  const auto zero = [&](int64_t offset, int64_t row_bytes, int64_t begin, int64_t end) {
    if (offset >= 0) fill_rows(own + offset, row_bytes / 4, begin, end, uint32_t{0});
  };
  for (int expert = blockIdx.x; expert < group.num_experts; expert += gridDim.x) {
    if (group.placement.rank_of[expert] != group.rank) continue;
    const int local = group.placement.local_of[expert];
    const int64_t begin =
        args.routing.expert_offsets[local] + args.routing.num_recv_tokens_per_expert[local];
    int64_t end = args.routing.expert_offsets[local + 1];
    if (sizes.capacity >= 0) end = min(end, sizes.capacity);
    zero(args.recv_x, sizes.row_bytes, begin, end);
    zero(args.recv_scales, sizes.scale_bytes, begin, end);
    zero(args.recv_topk_weights, sizes.weight_bytes, begin, end);
    if (args.recv_chain >= 0) fill_rows(own + args.recv_chain, 1, begin, end, kEndOfChain);
  }
}

/// All threads of all blocks.
__device__ inline void pad_results(const DeviceGroup& group, const HtDispatchArgs& args) {
  if (static_cast<Layout>(args.sizes.layout) == Layout::kRankMajor)
    clear_unused_choices(group, args);
  else
    pad_groups(group, args);
}

}  // namespace ep::cuda

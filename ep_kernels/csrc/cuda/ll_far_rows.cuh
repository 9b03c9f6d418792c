#pragma once

#include "cuda/ll_far_layout.cuh"
#include "cuda/ll_posts.cuh"
#include "cuda/ll_share.cuh"

// The ways of rows to far ranks and back. Of each expert, a rank's rows are one range here and one
// there, so that a put takes all of them. No code where no rank is far.

namespace ep::cuda {

/// All threads of the last block of a dispatch: sends the rows that all blocks have laid out. They
/// are there when it returns.
template <typename Format>
__device__ void ll_send_far_rows(const LlShare<Format>& share, LlRanks peers) {
  const LlGroup& g = share.g;
  if (!ll_has_far(g)) return;
  const LlSizes& sizes = share.call.args.sizes;
  const uint64_t deadline = now_ns() + g.group.timeout_ns;
  const int rank = g.group.rank, num_warps = static_cast<int>(blockDim.x) / kWarpSize;
  const int64_t row_bytes = ll_row_bytes(sizes), scale_bytes = ll_scales_of_row(sizes);
  __threadfence_system();  // rows, then the puts that read them
  __syncthreads();
  for (int expert = static_cast<int>(threadIdx.x) / kWarpSize; expert < g.group.num_experts;
       expert += num_warps) {
    const int owner = g.group.placement.rank_of[expert];
    if (!ll_is_far(g, owner) || !ll_has(peers, owner)) continue;
    const auto num_rows =
        static_cast<int32_t>(load_relaxed(ll_tagged_counts(g, share.number, rank, rank) + expert));
    if (num_rows == 0) continue;
    int32_t before = 0;  // found by one lane: each would look at the deadline itself
    if (threadIdx.x % kWarpSize == 0) before = share.rows_before(expert, peers, deadline);
    before = __shfl_sync(~0u, before, 0);
    if (before < 0) continue;  // the dispatch is given up
    const int num_local = g.num_local[owner], local = g.group.placement.local_of[expert];
    const LlHalfLayout half(sizes, g.group.num_ranks, num_local);
    uint8_t* window =
        ll_window(g, owner, static_cast<int>(share.board.posts[owner].word[kLlWordWindow]));
    const LlTarget from = ll_far_target(g, sizes, share.call.half, expert, 0);
    ll_put_bytes(g, owner, window + half.row(local, before), from.row, num_rows * row_bytes);
    if (scale_bytes > 0)
      ll_put_bytes(g, owner, window + ll_landing_offset(half, sizes, num_local, local, before),
                   from.scales, num_rows * scale_bytes);
  }
  ll_finish_puts();
  __syncthreads();
}

/// All threads of one block: brings the scales of rows that came from far ranks of `came` to their
/// places.
__device__ inline void ll_place_far_scales(const LlGroup& g, const LlDispatchCall& call,
                                           const int32_t* counts, LlRanks came) {
  if (!ll_has_far(g)) return;
  const LlSizes& sizes = call.args.sizes;
  const int num_ranks = g.group.num_ranks, num_local = g.group.num_local_experts;
  const int64_t num_words = ll_scales_of_row(sizes) / 4;
  const LlHalfLayout half(sizes, num_ranks, num_local);
  uint8_t* window = ll_window(g, g.group.rank, call.half);
  for (int local = 0; local < num_local; ++local) {
    int64_t first = 0;
    for (int src = 0; src < num_ranks; ++src) {
      const int64_t num_rows = counts[local * num_ranks + src];
      if (ll_is_far(g, src) && ll_has(came, src)) {
        const auto* from = reinterpret_cast<const uint32_t*>(
            window + ll_landing_offset(half, sizes, num_local, local, first));
        auto* to = reinterpret_cast<uint32_t*>(window + ll_scale_offset(half, sizes, local, first));
        for (int64_t i = threadIdx.x; i < num_rows * num_words; i += blockDim.x)
          to[i % num_words * half.rows_per_expert + i / num_words] = __ldcg(from + i);
      }
      first += num_rows;
    }
  }
}

/// All threads of one block, before a combine is announced: sends far ranks the results of their
/// rows, which lie in this rank's window. They are there when it returns.
__device__ inline void ll_send_far_results(const LlGroup& g, const LlCombineCall& call) {
  if (!ll_has_far(g)) return;
  const LlHalfState& state = g.state->halves[call.half];
  const int rank = g.group.rank, num_ranks = g.group.num_ranks;
  const int num_local = g.group.num_local_experts;
  const int num_warps = static_cast<int>(blockDim.x) / kWarpSize;
  const int32_t* counts = g.counts + int64_t{call.half} * num_local * num_ranks;
  const LlHalfLayout half(call.sizes, num_ranks, num_local);
  const uint8_t* window = ll_window(g, rank, call.half);
  __threadfence_system();  // rows, then the puts that read them
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x) / kWarpSize; i < g.group.num_experts * num_ranks;
       i += num_warps) {
    const int expert = i / num_ranks, src = i % num_ranks;
    if (g.group.placement.rank_of[expert] != rank) continue;
    if (!ll_is_far(g, src) || !ll_has(state.peers, src)) continue;
    const int local = g.group.placement.local_of[expert];
    const int32_t* of_expert = counts + local * num_ranks;
    if (of_expert[src] == 0) continue;
    int64_t first = 0;
    for (int before = 0; before < src; ++before) first += of_expert[before];
    ll_put_bytes(g, src, ll_far_expert(g, call.sizes, state.peer_half[src], expert),
                 window + half.combine_row(local, first), of_expert[src] * half.combine_row_bytes);
  }
  ll_finish_puts();
  __syncthreads();
}

}  // namespace ep::cuda

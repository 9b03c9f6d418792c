#pragma once

#include "cuda/ll_far_rows.cuh"
#include "cuda/ll_posts.cuh"
#include "cuda/ll_rows.cuh"

// The receive half of a low-latency dispatch on the GPU, one block: a kernel of its own, or what
// the last block of the send half does next. The twin of the steps of dispatch in
// cpu/ll_receive.cpp.
//
//   rows of each expert, which the posts have told      ll_tell_counts
//   wait for "done" of all ranks                        ll_wait_rows
//   zero what is missing                                ll_clear_rows
//   the caller's statistics                             ll_add_stats

namespace ep::cuda {

/// All threads: zeroes the rows that `src` was to write.
__device__ inline void ll_clear_rows(const LlGroup& g, const LlDispatchCall& call,
                                     const int32_t* counts, int src) {
  const LlSizes& sizes = call.args.sizes;
  const int num_ranks = g.group.num_ranks, num_local = g.group.num_local_experts;
  const LlHalfLayout half(sizes, num_ranks, num_local);
  const int64_t num_scales = ll_scale_bytes(static_cast<LlFormat>(sizes.format), sizes.hidden) / 4;
  uint8_t* window = ll_window(g, g.group.rank, call.half);
  for (int local = 0; local < num_local; ++local) {
    const int32_t* of_expert = counts + local * num_ranks;
    int64_t first = 0;
    for (int before = 0; before < src; ++before) first += of_expert[before];
    auto* rows = reinterpret_cast<uint4*>(window + half.row(local, first));
    for (int64_t i = threadIdx.x; i < of_expert[src] * half.row_bytes / 16; i += blockDim.x)
      rows[i] = uint4{};
    auto* scales = reinterpret_cast<uint32_t*>(window + ll_scale_offset(half, sizes, local, first));
    for (int64_t i = threadIdx.x; i < num_scales * of_expert[src]; i += blockDim.x)
      scales[i / of_expert[src] * half.rows_per_expert + i % of_expert[src]] = 0;
  }
}

/// All threads: waits for the rows of all peers. Returns who sent them under the same view.
__device__ inline LlRanks ll_wait_rows(const LlGroup& g, const LlDispatchCall& call,
                                       LlBoard& board) {
  const LlHalfState& half = g.state->halves[call.half];
  if (threadIdx.x == 0) board.came = 0;
  __syncthreads();
  const LlRanks from = half.error ? 0 : half.peers & ~read_word(&g.state->masked), view = half.view;
  const uint64_t expected = half.number;
  // A peer may wait as long as the timeout for a silent one, and then send what it has.
  const uint64_t start = now_ns(),
                 deadline = start + (g.mask_silent_ranks ? 2 : 1) * g.group.timeout_ns;
  for (int peer = threadIdx.x; peer < g.group.num_ranks; peer += blockDim.x) {
    if (!ll_has(from, peer)) continue;
    const LlDoneLine& line = ll_done_line(g, call.half, g.group.rank, peer);
    uint64_t seen = 0;
    LlLoss loss;
    const bool has_come = ll_wait(g, peer, deadline, &loss, [&] {
      seen = load_flag(&line.flag);
      return seen >= expected;
    });
    if (has_come) ll_take_arrival(g, peer, &line.flag);
    if (!has_come)
      ll_lose(g, ll_timeout(g, Phase::kRows, peer, expected, seen), loss);
    else if (__ldcg(reinterpret_cast<const AtomicWord*>(line.view.words)) == view)
      atomicOr(&board.came, ll_bit(peer));
    if (call.args.wait_recv_cost_stats)
      call.args.wait_recv_cost_stats[peer] += static_cast<int64_t>((now_ns() - start) / 1000);
  }
  __syncthreads();
  return board.came;
}

/// Rows of a local expert from `ranks`.
__device__ inline int32_t ll_rows_from(const LlGroup& g, const int32_t* counts, int local,
                                       LlRanks ranks) {
  constexpr int kAtOnce = 8;  // loads under way
  const int num_ranks = g.group.num_ranks;
  int32_t total = 0;
  for (int first = 0; first < num_ranks; first += kAtOnce) {
    int32_t parts[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int src = first + i;
      parts[i] = src < num_ranks && ll_has(ranks, src) ? counts[local * num_ranks + src] : 0;
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) total += parts[i];
  }
  return total;
}

/// One thread per expert and rank: who was to send how much. Known before the rows are here.
__device__ inline void ll_tell_counts(const LlGroup& g, const LlDispatchArgs& args, int32_t* counts,
                                      bool has_error) {
  const int num_local = g.group.num_local_experts;
  for (int i = threadIdx.x; i < num_local * g.group.num_ranks; i += blockDim.x) {
    if (has_error) counts[i] = 0;
    args.recv_rank_counts[i] = counts[i];
  }
  for (int local = threadIdx.x; local < num_local; local += blockDim.x)
    args.recv_count[local] = has_error ? 0 : ll_rows_from(g, counts, local, ~LlRanks{0});
}

/// One thread per expert: the statistics, of what has arrived.
__device__ inline void ll_add_stats(const LlGroup& g, const LlDispatchArgs& args,
                                    const int32_t* counts, LlRanks came) {
  if (!args.cumulative_recv_stats) return;
  for (int local = threadIdx.x; local < g.group.num_local_experts; local += blockDim.x) {
    const int32_t arrived = ll_rows_from(g, counts, local, came);
    if (args.cumulative_stats_bytes == 8)
      static_cast<int64_t*>(args.cumulative_recv_stats)[local] += arrived;
    else
      static_cast<int32_t*>(args.cumulative_recv_stats)[local] += arrived;
  }
}

/// All threads of the block: the receive half.
__device__ inline void ll_receive_rows(const LlGroup& g, const LlDispatchCall& call,
                                       LlBoard& board) {
  LlHalfState& half = g.state->halves[call.half];
  const int num_ranks = g.group.num_ranks;
  int32_t* counts =
      g.counts + static_cast<int64_t>(call.half) * g.group.num_local_experts * num_ranks;
  const uint64_t number = half.number - 1;
  const bool has_error = half.error != 0;
  const LlRanks peers = has_error ? 0 : half.peers;
  if (threadIdx.x == 0) ll_stamp(g, number, kLlStampReceiving);
  ll_tell_counts(g, call.args, counts, has_error);
  const LlRanks came = ll_wait_rows(g, call, board);
  if (threadIdx.x == 0) ll_stamp(g, number, kLlStampArrived);
  for (int src = threadIdx.x; src < num_ranks; src += blockDim.x)
    call.args.missing[src] = !ll_has(came, src);
  for (int src = 0; src < num_ranks; ++src)
    if (ll_has(peers & ~came, src)) ll_clear_rows(g, call, counts, src);
  ll_place_far_scales(g, call, counts, peers & came);
  ll_add_stats(g, call.args, counts, came);
  __syncthreads();
  if (threadIdx.x != 0) return;
  half.peers = came;
  ll_stamp(g, number, kLlStampEnd);
  if (g.state->failed && !has_error) half.error = static_cast<int32_t>(LlStatus::kTimeout);
  ll_end(g, call.record, half.error ? static_cast<LlStatus>(half.error) : LlStatus::kOk);
}

}  // namespace ep::cuda

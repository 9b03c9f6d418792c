// The receive half of a low-latency dispatch on the GPU, one block. The twin of the steps of
// dispatch in cpu/ll_receive.cpp.
//
//   wait for "done" of all ranks                        wait_rows
//   zero what is missing                                clear_rows
//   rows of each expert, and the caller's statistics    tell_counts

#include "cuda/check_cuda.h"
#include "cuda/ll_kernels.h"
#include "cuda/ll_posts.cuh"
#include "cuda/ll_rows.cuh"

namespace ep::cuda {
namespace {

constexpr int kNumThreads = 512;

/// All threads: zeroes the rows that `src` was to write.
__device__ void clear_rows(const LlGroup& g, const LlDispatchCall& call, const int32_t* counts,
                           int src) {
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
__device__ LlRanks wait_rows(const LlGroup& g, const LlDispatchCall& call, LlBoard& board) {
  const LlHalfState& half = g.state->halves[call.half];
  if (threadIdx.x == 0) board.came = 0;
  __syncthreads();
  const LlRanks from = half.error ? 0 : half.peers & ~read_word(&g.state->masked);
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
      return seen >= half.number;
    });
    if (!has_come)
      ll_lose(g, ll_timeout(g, Phase::kRows, peer, half.number, seen), loss);
    else if (load_flag(&line.view.words[0]) == half.view)
      atomicOr(&board.came, ll_bit(peer));
    if (call.args.wait_recv_cost_stats)
      call.args.wait_recv_cost_stats[peer] += static_cast<int64_t>((now_ns() - start) / 1000);
  }
  __syncthreads();
  return board.came;
}

/// One thread per expert: rows of each local expert, and the statistics.
__device__ void tell_counts(const LlGroup& g, const LlDispatchArgs& args, const int32_t* counts,
                            LlRanks came) {
  const int num_ranks = g.group.num_ranks;
  for (int local = threadIdx.x; local < g.group.num_local_experts; local += blockDim.x) {
    int32_t total = 0, arrived = 0;
    for (int src = 0; src < num_ranks; ++src) {
      const int32_t count = counts[local * num_ranks + src];
      total += count;
      if (ll_has(came, src)) arrived += count;
    }
    args.recv_count[local] = total;
    if (!args.cumulative_recv_stats) continue;
    if (args.cumulative_stats_bytes == 8)
      static_cast<int64_t*>(args.cumulative_recv_stats)[local] += arrived;
    else
      static_cast<int32_t*>(args.cumulative_recv_stats)[local] += arrived;
  }
}

__global__ void __launch_bounds__(kNumThreads)
    dispatch_receive_kernel(const __grid_constant__ LlGroup g,
                            const __grid_constant__ LlDispatchCall call) {
  __shared__ LlBoard board;
  LlHalfState& half = g.state->halves[call.half];
  const int num_ranks = g.group.num_ranks;
  const int num_counts = g.group.num_local_experts * num_ranks;
  int32_t* counts = g.counts + static_cast<int64_t>(call.half) * num_counts;
  const LlRanks came = wait_rows(g, call, board);
  const bool has_error = half.error != 0;
  const LlRanks peers = has_error ? 0 : half.peers;
  for (int i = threadIdx.x; i < num_counts; i += blockDim.x) {
    if (has_error) counts[i] = 0;
    call.args.recv_rank_counts[i] = counts[i];
  }
  for (int src = threadIdx.x; src < num_ranks; src += blockDim.x)
    call.args.missing[src] = !ll_has(came, src);
  for (int src = 0; src < num_ranks; ++src)
    if (ll_has(peers & ~came, src)) clear_rows(g, call, counts, src);
  __syncthreads();
  tell_counts(g, call.args, counts, came);
  __syncthreads();
  if (threadIdx.x != 0) return;
  half.peers = came;
  if (g.state->failed && !half.error) half.error = static_cast<int32_t>(LlStatus::kTimeout);
  ll_end(g, call.record, half.error ? static_cast<LlStatus>(half.error) : LlStatus::kOk);
}

}  // namespace

void launch_ll_dispatch_receive(const LlGroup& group, const LlDispatchCall& call,
                                cudaStream_t stream) {
  dispatch_receive_kernel<<<1, kNumThreads, 0, stream>>>(group, call);
  EP_CHECK_CUDA(cudaGetLastError());
}

}  // namespace ep::cuda

// The send half of a low-latency combine on the GPU. The twin of the steps of combine in
// cpu/low_latency.cpp.
//
//   every block   compare topk_idx with the handle            ll_check_idx
//                 copy or compress rows                       stage
//   last block    "my rows can be read" to all ranks          ll_post_rows

#include "cuda/check_cuda.h"
#include "cuda/ll_combine_post.cuh"
#include "cuda/ll_kernels.h"
#include "cuda/ll_posts.cuh"
#include "cuda/ll_rows.cuh"

namespace ep::cuda {
namespace {

constexpr int kNumThreads = 1024;
constexpr int kNumWarps = kNumThreads / kWarpSize;

/// The rows of this rank's experts, in shared memory.
struct RowList {
  int32_t* begin;      ///< [L + 1] first row of each expert in the list
  int32_t* own_begin;  ///< [L] first row of an expert that came from this rank
  int32_t* own_end;    ///< [L]

  /// All threads.
  __device__ void fill(const LlGroup& g, const int32_t* counts) const {
    const int num_ranks = g.group.num_ranks, num_local = g.group.num_local_experts;
    for (int local = threadIdx.x; local < num_local; local += blockDim.x) {
      const int32_t* of_expert = counts + local * num_ranks;
      int32_t total = 0;
      for (int src = 0; src < num_ranks; ++src) {
        if (src == g.group.rank) own_begin[local] = total;
        total += of_expert[src];
        if (src == g.group.rank) own_end[local] = total;
      }
      begin[local + 1] = total;
    }
    if (threadIdx.x == 0) begin[0] = 0;
    __syncthreads();
    if (threadIdx.x < kWarpSize) scan(num_local);
    __syncthreads();
  }
  /// One warp: turns counts into first rows.
  __device__ void scan(int num_local) const {
    const int lane = threadIdx.x;
    int32_t before = 0;
    for (int first = 1; first <= num_local; first += kWarpSize) {
      const int at = first + lane;
      int32_t sum = at <= num_local ? begin[at] : 0;
#pragma unroll
      for (int step = 1; step < kWarpSize; step *= 2) {
        const int32_t other = __shfl_up_sync(kAllLanes, sum, step);
        if (lane >= step) sum += other;
      }
      if (at <= num_local) begin[at] = before + sum;
      before += __shfl_sync(kAllLanes, sum, kWarpSize - 1);
    }
  }
  /// The expert of a row of the list.
  __device__ int expert_of(int32_t row, int num_local) const {
    int low = 0, high = num_local - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (begin[middle] <= row)
        low = middle;
      else
        high = middle - 1;
    }
    return low;
  }
};

/// One warp: copies a row.
__device__ void copy_row(const uint16_t* from, uint8_t* to, int64_t hidden, int lane) {
  const auto* source = reinterpret_cast<const uint4*>(from);
  auto* target = reinterpret_cast<uint4*>(to);
  const auto num_vectors = static_cast<int>(hidden / 8);
  constexpr int kAtOnce = 8;
  for (int first = lane; first < num_vectors; first += kAtOnce * kWarpSize) {
    uint4 parts[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if (first + i * kWarpSize < num_vectors) parts[i] = load_once(source + first + i * kWarpSize);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if (first + i * kWarpSize < num_vectors) target[first + i * kWarpSize] = parts[i];
  }
}

/// One warp: compresses a row, also where it lies: a piece is read before the bytes of an earlier
/// one are written, and the scales wait until all is read.
__device__ void compress_row(const uint16_t* from, uint8_t* to, int64_t hidden, float* scales,
                             int lane) {
  using Cast = LlSendFP8<LlFormat::kFP8>;
  for (int piece = 0; piece * int64_t{Cast::kChannels} < hidden; ++piece) {
    const LlPiece cast = Cast::cast(from, hidden, piece, lane);
    const int64_t channel = int64_t{piece} * Cast::kChannels + 16 * lane;
    __syncwarp();
    if (channel >= hidden) continue;
    *reinterpret_cast<uint4*>(to + channel) = cast.data;
    if (channel % kScaleGroup == 0) scales[channel / kScaleGroup] = cast.scale;
  }
  __syncwarp();
  auto* out = reinterpret_cast<float*>(to + ll_wire_scales(hidden));
  for (int i = lane; i < hidden / kScaleGroup; i += kWarpSize) out[i] = scales[i];
  __syncwarp();
}

/// All blocks: puts the rows of x where peers read them.
__device__ void stage(const LlGroup& g, const LlCombineCall& call, void* shared) {
  const int num_local = g.group.num_local_experts, num_ranks = g.group.num_ranks;
  const int64_t hidden = call.sizes.hidden;
  auto* words = static_cast<int32_t*>(shared);
  const RowList list{words, words + num_local + 1, words + 2 * num_local + 1};
  list.fill(g, g.counts + static_cast<int64_t>(call.half) * num_local * num_ranks);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  auto* scales =
      reinterpret_cast<float*>(words + 3 * num_local + 1) + warp * (hidden / kScaleGroup);
  const LlHalfLayout half(call.sizes, num_ranks, num_local);
  uint8_t* window = ll_window(g, g.group.rank, call.half);
  for (int32_t i = blockIdx.x * kNumWarps + warp; i < list.begin[num_local];
       i += gridDim.x * kNumWarps) {
    const int local = list.expert_of(i, num_local);
    const int32_t row = i - list.begin[local];
    const uint16_t* from = call.args.x + (local * half.rows_per_expert + row) * hidden;
    uint8_t* to = window + half.combine_row(local, row);
    if (ll_is_compressed(call)) {
      compress_row(from, to, hidden, scales, lane);
    } else {
      const bool is_read_there = row >= list.own_begin[local] && row < list.own_end[local];
      if (!is_read_there && reinterpret_cast<const uint8_t*>(from) != to)
        copy_row(from, to, hidden, lane);
    }
  }
}

__global__ void __launch_bounds__(kNumThreads, 1)
    combine_send_kernel(const __grid_constant__ LlGroup g,
                        const __grid_constant__ LlCombineCall call) {
  extern __shared__ uint4 shared[];
  __shared__ LlBoard board;
  __shared__ LlWords words;
  const LlStart start = ll_start(g);
  if (blockIdx.x == 0 && threadIdx.x == 0) ll_stamp(g, start.number, kLlStampBegin);
  if (start.failed == 0) {
    ll_check_idx(g, call, blockIdx.x, gridDim.x);
    if (!call.args.is_zero_copy && !g.state->halves[call.half].error) stage(g, call, shared);
  }
  if (!ll_is_last_block<LlReaders::kPeers>(g)) return;
  LlHalfState& half = g.state->halves[call.half];
  if (start.failed == 0) ll_post_rows(g, call, start, board, words);
  __syncthreads();
  if (threadIdx.x != 0) return;
  half.combine = start.failed ? 0 : start.number + 1;
  half.is_collected = 0;
  if (start.failed == 0) g.state->next_number = start.number + 1;
  ll_reset_blocks(g);
}

}  // namespace

void launch_ll_combine_send(const LlGroup& group, const LlCombineCall& call, cudaStream_t stream) {
  const int num_blocks = call.args.is_zero_copy ? 1 : call.sizes.num_threads;
  const int64_t num_scales = static_cast<LlWire>(call.args.wire) == LlWire::kFP8
                                 ? kNumWarps * call.sizes.hidden / kScaleGroup
                                 : 0;
  const auto shared_bytes = static_cast<int>(
      sizeof(int32_t) * (3 * int64_t{group.group.num_local_experts} + 1 + num_scales));
  EP_CHECK_CUDA(cudaFuncSetAttribute(combine_send_kernel,
                                     cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  combine_send_kernel<<<num_blocks, kNumThreads, shared_bytes, stream>>>(group, call);
  EP_CHECK_CUDA(cudaGetLastError());
}

}  // namespace ep::cuda

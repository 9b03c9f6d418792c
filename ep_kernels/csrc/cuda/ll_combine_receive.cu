// The receive half of a low-latency combine on the GPU. The twin of cpu/ll_combine.cpp and of the
// steps of combine in cpu/ll_receive.cpp.
//
//   block 0       the send half, if this is the kernel of a whole call             ll_post_rows
//   every block   wait for the posts                                               take_posts
//                 its share of the pieces of rows: list the rows of a token,
//                 pull, weigh and sum them                                         Sums::run
//   last block    sum again without ranks that some block has not seen, or
//                 that have left this one meanwhile                                look_back
//                 tell                                                             finish

#include <algorithm>

#include "core/math.h"
#include "cuda/check_cuda.h"
#include "cuda/ll_combine_post.cuh"
#include "cuda/ll_kernels.h"
#include "cuda/ll_posts.cuh"
#include "cuda/ll_rows.cuh"

namespace ep::cuda {
namespace {

constexpr int kNumThreads = 1024;
constexpr int kNumWarps = kNumThreads / kWarpSize;
constexpr int kMinPieces = 8;    ///< of a block, or fewer blocks do
constexpr int kMaxSlots = 2048;  ///< choices that a block lists at once
constexpr int kRowsAtOnce = 8;
constexpr int kChannels = 8 * kWarpSize;  ///< of a piece

/// A row of a token, and its weight; null: none. First where it is in half 0 of `rank`, which is
/// known before the posts come; -1: nowhere else.
struct Source {
  const uint8_t* row;
  float weight;
  int rank;
};

/// One block's share of the sums. Pieces are numbered token by token.
struct Sums {
  const LlGroup& g;
  const LlCombineCall& call;
  const LlBoard& board;  ///< the posts of the combine
  Source* list;          ///< rows of the tokens of a wave
  int begin, end;        ///< pieces
  int pieces_per_token, tokens_per_wave;

  /// A row at its owner, in half 0 of it, unless it is in the caller's tensor or came from far.
  __device__ Source find(int64_t expert, int64_t row, float weight) const {
    const int rank = g.group.placement.rank_of[expert];
    if (ll_is_far(g, rank))
      return {ll_far_result(g, call.sizes, call.half, expert, row), weight, -1};
    const int64_t local = g.group.placement.local_of[expert];
    const LlHalfLayout half(call.sizes, g.group.num_ranks, g.num_local[rank]);
    if (rank == g.group.rank && !ll_is_compressed(call))  // own rows were not staged
      return {reinterpret_cast<const uint8_t*>(call.args.x + (local * half.rows_per_expert + row) *
                                                                 call.sizes.hidden),
              weight, -1};
    return {ll_window(g, rank, 0) + half.combine_row(local, row), weight, rank};
  }

  __device__ int first_token() const { return begin / pieces_per_token; }
  __device__ int wave_end(int first) const {
    return min(first + tokens_per_wave, ceil_div(end, pieces_per_token));
  }

  /// All threads: lists the rows of the tokens of a wave.
  __device__ void fill(int first) const {
    const int num_topk = call.sizes.num_topk;
    for (int i = threadIdx.x; i < (wave_end(first) - first) * num_topk; i += blockDim.x) {
      const int choice = first * num_topk + i;
      const int32_t row = call.args.rows[choice], expert = call.args.experts[choice];
      const float weight = call.args.topk_weights[choice];
      list[i] = {nullptr, weight, -1};
      const bool is_sent = row >= 0 && expert >= 0 && expert < g.group.num_experts;
      if (is_sent)  // after a dispatch that failed these words may be anything
        list[i] = find(expert, row, weight);
    }
  }

  /// All threads, the same as in fill(): the rows are those of `sources`, in the halves that their
  /// posts name.
  __device__ void resolve(int first, LlRanks sources) const {
    for (int i = threadIdx.x; i < (wave_end(first) - first) * call.sizes.num_topk;
         i += blockDim.x) {
      const int rank = list[i].rank;
      if (!ll_has(sources, rank < 0 ? g.group.rank : rank)) {
        list[i].row = nullptr;
      } else if (rank >= 0 && list[i].row) {
        list[i].row += board.posts[rank].word[kLlWordWindow] * g.half_bytes;
      }
    }
    __syncthreads();
  }

  /// Adds the rows of a token at this lane's channels, in order.
  __device__ void add(const Source* rows, int64_t channel, float (&sum)[8]) const {
    for (int first = 0; first < call.sizes.num_topk; first += kRowsAtOnce) {
      uint4 parts[kRowsAtOnce];
#pragma unroll
      for (int i = 0; i < kRowsAtOnce; ++i)
        if (first + i < call.sizes.num_topk && rows[first + i].row)
          parts[i] = load_once(reinterpret_cast<const uint4*>(rows[first + i].row + 2 * channel));
#pragma unroll
      for (int i = 0; i < kRowsAtOnce; ++i) {
        if (first + i >= call.sizes.num_topk || !rows[first + i].row) continue;
        const float weight = rows[first + i].weight;
#pragma unroll
        for (int j = 0; j < 8; ++j)
          sum[j] = __fadd_rn(sum[j], __fmul_rn(weight, bf16_to_float(ll_half_word(parts[i], j))));
      }
    }
  }

  __device__ void add_compressed(const Source* rows, int64_t channel, float (&sum)[8]) const {
    for (int k = 0; k < call.sizes.num_topk; ++k) {
      const uint8_t* row = rows[k].row;
      if (!row) continue;
      const uint2 part = *reinterpret_cast<const uint2*>(row + channel);
      const float scale = *reinterpret_cast<const float*>(row + ll_wire_scales(call.sizes.hidden) +
                                                          channel / kScaleGroup * 4);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const uint32_t word = j < 4 ? part.x : part.y;
        const float value = e4m3_to_float(static_cast<uint8_t>(word >> (8 * (j % 4))));
        sum[j] = __fadd_rn(sum[j], __fmul_rn(rows[k].weight, __fmul_rn(scale, value)));
      }
    }
  }

  /// All threads: the sums of this share, from the rows of `sources`. The first wave is listed.
  __device__ void run(LlRanks sources) const {
    for (int first = first_token(); first * pieces_per_token < end; first = wave_end(first)) {
      if (first != first_token()) fill(first);
      resolve(first, sources);
      sum_wave(first);
      __syncthreads();
    }
  }
  __device__ void sum_wave(int first) const {
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const int64_t hidden = call.sizes.hidden;
    for (int piece = max(begin, first * pieces_per_token) + warp;
         piece < min(end, wave_end(first) * pieces_per_token); piece += kNumWarps) {
      const int token = piece / pieces_per_token;
      const int64_t channel = piece % pieces_per_token * kChannels + 8 * lane;
      if (channel >= hidden) continue;
      const Source* rows = list + (token - first) * call.sizes.num_topk;
      float sum[8] = {};
      if (ll_is_compressed(call))
        add_compressed(rows, channel, sum);
      else
        add(rows, channel, sum);
      store_once(reinterpret_cast<uint4*>(call.args.out + int64_t{token} * hidden + channel),
                 BF16::store(sum));
    }
  }
};

/// All threads: the posts of all ranks, awaited or kept. Returns who came.
__device__ LlRanks take_posts(const LlGroup& g, const LlCombineCall& call, LlBoard& board,
                              uint64_t number) {
  const LlHalfState& half = g.state->halves[call.half];
  if (!call.is_whole && half.is_collected) {
    for (int i = threadIdx.x; i < g.group.num_ranks * kNumLlWords; i += blockDim.x)
      board.posts[i / kNumLlWords].word[i % kNumLlWords] =
          half.posts[i / kNumLlWords].word[i % kNumLlWords];
    __syncthreads();
    return half.arrived;
  }
  int64_t* stats = blockIdx.x == 0 ? call.args.wait_recv_cost_stats : nullptr;
  const LlRanks from = ll_peers(g, read_word(&g.state->masked));
  return ll_wait_posts(g, board, number, from, stats, [&](int peer, LlLoss) {
    atomicOr(atomic_word(&g.state->late), ll_bit(peer));
  });
}

/// Whom this rank leaves out when it learns whom its peers leave out.
__device__ LlRanks learn(const LlGroup& g, const LlBoard& board, LlRanks came) {
  LlRanks masked = 0;
  for (int peer = 0; peer < g.group.num_ranks; ++peer) {
    if (!ll_has(came, peer)) continue;
    const LlRanks theirs = board.posts[peer].word[kLlWordMasked];
    masked |= ll_has(theirs, g.group.rank) ? ll_bit(peer) : theirs;
  }
  return masked;
}

/// One thread of the last block: masks, or fails for, those that some block has not seen.
__device__ void lose_late(const LlGroup& g, uint64_t number, LlRanks late) {
  for (int peer = 0; peer < g.group.num_ranks; ++peer) {
    if (!ll_has(late, peer) || peer == g.group.rank) continue;
    LlLoss loss = LlLoss::kLate;
    ll_is_lost(g, peer, &loss);
    ll_lose_post(g, number, peer, loss);
  }
}

/// All threads of the last block, when not all is as usual: who has been summed in the end, after
/// `used` by all blocks.
__device__ LlRanks look_back(const LlGroup& g, Sums sums, LlRanks used, bool is_uneven) {
  sums.begin = 0;
  sums.end = static_cast<int>(sums.call.sizes.num_tokens) * sums.pieces_per_token;
  while (true) {
    // An owner that has masked us may have overwritten rows while we read them.
    for (int peer = threadIdx.x; peer < g.group.num_ranks; peer += blockDim.x)
      if (ll_has(used, peer) && peer != g.group.rank && ll_has_left(g, peer)) ll_mask(g, peer);
    __syncthreads();
    const LlRanks sources = used & ~read_word(&g.state->masked);
    if (sources == used && !is_uneven) return used;
    used = sources;
    is_uneven = false;
    __syncthreads();
    sums.fill(0);
    sums.run(used);
  }
}

__device__ Sums make_sums(const LlGroup& g, const LlCombineCall& call, const LlBoard& board,
                          void* shared) {
  const int per_token = static_cast<int>(ceil_div(call.sizes.hidden, int64_t{kChannels}));
  const Range range = split_evenly(call.sizes.num_tokens * per_token, blockIdx.x, gridDim.x);
  return {g,
          call,
          board,
          static_cast<Source*>(shared),
          static_cast<int>(range.begin),
          static_cast<int>(range.end),
          per_token,
          max(1, kMaxSlots / call.sizes.num_topk)};
}

/// All threads of the last block: loses whom some block has not seen, and leaves out whom a peer
/// leaves out.
__device__ void take_news(const LlGroup& g, uint64_t number, const LlBoard& board, LlRanks came,
                          LlRanks late) {
  if (threadIdx.x == 0) {
    if (late) lose_late(g, number, late);
    for (int peer = 0; peer < g.group.num_ranks; ++peer)
      if (ll_has(came, peer) &&
          (board.posts[peer].word[kLlWordMasked] & ~read_word(&g.state->masked)) != 0)
        ll_adopt(g, peer, board.posts[peer].word[kLlWordMasked]);
  }
  __syncthreads();
}

/// All threads of the last block: the outcome.
__device__ void finish(const LlGroup& g, const Sums& sums, LlBoard& board, LlRanks came,
                       LlRanks sources, int finding, uint64_t number) {
  const LlCombineCall& call = sums.call;
  LlState& state = *g.state;
  LlHalfState& half = state.halves[call.half];
  const LlRanks late = read_word(&state.late), masked = read_word(&state.masked);
  bool is_news = late != 0 || read_word(&state.failed) != 0;
  for (int peer = threadIdx.x; peer < g.group.num_ranks; peer += blockDim.x) {
    if (!ll_has(came, peer)) continue;
    is_news |= (board.posts[peer].word[kLlWordMasked] & ~masked) != 0;
    is_news |= peer != g.group.rank && ll_has_left(g, peer);
  }
  bool is_summed = finding == INT32_MAX;
  if (__syncthreads_or(is_news || (sources & masked) != 0)) {
    take_news(g, number, board, came, late);
    is_summed &= read_word(&state.failed) == 0;
    // Blocks may differ in whether they have summed the late ones.
    if (is_summed) sources = look_back(g, sums, sources & ~late, late != 0);
  }
  for (int src = threadIdx.x; src < g.group.num_ranks; src += blockDim.x)
    call.args.missing[src] = !is_summed || !ll_has(sources, src);
  __syncthreads();
  if (threadIdx.x != 0) return;
  LlStatus status = LlStatus::kOk;
  if (finding != INT32_MAX)
    status = ll_report(g, board, came, number, finding, call.record);
  else if (!is_summed)
    status = LlStatus::kTimeout;
  ll_stamp(g, number, kLlStampEnd);
  half.combine = 0;
  half.is_collected = 0;
  if (call.is_whole) state.next_number = number + 1;
  ll_reset_blocks(g);
  ll_end(g, call.record, status);
}

__global__ void __launch_bounds__(kNumThreads, 1)
    combine_receive_kernel(const __grid_constant__ LlGroup g,
                           const __grid_constant__ LlCombineCall call) {
  extern __shared__ uint4 shared[];
  __shared__ LlBoard board;
  __shared__ LlWords words;
  const LlStart start = ll_start(g);
  const LlHalfState& half = g.state->halves[call.half];
  const LlRanks peers = half.peers & ~start.masked;
  const uint64_t number = call.is_whole ? start.number : start.combines[call.half] - 1;
  const bool is_usable = start.failed == 0 && (call.is_whole || start.combines[call.half] != 0);
  const Sums sums = make_sums(g, call, board, shared);
  const bool is_first = blockIdx.x == 0 && threadIdx.x == 0;
  if (is_first) ll_stamp(g, number, call.is_whole ? kLlStampBegin : kLlStampReceiving);
  if (!call.is_whole || blockIdx.x != 0) sums.fill(sums.first_token());
  if (call.is_whole && is_usable && blockIdx.x == 0) {
    ll_check_idx(g, call, 0, 1);
    __syncthreads();
    const LlRanks left = ll_post_rows(g, call, start, board, words) & ~start.masked;
    if (left != 0 && threadIdx.x == 0)  // since other blocks began: they may sum their rows
      atomicOr(atomic_word(&g.state->late), left);
    sums.fill(sums.first_token());
  }
  LlRanks came = 0, sources = 0;
  int finding = INT32_MAX;
  if (is_usable) {
    came = take_posts(g, call, board, number);
    if (is_first) ll_stamp(g, number, kLlStampArrived);
    finding = ll_find(g, board, came);
    sources = peers & came & ~learn(g, board, came);
    if (finding == INT32_MAX) sums.run(sources);
    if (is_first) ll_stamp(g, number, kLlStampSummed);
  }
  if (ll_is_last_block<LlReaders::kThisDevice>(g))
    finish(g, sums, board, came, sources, finding, number);
}

int64_t num_pieces(const LlSizes& sizes) {
  return sizes.num_tokens * ceil_div(sizes.hidden, int64_t{kChannels});
}

}  // namespace

void launch_ll_combine_receive(const LlGroup& group, const LlCombineCall& call,
                               cudaStream_t stream) {
  const auto num_blocks = static_cast<int>(
      std::clamp<int64_t>(num_pieces(call.sizes) / kMinPieces, 1, call.sizes.num_threads));
  const auto shared_bytes =
      static_cast<int>(sizeof(Source)) * std::max(kMaxSlots, call.sizes.num_topk);
  EP_CHECK_CUDA(cudaFuncSetAttribute(combine_receive_kernel,
                                     cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  combine_receive_kernel<<<num_blocks, kNumThreads, shared_bytes, stream>>>(group, call);
  EP_CHECK_CUDA(cudaGetLastError());
}

}  // namespace ep::cuda

// Low-latency combine on the GPU. The twin of cpu/ll_combine.cpp and of the steps of combine in
// cpu/low_latency.cpp and cpu/ll_receive.cpp.
//
//   send      every block   compare topk_idx with the handle; copy or compress rows   stage
//             last block    "my rows can be read" to all ranks                        post
//   receive   every block   wait for the posts; its share of the pieces of rows:
//                           list the rows of a token, pull, weigh and sum them        reduce
//             last block    sum again without ranks that some block has not seen, or
//                           that have left this one meanwhile; tell                   finish

#include <algorithm>

#include "core/math.h"
#include "cuda/check_cuda.h"
#include "cuda/ll_kernels.h"
#include "cuda/ll_protocol.cuh"
#include "cuda/ll_rows.cuh"

namespace ep::cuda {
namespace {

constexpr int kNumThreads = 1024;
constexpr int kNumWarps = kNumThreads / kLlWarpSize;
constexpr int kMinPieces = 8;    ///< of a block, or fewer blocks do
constexpr int kMaxSlots = 2048;  ///< choices that a block lists at once
constexpr int kRowsAtOnce = 8;
constexpr int kChannels = 8 * kLlWarpSize;  ///< of a piece

__device__ bool is_compressed(const LlCombineCall& call) {
  return static_cast<LlWire>(call.args.wire) == LlWire::kFP8;
}

// Send half.

/// All blocks: notes the first choice that is not what was dispatched.
__device__ void check_idx(const LlGroup& g, const LlCombineCall& call) {
  const int64_t num_choices = call.sizes.num_tokens * call.sizes.num_topk;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < num_choices;
       i += int64_t{gridDim.x} * blockDim.x)
    if (call.args.topk_idx[i] != call.args.experts[i])
      atomicMin(atomic_word(&g.state->bad), static_cast<AtomicWord>(i));
}

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
    if (threadIdx.x < kLlWarpSize) scan(num_local);
    __syncthreads();
  }
  /// One warp: turns counts into first rows.
  __device__ void scan(int num_local) const {
    const int lane = threadIdx.x;
    int32_t before = 0;
    for (int first = 1; first <= num_local; first += kLlWarpSize) {
      const int at = first + lane;
      int32_t sum = at <= num_local ? begin[at] : 0;
#pragma unroll
      for (int step = 1; step < kLlWarpSize; step *= 2) {
        const int32_t other = __shfl_up_sync(kLlLanes, sum, step);
        if (lane >= step) sum += other;
      }
      if (at <= num_local) begin[at] = before + sum;
      before += __shfl_sync(kLlLanes, sum, kLlWarpSize - 1);
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
  for (int first = lane; first < num_vectors; first += kAtOnce * kLlWarpSize) {
    uint4 parts[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if (first + i * kLlWarpSize < num_vectors)
        parts[i] = load_once(source + first + i * kLlWarpSize);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if (first + i * kLlWarpSize < num_vectors) target[first + i * kLlWarpSize] = parts[i];
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
  for (int i = lane; i < hidden / kScaleGroup; i += kLlWarpSize) out[i] = scales[i];
  __syncwarp();
}

/// All blocks: puts the rows of x where peers read them.
__device__ void stage(const LlGroup& g, const LlCombineCall& call, void* shared) {
  const int num_local = g.group.num_local_experts, num_ranks = g.group.num_ranks;
  const int64_t hidden = call.sizes.hidden;
  auto* words = static_cast<int32_t*>(shared);
  const RowList list{words, words + num_local + 1, words + 2 * num_local + 1};
  list.fill(g, g.counts + static_cast<int64_t>(call.half) * num_local * num_ranks);
  const int warp = threadIdx.x / kLlWarpSize, lane = threadIdx.x % kLlWarpSize;
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
    if (is_compressed(call)) {
      compress_row(from, to, hidden, scales, lane);
    } else {
      const bool is_read_there = row >= list.own_begin[local] && row < list.own_end[local];
      if (!is_read_there && reinterpret_cast<const uint8_t*>(from) != to)
        copy_row(from, to, hidden, lane);
    }
  }
}

/// All threads of the last block: announces that the rows can be read.
__device__ void post_rows(const LlGroup& g, const LlCombineCall& call, LlBoard& board,
                          LlWords& words) {
  LlState& state = *g.state;
  LlHalfState& half = state.halves[call.half];
  const uint64_t number = state.next_number;
  ll_collect_old(g, board, number);
  const LlRanks view = read_word(&state.masked);
  ll_begin_words(g, words, LlOp::kCombine, call.sizes, call.held, view);
  if (threadIdx.x == 0) {
    words.word[kLlFieldDispatch] = half.number - 1;
    words.word[kLlFieldWire] = call.args.wire;
    words.word[kLlWordWindow] = call.half;
    const auto bad = static_cast<int64_t>(state.bad);
    const int num_topk = call.sizes.num_topk;
    if (half.error)
      ll_refuse_in(words, LlStatus::kNoDispatch, {0, 0, 0, 0});
    else if (state.bad != ~uint64_t{0})
      ll_refuse_in(
          words, LlStatus::kOtherIdx,
          {bad / num_topk, bad % num_topk, call.args.topk_idx[bad], call.args.experts[bad]});
  }
  __syncthreads();
  ll_send_post(g, number, 0, words, nullptr, nullptr, ll_peers(g, view));
  if (threadIdx.x != 0) return;
  half.combine = number + 1;
  half.is_collected = 0;
  state.next_number = number + 1;
}

__global__ void __launch_bounds__(kNumThreads, 1)
    combine_send_kernel(const __grid_constant__ LlGroup g,
                        const __grid_constant__ LlCombineCall call) {
  extern __shared__ uint4 shared[];
  __shared__ LlBoard board;
  __shared__ LlWords words;
  const bool is_usable = load_word(&g.state->failed) == 0;
  if (is_usable) {
    check_idx(g, call);
    if (!call.args.is_zero_copy && !g.state->halves[call.half].error) stage(g, call, shared);
  }
  if (!ll_is_last_block(g)) return;
  if (is_usable)
    post_rows(g, call, board, words);
  else if (threadIdx.x == 0)
    g.state->halves[call.half].combine = 0;
  __syncthreads();
  if (threadIdx.x == 0) ll_reset_blocks(g);
}

// Receive half.

/// A row of a token, and its weight; null: none.
struct Source {
  const uint8_t* row;
  float weight;
};

/// One block's share of the sums. Pieces are numbered token by token.
struct Sums {
  const LlGroup& g;
  const LlCombineCall& call;
  const LlBoard& board;  ///< the posts of the combine
  Source* list;          ///< rows of the tokens of a wave
  int64_t begin, end;    ///< pieces
  int pieces_per_token, tokens_per_wave;

  __device__ const uint8_t* row_at(int src, int64_t local, int64_t row) const {
    const LlHalfLayout half(call.sizes, g.group.num_ranks, g.num_local[src]);
    if (src == g.group.rank && !is_compressed(call))  // own rows were not staged
      return reinterpret_cast<const uint8_t*>(call.args.x + (local * half.rows_per_expert + row) *
                                                                call.sizes.hidden);
    const auto at = static_cast<int>(board.posts[src].word[kLlWordWindow]);
    return ll_window(g, src, at) + half.combine_row(local, row);
  }

  /// All threads: lists the rows of the tokens of a wave.
  __device__ void fill(int64_t first, int64_t last, LlRanks sources) const {
    __syncthreads();
    const int num_topk = call.sizes.num_topk;
    for (int64_t i = threadIdx.x; i < (last - first) * num_topk; i += blockDim.x) {
      const int64_t choice = first * num_topk + i;
      const int32_t row = call.args.rows[choice], expert = call.args.experts[choice];
      const float weight = call.args.topk_weights[choice];
      Source source{nullptr, weight};
      if (row >= 0) {
        const int src = g.group.placement.rank_of[expert];
        if (ll_has(sources, src)) source.row = row_at(src, g.group.placement.local_of[expert], row);
      }
      list[i] = source;
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

  /// All threads: the sums of this share, from the rows of `sources`.
  __device__ void run(LlRanks sources) const {
    const int warp = threadIdx.x / kLlWarpSize, lane = threadIdx.x % kLlWarpSize;
    const int64_t hidden = call.sizes.hidden;
    for (int64_t first = begin / pieces_per_token; first * pieces_per_token < end;
         first += tokens_per_wave) {
      const int64_t last = min(first + tokens_per_wave, call.sizes.num_tokens);
      fill(first, last, sources);
      for (int64_t piece = max(begin, first * pieces_per_token) + warp;
           piece < min(end, last * pieces_per_token); piece += kNumWarps) {
        const int64_t token = piece / pieces_per_token;
        const int64_t channel = piece % pieces_per_token * kChannels + 8 * lane;
        if (channel >= hidden) continue;
        const Source* rows = list + (token - first) * call.sizes.num_topk;
        float sum[8] = {};
        if (is_compressed(call))
          add_compressed(rows, channel, sum);
        else
          add(rows, channel, sum);
        store_once(reinterpret_cast<uint4*>(call.args.out + token * hidden + channel),
                   BF16::store(sum));
      }
    }
  }
};

/// All threads: the posts of all ranks, awaited or kept. Returns who came.
__device__ LlRanks take_posts(const LlGroup& g, const LlCombineCall& call, LlBoard& board) {
  const LlHalfState& half = g.state->halves[call.half];
  if (half.is_collected) {
    for (int i = threadIdx.x; i < g.group.num_ranks * kNumLlWords; i += blockDim.x)
      board.posts[i / kNumLlWords].word[i % kNumLlWords] =
          half.posts[i / kNumLlWords].word[i % kNumLlWords];
    __syncthreads();
    return half.arrived;
  }
  int64_t* stats = blockIdx.x == 0 ? call.args.wait_recv_cost_stats : nullptr;
  const LlRanks from = ll_peers(g, read_word(&g.state->masked));
  return ll_wait_posts(g, board, half.combine - 1, from, stats, [&](int peer, LlLoss, uint64_t) {
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
__device__ void lose_late(const LlGroup& g, const LlCombineCall& call, LlRanks late) {
  const uint64_t expected = ll_post_flag(g.state->halves[call.half].combine - 1, 0);
  for (int peer = 0; peer < g.group.num_ranks; ++peer) {
    if (!ll_has(late, peer)) continue;
    LlLoss loss = LlLoss::kLate;
    ll_is_lost(g, peer, &loss);
    ll_lose(g, ll_timeout(g, Phase::kPost, peer, expected, 0), loss);
  }
}

/// All threads of the last block: who has been summed in the end, after `used` by all blocks.
__device__ LlRanks look_back(const LlGroup& g, LlBoard& board, Sums sums, LlRanks used,
                             bool is_uneven) {
  sums.begin = 0;
  sums.end = sums.call.sizes.num_tokens * sums.pieces_per_token;
  while (true) {
    // An owner that has masked us may have overwritten rows while we read them.
    __syncthreads();
    for (int peer = threadIdx.x; peer < g.group.num_ranks; peer += blockDim.x)
      if (ll_has(used, peer) && peer != g.group.rank && ll_has_left(g, peer)) ll_mask(g, peer);
    __syncthreads();
    if (threadIdx.x == 0) board.masked = read_word(&g.state->masked);
    __syncthreads();
    const LlRanks sources = used & ~board.masked;
    if (sources == used && !is_uneven) return used;
    used = sources;
    is_uneven = false;
    sums.run(used);
  }
}

__device__ Sums make_sums(const LlGroup& g, const LlCombineCall& call, const LlBoard& board,
                          void* shared) {
  const int per_token = static_cast<int>(ceil_div(call.sizes.hidden, int64_t{kChannels}));
  const Range range = split_evenly(call.sizes.num_tokens * per_token, blockIdx.x, gridDim.x);
  return {g,           call,      board,     static_cast<Source*>(shared),
          range.begin, range.end, per_token, max(1, kMaxSlots / call.sizes.num_topk)};
}

/// All threads of the last block: the outcome.
__device__ void finish(const LlGroup& g, const Sums& sums, LlBoard& board, LlRanks came,
                       LlRanks sources, int finding) {
  const LlCombineCall& call = sums.call;
  LlState& state = *g.state;
  LlHalfState& half = state.halves[call.half];
  const LlRanks late = state.late;  // blocks may differ in whether they have summed these
  if (threadIdx.x == 0) {
    if (late) lose_late(g, call, late);
    for (int peer = 0; peer < g.group.num_ranks; ++peer)
      if (ll_has(came, peer) &&
          (board.posts[peer].word[kLlWordMasked] & ~read_word(&state.masked)) != 0)
        ll_adopt(g, peer, board.posts[peer].word[kLlWordMasked]);
  }
  __syncthreads();
  const bool is_summed = finding == INT32_MAX && load_word(&state.failed) == 0;
  if (is_summed) sources = look_back(g, board, sums, sources & ~late, late != 0);
  for (int src = threadIdx.x; src < g.group.num_ranks; src += blockDim.x)
    call.args.missing[src] = !is_summed || !ll_has(sources, src);
  __syncthreads();
  if (threadIdx.x != 0) return;
  LlStatus status = LlStatus::kOk;
  if (finding != INT32_MAX)
    status = ll_report(g, board, came, half.combine - 1, finding, call.record);
  else if (!is_summed)
    status = LlStatus::kTimeout;
  half.combine = 0;
  half.is_collected = 0;
  ll_reset_blocks(g);
  ll_end(g, call.record, status);
}

__global__ void __launch_bounds__(kNumThreads, 1)
    combine_receive_kernel(const __grid_constant__ LlGroup g,
                           const __grid_constant__ LlCombineCall call) {
  extern __shared__ uint4 shared[];
  __shared__ LlBoard board;
  const LlHalfState& half = g.state->halves[call.half];
  const Sums sums = make_sums(g, call, board, shared);
  LlRanks came = 0, sources = 0;
  int finding = INT32_MAX;
  if (half.combine != 0 && load_word(&g.state->failed) == 0) {
    const LlRanks peers = half.peers & ~read_word(&g.state->masked);
    came = take_posts(g, call, board);
    finding = ll_find(g, board, came);
    sources = peers & came & ~learn(g, board, came);
    if (finding == INT32_MAX) sums.run(sources);
  }
  if (ll_is_last_block(g)) finish(g, sums, board, came, sources, finding);
}

int64_t num_pieces(const LlSizes& sizes) {
  return sizes.num_tokens * ceil_div(sizes.hidden, int64_t{kChannels});
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

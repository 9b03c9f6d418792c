// Low-latency dispatch on the GPU. The twin of cpu/ll_dispatch.cpp and of the steps of dispatch in
// cpu/low_latency.cpp and cpu/ll_receive.cpp.
//
//   send      block 0       count the choices, check them, post the counts           post_counts
//             every block   its share of the pieces of rows: rows before it          count_before
//                           place its tokens relative to this rank's first rows      place
//                           load and cast the first pieces, while the posts come
//                           wait for the posts, agree                                ll_settle
//                           final rows, send                                         resolve, send
//             last block    "done" to all ranks, the state of the half               close
//   receive   one block     wait for done, zero what is missing, counts, statistics

#include <algorithm>

#include "core/math.h"
#include "cuda/check_cuda.h"
#include "cuda/ll_agreement.cuh"
#include "cuda/ll_kernels.h"
#include "cuda/ll_rows.cuh"

namespace ep::cuda {
namespace {

constexpr int kNumThreads = 1024;
constexpr int kNumWarps = kNumThreads / kLlWarpSize;
constexpr int kReceiveThreads = 512;
constexpr int kMinPieces = 8;    ///< of a block, or fewer blocks do
constexpr int kHeldPieces = 4;   ///< of a warp, in registers while the posts come
constexpr int kMaxSlots = 2048;  ///< choices that a block places at once

/// A choice of a token: first its expert and its row, then where it goes.
union Slot {
  struct {
    int32_t expert, row;
  } choice;
  LlTarget target;
};

/// One block's share of a dispatch. Pieces are numbered token by token.
template <typename Format>
struct Share {
  const LlGroup& g;
  const LlDispatchCall& call;
  const LlBoard& board;  ///< the posts, once they have come
  int32_t* next;         ///< [E] rows of this rank for each expert, so far
  Slot* slots;           ///< of the tokens of a wave
  uint64_t number;
  int64_t begin, end;  ///< pieces
  int pieces_per_token, tokens_per_wave;

  __device__ int num_topk() const { return call.args.sizes.num_topk; }
  __device__ int64_t first_token() const { return begin / pieces_per_token; }
  __device__ int64_t end_token() const { return ceil_div(end, int64_t{pieces_per_token}); }
  __device__ int64_t wave_end(int64_t first) const {
    return min(first + tokens_per_wave, end_token());
  }
  __device__ bool is_expert(int64_t expert) const {
    return expert >= 0 && expert < g.group.num_experts;
  }

  /// All threads: counts the choices of the first `num_tokens` tokens.
  __device__ void count(int64_t num_tokens) const {
    for (int i = threadIdx.x; i < g.group.num_experts; i += blockDim.x) next[i] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < num_tokens * num_topk(); i += blockDim.x) {
      const int64_t expert = call.args.topk_idx[i];
      if (is_expert(expert)) atomicAdd(next + expert, 1);
    }
    __syncthreads();
  }

  /// All threads: places the tokens of a wave by the order of tokens.
  __device__ void place(int64_t first) const {
    const int64_t num_choices = (wave_end(first) - first) * num_topk();
    for (int64_t i = threadIdx.x; i < num_choices; i += blockDim.x) {
      const int64_t expert = call.args.topk_idx[first * num_topk() + i];
      slots[i].choice.expert = is_expert(expert) ? static_cast<int32_t>(expert) : -1;
    }
    __syncthreads();
    if (threadIdx.x >= kLlWarpSize) return;
    for (int64_t token = 0; token < wave_end(first) - first; ++token) {
      for (int k = threadIdx.x; k < num_topk(); k += kLlWarpSize) {
        auto& choice = slots[token * num_topk() + k].choice;
        if (choice.expert >= 0) choice.row = next[choice.expert]++;
      }
      __syncwarp();
    }
  }

  /// All threads: turns the choices of a wave into targets among the rows of `peers`.
  __device__ void resolve(int64_t first, LlRanks peers) const {
    const LlSizes& sizes = call.args.sizes;
    const int rank = g.group.rank, num_ranks = g.group.num_ranks;
    __syncthreads();
    const int64_t num_choices = (wave_end(first) - first) * num_topk();
    for (int64_t i = threadIdx.x; i < num_choices; i += blockDim.x) {
      const int32_t expert = slots[i].choice.expert;
      const int dst = rank_of_choice(g.group.placement, expert);
      int32_t row = -1;
      LlTarget target{};
      if (dst >= 0 && ll_has(peers, dst)) {
        row = slots[i].choice.row;
        for (int src = 0; src < rank; ++src)
          if (ll_has(peers, src)) row += __ldcg(ll_counts(g, number, rank, src) + expert);
        const LlHalfLayout half(sizes, num_ranks, g.num_local[dst]);
        const int32_t local = g.group.placement.local_of[expert];
        const auto at = static_cast<int>(board.posts[dst].word[kLlWordWindow]);
        uint8_t* window = ll_window(g, dst, at);
        target = {window + half.row(local, row), window + ll_scale_offset(half, sizes, local, row)};
      }
      slots[i].target = target;
      if ((first + i / num_topk()) * pieces_per_token < begin) continue;  // another block's token
      call.args.experts[first * num_topk() + i] =
          static_cast<int32_t>(call.args.topk_idx[first * num_topk() + i]);
      call.args.rows[first * num_topk() + i] = row;
    }
    __syncthreads();
  }
  __device__ LlPiece load(int64_t piece) const {
    return Format::load(call.args, piece / pieces_per_token,
                        static_cast<int>(piece % pieces_per_token), threadIdx.x % kLlWarpSize);
  }

  /// One warp: sends a piece to where the choices of its token go.
  __device__ void send(int64_t piece, const LlPiece& loaded, int64_t first) const {
    const int64_t token = piece / pieces_per_token;
    const int number_in_row = static_cast<int>(piece % pieces_per_token);
    const int64_t stride = call.args.sizes.num_max_tokens_per_rank * g.group.num_ranks;
    const Slot* of_token = slots + (token - first) * num_topk();
    for (int k = 0; k < num_topk(); ++k) {
      const LlTarget target = of_token[k].target;
      if (target.row)
        Format::store(call.args, loaded, target, number_in_row, stride, threadIdx.x % kLlWarpSize);
    }
  }

  /// The pieces of a wave that are this warp's: from, step, to.
  __device__ int64_t first_piece(int64_t first) const {
    return max(begin, first * pieces_per_token) + threadIdx.x / kLlWarpSize;
  }
  __device__ int64_t end_piece(int64_t first) const {
    return min(end, wave_end(first) * pieces_per_token);
  }

  /// All threads: sends the pieces of a wave, those from `skip` rounds on.
  __device__ void send_wave(int64_t first, int skip) const {
    for (int64_t piece = first_piece(first) + skip * kNumWarps; piece < end_piece(first);
         piece += kNumWarps)
      send(piece, load(piece), first);
  }

  /// All threads: sends the waves from `first` on.
  __device__ void send_from(int64_t first, LlRanks peers) const {
    for (; first < end_token(); first = wave_end(first)) {
      __syncthreads();
      place(first);
      resolve(first, peers);
      send_wave(first, 0);
    }
  }
};

/// All threads of block 0: counts all choices; the first bad one makes `words` a refusal.
template <typename Format>
__device__ void check_and_count(const Share<Format>& share, LlBoard& board, LlWords& words) {
  const LlDispatchArgs& args = share.call.args;
  const int64_t num_choices = args.sizes.num_tokens * args.sizes.num_topk;
  const int num_topk = args.sizes.num_topk;
  constexpr AtomicWord kNone = ~AtomicWord{0};
  if (threadIdx.x == 0) board.came = kNone;
  for (int i = threadIdx.x; i < share.g.group.num_experts; i += blockDim.x) share.next[i] = 0;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < num_choices; i += blockDim.x) {
    const int64_t expert = args.topk_idx[i];
    bool is_twice = false;
    for (int64_t other = i - i % num_topk; other < i && expert >= 0; ++other)
      is_twice |= args.topk_idx[other] == expert;
    const bool is_outside = expert < -1 || expert >= share.g.group.num_experts;
    if (is_outside || is_twice)
      atomicMin(&board.came, static_cast<AtomicWord>(2 * i + (is_outside ? 0 : 1)));
    else if (expert >= 0)
      atomicAdd(share.next + expert, 1);
  }
  __syncthreads();
  if (threadIdx.x == 0 && board.came != kNone) {
    const auto i = static_cast<int64_t>(board.came / 2);
    ll_refuse_in(words, board.came % 2 ? LlStatus::kTwice : LlStatus::kBadExpert,
                 {i / num_topk, i % num_topk, args.topk_idx[i], 0});
  }
  __syncthreads();
}

/// All threads of block 0: announces the call with the counts of its rows.
template <typename Format>
__device__ void post_counts(const Share<Format>& share, LlBoard& board, LlWords& words,
                            LlRanks view) {
  const LlDispatchCall& call = share.call;
  ll_collect_old(share.g, board, share.number);
  ll_begin_words(share.g, words, LlOp::kDispatch, call.args.sizes, call.held, view);
  if (threadIdx.x == 0) {
    words.word[kLlWordWindow] = call.half;
    words.word[kLlWordReused] = share.g.state->halves[call.half].number;
    share.g.state->halves[call.half].error = 0;
  }
  check_and_count(share, board, words);
  ll_send_post(share.g, share.number, 0, words, share.next, nullptr, ll_peers(share.g, view));
}

/// Threads of `num_parts` blocks: keeps who sent how much to each expert of this rank.
__device__ void keep_counts(const LlGroup& g, int half, uint64_t number, LlRanks peers, int part,
                            int num_parts) {
  const int num_ranks = g.group.num_ranks;
  int32_t* kept = g.counts + static_cast<int64_t>(half) * g.group.num_local_experts * num_ranks;
  for (int i = part * blockDim.x + threadIdx.x; i < g.group.num_experts * num_ranks;
       i += num_parts * blockDim.x) {
    const int expert = i % g.group.num_experts, src = i / g.group.num_experts;
    if (g.group.placement.rank_of[expert] != g.group.rank) continue;
    const int32_t count =
        ll_has(peers, src) ? __ldcg(ll_counts(g, number, g.group.rank, src) + expert) : 0;
    kept[g.group.placement.local_of[expert] * num_ranks + src] = count;
  }
}

/// All threads of the last block, in a dispatch that was given up: when no peer writes rows here
/// any more, places this rank's rows for its own experts.
template <typename Format>
__device__ void keep_own_rows(Share<Format> share, LlRanks view) {
  const LlGroup& g = share.g;
  const uint64_t deadline = now_ns() + g.group.timeout_ns;
  for (int peer = threadIdx.x; peer < g.group.num_ranks; peer += blockDim.x) {
    LlLoss loss;
    if (ll_has(ll_peers(g, view), peer))
      ll_wait(g, peer, deadline, &loss,
              [&] { return ll_has_done(g, share.call.half, share.number, peer); });
  }
  const LlRanks self = ll_bit(g.group.rank);
  keep_counts(g, share.call.half, share.number, self, 0, 1);
  share.begin = 0;
  share.end = share.call.args.sizes.num_tokens * share.pieces_per_token;
  share.count(0);
  share.send_from(0, self);
  __syncthreads();
}

/// All threads of the last block: tells all ranks, and keeps what the receive half has to know.
template <typename Format>
__device__ void close(const Share<Format>& share, const LlSettled& settled) {
  const LlGroup& g = share.g;
  LlHalfState& half = g.state->halves[share.call.half];
  const bool is_given_up = settled.verdict == LlVerdict::kGivenUp;
  const LlRanks view = is_given_up ? kLlGivenUp : settled.view;
  const LlRanks told = settled.verdict == LlVerdict::kEnd ? 0 : ll_peers(g, settled.view);
  for (int peer = threadIdx.x; peer < g.group.num_ranks; peer += blockDim.x) {
    if (!ll_has(told, peer)) continue;
    half.peer_half[peer] = static_cast<uint8_t>(share.board.posts[peer].word[kLlWordWindow]);
    LlDoneLine& line = ll_done_line(g, half.peer_half[peer], peer, g.group.rank);
    line.view.words[0] = view;
    store_flag(&line.flag, share.number + 1);
  }
  if (is_given_up) keep_own_rows(share, settled.view);
  if (threadIdx.x != 0) return;
  if (g.state->failed || (told == 0 && half.error == 0))
    half.error = static_cast<int32_t>(LlStatus::kTimeout);
  half.number = half.error ? 0 : share.number + 1;
  half.view = view;
  half.peers = is_given_up ? ll_bit(g.group.rank) : told;
  half.combine = 0;
  half.is_collected = 0;
  g.state->next_number = share.number + 1;
  ll_reset_blocks(g);
}

template <typename Format>
__device__ Share<Format> make_share(const LlGroup& g, const LlDispatchCall& call,
                                    const LlBoard& board, void* shared) {
  const LlSizes& sizes = call.args.sizes;
  const int per_token = static_cast<int>(ceil_div(sizes.hidden, int64_t{Format::kChannels}));
  const Range range = split_evenly(sizes.num_tokens * per_token, blockIdx.x, gridDim.x);
  auto* next = static_cast<int32_t*>(shared);
  auto* slots = reinterpret_cast<Slot*>(next + align_up(g.group.num_experts, 4));
  const int wave = max(1, kMaxSlots / sizes.num_topk);
  return {g,           call,      board,     next, slots, read_word(&g.state->next_number),
          range.begin, range.end, per_token, wave};
}

template <typename Format>
__global__ void __launch_bounds__(kNumThreads, 1)
    dispatch_send_kernel(const __grid_constant__ LlGroup g,
                         const __grid_constant__ LlDispatchCall call) {
  extern __shared__ uint4 shared[];
  __shared__ LlBoard board;
  __shared__ LlWords words;
  const Share<Format> share = make_share<Format>(g, call, board, shared);
  const LlRanks view = read_word(&g.state->masked);
  LlSettled settled{LlVerdict::kEnd, view};
  if (load_word(&g.state->failed) == 0) {
    if (blockIdx.x == 0) post_counts(share, board, words, view);
    const int64_t first = share.first_token();
    share.count(first);
    if (first < share.end_token()) share.place(first);
    LlPiece held[kHeldPieces];
#pragma unroll
    for (int i = 0; i < kHeldPieces; ++i) {
      const int64_t piece = share.first_piece(first) + i * kNumWarps;
      if (piece < share.end_piece(first)) held[i] = share.load(piece);
    }
    settled = ll_settle(g, board, call, share.number, words, view);
    if (settled.verdict == LlVerdict::kGo) {
      const LlRanks peers = ll_peers(g, settled.view);
      keep_counts(g, call.half, share.number, peers, blockIdx.x, gridDim.x);
      if (first < share.end_token()) {
        share.resolve(first, peers);
#pragma unroll
        for (int i = 0; i < kHeldPieces; ++i) {
          const int64_t piece = share.first_piece(first) + i * kNumWarps;
          if (piece < share.end_piece(first)) share.send(piece, held[i], first);
        }
        share.send_wave(first, kHeldPieces);
        share.send_from(share.wave_end(first), peers);
      }
    }
  }
  if (ll_is_last_block(g)) close(share, settled);
}

// Receive half.

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

__global__ void __launch_bounds__(kReceiveThreads)
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

template <typename Format>
void launch_send(const LlGroup& group, const LlDispatchCall& call, cudaStream_t stream) {
  const LlSizes& sizes = call.args.sizes;
  const int64_t num_pieces = sizes.num_tokens * ceil_div(sizes.hidden, int64_t{Format::kChannels});
  const auto num_blocks =
      static_cast<int>(std::clamp<int64_t>(num_pieces / kMinPieces, 1, sizes.num_threads));
  const int num_slots = std::max(kMaxSlots, sizes.num_topk);
  const auto shared_bytes = static_cast<int>(
      sizeof(int32_t) * align_up(group.group.num_experts, 4) + sizeof(Slot) * num_slots);
  EP_CHECK_CUDA(cudaFuncSetAttribute(dispatch_send_kernel<Format>,
                                     cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  dispatch_send_kernel<Format><<<num_blocks, kNumThreads, shared_bytes, stream>>>(group, call);
  EP_CHECK_CUDA(cudaGetLastError());
}

}  // namespace

void launch_ll_dispatch_send(const LlGroup& group, const LlDispatchCall& call,
                             cudaStream_t stream) {
  switch (static_cast<LlFormat>(call.args.sizes.format)) {
    case LlFormat::kBF16:
      return launch_send<LlSendBF16>(group, call, stream);
    case LlFormat::kFP8:
      return launch_send<LlSendFP8<LlFormat::kFP8>>(group, call, stream);
    case LlFormat::kFP8Rounded:
      return launch_send<LlSendFP8<LlFormat::kFP8Rounded>>(group, call, stream);
    case LlFormat::kFP8UE8M0:
      return launch_send<LlSendFP8<LlFormat::kFP8UE8M0>>(group, call, stream);
  }
}

void launch_ll_dispatch_receive(const LlGroup& group, const LlDispatchCall& call,
                                cudaStream_t stream) {
  dispatch_receive_kernel<<<1, kReceiveThreads, 0, stream>>>(group, call);
  EP_CHECK_CUDA(cudaGetLastError());
}

}  // namespace ep::cuda

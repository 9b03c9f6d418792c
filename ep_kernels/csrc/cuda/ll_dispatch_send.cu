// The send half of a low-latency dispatch on the GPU. The twin of cpu/ll_dispatch.cpp and of the
// steps of dispatch in cpu/low_latency.cpp.
//
//   block 0       count the choices, check them, post the counts           post_counts
//   the others    its share of the pieces of rows: rows before it          LlShare::count
//                 place its tokens relative to this rank's first rows      LlShare::place
//                 load and cast the first pieces, while the posts come
//                 wait for the posts, agree                                ll_settle
//                 who sent how much to this rank                           keep_counts
//                 final rows, send                                         LlShare::resolve, send
//   last block    "done" to all ranks, the state of the half               close
//                 the receive half, if that is to follow at once           ll_receive_rows

#include <algorithm>

#include "core/math.h"
#include "cuda/check_cuda.h"
#include "cuda/ll_agreement.cuh"
#include "cuda/ll_far_rows.cuh"
#include "cuda/ll_kernels.h"
#include "cuda/ll_receive.cuh"
#include "cuda/ll_share.cuh"

namespace ep::cuda {
namespace {

constexpr int kMinPieces = 8;   ///< of a block, or fewer blocks do
constexpr int kHeldPieces = 4;  ///< of a warp, in registers while the posts come

/// All threads of block 0: counts all choices; the first bad one makes `words` a refusal.
template <typename Format>
__device__ void check_and_count(const LlShare<Format>& share, LlBoard& board, LlWords& words) {
  const LlDispatchArgs& args = share.call.args;
  const int num_topk = args.sizes.num_topk, num_experts = share.g.group.num_experts;
  const int num_choices = static_cast<int>(args.sizes.num_tokens) * num_topk;
  auto* experts = reinterpret_cast<int32_t*>(share.slots);  // of whole tokens, a wave at a time
  const int wave = share.tokens_per_wave * num_topk;
  constexpr AtomicWord kNone = ~AtomicWord{0};
  constexpr int32_t kOutside = INT32_MAX;
  if (threadIdx.x == 0) board.came = kNone;
  for (int i = threadIdx.x; i < num_experts; i += blockDim.x) share.next[i] = 0;
  __syncthreads();  // also if there are no tokens
  for (int first = 0; first < num_choices; first += wave) {
    const int num_here = min(wave, num_choices - first);
    for (int i = threadIdx.x; i < num_here; i += blockDim.x) {
      const int64_t expert = args.topk_idx[first + i];
      const bool is_outside = expert < -1 || expert >= num_experts;
      experts[i] = is_outside ? kOutside : static_cast<int32_t>(expert);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < num_here; i += blockDim.x) {
      const int32_t expert = experts[i];
      bool is_twice = false;
      for (int other = i - i % num_topk; other < i; ++other) is_twice |= experts[other] == expert;
      if (expert == kOutside || (is_twice && expert >= 0))
        atomicMin(&board.came,
                  2 * static_cast<AtomicWord>(first + i) + (expert == kOutside ? 0 : 1));
      else if (expert >= 0)
        atomicAdd(share.next + expert, 1);
    }
    __syncthreads();
  }
  if (threadIdx.x == 0 && board.came != kNone) {
    const auto i = static_cast<int>(board.came / 2);
    ll_refuse_in(words, board.came % 2 ? LlStatus::kTwice : LlStatus::kBadExpert,
                 {i / num_topk, i % num_topk, args.topk_idx[i], 0});
  }
  __syncthreads();
}

/// All threads of block 0: announces the call with the counts of its rows.
template <typename Format>
__device__ void post_counts(const LlShare<Format>& share, const LlStart& start, LlBoard& board,
                            LlWords& words) {
  const LlDispatchCall& call = share.call;
  ll_collect_old(share.g, board, start);
  ll_begin_words(start, words, LlOp::kDispatch, call.args.sizes, call.held);
  if (threadIdx.x == 0) {
    words.word[kLlWordWindow] = call.half;
    words.word[kLlWordReused] = start.numbers[call.half];
    share.g.state->halves[call.half].error = 0;
  }
  check_and_count(share, board, words);
  const LlRanks to = ll_peers(share.g, start.masked);
  ll_send_post(share.g, share.number, words, to, threadIdx.x, blockDim.x);
  ll_send_counts(share.g, share.number, share.next, to);
  ll_share_post(share.g, share.number, 2 * kNumLlWords + share.g.group.num_experts, to);
  __syncthreads();  // the counters are used again
}

/// Threads of `num_parts` blocks: keeps who sent how much to each expert of this rank. The posts of
/// `peers` have come.
__device__ void keep_counts(const LlGroup& g, int half, uint64_t number, LlRanks peers, int part,
                            int num_parts) {
  const int num_ranks = g.group.num_ranks;
  const uint64_t deadline = now_ns() + g.group.timeout_ns;
  int32_t* kept = g.counts + static_cast<int64_t>(half) * g.group.num_local_experts * num_ranks;
  for (int i = part * blockDim.x + threadIdx.x; i < g.group.num_experts * num_ranks;
       i += num_parts * blockDim.x) {
    const int expert = i % g.group.num_experts, src = i / g.group.num_experts;
    if (g.group.placement.rank_of[expert] != g.group.rank) continue;
    uint64_t count = ll_tag(number, 0);
    if (ll_has(peers, src)) {
      const uint64_t* word = ll_tagged_counts(g, number, g.group.rank, src) + expert;
      do count = load_relaxed(word);
      while (!ll_has_tag(count, number) && now_ns() < deadline);
    }
    if (!ll_has_tag(count, number)) ll_lose_count(g, number, src);
    kept[g.group.placement.local_of[expert] * num_ranks + src] = static_cast<int32_t>(count);
  }
}

/// All threads of the last block, in a dispatch that was given up: when no peer writes rows here
/// any more, places this rank's rows for its own experts.
template <typename Format>
__device__ void keep_own_rows(LlShare<Format> share, LlRanks view) {
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
  share.end = static_cast<int>(share.call.args.sizes.num_tokens) * share.pieces_per_token;
  share.count(0);
  share.send_from(0, self);
  __syncthreads();
}

/// All threads: the line of done of this dispatch at a peer.
template <typename Format>
__device__ LlDoneLine& done_line_at(const LlShare<Format>& share, int peer) {
  const auto half = static_cast<int>(share.board.posts[peer].word[kLlWordWindow]);
  return ll_done_line(share.g, half, peer, share.g.group.rank);
}

/// All threads of one block: writes a view to the lines of done of `told`, ahead of their flags.
/// Far ranks get it with the flag.
template <typename Format>
__device__ void tell_view(const LlShare<Format>& share, LlRanks told, LlRanks view) {
  for (int peer = threadIdx.x; peer < share.g.group.num_ranks; peer += blockDim.x)
    if (ll_has(told, peer) && !ll_is_far(share.g, peer))
      done_line_at(share, peer).view.words[0] = view;
}

/// All threads of the last block: tells all ranks, and keeps what the receive half has to know.
template <typename Format>
__device__ void close(const LlShare<Format>& share, const LlSettled& settled) {
  const LlGroup& g = share.g;
  if (threadIdx.x == 0) ll_stamp(g, share.number, kLlStampWritten);
  LlHalfState& half = g.state->halves[share.call.half];
  const LlRanks told = settled.verdict == LlVerdict::kEnd ? 0 : ll_peers(g, settled.view);
  const bool is_given_up = settled.verdict == LlVerdict::kGivenUp ||
                           (told != 0 && read_word(&g.state->lacks_counts) != 0);
  if (is_given_up) tell_view(share, told, kLlGivenUp);
  for (int peer = threadIdx.x; peer < g.group.num_ranks; peer += blockDim.x) {
    if (!ll_has(told, peer)) continue;
    half.peer_half[peer] = static_cast<uint8_t>(share.board.posts[peer].word[kLlWordWindow]);
    LlDoneLine& line = done_line_at(share, peer);
    if (ll_is_far(g, peer))
      ll_put_word(g, peer, line.view.words, is_given_up ? kLlGivenUp : settled.view);
    ll_put_flag(g, peer, &line.flag, share.number + 1);
  }
  if (is_given_up) keep_own_rows(share, settled.view);
  if (threadIdx.x != 0) return;
  ll_stamp(g, share.number, kLlStampSaid);
  if (g.state->failed || (told == 0 && half.error == 0))
    half.error = static_cast<int32_t>(LlStatus::kTimeout);
  half.number = half.error ? 0 : share.number + 1;
  half.view = is_given_up ? kLlGivenUp : settled.view;
  half.peers = is_given_up ? ll_bit(g.group.rank) : told;
  half.combine = 0;
  half.is_collected = 0;
  g.state->next_number = share.number + 1;
  ll_reset_blocks(g);
}

template <typename Format>
__global__ void __launch_bounds__(kLlSendThreads, 1)
    dispatch_send_kernel(const __grid_constant__ LlGroup g,
                         const __grid_constant__ LlDispatchCall call) {
  extern __shared__ uint4 shared[];
  __shared__ LlBoard board;
  __shared__ LlWords words;
  const LlStart start = ll_start(g);
  const LlShare<Format> share = make_share<Format>(g, call, board, start.number, shared);
  LlSettled settled{LlVerdict::kEnd, start.masked};
  const bool is_first = blockIdx.x == 0 && threadIdx.x == 0;
  if (is_first) ll_stamp(g, share.number, kLlStampBegin);
  if (start.failed == 0) {
    if (blockIdx.x == 0) post_counts(share, start, board, words);
    if (is_first) ll_stamp(g, share.number, kLlStampPosted);
    const int first = share.first_token();
    share.count(first);
    if (first < share.end_token()) share.place(first);
    LlPiece held[kHeldPieces];
#pragma unroll
    for (int i = 0; i < kHeldPieces; ++i) {
      const int piece = share.first_piece(first) + i * kLlSendWarps;
      if (piece < share.end_piece(first)) held[i] = share.load(piece);
    }
    if (is_first) ll_stamp(g, share.number, kLlStampPlaced);
    settled = ll_settle(g, board, call, share.number, words, start.masked);
    if (is_first) ll_stamp(g, share.number, kLlStampAgreed);
    if (settled.verdict == LlVerdict::kGo) {
      const LlRanks peers = ll_peers(g, settled.view);
      if (blockIdx.x == 0) tell_view(share, peers, settled.view);
      if (first < share.end_token()) {
        share.resolve(first, peers);
        if (is_first) ll_stamp(g, share.number, kLlStampResolved);
#pragma unroll
        for (int i = 0; i < kHeldPieces; ++i) {
          const int piece = share.first_piece(first) + i * kLlSendWarps;
          if (piece < share.end_piece(first)) share.send(piece, held[i], first);
        }
        share.send_wave(first, kHeldPieces);
        share.send_from(share.wave_end(first), peers);
      }
      if (ll_has_leader() && blockIdx.x == 0)
        keep_counts(g, call.half, share.number, peers, 0, 1);
      else if (!ll_has_leader())
        keep_counts(g, call.half, share.number, peers, blockIdx.x, gridDim.x);
    }
  }
  if (is_first) ll_stamp(g, share.number, kLlStampSent);
  if (!ll_is_last_block<LlReaders::kPeers>(g)) return;
  if (settled.verdict == LlVerdict::kGo) ll_send_far_rows(share, ll_peers(g, settled.view));
  close(share, settled);
  if (!call.is_whole) return;
  __syncthreads();
  ll_receive_rows(g, call, board);
}

template <typename Format>
void launch_send(const LlGroup& group, const LlDispatchCall& call, cudaStream_t stream) {
  const LlSizes& sizes = call.args.sizes;
  const int64_t num_pieces = sizes.num_tokens * ceil_div(sizes.hidden, int64_t{Format::kChannels});
  const auto num_blocks =
      static_cast<int>(std::clamp<int64_t>(num_pieces / kMinPieces, 1, sizes.num_threads));
  const int num_slots = std::max(kLlMaxSlots, sizes.num_topk);
  const auto shared_bytes = static_cast<int>(
      sizeof(int32_t) * align_up(group.group.num_experts, 4) + sizeof(LlSlot) * num_slots);
  EP_CHECK_CUDA(cudaFuncSetAttribute(dispatch_send_kernel<Format>,
                                     cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  dispatch_send_kernel<Format><<<num_blocks, kLlSendThreads, shared_bytes, stream>>>(group, call);
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

}  // namespace ep::cuda

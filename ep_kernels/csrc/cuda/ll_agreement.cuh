#pragma once

#include "cuda/ll_posts.cuh"

// How the blocks of a dispatch, on all ranks, come to place rows under the same view.
//
// As a rule every block finds by itself that all peers have posted the call with this rank's view,
// and goes ahead. Otherwise block 0 decides: it freezes the blocks that have not gone ahead, and if
// none has, agrees with the peers as cpu/ll_agreement.cpp does and publishes a verdict. A peer that
// went ahead with the old view will not post again; then the ranks that have not give this dispatch
// up: they say so in "done", and keep their own rows only. So rows under two views never mix.

namespace ep::cuda {

enum class LlVerdict : int32_t { kNone = 0, kFrozen = 1, kGo = 2, kGivenUp = 3, kEnd = 4 };

struct LlSettled {
  LlVerdict verdict;
  LlRanks view;
};

__device__ __forceinline__ uint64_t ll_verdict(uint64_t number, LlVerdict verdict) {
  return (number + 1) * 8 + static_cast<uint64_t>(verdict);
}

__device__ __forceinline__ LlVerdict ll_read_verdict(const LlGroup& g, uint64_t number) {
  const uint64_t verdict = load_flag(&g.state->verdict);
  if (verdict / 8 != number + 1) return LlVerdict::kNone;
  return static_cast<LlVerdict>(verdict % 8);
}

__device__ __forceinline__ bool ll_has_done(const LlGroup& g, int half, uint64_t number, int peer) {
  return load_flag(&ll_done_line(g, half, g.group.rank, peer).flag) >= number + 1;
}

/// All threads: whether all peers have posted the call as this rank has; the posts are in `board`.
__device__ inline bool ll_is_plain(const LlGroup& g, LlBoard& board, uint64_t number, LlRanks view,
                                   uint64_t deadline) {
  const LlRanks peers = ll_peers(g, view);
  const auto wait = [&](int peer, LlLoss* loss, auto&& is_there) {
    if (blockIdx.x == 0) return ll_wait(g, peer, deadline, loss, is_there);
    for (uint32_t spin = 0; !is_there(); ++spin)  // block 0 says when to stop
      if (spin % 32 == 31 && ll_read_verdict(g, number) != LlVerdict::kNone) return false;
    return true;
  };
  const bool have_come =
      ll_take_posts(g, board, number, peers, wait, [](int, int, bool, LlLoss) {});
  if (!__syncthreads_and(have_come)) return false;
  bool is_same = ll_is_same(g, board, peers);
  for (int peer = threadIdx.x; peer < g.group.num_ranks; peer += blockDim.x)
    is_same &= !ll_has(peers, peer) || board.posts[peer].word[kLlWordMasked] == view;
  return __syncthreads_and(is_same);
}

/// All threads of a block other than 0: what block 0 has found.
__device__ inline LlSettled ll_follow(const LlGroup& g, LlBoard& board, uint64_t number,
                                      LlRanks view) {
  __shared__ LlSettled settled;
  if (threadIdx.x == 0) {
    // Block 0 waits a deadline for each view, of which there are at most as many as ranks.
    const uint64_t deadline = now_ns() + (2 * g.group.num_ranks + 4) * g.group.timeout_ns;
    bool is_frozen = false;
    settled = {LlVerdict::kEnd, view};
    while (now_ns() < deadline) {
      const LlVerdict verdict = ll_read_verdict(g, number);
      if (verdict == LlVerdict::kFrozen && !is_frozen) {
        is_frozen = true;
        atomicAdd(&g.state->num_frozen, 1u);
      }
      if (verdict <= LlVerdict::kFrozen) continue;
      settled = {verdict, read_word(&g.state->view)};
      break;
    }
  }
  __syncthreads();
  const LlSettled found = settled;
  if (found.verdict != LlVerdict::kEnd) ll_read_posts(g, board, number, ll_peers(g, found.view));
  return found;
}

/// One thread of block 0: stops the other blocks. Whether one of them has gone ahead.
__device__ inline bool ll_freeze(const LlGroup& g, uint64_t number) {
  store_flag(&g.state->verdict, ll_verdict(number, LlVerdict::kFrozen));
  const uint64_t deadline = now_ns() + 2 * g.group.timeout_ns;  // one may wait for counts as long
  uint32_t num_finished = 0;
  while (now_ns() < deadline) {
    num_finished = load_word(&g.state->num_finished);
    if (num_finished + load_word(&g.state->num_frozen) >= gridDim.x - 1) break;
  }
  return num_finished > 0;
}

/// All threads of block 0: waits until every unmasked peer has posted this rank's view, or one that
/// this rank learns from. Returns who came.
__device__ inline LlRanks ll_wait_views(const LlGroup& g, LlBoard& board,
                                        const LlDispatchCall& call, uint64_t number, LlRanks view,
                                        uint64_t deadline) {
  if (threadIdx.x == 0) board.came = 0;
  __syncthreads();
  for (int peer = threadIdx.x; peer < g.group.num_ranks; peer += blockDim.x) {
    if (!ll_has(ll_peers(g, view), peer)) continue;
    LlLoss loss;
    const bool has_come = ll_wait(g, peer, deadline, &loss, [&] {
      const bool is_final = ll_has_done(g, call.half, number, peer);
      LlWords post;
      bool is_there = true;  // every word, as they come in no order
      for (int word = 0; word < kNumLlWords; ++word)
        is_there &= ll_read_post_word(g, number, peer, word, &post.word[word]);
      const LlRanks theirs = post.word[kLlWordMasked];
      const bool is_dispatch = post.word[kLlFieldOp] == static_cast<uint64_t>(LlOp::kDispatch);
      return is_there && (theirs == view || (theirs & ~view) != 0 || is_final || !is_dispatch);
    });
    if (has_come)
      atomicOr(&board.came, ll_bit(peer));
    else
      ll_lose_post(g, number, peer, loss);
  }
  __syncthreads();
  return board.came;
}

/// All threads of block 0: agrees with the peers on a view. `words` is this rank's post.
__device__ inline LlSettled ll_agree(const LlGroup& g, LlBoard& board, const LlDispatchCall& call,
                                     uint64_t number, LlWords& words, uint64_t deadline) {
  LlRanks view = words.word[kLlWordMasked];
  for (int attempt = 1;; ++attempt) {
    const LlRanks came = ll_wait_views(g, board, call, number, view, deadline);
    ll_read_posts(g, board, number, came);
    if (threadIdx.x == 0) {
      for (int peer = 0; peer < g.group.num_ranks; ++peer) {
        const LlRanks theirs = board.posts[peer].word[kLlWordMasked];
        if (ll_has(came, peer) && (theirs & ~read_word(&g.state->masked)) != 0)
          ll_adopt(g, peer, theirs);
      }
      board.masked = read_word(&g.state->masked);
      words.word[kLlWordMasked] = board.masked;
    }
    __syncthreads();
    if (load_word(&g.state->failed)) return {LlVerdict::kEnd, view};
    const LlRanks masked = board.masked;
    __syncthreads();
    if (masked == view) break;
    view = masked;
    ll_post_again(g, number, attempt, words, nullptr, ll_peers(g, view));
    // A new one: peers may have waited as long as this rank before they post again.
    deadline = now_ns() + g.group.timeout_ns;
  }
  const LlRanks members = ll_peers(g, view);
  const int finding = ll_find(g, board, members);
  if (finding != INT32_MAX) {
    if (threadIdx.x == 0)
      g.state->halves[call.half].error =
          static_cast<int32_t>(ll_report(g, board, members, number, finding, call.record));
    return {LlVerdict::kEnd, view};
  }
  bool is_same = true;
  for (int peer = threadIdx.x; peer < g.group.num_ranks; peer += blockDim.x)
    is_same &= !ll_has(members, peer) || board.posts[peer].word[kLlWordMasked] == view;
  return {__syncthreads_and(is_same) ? LlVerdict::kGo : LlVerdict::kGivenUp, view};
}

/// All threads: the view under which rows are placed, or that none are. Posts are in `board`.
__device__ inline LlSettled ll_settle(const LlGroup& g, LlBoard& board, const LlDispatchCall& call,
                                      uint64_t number, LlWords& words, LlRanks view) {
  const uint64_t deadline = now_ns() + g.group.timeout_ns;
  if (ll_is_plain(g, board, number, view, deadline)) return {LlVerdict::kGo, view};
  if (blockIdx.x != 0) return ll_follow(g, board, number, view);
  __shared__ bool has_gone_ahead;
  if (threadIdx.x == 0) has_gone_ahead = ll_freeze(g, number);
  __syncthreads();
  if (has_gone_ahead) {  // so the posts had come, with this view
    ll_read_posts(g, board, number, ll_peers(g, view));
    if (threadIdx.x == 0) {
      g.state->view = view;
      store_flag(&g.state->verdict, ll_verdict(number, LlVerdict::kGo));
    }
    return {LlVerdict::kGo, view};
  }
  const LlSettled settled = ll_agree(g, board, call, number, words, deadline);
  __syncthreads();
  if (threadIdx.x == 0) {
    g.state->view = settled.view;
    store_flag(&g.state->verdict, ll_verdict(number, settled.verdict));
  }
  __syncthreads();
  return settled;
}

}  // namespace ep::cuda

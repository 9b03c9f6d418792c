// Low-latency calls without rows, and masks, one block each. The twin of cpu/ll_masking.cpp.
//
//   plain   post a barrier or a refusal, wait for the posts of all, compare
//   mask    leave ranks out, or take them back

#include "cuda/check_cuda.h"
#include "cuda/ll_kernels.h"
#include "cuda/ll_posts.cuh"

namespace ep::cuda {
namespace {

constexpr int kNumThreads = 256;

__global__ void __launch_bounds__(kNumThreads)
    plain_kernel(const __grid_constant__ LlGroup g, const __grid_constant__ LlPlainCall call) {
  __shared__ LlBoard board;
  __shared__ LlWords words;
  LlState& state = *g.state;
  const LlStart start = ll_start(g);
  if (start.failed) {
    if (threadIdx.x == 0) ll_end(g, call.record, LlStatus::kTimeout);
    return;
  }
  const uint64_t number = start.number;
  const bool is_refused = call.op == static_cast<int32_t>(LlOp::kRefused);
  const LlRanks view = ll_collect_old(g, board, start);
  ll_begin_words(start, words, static_cast<LlOp>(call.op), LlSizes{}, call.held);
  if (threadIdx.x == 0) words.word[kLlWordMasked] = view;
  __syncthreads();
  ll_send_post(g, number, words, ll_peers(g, view), threadIdx.x, blockDim.x);
  ll_share_post(g, number, 2 * kNumLlWords, ll_peers(g, view));
  if (is_refused) ll_post_again(g, number, 0, words, call.text, ll_peers(g, view));
  const LlRanks came =
      ll_wait_posts(g, board, number, ll_peers(g, view), nullptr,
                    [&](int peer, LlLoss loss) { ll_lose_post(g, number, peer, loss); });
  if (threadIdx.x == 0) {
    for (int peer = 0; peer < g.group.num_ranks; ++peer)
      if (ll_has(came, peer) &&
          (board.posts[peer].word[kLlWordMasked] & ~read_word(&state.masked)) != 0)
        ll_adopt(g, peer, board.posts[peer].word[kLlWordMasked]);
    board.masked = read_word(&state.masked);
  }
  __syncthreads();
  const LlRanks members = came & ~board.masked;
  const int finding = ll_find(g, board, members);
  if (threadIdx.x != 0) return;
  state.next_number = number + 1;
  LlStatus status = LlStatus::kOk;
  if (state.failed)
    status = LlStatus::kTimeout;
  else if (finding != INT32_MAX && !is_refused)
    status = ll_report(g, board, members, number, finding, call.record);
  ll_end(g, call.record, status);
}

__device__ bool replace(uint64_t* word, uint64_t from, uint64_t to) {
  return atomicCAS_system(atomic_word(word), static_cast<AtomicWord>(from),
                          static_cast<AtomicWord>(to)) == from;
}

/// The wish of `peer`, which is gone then, so that it cannot be withdrawn; kLlMasked if none.
__device__ uint64_t take_wish(const LlGroup& g, int peer) {
  uint64_t* state = &ll_mask_line(g, g.group.rank, peer).state;
  const uint64_t wish = load_flag(state);
  return wish > kLlMasked && replace(state, wish, kLlTogether) ? wish : kLlMasked;
}

/// One thread: takes a masked peer back, which must do the same. False: it does not answer.
__device__ bool take_back(const LlGroup& g, int peer, int held) {
  LlState& state = *g.state;
  uint64_t* theirs = &ll_mask_line(g, peer, g.group.rank).state;
  const uint64_t wish = ll_wish(state.next_number);
  __threadfence_system();
  store_flag(theirs, wish);
  const PeerLine& line = peer_line(g.group, g.group.rank, peer);
  const uint64_t deadline = now_ns() + g.group.timeout_ns;
  uint64_t answer = kLlMasked;  // the wish of the peer, once it is taken
  while ((answer = take_wish(g, peer)) <= kLlMasked && now_ns() < deadline &&
         load_word(&line.departed) == 0) {
  }
  if (answer <= kLlMasked && !replace(theirs, wish, kLlMasked)) {
    // The peer has taken our wish. Its own was here before; it is not if the peer has left again.
    answer = take_wish(g, peer);
    if (answer <= kLlMasked) store_flag(theirs, kLlMasked);
  }
  if (answer <= kLlMasked) return false;
  state.masked &= ~ll_bit(peer);
  state.next_number = max(state.next_number, answer - ll_wish(0));
  for (int half = 0; half < 2; ++half) {
    state.halves[half].peers &= ~ll_bit(peer);
    if (!(held >> half & 1)) state.halves[half].number = 0;
  }
  return true;
}

__global__ void __launch_bounds__(kNumThreads)
    mask_kernel(const __grid_constant__ LlGroup g, const __grid_constant__ LlMaskCall call) {
  __shared__ LlBoard board;
  __shared__ bool is_away;
  LlState& state = *g.state;
  if (threadIdx.x == 0) state.answer = 0;
  for (int peer = 0; peer < g.group.num_ranks; ++peer) {
    if (!ll_has(call.ranks, peer) || peer == g.group.rank) continue;
    if (threadIdx.x == 0) is_away = ll_has(read_word(&state.masked), peer) || ll_has_left(g, peer);
    __syncthreads();
    const bool is_due = call.is_masked || is_away;
    __syncthreads();
    if (!is_due) continue;
    if (threadIdx.x == 0) ll_mask(g, peer);
    __syncthreads();
    if (call.is_masked) continue;
    for (int half = 0; half < 2; ++half) ll_collect(g, board, half);
    if (threadIdx.x == 0 && !take_back(g, peer, call.held)) state.answer |= ll_bit(peer);
    __syncthreads();
  }
}

}  // namespace

void launch_ll_plain(const LlGroup& group, const LlPlainCall& call, cudaStream_t stream) {
  plain_kernel<<<1, kNumThreads, 0, stream>>>(group, call);
  EP_CHECK_CUDA(cudaGetLastError());
}

void launch_ll_mask(const LlGroup& group, const LlMaskCall& call, cudaStream_t stream) {
  mask_kernel<<<1, kNumThreads, 0, stream>>>(group, call);
  EP_CHECK_CUDA(cudaGetLastError());
}

}  // namespace ep::cuda

#pragma once

#include "cuda/ll_far_rows.cuh"
#include "cuda/ll_posts.cuh"

// How a rank announces a combine: by the send kernel, or by the kernel of a whole call.

namespace ep::cuda {

/// Threads of `num_parts` blocks: notes the first choice that is not what was dispatched.
__device__ inline void ll_check_idx(const LlGroup& g, const LlCombineCall& call, int part,
                                    int num_parts) {
  const int num_choices = static_cast<int>(call.sizes.num_tokens) * call.sizes.num_topk;
  for (int i = part * blockDim.x + threadIdx.x; i < num_choices; i += num_parts * blockDim.x)
    if (call.args.topk_idx[i] != call.args.experts[i])
      atomicMin(atomic_word(&g.state->bad), static_cast<AtomicWord>(i));
}

/// All threads of one block, after ll_check_idx(): announces that the rows can be read. Returns
/// whom this rank leaves out now.
__device__ inline LlRanks ll_post_rows(const LlGroup& g, const LlCombineCall& call,
                                       const LlStart& start, LlBoard& board, LlWords& words) {
  const int32_t error = g.state->halves[call.half].error;
  const AtomicWord bad = read_word(&g.state->bad);
  if (threadIdx.x == 0) ll_stamp(g, start.number, kLlStampWritten);
  if (!error) ll_send_far_results(g, call);
  const LlRanks view = ll_collect_old(g, board, start);
  ll_begin_words(start, words, LlOp::kCombine, call.sizes, call.held);
  if (threadIdx.x == 0) {
    words.word[kLlFieldDispatch] = start.numbers[call.half] - 1;
    words.word[kLlFieldWire] = call.args.wire;
    words.word[kLlWordWindow] = call.half;
    words.word[kLlWordMasked] = view;
    const auto i = static_cast<int64_t>(bad);
    const int num_topk = call.sizes.num_topk;
    if (error)
      ll_refuse_in(words, LlStatus::kNoDispatch, {0, 0, 0, 0});
    else if (bad != ~AtomicWord{0})
      ll_refuse_in(words, LlStatus::kOtherIdx,
                   {i / num_topk, i % num_topk, call.args.topk_idx[i], call.args.experts[i]});
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    __threadfence_system();  // rows, then the words that announce them
    ll_send_post(g, start.number, words, ll_peers(g, view), threadIdx.x, 32);
  }
  ll_share_post(g, start.number, 2 * kNumLlWords, ll_peers(g, view));
  if (threadIdx.x == 0) ll_stamp(g, start.number, kLlStampSaid);
  return view;
}

}  // namespace ep::cuda

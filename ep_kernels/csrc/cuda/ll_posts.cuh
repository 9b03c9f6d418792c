#pragma once

#include "cuda/ll_protocol.cuh"

// Posts of low-latency calls: writing them, waiting for those of the peers, comparing them.

namespace ep::cuda {

/// What a block has read of the posts of a call, in shared memory.
struct LlBoard {
  LlWords posts[kMaxRanks];
  AtomicWord came, masked;
  int finding;
};

/// What a kernel finds of the calls before. All loads are under way before the first is used.
struct LlStart {
  uint64_t number;  ///< of this call
  LlRanks masked;
  uint64_t numbers[2];  ///< of the halves
  uint64_t combines[2];
  uint32_t failed;
};

__device__ __forceinline__ LlStart ll_start(const LlGroup& g) {
  const LlState& state = *g.state;
  return {read_word(&state.next_number),
          read_word(&state.masked),
          {read_word(&state.halves[0].number), read_word(&state.halves[1].number)},
          {read_word(&state.halves[0].combine), read_word(&state.halves[1].combine)},
          read_word(&state.failed)};
}

/// Thread 0 fills the words of a post; the same thread may change them.
__device__ inline void ll_begin_words(const LlStart& start, LlWords& words, LlOp op,
                                      const LlSizes& sizes, int held) {
  if (threadIdx.x != 0) return;
  for (uint64_t& word : words.word) word = 0;
  words.word[kLlFieldOp] = static_cast<uint64_t>(op);
  words.word[kLlFieldMaxTokens] = sizes.num_max_tokens_per_rank;
  words.word[kLlFieldHidden] = sizes.hidden;
  words.word[kLlFieldFormat] = sizes.format;
  for (int half = 0; half < 2; ++half)
    if (held >> half & 1) words.word[kLlWordHeld + half] = start.numbers[half];
  words.word[kLlWordMasked] = start.masked;
}

/// One thread: turns the post into a refusal that says what is wrong in its fields.
__device__ inline void ll_refuse_in(LlWords& words, LlStatus kind, const int64_t (&detail)[4]) {
  words.word[kLlFieldOp] = static_cast<uint64_t>(LlOp::kRefused);
  words.word[1] = static_cast<uint64_t>(kind);
  for (int i = 0; i < 4; ++i) words.word[2 + i] = static_cast<uint64_t>(detail[i]);
}

/// Threads of one block or warp, `part` of `num_parts`: writes the post in words with tags, except
/// to far ranks, see ll_share_post(). NOTE: they have no order; a post that announces rows needs a
/// fence of each thread before.
__device__ inline void ll_send_post(const LlGroup& g, uint64_t number, const LlWords& words,
                                    LlRanks to, int part, int num_parts) {
  const int rank = g.group.rank;
  for (int i = part; i < g.group.num_ranks * 2 * kNumLlWords; i += num_parts) {
    const int peer = i / (2 * kNumLlWords), at = i % (2 * kNumLlWords);
    const auto value = static_cast<uint32_t>(words.word[at / 2] >> (32 * (at % 2)));
    if (ll_has(to, peer) && !ll_is_far(g, peer))
      store_relaxed(ll_tagged(g, number, peer, rank) + at, ll_tag(number, value));
  }
}

/// All threads: writes the counts that go with a post.
__device__ inline void ll_send_counts(const LlGroup& g, uint64_t number, const int32_t* counts,
                                      LlRanks to) {
  const int num_ranks = g.group.num_ranks, num_experts = g.group.num_experts;
  for (int i = threadIdx.x; i < num_ranks * num_experts; i += blockDim.x) {
    const int peer = i / num_experts, expert = i % num_experts;
    if (ll_has(to, peer) && !ll_is_far(g, peer))
      store_relaxed(ll_tagged_counts(g, number, peer, g.group.rank) + expert,
                    ll_tag(number, static_cast<uint32_t>(counts[expert])));
  }
}

/// All threads of one block: sends the far ranks of `to` what this rank has from itself: the first
/// `num_words` words with tags.
__device__ inline void ll_share_post(const LlGroup& g, uint64_t number, int num_words, LlRanks to) {
  if (!ll_has_far(g)) return;
  __threadfence_system();
  __syncthreads();
  uint64_t* words = ll_tagged(g, number, g.group.rank, g.group.rank);
  for (int peer = static_cast<int>(threadIdx.x) / 32; peer < g.group.num_ranks;
       peer += static_cast<int>(blockDim.x) / 32)
    if (ll_has(to, peer) && ll_is_far(g, peer))
      ll_put_bytes(g, peer, words, words, num_words * int64_t{sizeof(uint64_t)});
}

/// All threads: writes a post with a flag to the ranks of `to`: a later attempt, or one with text.
__device__ inline void ll_post_again(const LlGroup& g, uint64_t number, int attempt,
                                     const LlWords& words, const char* text, LlRanks to) {
  const int rank = g.group.rank, num_ranks = g.group.num_ranks;
  for (int i = threadIdx.x; i < num_ranks * kNumLlWords; i += blockDim.x) {
    const int peer = i / kNumLlWords, word = i % kNumLlWords;
    if (ll_has(to, peer) && !ll_is_far(g, peer))
      reinterpret_cast<uint64_t*>(&ll_post(g, number, peer, rank))[word] = words.word[word];
  }
  for (int i = threadIdx.x; text && i < num_ranks * kMaxText; i += blockDim.x)
    if (ll_has(to, i / kMaxText) && !ll_is_far(g, i / kMaxText))
      ll_post(g, number, i / kMaxText, rank).text[i % kMaxText] = text[i % kMaxText];
  if (ll_has_far(g)) __threadfence_system();
  __syncthreads();
  LlPost& own = ll_post(g, number, rank, rank);
  for (int peer = static_cast<int>(threadIdx.x) / 32; peer < num_ranks && ll_has_far(g);
       peer += static_cast<int>(blockDim.x) / 32)
    if (ll_has(to, peer) && ll_is_far(g, peer)) ll_put_bytes(g, peer, &own, &own, sizeof(own));
  if (ll_has_far(g)) {
    ll_finish_puts();
    __syncthreads();
  }
  for (int peer = threadIdx.x; peer < num_ranks; peer += blockDim.x)
    if (ll_has(to, peer))
      ll_put_flag(g, peer, ll_flag(g, number, peer, rank), ll_post_flag(number, attempt));
}

/// Whether a peer has posted again, so that only the words behind the flag count.
__device__ __forceinline__ bool ll_has_posted_again(const LlGroup& g, uint64_t number, int peer) {
  return load_flag(ll_flag(g, number, g.group.rank, peer)) >= ll_post_flag(number, 0);
}

/// A word of a post from its tagged halves. False if they are not there for this call.
__device__ __forceinline__ bool ll_read_halves(const uint64_t* halves, uint64_t number,
                                               uint64_t* value) {
  const uint64_t low = load_flag(halves), high = load_flag(halves + 1);
  *value = high << 32 | static_cast<uint32_t>(low);
  return ll_has_tag(low, number) && ll_has_tag(high, number);
}

/// A word of a peer's post. False if it has not come.
__device__ __forceinline__ bool ll_read_post_word(const LlGroup& g, uint64_t number, int peer,
                                                  int word, uint64_t* value) {
  if (ll_has_posted_again(g, number, peer)) {
    ll_take_arrival(g, peer, ll_flag(g, number, g.group.rank, peer));
    const auto* post = reinterpret_cast<const uint64_t*>(&ll_post(g, number, g.group.rank, peer));
    *value = load_flag(post + word);
    return true;
  }
  return ll_read_halves(ll_tagged(g, number, g.group.rank, peer) + 2 * word, number, value);
}

/// All threads: reads the posts of `from`, which have come.
__device__ inline void ll_read_posts(const LlGroup& g, LlBoard& board, uint64_t number,
                                     LlRanks from) {
  __syncthreads();
  for (int i = threadIdx.x; i < g.group.num_ranks * kNumLlWords; i += blockDim.x) {
    const int src = i / kNumLlWords, word = i % kNumLlWords;
    if (ll_has(from, src)) ll_read_post_word(g, number, src, word, &board.posts[src].word[word]);
  }
  __syncthreads();
}

/// All threads, one for each word of each post of `from`: takes the word when it comes, for which
/// wait(peer, &loss, is_there) waits. ended(peer, word, has_come, loss) is told of each. Whether
/// all have come that this thread has waited for.
template <typename Wait, typename Ended>
__device__ bool ll_take_posts(const LlGroup& g, LlBoard& board, uint64_t number, LlRanks from,
                              Wait&& wait, Ended&& ended) {
  bool have_come = true;
  for (int i = threadIdx.x; i < g.group.num_ranks * kNumLlWords; i += blockDim.x) {
    const int src = i / kNumLlWords, word = i % kNumLlWords;
    if (!ll_has(from, src)) continue;
    const uint64_t* halves = ll_tagged(g, number, g.group.rank, src) + 2 * word;
    LlLoss loss = LlLoss::kLate;
    const bool has_come = wait(
        src, &loss, [&] { return ll_read_halves(halves, number, &board.posts[src].word[word]); });
    if (has_come) ll_take_arrival(g, src, halves);
    ended(src, word, has_come, loss);
    have_come &= has_come;
  }
  return have_come;
}

/// All threads: waits for the posts of `from` and reads them. Returns who came. The losses of the
/// others are told to lost(peer, loss) by one thread each.
template <typename Lost>
__device__ LlRanks ll_wait_posts(const LlGroup& g, LlBoard& board, uint64_t number, LlRanks from,
                                 int64_t* waited_us, Lost&& lost) {
  if (threadIdx.x == 0) board.came = from;
  __syncthreads();
  const uint64_t start = now_ns();
  const auto wait = [&](int peer, LlLoss* loss, auto&& is_there) {
    return ll_wait(g, peer, start + g.group.timeout_ns, loss, is_there);
  };
  ll_take_posts(g, board, number, from, wait, [&](int peer, int word, bool has_come, LlLoss loss) {
    if (!has_come && ll_has(atomicAnd(&board.came, ~AtomicWord{ll_bit(peer)}), peer))
      lost(peer, loss);
    if (waited_us && word == 0) waited_us[peer] += static_cast<int64_t>((now_ns() - start) / 1000);
  });
  __syncthreads();
  return board.came;
}

/// One thread: a count that goes with a post of `peer` has not come in time, although the post has.
/// What this rank knows of the rows is not enough then: it gives the dispatch up.
__device__ inline void ll_lose_count(const LlGroup& g, uint64_t number, int peer) {
  ll_lose_post(g, number, peer, LlLoss::kLate);
  atomicExch(&g.state->lacks_counts, 1u);
}

/// One thread: what the post of a peer says was wrong with it. It has come.
__device__ inline void ll_read_text(const LlGroup& g, uint64_t number, int peer, char* text) {
  const uint64_t deadline = now_ns() + g.group.timeout_ns;
  const uint64_t* flag = ll_flag(g, number, g.group.rank, peer);
  while (load_flag(flag) < ll_post_flag(number, 0) && now_ns() < deadline) {
  }
  ll_take_arrival(g, peer, flag);
  for (int i = 0; i < kMaxText; ++i) text[i] = ll_post(g, number, g.group.rank, peer).text[i];
}

// Comparison.

/// All threads, a part each, then to be combined: whether the posts of `members`, this rank among
/// them, say the same, refuse nothing, and reuse no half that somebody reads.
__device__ inline bool ll_is_same(const LlGroup& g, const LlBoard& board, LlRanks members) {
  const int num_ranks = g.group.num_ranks;
  const LlWords& own = board.posts[g.group.rank];
  bool is_same = own.word[kLlFieldOp] != static_cast<uint64_t>(LlOp::kRefused);
  for (int i = threadIdx.x; i < num_ranks * kNumLlFields; i += blockDim.x) {
    const int src = i / kNumLlFields, field = i % kNumLlFields;
    is_same &= !ll_has(members, src) || board.posts[src].word[field] == own.word[field];
  }
  for (int i = threadIdx.x; i < num_ranks * num_ranks; i += blockDim.x) {
    const int owner = i / num_ranks, reader = i % num_ranks;
    if (!ll_has(members, owner) || !ll_has(members, reader)) continue;
    const uint64_t reused = board.posts[owner].word[kLlWordReused];
    const uint64_t* held = &board.posts[reader].word[kLlWordHeld];
    is_same &= reused == 0 || (held[0] != reused && held[1] != reused);
  }
  return is_same;
}

/// All threads: the lowest finding among the posts of `members`, or INT32_MAX: refusals by rank,
/// then disagreements by rank and field, then results that a rank has let go of and another has
/// not.
__device__ inline int ll_find(const LlGroup& g, LlBoard& board, LlRanks members) {
  constexpr int kNothing = INT32_MAX;
  if (__syncthreads_and(ll_has(members, g.group.rank) && ll_is_same(g, board, members)))
    return kNothing;
  if (threadIdx.x == 0) board.finding = kNothing;
  __syncthreads();
  const int num_ranks = g.group.num_ranks, first = __ffsll(static_cast<int64_t>(members)) - 1;
  const int num_fields = num_ranks * kNumLlFields;
  for (int i = threadIdx.x; i < num_fields; i += blockDim.x) {
    const int src = i / kNumLlFields, field = i % kNumLlFields;
    if (!ll_has(members, src)) continue;
    const uint64_t value = board.posts[src].word[field];
    if (field == kLlFieldOp && value == static_cast<uint64_t>(LlOp::kRefused))
      atomicMin(&board.finding, src);
    if (value != board.posts[first].word[field]) atomicMin(&board.finding, num_ranks + i);
  }
  for (int i = threadIdx.x; i < num_ranks * num_ranks; i += blockDim.x) {
    const int owner = i / num_ranks, reader = i % num_ranks;
    if (!ll_has(members, owner) || !ll_has(members, reader)) continue;
    const uint64_t reused = board.posts[owner].word[kLlWordReused];
    const uint64_t* held = &board.posts[reader].word[kLlWordHeld];
    if (reused != 0 && (held[0] == reused || held[1] == reused))
      atomicMin(&board.finding, num_ranks + num_fields + i);
  }
  __syncthreads();
  const int finding = board.finding;
  __syncthreads();
  return finding;
}

/// One thread: writes a finding into the record.
__device__ inline LlStatus ll_report(const LlGroup& g, const LlBoard& board, LlRanks members,
                                     uint64_t number, int finding, LlRecord* record) {
  const int num_ranks = g.group.num_ranks, num_fields = num_ranks * kNumLlFields;
  if (finding < num_ranks) {
    const LlWords& words = board.posts[finding];
    record->rank = finding;
    for (int i = 0; i < 4; ++i) record->detail[i] = static_cast<int64_t>(words.word[2 + i]);
    if (words.word[1] != 0) return static_cast<LlStatus>(words.word[1]);
    ll_read_text(g, number, finding, record->text);
    return LlStatus::kRefused;
  }
  if (finding < num_ranks + num_fields) {
    const int i = finding - num_ranks, src = i / kNumLlFields, field = i % kNumLlFields;
    const int first = __ffsll(static_cast<int64_t>(members)) - 1;
    record->rank = src;
    record->detail[0] = field;
    record->detail[1] = first;
    record->detail[2] = static_cast<int64_t>(board.posts[first].word[field]);
    record->detail[3] = static_cast<int64_t>(board.posts[src].word[field]);
    return LlStatus::kDisagree;
  }
  const int i = finding - num_ranks - num_fields;
  record->rank = i % num_ranks;
  record->detail[0] = i / num_ranks;
  record->detail[1] = static_cast<int64_t>(board.posts[i / num_ranks].word[kLlWordReused] - 1);
  return LlStatus::kReader;
}

// Posts of an earlier combine.

/// All threads of one block: keeps the posts of a combine that was sent and not received, so that
/// their slot can be used again.
__device__ inline void ll_collect(const LlGroup& g, LlBoard& board, int half) {
  LlHalfState& state = g.state->halves[half];
  if (state.combine == 0 || state.is_collected) return;
  const uint64_t number = state.combine - 1;
  const LlRanks from = ll_peers(g, read_word(&g.state->masked));
  const LlRanks came = ll_wait_posts(g, board, number, from, nullptr, [&](int peer, LlLoss loss) {
    ll_lose_post(g, number, peer, loss);
  });
  for (int i = threadIdx.x; i < g.group.num_ranks * kNumLlWords; i += blockDim.x)
    state.posts[i / kNumLlWords].word[i % kNumLlWords] =
        board.posts[i / kNumLlWords].word[i % kNumLlWords];
  if (threadIdx.x == 0) {
    state.arrived = came;
    state.is_collected = 1;
  }
  __syncthreads();
}

/// All threads of the block that is about to post. Returns whom this rank leaves out after it.
__device__ inline LlRanks ll_collect_old(const LlGroup& g, LlBoard& board, const LlStart& start) {
  bool is_changed = false;
  for (int half = 0; half < 2; ++half) {
    if (start.combines[half] == 0 || start.combines[half] + 1 > start.number) continue;
    ll_collect(g, board, half);
    is_changed = true;
  }
  return is_changed ? read_word(&g.state->masked) : start.masked;
}

}  // namespace ep::cuda

#pragma once

#include "core/ll_protocol.h"
#include "cuda/device/sync.cuh"
#include "cuda/ll_group.h"
#include "cuda/protocol.cuh"

// Protocol steps of low-latency mode, as in cpu/ll_exchange.h. A wait is made by one thread per
// peer and has a deadline. "All threads" are those of one block.

namespace ep::cuda {

using AtomicWord = unsigned long long;  // what atomics on uint64_t want

__device__ __forceinline__ AtomicWord* atomic_word(uint64_t* word) {
  return reinterpret_cast<AtomicWord*>(word);
}

__device__ __forceinline__ uint64_t read_word(const uint64_t* word) {
  return *static_cast<const volatile uint64_t*>(word);
}

// Words of the region.

template <typename T>
__device__ __forceinline__ T* ll_word(const LlGroup& g, int rank, size_t offset) {
  return reinterpret_cast<T*>(g.regions[rank] + offset);
}
__device__ __forceinline__ LlMaskLine& ll_mask_line(const LlGroup& g, int owner, int src) {
  return ll_word<LlMaskLine>(g, owner, g.layout.mask_lines)[src];
}
__device__ __forceinline__ uint64_t* ll_flag(const LlGroup& g, uint64_t number, int owner,
                                             int src) {
  return ll_word<uint64_t>(g, owner, g.layout.post_flags) + g.layout.slot(number, src);
}
__device__ __forceinline__ LlPost& ll_post(const LlGroup& g, uint64_t number, int owner, int src) {
  const size_t slot = g.layout.slot(number, src);
  return *ll_word<LlPost>(g, owner, g.layout.posts + slot * g.layout.post_stride);
}
__device__ __forceinline__ int32_t* ll_counts(const LlGroup& g, uint64_t number, int owner,
                                              int src) {
  return reinterpret_cast<int32_t*>(&ll_post(g, number, owner, src) + 1);
}
/// Lines of done lie by the half that the owner receives in: nobody writes one again before the
/// owner has posted its next dispatch for that half.
__device__ __forceinline__ LlDoneLine& ll_done_line(const LlGroup& g, int half, int owner,
                                                    int src) {
  return ll_word<LlDoneLine>(g, owner, g.layout.done_lines)[half * g.group.num_ranks + src];
}
/// Start of a half.
__device__ __forceinline__ uint8_t* ll_window(const LlGroup& g, int rank, int half) {
  return ll_word<uint8_t>(g, rank, g.layout.num_bytes) + half * g.half_bytes;
}

__device__ __forceinline__ LlRanks ll_peers(const LlGroup& g, LlRanks view) {
  return ll_all(g.group.num_ranks) & ~view;
}

// Masks.

/// One thread. Leaves `peer` out from now on; it knows before anything it may read is overwritten.
__device__ inline void ll_mask(const LlGroup& g, int peer) {
  if (ll_has(atomicOr(atomic_word(&g.state->masked), ll_bit(peer)), peer)) return;
  store_flag(&ll_mask_line(g, peer, g.group.rank).state, kLlMasked);
  __threadfence_system();
}

__device__ __forceinline__ bool ll_has_left(const LlGroup& g, int peer) {
  return load_flag(&ll_mask_line(g, g.group.rank, peer).state) != kLlTogether;
}

/// One thread. Leaves out whom `peer` leaves out; also `peer`, if that is us.
__device__ inline void ll_adopt(const LlGroup& g, int peer, LlRanks masked) {
  if (ll_has(masked, g.group.rank)) return ll_mask(g, peer);
  for (int rank = 0; rank < g.group.num_ranks; ++rank)
    if (ll_has(masked, rank)) ll_mask(g, rank);
}

// Waits.

/// Whether there is no point in waiting for `peer` any longer.
__device__ inline bool ll_is_lost(const LlGroup& g, int peer, LlLoss* loss) {
  const PeerLine& line = peer_line(g.group, g.group.rank, peer);
  if (load_word(&line.departed) != 0 || load_word(&line.failed) != 0) {
    *loss = LlLoss::kGone;
    return true;
  }
  if (peer == g.group.rank || !ll_has_left(g, peer)) return false;
  *loss = LlLoss::kLeft;
  return true;
}

/// One thread. Waits for ready(), in vain if `peer` is lost or the time is over.
template <typename Ready>
__device__ bool ll_wait(const LlGroup& g, int peer, uint64_t deadline, LlLoss* loss,
                        Ready&& ready) {
  *loss = LlLoss::kLate;
  for (uint32_t spin = 0;; ++spin) {
    if (ready()) return true;
    if (spin % 32 != 31) continue;
    if (!ll_is_lost(g, peer, loss) && now_ns() < deadline) continue;
    return ready();
  }
}

/// One thread, after a wait in vain: masks the peer, or fails the buffer.
__device__ inline void ll_lose(const LlGroup& g, const TimeoutRecord& what, LlLoss loss) {
  if (g.mask_silent_ranks) return ll_mask(g, what.peer);
  if (atomicCAS(&g.state->failed, 0u, 1u) != 0) return;
  const int rank = g.group.rank;
  TimeoutRecord timeout = what;
  const PeerLine& told = peer_line(g.group, rank, what.peer);
  if (load_word(&told.failed) != 0 && what.peer != rank) timeout.peer = told.culprit;
  g.state->lost = timeout;
  g.state->loss = static_cast<int64_t>(loss);
  for (int peer = 0; peer < g.group.num_ranks; ++peer) {
    PeerLine& line = peer_line(g.group, peer, rank);
    line.culprit = timeout.peer;
    line.culprit_phase = timeout.phase;
    store_word(&line.failed, 1u);
  }
}

__device__ __forceinline__ TimeoutRecord ll_timeout(const LlGroup& g, Phase phase, int peer,
                                                    uint64_t expected, uint64_t seen) {
  return {g.group.rank, static_cast<int32_t>(phase), peer, static_cast<int64_t>(expected),
          static_cast<int64_t>(seen)};
}

// Posts.

/// What a block has read of the posts of a call, in shared memory.
struct LlBoard {
  LlWords posts[kMaxRanks];
  AtomicWord came, masked;
  int finding;
};

/// All threads: fills the words of a post; fields are to be set after a barrier.
__device__ inline void ll_begin_words(const LlGroup& g, LlWords& words, LlOp op,
                                      const LlSizes& sizes, int held, LlRanks masked) {
  if (threadIdx.x != 0) return;
  for (uint64_t& word : words.word) word = 0;
  words.word[kLlFieldOp] = static_cast<uint64_t>(op);
  words.word[kLlFieldMaxTokens] = sizes.num_max_tokens_per_rank;
  words.word[kLlFieldHidden] = sizes.hidden;
  words.word[kLlFieldFormat] = sizes.format;
  for (int half = 0; half < 2; ++half)
    if (held >> half & 1) words.word[kLlWordHeld + half] = g.state->halves[half].number;
  words.word[kLlWordMasked] = masked;
}

/// One thread: turns the post into a refusal that says what is wrong in its fields.
__device__ inline void ll_refuse_in(LlWords& words, LlStatus kind, const int64_t (&detail)[4]) {
  words.word[kLlFieldOp] = static_cast<uint64_t>(LlOp::kRefused);
  words.word[1] = static_cast<uint64_t>(kind);
  for (int i = 0; i < 4; ++i) words.word[2 + i] = static_cast<uint64_t>(detail[i]);
}

/// All threads: writes the post, `counts` and `text` if given, to the ranks of `to`; then the
/// flags.
__device__ inline void ll_send_post(const LlGroup& g, uint64_t number, int attempt,
                                    const LlWords& words, const int32_t* counts, const char* text,
                                    LlRanks to) {
  const int rank = g.group.rank, num_ranks = g.group.num_ranks, num_experts = g.group.num_experts;
  for (int i = threadIdx.x; i < num_ranks * kNumLlWords; i += blockDim.x) {
    const int peer = i / kNumLlWords, word = i % kNumLlWords;
    if (ll_has(to, peer))
      reinterpret_cast<uint64_t*>(&ll_post(g, number, peer, rank))[word] = words.word[word];
  }
  for (int i = threadIdx.x; counts && i < num_ranks * num_experts; i += blockDim.x) {
    const int peer = i / num_experts, expert = i % num_experts;
    if (ll_has(to, peer)) ll_counts(g, number, peer, rank)[expert] = counts[expert];
  }
  for (int i = threadIdx.x; text && i < num_ranks * kMaxText; i += blockDim.x)
    if (ll_has(to, i / kMaxText))
      ll_post(g, number, i / kMaxText, rank).text[i % kMaxText] = text[i % kMaxText];
  __syncthreads();
  for (int peer = threadIdx.x; peer < num_ranks; peer += blockDim.x)
    if (ll_has(to, peer)) store_flag(ll_flag(g, number, peer, rank), ll_post_flag(number, attempt));
}

/// All threads: reads the posts of `from`, which have come.
__device__ inline void ll_read_posts(const LlGroup& g, LlBoard& board, uint64_t number,
                                     LlRanks from) {
  __syncthreads();
  for (int i = threadIdx.x; i < g.group.num_ranks * kNumLlWords; i += blockDim.x) {
    const int src = i / kNumLlWords, word = i % kNumLlWords;
    if (ll_has(from, src))
      board.posts[src].word[word] = __ldcg(
          reinterpret_cast<const AtomicWord*>(&ll_post(g, number, g.group.rank, src)) + word);
  }
  __syncthreads();
}

/// All threads: waits for the posts of `from` and reads them. Returns who came. The losses of the
/// others are told to lost(peer, loss, seen) by one thread each.
template <typename Lost>
__device__ LlRanks ll_wait_posts(const LlGroup& g, LlBoard& board, uint64_t number, LlRanks from,
                                 int64_t* waited_us, Lost&& lost) {
  if (threadIdx.x == 0) board.came = 0;
  __syncthreads();
  const uint64_t start = now_ns();
  for (int peer = threadIdx.x; peer < g.group.num_ranks; peer += blockDim.x) {
    if (!ll_has(from, peer)) continue;
    uint64_t seen = 0;
    LlLoss loss;
    const bool has_come = ll_wait(g, peer, start + g.group.timeout_ns, &loss, [&] {
      seen = load_flag(ll_flag(g, number, g.group.rank, peer));
      return seen >= ll_post_flag(number, 0);
    });
    if (has_come)
      atomicOr(&board.came, ll_bit(peer));
    else
      lost(peer, loss, seen);
    if (waited_us) waited_us[peer] += static_cast<int64_t>((now_ns() - start) / 1000);
  }
  __syncthreads();
  const LlRanks came = board.came;
  ll_read_posts(g, board, number, came);
  return came;
}

// Agreement.

/// All threads: the lowest finding among the posts of `members`, or INT32_MAX: refusals by rank,
/// then disagreements by rank and field, then results that a rank has let go of and another has
/// not.
__device__ inline int ll_find(const LlGroup& g, LlBoard& board, LlRanks members) {
  constexpr int kNothing = INT32_MAX;
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
    for (int i = 0; i < kMaxText; ++i)
      record->text[i] = ll_post(g, number, g.group.rank, finding).text[i];
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

/// One thread, at the end of a call: tells the host.
__device__ inline void ll_end(const LlGroup& g, LlRecord* record, LlStatus status) {
  if (g.is_captured && status == LlStatus::kOk) return;
  if (status == LlStatus::kTimeout) {
    record->timeout = g.state->lost;
    record->detail[0] = g.state->loss;
  }
  __threadfence_system();
  *static_cast<volatile int32_t*>(&record->status) = static_cast<int32_t>(status);
}

/// All threads of one block: keeps the posts of a combine that was sent and not received, so that
/// their slot can be used again.
__device__ inline void ll_collect(const LlGroup& g, LlBoard& board, int half) {
  LlHalfState& state = g.state->halves[half];
  if (state.combine == 0 || state.is_collected) return;
  const uint64_t number = state.combine - 1;
  const LlRanks from = ll_peers(g, read_word(&g.state->masked));
  const LlRanks came =
      ll_wait_posts(g, board, number, from, nullptr, [&](int peer, LlLoss loss, uint64_t seen) {
        ll_lose(g, ll_timeout(g, Phase::kPost, peer, ll_post_flag(number, 0), seen), loss);
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

/// All threads of the block that is about to post call `number`.
__device__ inline void ll_collect_old(const LlGroup& g, LlBoard& board, uint64_t number) {
  for (int half = 0; half < 2; ++half)
    if (g.state->halves[half].combine != 0 && g.state->halves[half].combine + 1 <= number)
      ll_collect(g, board, half);
}

/// All threads, once, at the end of every block of a kernel: whether this block is the last one. It
/// sees, and its flags announce, what all blocks have written.
__device__ inline bool ll_is_last_block(const LlGroup& g) {
  __shared__ bool is_last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence_system();
    is_last = atomicAdd(&g.state->num_finished, 1u) == gridDim.x - 1;
    __threadfence_system();
  }
  __syncthreads();
  return is_last;
}

/// One thread of the last block: makes ready for the next kernel.
__device__ inline void ll_reset_blocks(const LlGroup& g) {
  g.state->num_finished = 0;
  g.state->num_frozen = 0;
  g.state->verdict = 0;
  g.state->late = 0;
  g.state->bad = ~uint64_t{0};
}

}  // namespace ep::cuda

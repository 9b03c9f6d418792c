#pragma once

#include "core/ll_protocol.h"
#include "cuda/device/sync.cuh"
#include "cuda/ll_group.h"
#include "cuda/ll_wire.cuh"
#include "cuda/protocol.cuh"

// Protocol steps of low-latency mode, as in cpu/ll_exchange.h: the words of the region, masks,
// waits, ends of calls and kernels; ll_posts.cuh has the posts. A wait is made by one thread per
// peer and has a deadline. "All threads" are those of one block.

namespace ep::cuda {

using AtomicWord = unsigned long long;  // what atomics on uint64_t want

__device__ __forceinline__ AtomicWord* atomic_word(uint64_t* word) {
  return reinterpret_cast<AtomicWord*>(word);
}

__device__ __forceinline__ uint64_t read_word(const uint64_t* word) {
  return *static_cast<const volatile uint64_t*>(word);
}
__device__ __forceinline__ uint32_t read_word(const uint32_t* word) {
  return *static_cast<const volatile uint32_t*>(word);
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
/// A post again, in words that carry the number of their call and so need no flag: the halves of
/// its words, then the counts of the rows to each expert. Those of the first attempt.
__device__ __forceinline__ uint64_t* ll_tagged(const LlGroup& g, uint64_t number, int owner,
                                               int src) {
  return reinterpret_cast<uint64_t*>(&ll_post(g, number, owner, src) + 1);
}
__device__ __forceinline__ uint64_t* ll_tagged_counts(const LlGroup& g, uint64_t number, int owner,
                                                      int src) {
  return ll_tagged(g, number, owner, src) + 2 * kNumLlWords;
}
__device__ __forceinline__ uint64_t ll_tag(uint64_t number, uint32_t value) {
  return (number + 1) << 32 | value;
}
__device__ __forceinline__ bool ll_has_tag(uint64_t word, uint64_t number) {
  return word >> 32 == static_cast<uint32_t>(number + 1);
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
  ll_put_flag(g, peer, &ll_mask_line(g, peer, g.group.rank).state, kLlMasked);
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
  // Far ranks last: the way to one that is gone may be blocked until its network card gives up.
  for (int is_far = 0; is_far < 2; ++is_far)
    for (int peer = 0; peer < g.group.num_ranks; ++peer)
      if (ll_is_far(g, peer) == (is_far != 0))
        ll_put_failure(g, peer, peer_line(g.group, peer, rank), timeout.peer, timeout.phase);
}

__device__ __forceinline__ TimeoutRecord ll_timeout(const LlGroup& g, Phase phase, int peer,
                                                    uint64_t expected, uint64_t seen) {
  return {g.group.rank, static_cast<int32_t>(phase), peer, static_cast<int64_t>(expected),
          static_cast<int64_t>(seen)};
}

/// One thread, after a wait in vain for the post of `peer`.
__device__ inline void ll_lose_post(const LlGroup& g, uint64_t number, int peer, LlLoss loss) {
  ll_lose(g, ll_timeout(g, Phase::kPost, peer, ll_post_flag(number, 0), 0), loss);
}

// Ends of calls and kernels.

/// One thread.
__device__ __forceinline__ void ll_stamp(const LlGroup& g, uint64_t number, LlStamp which) {
  uint64_t* stamps = g.state->stamps[number % kNumLlStamped];
  for (int i = 0; which == kLlStampBegin && i < kNumLlStamps; ++i) stamps[i] = 0;
  stamps[which] = now_ns();
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

/// Who reads what the blocks of a kernel have written.
enum class LlReaders { kThisDevice, kPeers };

/// All threads, once, at the end of every block of a kernel: whether this block is the last one. It
/// sees, and its flags announce, what all blocks have written.
template <LlReaders kReaders>
__device__ bool ll_is_last_block(const LlGroup& g) {
  __shared__ bool is_last;
  __syncthreads();
  if (gridDim.x == 1) return true;
  if (threadIdx.x == 0) {
    if constexpr (kReaders == LlReaders::kPeers)
      __threadfence_system();
    else
      __threadfence();
    is_last = atomicAdd(&g.state->num_finished, 1u) == gridDim.x - 1;
    __threadfence();
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
  g.state->lacks_counts = 0;
  g.state->bad = ~uint64_t{0};
}

}  // namespace ep::cuda

#pragma once

#include "cuda/device/sync.cuh"
#include "cuda/ll_group.h"

// How words and rows get to another rank. Here every rank's memory is mapped and stored to, and no
// rank is far; a library that has far ranks says in EP_LL_WIRE which header has these functions
// instead. An address at a far rank is given as that of the same place in this rank's region.

#ifdef EP_LL_WIRE
#include EP_LL_WIRE
#else

namespace ep::cuda {

__device__ constexpr bool ll_is_far(const LlGroup&, int) { return false; }
__device__ constexpr bool ll_has_far(const LlGroup&) { return false; }

/// One thread: a word without order.
__device__ __forceinline__ void ll_put_word(const LlGroup&, int, uint64_t* word, uint64_t value) {
  store_relaxed(word, value);
}

/// One thread: a word behind all that this thread has stored or put.
__device__ __forceinline__ void ll_put_flag(const LlGroup&, int, uint64_t* word, uint64_t value) {
  store_flag(word, value);
}

/// One thread: says to `rank` on whom this one gave up.
__device__ __forceinline__ void ll_put_failure(const LlGroup&, int, PeerLine& line, int culprit,
                                               int phase) {
  line.culprit = culprit;
  line.culprit_phase = phase;
  store_word(&line.failed, 1u);
}

/// One warp: begins to copy bytes of this rank's region to a far rank.
__device__ __forceinline__ void ll_put_bytes(const LlGroup&, int, void*, const void*, int64_t) {}

/// One thread: what it has begun to put is there.
__device__ __forceinline__ void ll_finish_puts() {}

/// One thread, which has seen a word from a rank: what that rank put before can be read.
__device__ __forceinline__ void ll_take_arrival(const LlGroup&, int, const uint64_t*) {}

}  // namespace ep::cuda

#endif

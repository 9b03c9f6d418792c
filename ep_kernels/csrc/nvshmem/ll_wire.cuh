#pragma once

#include <nvshmem.h>
#include <nvshmemx.h>

#include "cuda/device/sync.cuh"
#include "cuda/ll_group.h"

// cuda/ll_wire.cuh over NVSHMEM: ranks whose memory is mapped are stored to as there, far ones are
// reached by puts. Regions are symmetric memory.
//
// NOTE: NVSHMEM orders what one thread has put. So a thread that announces what others have put
// comes behind ll_finish_puts() of each of them and a barrier. Its fence (3.4.5) leaves out all but
// the first network card of a GPU that has several; quiet does not.

namespace ep::cuda {

__device__ __forceinline__ bool ll_is_far(const LlGroup& g, int rank) {
  return ll_has(g.far.ranks, rank);
}
__device__ __forceinline__ bool ll_has_far(const LlGroup& g) { return g.far.ranks != 0; }

__device__ __forceinline__ void ll_put_word(const LlGroup& g, int rank, uint64_t* word,
                                            uint64_t value) {
  if (ll_is_far(g, rank))
    nvshmem_uint64_p(word, value, g.far.pes[rank]);
  else
    store_relaxed(word, value);
}

__device__ __forceinline__ void ll_put_flag(const LlGroup& g, int rank, uint64_t* word,
                                            uint64_t value) {
  if (!ll_is_far(g, rank)) return store_flag(word, value);
  nvshmem_quiet();
  nvshmemx_signal_op(word, value, NVSHMEM_SIGNAL_SET, g.far.pes[rank]);
}

__device__ __forceinline__ void ll_put_failure(const LlGroup& g, int rank, PeerLine& line,
                                               int culprit, int phase) {
  if (ll_is_far(g, rank)) {
    nvshmem_int32_p(&line.culprit, culprit, g.far.pes[rank]);
    nvshmem_int32_p(&line.culprit_phase, phase, g.far.pes[rank]);
    nvshmem_quiet();
    nvshmem_uint32_p(&line.failed, 1u, g.far.pes[rank]);
    return;
  }
  line.culprit = culprit;
  line.culprit_phase = phase;
  store_word(&line.failed, 1u);
}

__device__ __forceinline__ void ll_put_bytes(const LlGroup& g, int rank, void* to, const void* from,
                                             int64_t num_bytes) {
  nvshmemx_putmem_nbi_warp(to, from, static_cast<size_t>(num_bytes), g.far.pes[rank]);
}

__device__ __forceinline__ void ll_finish_puts() { nvshmem_quiet(); }

/// NOTE: the word is there already. NVSHMEM's test of it gives the order of bytes which a network
/// card wrote; its wait for a signal does not.
__device__ __forceinline__ void ll_take_arrival(const LlGroup& g, int rank, const uint64_t* word) {
  if (!ll_is_far(g, rank)) return;
  const uint64_t value = load_flag(word);
  nvshmem_uint64_test(const_cast<uint64_t*>(word), NVSHMEM_CMP_GE, value);
}

}  // namespace ep::cuda

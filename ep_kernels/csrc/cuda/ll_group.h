#pragma once

#include <cstddef>
#include <cstdint>

#include "core/ll_args.h"
#include "core/ll_layout.h"
#include "cuda/group.h"

// What the kernels of low-latency mode know, and keep from call to call. Everything that a replay
// of a CUDA graph has to find changed lies in device memory: numbers of calls, masks, what is in
// which half. What a graph may fix is passed by value: tensors, sizes, which half.

namespace ep::cuda {

/// A set of ranks in one word.
using LlRanks = uint64_t;

EP_HOST_DEVICE constexpr LlRanks ll_bit(int rank) { return LlRanks{1} << rank; }
EP_HOST_DEVICE constexpr bool ll_has(LlRanks ranks, int rank) { return (ranks >> rank & 1) != 0; }
EP_HOST_DEVICE constexpr LlRanks ll_all(int num_ranks) {
  return num_ranks == 64 ? ~LlRanks{0} : ll_bit(num_ranks) - 1;
}

constexpr int kMaxLlExperts = 4096;  ///< counters of a block, in shared memory

/// "View" of a rank that gave a dispatch up after a peer was lost in it; its rows do not count.
constexpr LlRanks kLlGivenUp = ~LlRanks{0};

enum class LlStatus : int32_t {
  kRunning = 0,
  kOk = 1,
  kDisagree = 2,    ///< detail: field, rank, its value, `rank`'s value
  kRefused = 3,     ///< by `rank`, text
  kBadExpert = 4,   ///< at `rank`; detail: token, position in topk_idx, expert
  kTwice = 5,       ///< as kBadExpert: chosen twice
  kOtherIdx = 6,    ///< combine; detail: token, position, expert given, expert dispatched
  kReader = 7,      ///< detail: owner, number of the dispatch it has let go of; `rank` has not
  kTimeout = 8,     ///< timeout: the record; detail: LlLoss
  kNoDispatch = 9,  ///< the dispatch of this handle has failed
};

/// Why a wait was given up.
enum class LlLoss : int64_t { kLate = 0, kLeft = 1, kGone = 2 };

/// How a call ended. Pinned host memory; `status` is written last.
struct LlRecord {
  int32_t status;  ///< LlStatus
  int32_t rank;
  int64_t detail[4];
  TimeoutRecord timeout;
  char text[kMaxText];
};

/// The words of a post that GPUs use: up to the first of its set of masked ranks.
constexpr int kNumLlWords = static_cast<int>(offsetof(LlPost, masked) / sizeof(uint64_t)) + 1;
struct LlWords {
  uint64_t word[kNumLlWords];
};
enum LlWord : int {
  kLlWordWindow = offsetof(LlPost, window) / 8,
  kLlWordReused = offsetof(LlPost, reused) / 8,
  kLlWordHeld = offsetof(LlPost, held) / 8,
  kLlWordMasked = offsetof(LlPost, masked) / 8,
};

/// What is in a half, and the calls over it.
struct LlHalfState {
  uint64_t number;       ///< number + 1 of the last dispatch here
  uint64_t combine;      ///< number + 1 of the combine that was sent, not received; 0 = none
  LlRanks view;          ///< masked ranks when its rows were placed
  LlRanks peers;         ///< ranks that rows went to and came from
  int32_t error;         ///< LlStatus of a dispatch that has failed, or 0
  int32_t is_collected;  ///< posts below are those of the combine
  uint8_t peer_half[kMaxRanks];  ///< where the same dispatch is at the peers
  LlRanks arrived;               ///< of the collected combine
  LlWords posts[kMaxRanks];
};

/// Moments of a call that are kept for whoever asks where its time went; those that a call does not
/// come to stay 0. Send half first: of block 0, then of the block that ends last.
enum LlStamp : int {
  kLlStampBegin,      ///< the send kernel runs
  kLlStampPosted,     ///< dispatch: this rank has posted
  kLlStampPlaced,     ///< dispatch: first pieces are loaded, tokens placed
  kLlStampAgreed,     ///< dispatch: all ranks have posted the same
  kLlStampResolved,   ///< dispatch: rows have addresses
  kLlStampSent,       ///< dispatch: block 0 has sent its rows
  kLlStampWritten,    ///< all blocks have
  kLlStampSaid,       ///< the peers are told: done, or a combine's post
  kLlStampReceiving,  ///< the receive kernel runs
  kLlStampArrived,    ///< what it waits for is there
  kLlStampSummed,     ///< combine: block 0 has its sums
  kLlStampEnd,
  kNumLlStamps,
};
constexpr int kNumLlStamped = 64;  ///< calls

/// Device memory of one rank that only its own kernels touch; they run one after the other.
struct LlState {
  uint64_t next_number;
  LlRanks masked;
  uint64_t verdict;       ///< of block 0 for the other blocks of a send kernel: ll_verdict()
  LlRanks view;           ///< goes with the verdict
  uint64_t late;          ///< ranks that a block of a receive kernel has not seen
  uint64_t bad;           ///< first choice of a combine that differs from its dispatch
  uint32_t lacks_counts;  ///< a block of a dispatch has not got all counts of a post
  uint32_t num_frozen, num_finished;  ///< blocks of the kernel under way
  uint32_t failed;                    ///< a wait ran out without masking: nothing moves any more
  TimeoutRecord lost;                 ///< why
  int64_t loss;                       ///< LlLoss
  uint64_t answer;                    ///< of an un-masking: the peers that did not answer
  LlHalfState halves[2];
  uint64_t stamps[kNumLlStamped][kNumLlStamps];  ///< [number % kNumLlStamped] nanoseconds
};

/// Ranks whose memory kernels cannot address: rows for them are laid out in this rank's memory and
/// sent from there, and their results come to the same places. See ll_wire.cuh, ll_far_rows.cuh.
struct LlFar {
  LlRanks ranks;
  uint8_t* rows;           ///< [2 halves, E, M] rows of 2 H bytes
  int64_t half_bytes;      ///< of each half of `rows`
  int16_t pes[kMaxRanks];  ///< what the network calls each rank
};

/// The group as the kernels see it; passed by value.
struct LlGroup {
  DeviceGroup group;
  LlState* state;
  int32_t* counts;     ///< [2, L, R] rows of each local expert from each rank
  int64_t half_bytes;  ///< of each half; the first begins behind the control words
  int32_t mask_silent_ranks;
  int32_t is_captured;  ///< into a graph: the record is that of all such calls, told of errors only
  LlControlLayout layout{1, 1};
  int16_t num_local[kMaxRanks];  ///< experts of each rank
  /// Of each rank, as mapped here; of a far rank, this rank's own: there it has the same place.
  uint8_t* regions[kMaxRanks];
  LlFar far;
};

struct LlDispatchCall {
  LlDispatchArgs args;
  LlRecord* record;
  int32_t half;
  int32_t held;      ///< bit h: half h holds a result
  int32_t is_whole;  ///< the receive half follows in the kernel of the send half
};

struct LlCombineCall {
  LlCombineArgs args;
  LlSizes sizes;  ///< of the dispatch
  LlRecord* record;
  int32_t half;
  int32_t held;
  int32_t is_whole;
};

/// A call without rows: a barrier, or one that this rank refuses.
struct LlPlainCall {
  LlRecord* record;
  int32_t op;  ///< LlOp
  int32_t held;
  char text[kMaxText];
};

struct LlMaskCall {
  LlRanks ranks;  ///< to mask; or to take back, if they are masked or have left
  int32_t is_masked;
  int32_t held;
};

}  // namespace ep::cuda

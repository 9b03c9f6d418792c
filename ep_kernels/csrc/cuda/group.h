#pragma once

#include <cstdint>

#include "core/check.h"
#include "core/ht_args.h"
#include "core/layout.h"
#include "core/protocol.h"
#include "core/routing.h"

// What kernels know of the group, and the words between host and device. The protocol words between
// ranks are those of core/protocol.h, in device memory.

namespace ep::cuda {

constexpr int kMaxRanks = 64;  // DeviceGroup::remote_ranks has a bit for each
constexpr int kMaxLocalExperts = 1024;

/// Tokens that one block counts and plans: bits of a mask.
constexpr int kChunkTokens = 128;

enum class CallStatus : int32_t {
  kRunning = 0,
  kOk = 1,
  kDisagree = 2,     ///< detail: field, rank, value of rank 0, value of `rank`
  kRefused = 3,      ///< detail: rank; text in the rank's post
  kBadExpert = 4,    ///< detail: rank, token, position in topk_idx, expert: out of range
  kTwice = 5,        ///< as kBadExpert: chosen twice
  kTimeout = 6,      ///< timeout: the record
  kNoMemory = 7,     ///< `rank` has no memory for its rows
  kSkipped = 8,      ///< the buffer had failed before
  kTooManyRows = 9,  ///< `rank` would receive detail[0] rows, which is too many
};

constexpr uint32_t kSizesValid = 1;  ///< CallRecord::recv_sizes may be read
constexpr uint32_t kSizesNever = 2;  ///< the call has ended with an error instead

/// Moments of a call, by the timer of the device. 0 for those that it does not have.
enum Stamp : int {
  kStampBegin,    ///< its first kernel runs
  kStampAgreed,   ///< all ranks have made the call
  kStampSized,    ///< fresh dispatch: the host may read how much memory it takes
  kStampOffered,  ///< fresh dispatch: all ranks have taken their memory
  kStampMoving,   ///< rows begin to move
  kStampMoved,    ///< this rank's rows have moved
  kStampDone,     ///< those of all ranks have
  kNumStamps,
};

/// How a call ended. Pinned host memory, written by the device, one per call in a ring.
struct CallRecord {
  int32_t status;  ///< CallStatus; written last
  int32_t rank;
  int64_t detail[4];
  TimeoutRecord timeout;
  int64_t recv_sizes[3];  ///< as in HtRouting, for the host that has to allocate
  int64_t num_recv_tokens_per_expert[kMaxLocalExperts];
  int64_t expert_offsets[kMaxLocalExperts + 1];
  uint64_t stamps[kNumStamps];  ///< nanoseconds
  uint32_t has_sizes;           ///< kSizesValid or kSizesNever, set with release order
  char text[kMaxText];
};

/// Device memory of one rank that only its own kernels touch.
struct LocalState {
  uint64_t num_calls;    ///< calls finished: the number of the next one
  int32_t call_status;   ///< CallStatus of the call under way
  uint32_t blocks_done;  ///< of the call's last kernel
  uint32_t next_item;    ///< see WorkQueue; of the kernel that moves the rows
  uint32_t failed;       ///< a wait ran out of time: everything later returns at once
  uint64_t stamps[kNumStamps];
  int64_t bad_choice[2];    ///< first bad entry of topk_idx: kind and index; kNoBadChoice if none
  Offer offers[kMaxRanks];  ///< memory of every rank, for the call under way
  int64_t capacities[kMaxRanks];
};

/// The group as kernels see it; passed by value.
struct DeviceGroup {
  int rank, num_ranks, num_experts, num_local_experts;
  Placement placement;  ///< in device memory
  uint64_t timeout_ns;
  uint64_t remote_ranks;  ///< a bit for each rank to which a row crosses a link only once
  int is_captured;        ///< the call's record is shared: it keeps errors only
  /// [num_ranks] or null: where the call under way counts the microseconds that it waits for each
  /// rank. Device memory of the caller.
  int64_t* waited_us;
  LocalState* state;
  uint8_t* segments[kMaxRanks];  ///< control region, then pool, of every rank

  EP_HOST_DEVICE bool is_remote(int other) const { return remote_ranks >> other & 1; }
  EP_HOST_DEVICE ControlLayout layout() const { return ControlLayout(num_ranks, num_experts); }
  EP_HOST_DEVICE uint8_t* pool(int of) const { return segments[of] + layout().num_bytes; }
};

/// What a call announces; the kernel adds the number and the counts.
struct PostArgs {
  int64_t fields[kNumPostFields];
  int64_t capacity;
  Offer offer;
  int32_t has_text;
  char text[kMaxText];
};

}  // namespace ep::cuda

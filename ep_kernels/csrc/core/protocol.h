#pragma once

#include <cstdint>
#include <string>

#include "core/ht_args.h"
#include "core/layout.h"
#include "core/macros.h"
#include "core/types.h"

// The words that ranks share, and their layout. README.md beside this folder holds the table of
// writers, readers, memory orders and resets.

namespace ep {

/// Calls of one buffer that may be under way at once; slots of call `seq` are `seq % kNumSlots`.
constexpr int kNumSlots = 8;
constexpr int kMaxText = 512;

/// What a rank waits for; part of a timeout record.
enum class Phase : int32_t {
  kNone = 0,
  kSlot = 1,    ///< a peer to finish the call that used this slot before
  kPost = 2,    ///< a peer to make the same call
  kOffer = 3,   ///< a peer to say where its receive memory is
  kDone = 4,    ///< a peer to finish its part of the call
  kRows = 5,    ///< a peer to send its rows (low-latency mode)
  kReturn = 6,  ///< a masked peer to come back (low-latency mode)
};

EP_HOST_DEVICE const char* phase_name(Phase phase) {
  switch (phase) {
    case Phase::kSlot:
      return "to finish an earlier call";
    case Phase::kPost:
      return "to make the same call";
    case Phase::kOffer:
      return "to offer its receive memory";
    case Phase::kDone:
      return "to finish its part of the call";
    case Phase::kRows:
      return "to send its rows";
    case Phase::kReturn:
      return "to come back, un-masked";
    default:
      return "";
  }
}

enum class Op : int64_t {
  kDispatch = 1,
  kCachedDispatch = 2,
  kCombine = 3,
  kBarrier = 4,
  kRefused = 5
};

/// Properties of a call on which all ranks must agree. protocol.cpp has their names.
enum PostField : int {
  kFieldOp,
  kFieldLayout,
  kFieldRowType,
  kFieldRowBytes,
  kFieldScaleBytes,
  kFieldScaleType,
  kFieldNumTopk,
  kFieldWeightBytes,
  kFieldAlignment,
  kFieldHasCapacity,
  kFieldHandle,
  kNumPostFields,
};

/// The fields of a call, for people.
std::string field_value(int field, int64_t value);

/// What every rank says when rank `src` disagrees with rank 0 on a field.
std::string disagreement(int field, int64_t value_of_first, int src, int64_t value);

/// Fills the fields on which ranks must agree.
void fill_fields(Op op, const HtSizes& sizes, int64_t (&fields)[kNumPostFields]);

/// Where a rank's receive memory (dispatch) or its rows (combine) are: byte offsets into its pool,
/// -1 where there is none.
struct Offer {
  int64_t failed = 0;  ///< nonzero: no memory, `text` of the slot says why
  int64_t x = -1;
  int64_t scales = -1;
  int64_t topk_idx = -1;
  int64_t topk_weights = -1;
  int64_t chain = -1;  ///< dispatch, CUDA: peers on other devices write rows once, and chain words
};

/// A rank's announcement of a call. Followed in its slot by int32 counts: rows for each rank
/// [num_ranks], then tokens for each expert [num_experts].
struct Post {
  int64_t fields[kNumPostFields];
  int64_t capacity;     ///< rows this rank can receive, -1 = any
  Offer offer;          ///< filled when the memory is known before the counts are
  char text[kMaxText];  ///< why, if the operation is kRefused
};

struct OfferSlot {
  Offer offer;
  char text[kMaxText];
};

/// Wakes a rank that sleeps. One per rank.
struct Doorbell {
  uint32_t rings;     ///< incremented after every store that somebody may wait for
  uint32_t sleepers;  ///< waits that are, or are about to be, asleep
};

/// What a peer says about itself, one cache line per source rank.
struct alignas(64) PeerLine {
  uint64_t done;      ///< calls finished: seq + 1 of the last one
  uint32_t departed;  ///< its buffer was destroyed
  uint32_t failed;    ///< it gave up: see culprit
  int32_t culprit;    ///< the rank it gave up on
  int32_t culprit_phase;
  int32_t waiting_for;  ///< rank of another node whose message it waits for, plus 1; 0 = none
};

/// Byte offsets of the control region, which every rank owns once and all peers map.
///
///   | doorbell | peer lines [R] | post flags [S][R] | offer flags [S][R] | posts [S][R] | offers |
struct ControlLayout {
  size_t doorbell, peer_lines, post_flags, offer_flags, posts, offers, num_bytes;
  size_t post_stride;
  int num_ranks, num_experts;

  EP_HOST_DEVICE constexpr ControlLayout(int ranks, int experts)
      : doorbell(0),
        peer_lines(0),
        post_flags(0),
        offer_flags(0),
        posts(0),
        offers(0),
        num_bytes(0),
        post_stride(0),
        num_ranks(ranks),
        num_experts(experts) {
    const size_t num_slots = static_cast<size_t>(kNumSlots) * ranks;
    post_stride = align_up(sizeof(Post) + (size_t{4} * ranks + size_t{4} * experts), size_t{64});
    Carver carve;
    doorbell = carve.take(sizeof(Doorbell));
    peer_lines = carve.take(sizeof(PeerLine) * ranks);
    post_flags = carve.take(sizeof(uint64_t) * num_slots);
    offer_flags = carve.take(sizeof(uint64_t) * num_slots);
    posts = carve.take(post_stride * num_slots);
    offers = carve.take(sizeof(OfferSlot) * num_slots);
    num_bytes = align_up(carve.end, size_t{4096});
  }

  /// Slot of source rank `src` for call `seq`, in every array of slots.
  EP_HOST_DEVICE constexpr size_t slot(uint64_t seq, int src) const {
    return (seq % kNumSlots) * static_cast<size_t>(num_ranks) + src;
  }
};

}  // namespace ep

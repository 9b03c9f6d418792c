#pragma once

#include <cstdint>
#include <string>

#include "core/ll_args.h"
#include "core/protocol.h"
#include "core/rank_set.h"

// The words that ranks share in low-latency mode. README.md beside this folder holds the table of
// writers, readers, memory orders and resets; docs/low-latency.md says why they suffice.

namespace ep {

/// Words of call c lie in slot c % kNumLlSlots.
constexpr int kNumLlSlots = 4;

enum class LlOp : int64_t { kDispatch = 1, kCombine = 2, kBarrier = 3, kRefused = 4 };

/// Properties of a call on which all ranks must agree. ll_protocol.cpp has their names.
enum LlField : int {
  kLlFieldOp,
  kLlFieldMaxTokens,
  kLlFieldHidden,
  kLlFieldFormat,
  kLlFieldDispatch,
  kLlFieldWire,
  kNumLlFields,
};

/// What every rank says when ranks `a` and `b` disagree on a field.
std::string ll_disagreement(int field, int a, int64_t value_of_a, int b, int64_t value_of_b);

/// A rank's announcement of a call. Followed in its slot by int32 counts [num_experts], the rows
/// that it sends to each expert.
struct LlPost {
  int64_t fields[kNumLlFields];
  int64_t window;       ///< pool offset of this rank's half: where rows go, or can be read
  uint64_t reused;      ///< number + 1 of the dispatch that was in this half before
  uint64_t held[2];     ///< number + 1 of the dispatches whose rows this rank may still read
  RankSet masked;       ///< ranks that this rank leaves out
  char text[kMaxText];  ///< why, if the operation is kRefused
};

/// The flag of a post: grows with the call, and with every time the call is posted again.
EP_HOST_DEVICE constexpr uint64_t ll_post_flag(uint64_t number, int attempt) {
  return ((number + 1) << 16) + static_cast<uint64_t>(attempt);
}

/// "My rows for this call are there."
struct alignas(64) LlDoneLine {
  RankSet view;   ///< the masked ranks of the sender when it placed its rows
  uint64_t flag;  ///< number + 1
};

/// What a peer has to say about the owner. One word, so that a peer which wants the owner back has
/// ceased to leave it out at the same moment.
struct alignas(64) LlMaskLine {
  uint64_t state;  ///< kLlTogether, kLlMasked, or the wish ll_wish(number of the peer's next call)
};

constexpr uint64_t kLlTogether = 0;  ///< neither of the others; set by the owner, who takes a wish
constexpr uint64_t kLlMasked = 1;    ///< the peer leaves the owner out

EP_HOST_DEVICE constexpr uint64_t ll_wish(uint64_t next_number) { return next_number + 2; }

}  // namespace ep

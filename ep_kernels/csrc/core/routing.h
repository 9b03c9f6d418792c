#pragma once

#include <cstdint>

#include "core/macros.h"

namespace ep {

/// Where every expert lives. `rank_of[e]` is the rank that owns expert e, `local_of[e]` its
/// ordinal among that rank's experts in ascending order.
///
/// Example: 4 experts, 2 ranks, round robin: rank_of = {0, 1, 0, 1}, local_of = {0, 0, 1, 1}.
struct Placement {
  const int32_t* rank_of;   ///< [num_experts]
  const int32_t* local_of;  ///< [num_experts]
};

/// Rank that owns `expert`; -1 (no expert chosen) stays -1.
EP_HOST_DEVICE int rank_of_choice(const Placement& placement, int64_t expert) {
  return expert < 0 ? -1 : placement.rank_of[expert];
}

/// Where a choice is served, one word: -1 if nowhere, else the rank and whether this choice carries
/// the token's row there. In the rank-major layout a token travels to a rank once, with the first
/// of its choices that land there; the others share the row.
///
/// Example: ranks of the choices {1, 1, 0, -1}, rank-major -> {1, 1 | shared, 0, -1}.
constexpr int32_t kNoRoute = -1;
constexpr int32_t kSharedRow = 1 << 30;

EP_HOST_DEVICE bool carries_row(int32_t route) { return route >= 0 && (route & kSharedRow) == 0; }

EP_HOST_DEVICE int route_rank(int32_t route) { return route < 0 ? -1 : route & ~kSharedRow; }

/// Chain words: on a rank that is sent a token's row once, although several of its experts want it,
/// the token's rows are a chain, from the one that was sent to the last. The word of a row tells
/// the next one; that of a first row is its number, of a later one its complement.
///
/// Example: rows 4, 9 and 7 want the same token -> word[4] = 9, word[9] = ~7, word[7] = ~end. A row
/// that is alone has the word `end`.
constexpr int32_t kEndOfChain = INT32_MAX;

EP_HOST_DEVICE int32_t first_in_chain(int32_t next) { return next; }

EP_HOST_DEVICE int32_t later_in_chain(int32_t next) { return ~next; }

/// Whether the row of this word has to be copied to others.
EP_HOST_DEVICE bool begins_chain(int32_t word) { return word >= 0 && word != kEndOfChain; }

EP_HOST_DEVICE int32_t next_in_chain(int32_t word) { return word < 0 ? ~word : word; }

}  // namespace ep

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

/// True for the first of a token's choices that lands on its rank. In the rank-major layout a
/// token travels to a rank once, however many of that rank's experts it chose.
///
/// Example: ranks of the choices {1, 1, 0, -1} -> {true, false, true, false}.
EP_HOST_DEVICE bool is_first_choice_on_rank(const Placement& placement, const int64_t* choices,
                                            int k) {
  const int rank = rank_of_choice(placement, choices[k]);
  if (rank < 0) return false;
  for (int i = 0; i < k; ++i)
    if (rank_of_choice(placement, choices[i]) == rank) return false;
  return true;
}

}  // namespace ep

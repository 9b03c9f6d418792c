#pragma once

#include <cstdint>

#include "core/macros.h"

namespace ep {

/// A set of ranks; fits into a message between ranks.
struct RankSet {
  static constexpr int kMaxRanks = 256;
  uint64_t words[kMaxRanks / 64] = {};

  EP_HOST_DEVICE bool has(int rank) const { return words[rank / 64] >> (rank % 64) & 1; }
  EP_HOST_DEVICE void add(int rank) { words[rank / 64] |= uint64_t{1} << (rank % 64); }
  EP_HOST_DEVICE void remove(int rank) { words[rank / 64] &= ~(uint64_t{1} << (rank % 64)); }

  EP_HOST_DEVICE bool is_empty() const { return *this == RankSet{}; }

  /// Whether every member is in `other`, too.
  EP_HOST_DEVICE bool is_within(const RankSet& other) const {
    for (int i = 0; i < kMaxRanks / 64; ++i)
      if (words[i] & ~other.words[i]) return false;
    return true;
  }

  EP_HOST_DEVICE bool operator==(const RankSet& other) const {
    for (int i = 0; i < kMaxRanks / 64; ++i)
      if (words[i] != other.words[i]) return false;
    return true;
  }
  EP_HOST_DEVICE bool operator!=(const RankSet& other) const { return !(*this == other); }
};

}  // namespace ep

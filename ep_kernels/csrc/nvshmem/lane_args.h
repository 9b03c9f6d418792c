#pragma once

#include <cstdint>

#include "core/lane_ring.h"

// What the exchange of a lane is told. Shared with Python: ep_kernels/_native_nvshmem.py.

namespace ep::nvshmem {

/// One of the things that travel for a token: its row, its scales, choices or weights.
struct LaneSection {
  const uint8_t* src;  ///< [rows here, bytes]
  uint8_t* dst;        ///< [rows received, bytes]
  int64_t bytes;       ///< 0: there is no such section
};

/// What this node exchanges with one node. Entries `send_first`, ... of `tokens` name the rows to
/// send; what comes is written to rows `recv_first`, ... of `dst`.
struct LaneCounts {
  int64_t send_first, num_sent;
  int64_t recv_first, num_received;
};

struct LaneExchangeArgs {
  LaneSection sections[kMaxLaneSections];
  const int32_t* tokens;  ///< rows of `src`; null: entry i is row i
  const LaneCounts*
      counts;  ///< [num_nodes], device memory; that of this node itself is not looked at
};

}  // namespace ep::nvshmem

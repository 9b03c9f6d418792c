#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/ht_args.h"
#include "core/lane_args.h"
#include "core/protocol.h"
#include "cpu/ht.h"

// What a rank does for the ranks of other nodes on its lane (docs/multi-node.md): messages are made
// and read here, and carried by whoever calls. The Python mirror of the structs is
// ep_kernels/_native_lane.py.

namespace ep::cpu {

/// Announces a call to the lane's peers, who post it on their nodes. Followed by int32 counts
/// [num_ranks + num_experts], zero unless the call is a fresh dispatch.
struct LanePost {
  int64_t num_tokens;    ///< T
  int64_t chunk_tokens;  ///< C, tokens of a chunk
  int64_t num_topk;      ///< K
  Post post;

  const int32_t* counts() const { return reinterpret_cast<const int32_t*>(this + 1); }
  int32_t* counts() { return reinterpret_cast<int32_t*>(this + 1); }
};

/// `num_local` is the number of ranks of a node.
void lane_tokens(const Group& group, int num_local, const LaneTokensArgs& args);
void lane_pack(const Transfer& transfer, const LanePackArgs& args);
void lane_merge(const Transfer& transfer, const LaneMergeArgs& args);

}  // namespace ep::cpu

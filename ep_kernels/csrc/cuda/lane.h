#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "core/ht_args.h"
#include "core/lane_args.h"
#include "core/protocol.h"
#include "cuda/buffer.h"

// Work on rows over several nodes, on the GPU: the twins of cpu/lane.h and cpu/ht.h for the ranks
// of one node. Announcements, plans and the order of the steps are the host's (docs/multi-node.md),
// so no kernel here waits for a peer. Each function enqueues on `stream` and returns; that the
// kernels have ended, and their writes can be seen, is what the host waits for before it says so.

namespace ep::cuda {

constexpr int kMaxNodes = 64;

/// Where the ranks of the node have what a step reads or writes; null where there is none. By local
/// rank; passed by value.
template <typename Byte, typename Index>
struct NodePointers {
  Byte *x[kMaxRanks], *scales[kMaxRanks], *topk_weights[kMaxRanks];
  Index* topk_idx[kMaxRanks];
};

/// The node as kernels see it; passed by value.
struct NodeGroup {
  int first_rank, num_local_experts;
  const int32_t* local_of;  ///< [num_experts] ordinal of an expert on its rank; device memory
};

using Destinations = NodePointers<uint8_t, int64_t>;

struct Sources {
  const uint8_t *x[kMaxRanks], *topk_weights[kMaxRanks];
  int first_rank;

  EP_HOST_DEVICE const uint8_t* x_of(int rank) const { return x[rank - first_rank]; }
  EP_HOST_DEVICE const uint8_t* weights_of(int rank) const {
    return topk_weights[rank - first_rank];
  }
};

/// Sums of all nodes for the tokens of a chunk; passed by value.
struct NodeSums {
  LaneSums of[kMaxNodes];
};

/// Packs rows, scales and weights of a list of tokens into a message.
void launch_lane_pack(const LanePackArgs& args, cudaStream_t stream);
/// Writes rows to their final place in the pools of the node's ranks.
void launch_lane_send(const NodeGroup& node, const HtDispatchArgs& args, const Destinations& to,
                      cudaStream_t stream);
/// Fills what nobody writes in this rank's own results.
void launch_lane_padding(const NodeGroup& node, const HtDispatchArgs& args, uint8_t* pool,
                         cudaStream_t stream);
/// Sums the rows of tokens on the node's ranks.
void launch_lane_reduce(const HtCombineArgs& args, const Sources& from, cudaStream_t stream);
/// Adds the sums of all nodes.
void launch_lane_merge(const LaneMergeArgs& args, const NodeSums& sums, cudaStream_t stream);

/// One rank's work on the rows of its node. `buffer` is that of the node's ranks, and outlives it.
class Lane {
 public:
  struct Config {
    int rank, num_local_ranks;         ///< among all ranks; of a node
    std::vector<int32_t> expert_rank;  ///< [num_experts] among all ranks
  };

  Lane(const Buffer& buffer, const Config& config);
  ~Lane();
  Lane(const Lane&) = delete;
  Lane& operator=(const Lane&) = delete;

  // `offers` is [ranks of all nodes], in host memory; only the own node's are read.

  void pack(const LanePackArgs& args, cudaStream_t stream) const;
  void send_rows(const HtDispatchArgs& args, const Offer* offers, cudaStream_t stream) const;
  void fill_padding(const HtDispatchArgs& args, cudaStream_t stream) const;
  void stage_rows(const HtCombineArgs& args, cudaStream_t stream) const;
  void reduce_rows(const HtCombineArgs& args, const Offer* offers, cudaStream_t stream) const;
  void merge(const LaneMergeArgs& args, cudaStream_t stream) const;
  /// Between host and device memory.
  void copy(void* to, const void* of, int64_t num_bytes, cudaStream_t stream) const;

 private:
  uint8_t* pool(int local) const { return buffer_.group().pool(local); }

  const Buffer& buffer_;
  int num_local_, local_rank_;
  NodeGroup node_{};
  int32_t* table_ = nullptr;  // of node_
};

}  // namespace ep::cuda

#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "core/check.h"
#include "core/lane_ring.h"
#include "nvshmem/lane_args.h"

namespace ep::nvshmem {

/// Why an exchange was given up.
enum class LaneStatus : uint32_t {
  kOk = 0,
  kNoArrival = 1,  ///< a piece did not come within the deadline
  kNoCredit = 2,   ///< a peer did not read what was sent
  kFarewell = 3,   ///< a peer gave up, naming the node to blame
  kMismatch = 4,   ///< a piece has another size than expected
};

/// In pinned host memory. Written once, by the first thread that gives up, `status` last.
struct LaneRecord {
  uint32_t status;
  int32_t peer;     ///< node that was waited for
  int32_t culprit;  ///< node to blame
  int32_t channel;
  int64_t expected, seen;
};

/// Pieces that a channel has moved since the lane was made. Only this node's kernels touch them.
struct ChannelState {
  uint64_t sent, received;
};

/// What kernels know of a lane.
struct DeviceLane {
  uint8_t* heap;           ///< symmetric, as RingLayout says
  ChannelState* channels;  ///< [num_channels][num_peers]
  uint32_t* failed;        ///< device memory: 1 once a block has given up
  LaneRecord* record;
  const int32_t* pes;  ///< [num_nodes] numbers that NVSHMEM has for the ranks of the lane
  RingLayout layout;
  uint64_t timeout_ns;
  int32_t node;
  int32_t is_direct;  ///< where a peer's memory can be addressed, pack into it without staging
};

/// `is_bytes`: what travels are ranges of bytes, see Lane::exchange_bytes().
void launch_exchange(const DeviceLane& lane, const LaneExchangeArgs& args, int64_t tokens_per_piece,
                     bool is_bytes, cudaStream_t stream);

/// This node's end of all rings of a lane.
class Lane {
 public:
  struct Config {
    int device, node, num_nodes, num_channels, num_slots;
    int64_t staging_bytes, timeout_us;
    bool is_direct;
    std::vector<int> pes;    ///< by node: NVSHMEM's numbers of the lane's ranks
    std::vector<int> ranks;  ///< by node, for messages
  };

  /// Collective over all PEs: takes symmetric memory. No node may exchange before all have made
  /// their lane.
  explicit Lane(const Config& config);
  Lane(const Lane&) = delete;
  Lane& operator=(const Lane&) = delete;
  ~Lane();

  /// Enqueues an exchange with all peers on `stream`. Any two nodes that exchange something make
  /// the same exchanges in the same order, on streams that keep this order.
  void exchange(const LaneExchangeArgs& args, cudaStream_t stream);

  /// The same with one range of bytes to and from each peer: section 0, of one byte per token.
  void exchange_bytes(const LaneExchangeArgs& args, cudaStream_t stream);

  /// Throws what a kernel has found wrong.
  void check() const;

  /// Idempotent. Collective over all PEs unless the lane has failed; then symmetric memory is kept.
  void destroy();

  int64_t slot_bytes() const { return device_.layout.slot_bytes; }

 private:
  void start(const LaneExchangeArgs& args, bool is_bytes, cudaStream_t stream);
  bool has_failed() const;

  void free_own_memory();

  Config config_;
  DeviceLane device_;
  int32_t* pes_ = nullptr;
  bool is_destroyed_ = false;
};

}  // namespace ep::nvshmem

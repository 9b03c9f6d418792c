#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/check.h"
#include "core/ht_plan.h"
#include "core/protocol.h"
#include "runtime/doorbell.h"
#include "runtime/process_watch.h"
#include "runtime/shared_segment.h"

namespace ep::cpu {

/// One rank's view of the memory that the ranks of a node share, and the protocol words in it.
/// Every wait is for one peer, has a deadline, and ends early with a TimeoutError when that peer
/// has ended, has destroyed its buffer or has itself given up.
///
/// A node is `num_local_ranks` consecutive ranks. Posts and offers of a rank on another node are
/// written by its proxy, the rank of this node with the same place in it; with one node every rank
/// is its own proxy.
class Exchange {
 public:
  struct Config {
    int rank, num_ranks, num_experts;
    int64_t pool_bytes;
    int64_t timeout_us;
    int num_local_ranks;
  };

  explicit Exchange(const Config& config);

  int fd() const { return segments_[config_.rank]->fd(); }

  /// Maps the segments of the node's ranks. `pids` and `fds` are what they published, by local
  /// rank.
  void attach(const int64_t* pids, const int32_t* fds);

  /// Forgets the files: from now on the memory lives as long as its mappings.
  void close_files();

  /// Tells the peers that this rank will not call again, and drops their memory. The own segment
  /// is returned: results in it may still be in use.
  std::shared_ptr<SharedSegment> detach();

  bool is_local(int rank) const { return rank >= local_begin_ && rank < local_end_; }
  uint8_t* pool(int local) const { return segments_[local]->data() + layout_.num_bytes; }

  // What the low-latency calls need besides.
  Doorbell& doorbell(int rank) const { return *word<Doorbell>(rank, layout_.doorbell); }
  /// Why the peer of `waiting` will never come, or empty; makes the culprit the record's peer.
  std::string peer_problem(TimeoutRecord& waiting) const;
  bool has_ended(int rank) const { return processes_[rank - local_begin_].has_ended(); }

  const Config& config() const { return config_; }

  // The steps of a call, in order. `seq` is the number of the call; at `waited_us`, [num_ranks] or
  // null, it counts the microseconds that it waits for each rank.

  /// Waits until every local rank has finished call seq - kNumSlots, whose slots this call reuses.
  void wait_slot(uint64_t seq, int64_t* waited_us = nullptr);
  /// Announces the call to the node's ranks, for rank `src`: this one, or one that it is proxy of.
  /// `counts` is [num_ranks + num_experts] or null.
  void send_post(uint64_t seq, int src, const Post& post, const int32_t* counts);
  /// Waits until all ranks have announced the call; throws ConfigError unless they agree.
  void wait_posts(uint64_t seq, int64_t* waited_us = nullptr);
  const Post& post(uint64_t seq, int src) const;
  /// Counts of all ranks, valid until this rank finishes the call.
  CountMatrix counts(uint64_t seq) const;
  void send_offer(uint64_t seq, int src, const OfferSlot& offer);
  /// Where the memory of every rank is. Throws DeviceError if a rank found none.
  std::vector<Offer> wait_offers(uint64_t seq, int64_t* waited_us = nullptr);
  /// Says that this rank has written and read all it will for this call and those before.
  void send_done(uint64_t seq);
  /// Waits for send_done() of the node's ranks: the rows are here, and ours may be overwritten.
  void wait_done(uint64_t seq, int64_t* waited_us = nullptr);

  /// Tells the node's ranks whom this rank gave up on.
  void send_failed(const TimeoutRecord& record);
  /// Tells them for which rank of another node it waits; -1 = none any more.
  void send_waiting_for(int rank);

 private:
  uint8_t* control(int rank) const { return segments_[rank]->data(); }
  template <typename T>
  T* word(int rank, size_t offset) const {
    return reinterpret_cast<T*>(control(rank) + offset);
  }
  PeerLine& line(int owner, int src) const {
    return word<PeerLine>(owner, layout_.peer_lines)[src];
  }

  int proxy_of(int rank) const { return local_begin_ + rank % config_.num_local_ranks; }

  /// Waits for `flag`, one of this rank's own words, to reach `expected`; `peer`, or its proxy,
  /// writes it.
  void wait_flag(const uint64_t* flag, uint64_t expected, int peer, Phase phase,
                 int64_t* waited_us);
  Clock::duration verdict_time() const;
  bool waits_for_network(int proxy) const;
  /// Whom a wait for `proxy` is really for: for it, unless it waits for another node itself.
  int awaited_through(int proxy) const;
  [[noreturn]] void throw_expired(TimeoutRecord& record) const;
  void check_agreement(uint64_t seq) const;

  Config config_;
  int local_begin_, local_end_;  // ranks of this node
  ControlLayout layout_;
  std::vector<std::shared_ptr<SharedSegment>> segments_;  // [num_ranks], null on other nodes
  std::vector<ProcessWatch> processes_;                   // [num_local_ranks]
};

}  // namespace ep::cpu

#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "core/ht_args.h"
#include "core/ht_plan.h"
#include "core/pool_allocator.h"
#include "cpu/exchange.h"
#include "cpu/ht.h"
#include "runtime/op_queue.h"
#include "runtime/thread_pool.h"

namespace ep::cpu {

/// The part of a buffer that must outlive it while results are in use: the memory and who has it.
struct Pool {
  explicit Pool(int64_t num_bytes) : allocator(num_bytes) {}
  PoolAllocator allocator;
  std::shared_ptr<SharedSegment> memory;  ///< set when the buffer is destroyed before its results
};

Offer recv_offer(const HtDispatchArgs& args);
Offer rows_offer(const HtCombineArgs& args);
OfferSlot make_offer(const HtDispatchArgs& args, const std::string& error);

/// Symmetric memory of one rank on the host, and the calls over it. Calls are made by one thread
/// at a time, in the same order on all ranks.
class Buffer {
 public:
  struct Config {
    Exchange::Config exchange;
    std::vector<int32_t> expert_rank;  ///< [num_experts]
  };

  explicit Buffer(const Config& config);
  ~Buffer();

  Exchange& exchange() { return *exchange_; }
  uint8_t* pool_base() const { return pool_base_; }
  const std::shared_ptr<Pool>& pool() const { return pool_; }
  const Group& group() const { return group_; }

  /// First half of a fresh dispatch: exchanges counts, fills args.routing, returns the call's
  /// number for send(). Nothing is sent if this rank's arguments are bad; the peers are told why.
  uint64_t notify(const HtDispatchArgs& args);
  /// Second half: the rows travel. `offer_error`, if not empty, says why there is no memory.
  std::shared_ptr<PendingOp> send(uint64_t seq, const HtDispatchArgs& args,
                                  const std::string& offer_error, bool is_async);
  /// A whole dispatch whose memory is known beforehand: with a capacity or a cached handle.
  /// `seq` receives the call's number.
  std::shared_ptr<PendingOp> dispatch(const HtDispatchArgs& args, bool is_async, uint64_t* seq);
  std::shared_ptr<PendingOp> combine(const HtCombineArgs& args, bool is_async);
  std::shared_ptr<PendingOp> barrier();

  /// Takes part in a call whose arguments this rank rejects, so that every peer learns why.
  void refuse(const std::string& reason);

  /// Waits for calls under way, leaves the group, drops the peers' memory. Idempotent.
  void destroy();

  // For calls whose steps are ordered elsewhere: over several nodes, and in low-latency mode.

  Transfer transfer() { return {group_, *exchange_, threads_}; }
  int num_local_ranks() const { return config_.exchange.num_local_ranks; }
  uint64_t next_seq();
  void check_usable();
  Post make_post(Op op, const HtSizes& sizes) const;
  Post make_refusal(const std::string& reason) const;
  std::vector<Offer> posted_offers(uint64_t seq) const;
  std::vector<int64_t> posted_capacities(uint64_t seq) const;
  /// This rank gave up: refuses further use, tells the node's ranks.
  void fail(const std::string& message, const TimeoutRecord& record);
  /// The same, of a rank that failed by itself in the middle of a call.
  void fail_alone(const std::string& reason);
  /// Runs `body` after all calls before it.
  std::shared_ptr<PendingOp> start(bool is_async, std::function<void()> body);

 private:
  /// Runs one call's body: afterwards the peers are told that this rank is through with it, or
  /// whom it gave up on.
  template <typename Body>
  void run_call(uint64_t seq, Body&& body);
  void move_rows(uint64_t seq, const HtDispatchArgs& args, const std::vector<Offer>& offers);

  Config config_;
  std::vector<int32_t> expert_local_;
  Group group_;
  std::unique_ptr<Exchange> exchange_;
  std::shared_ptr<Pool> pool_;
  uint8_t* pool_base_ = nullptr;
  ThreadPool threads_;
  uint64_t num_calls_ = 0;
  bool is_destroyed_ = false;
  std::mutex failure_mutex_;
  std::string failure_;  // why the buffer cannot be used any more
  OpQueue queue_;        // last member: its thread uses the others
};

}  // namespace ep::cpu

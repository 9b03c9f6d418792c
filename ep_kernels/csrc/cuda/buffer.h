#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "core/ht_args.h"
#include "core/pool_allocator.h"
#include "cuda/device_guard.h"
#include "cuda/group.h"
#include "cuda/ll_owner.h"

namespace ep::cuda {

/// Device memory that must outlive the buffer while results in its pool are in use.
struct Pool {
  Pool(int device, int64_t control_bytes, int64_t pool_bytes);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int device;
  uint8_t* segment = nullptr;  ///< control region, then pool
  PoolAllocator allocator;
};

/// A range of a pool, given back at the end unless somebody has taken it over.
struct Block {
  Block() = default;
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
  ~Block() {
    if (pool) pool->allocator.free(offset);
  }
  /// Of 0 bytes: nothing, at offset 0. Throws DeviceError.
  void allocate(const std::shared_ptr<Pool>& from, int64_t num_bytes) {
    offset = num_bytes == 0 ? 0 : from->allocator.allocate(num_bytes);
    if (num_bytes > 0) pool = from;
  }

  std::shared_ptr<Pool> pool;
  int64_t offset = -1;
};

/// Memory for the results of a dispatch.
struct Received {
  Block x, scales, topk_idx, topk_weights, chain;

  /// Takes what a dispatch of these sizes fills, expert-major with chain words if it `chains_rows`.
  /// Throws DeviceError if the pool is full.
  void allocate(const std::shared_ptr<Pool>& pool, const HtSizes& sizes, int64_t num_rows,
                bool chains_rows);
};

/// How a call is ordered with the work of its caller.
struct CallOrder {
  cudaStream_t caller;
  cudaEvent_t previous;  ///< the call waits for it, if not null
  bool is_async;         ///< the caller's stream does not wait for the call
  bool follows_caller;   ///< the call waits for what the caller's stream has been given
};

/// Symmetric memory of one rank on a GPU, and the calls over it. Calls enqueue and return; only
/// dispatch_fresh(), wait() and destroy() wait for the device. A call runs on its caller's stream
/// if each is to wait for the other anyway, else on the communication stream; either way after the
/// calls before it.
class Buffer : public LlOwner {
 public:
  struct Config {
    int device;
    int rank, num_ranks;
    int64_t pool_bytes;
    int64_t timeout_us;
    int64_t low_latency_bytes;  ///< first range of the pool, whose words are zeroed
    std::vector<int32_t> expert_rank;
  };

  static constexpr int kNumRecords = 64;
  /// Numbers of captured calls begin here. Such a call runs when its graph does: it counts as
  /// finished, and check() of any of them throws an error that a replay has met, once.
  static constexpr int64_t kFirstCaptured = int64_t{1} << 40;

  explicit Buffer(const Config& config);
  ~Buffer() override;

  cudaIpcMemHandle_t memory_handle() const;
  /// Maps the segments of all peers from their handles. `remote_ranks`: a bit for each rank to
  /// which, and from which, a row of an expert-major dispatch crosses a link only once.
  void attach(const cudaIpcMemHandle_t* handles, uint64_t remote_ranks);
  /// Whether expert-major results here come with chain words: a peer may send one row for several.
  bool chains_rows() const { return group_.remote_ranks != 0 && group_.num_local_experts > 1; }

  const std::shared_ptr<Pool>& pool() const { return pool_; }
  uint8_t* pool_base() const { return group_.segments[config_.rank] + control_bytes_; }
  int num_local_experts() const { return group_.num_local_experts; }
  int num_experts() const { return static_cast<int>(config_.expert_rank.size()); }
  const DeviceGroup& group() const override { return group_; }
  const std::vector<int32_t>& expert_rank() const override { return config_.expert_rank; }
  std::string name_of(int rank) const override { return "rank " + std::to_string(rank); }
  int device() const override { return config_.device; }
  int64_t timeout_us() const override { return config_.timeout_us; }

  void check_usable() const override;
  void fail(const std::string& why) override;

  // Calls. Each returns its number.

  /// A dispatch whose memory is not known yet: blocks the host until the sizes are, and takes it.
  int64_t dispatch_fresh(HtDispatchArgs args, const CallOrder& order, Received* received);
  /// What the host learns from dispatch_fresh(); valid until kNumRecords calls later.
  const CallRecord& record(int64_t call) const { return *record_of(call); }
  /// A whole dispatch whose memory is known: with a capacity or a cached handle.
  int64_t dispatch(const HtDispatchArgs& args, const CallOrder& order);
  int64_t combine(const HtCombineArgs& args, const CallOrder& order);
  int64_t barrier(const CallOrder& order);
  int64_t refuse(const std::string& reason, const CallOrder& order);

  /// Bytes per second at which this rank copies `num_bytes` at `offset` of its pool to
  /// offset + num_bytes of the next rank's, `num_blocks` blocks at work, while all ranks do the
  /// same. Waits for the device.
  double copy_rate(int num_blocks, int64_t num_bytes, int64_t offset, const CallOrder& order);

  /// Whether a call has finished. One too old to have a record has.
  bool is_finished(int64_t call) const;
  /// Waits for a call on the host, then throws its error.
  void wait(int64_t call);
  /// Throws the error of a finished call.
  void check(int64_t call);
  /// When a finished call reached each Stamp; zeros if it is too old.
  void stamps(int64_t call, uint64_t (&out)[kNumStamps]) const;
  /// Makes a stream wait for a call.
  void make_stream_wait(int64_t call, cudaStream_t stream);
  /// The end of a call, for other streams and buffers to wait for.
  cudaEvent_t end_event(int64_t call) const {
    return is_captured(call) ? captured_end_events_[(call - kFirstCaptured) % kNumRecords]
                             : end_events_[call % kNumRecords];
  }

  /// Notes that memory of the pool was freed while `stream` was current: it is not written again
  /// before the work that the stream has now is done.
  void note_free(cudaStream_t stream);
  /// Makes a stream, which is going to write to memory of the pool, wait for all such work.
  void wait_for_freed(cudaStream_t stream);

  /// Leaves the group and unmaps the peers. Waits for the device. Idempotent.
  void destroy();

 private:
  struct Freed {
    cudaEvent_t event;
    bool is_pending;  // noted since a call last waited for it
  };

  void wait_for_record(const CallRecord& record) const;
  bool wait_for_sizes(int64_t call) const;
  /// Chooses the stream of the call and makes it wait for what the call has to come after.
  int64_t begin_call(const CallOrder& order, int64_t* waited_us = nullptr);
  int64_t begin_eager_call(const CallOrder& order);
  int64_t begin_captured_call(const CallOrder& order, unsigned long long capture);
  void follow(const CallOrder& order);
  void follow_freed(cudaStream_t followed);
  void finish_call(int64_t call, const CallOrder& order);
  void end_call(int64_t call, const CallOrder& order);
  void launch_routing(int64_t call, const HtDispatchArgs& args, const PostArgs& post);
  void move_rows(int64_t call, const HtDispatchArgs& args);
  void take_scratch(int64_t num_tokens, const CallOrder& order);
  static bool is_captured(int64_t call) { return call >= kFirstCaptured; }
  bool is_too_old(int64_t call) const {
    return !is_captured(call) && num_calls_ - call > kNumRecords;
  }
  /// Captured calls share the record behind the others.
  CallRecord* record_of(int64_t call) const {
    return records_ + (is_captured(call) ? kNumRecords : call % kNumRecords);
  }
  PostArgs make_post(Op op, const HtSizes& sizes) const;
  void throw_error(const CallRecord& record);
  std::string peer_problem(int culprit) const;

  Config config_;
  int64_t control_bytes_;
  std::shared_ptr<Pool> pool_;
  DeviceGroup group_{};
  CallRecord* records_ = nullptr;  // pinned, seen by the device
  int64_t num_calls_ = 0, num_captured_calls_ = 0;
  cudaStream_t stream_of_call_ = nullptr;   // that is being enqueued
  cudaStream_t eager_stream_ = nullptr;     // of the eager call before
  cudaStream_t captured_stream_ = nullptr;  // of the captured call before
  unsigned long long capture_ = 0;          // and its capture
  int32_t* expert_tables_ = nullptr;
  int32_t* scratch_ = nullptr;
  int64_t scratch_elements_ = 0;
  std::vector<int32_t*> old_scratch_;  // graphs may use it
  cudaStream_t stream_ = nullptr;
  cudaEvent_t begin_event_ = nullptr;
  std::vector<cudaEvent_t> end_events_, captured_end_events_;
  std::mutex freed_mutex_;  // tensors die in any thread
  std::map<cudaStream_t, Freed> freed_;
  std::string failure_;
  bool is_destroyed_ = false;
};

}  // namespace ep::cuda

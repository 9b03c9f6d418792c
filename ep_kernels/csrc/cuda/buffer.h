#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/ht_args.h"
#include "core/pool_allocator.h"
#include "cuda/group.h"

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

/// Symmetric memory of one rank on a GPU, and the calls over it. Calls enqueue on the stream given
/// and return; nothing here waits for the device except wait_sizes() and destroy().
class Buffer {
 public:
  struct Config {
    int device;
    int rank, num_ranks;
    int64_t pool_bytes;
    int64_t timeout_us;
    std::vector<int32_t> expert_rank;
  };

  static constexpr int kNumRecords = 64;

  explicit Buffer(const Config& config);
  ~Buffer();

  cudaIpcMemHandle_t memory_handle() const;
  /// Maps the segments of all peers from their handles.
  void attach(const cudaIpcMemHandle_t* handles);

  const std::shared_ptr<Pool>& pool() const { return pool_; }
  uint8_t* pool_base() const { return group_.segments[config_.rank] + control_bytes_; }
  int num_local_experts() const { return group_.num_local_experts; }
  int num_experts() const { return static_cast<int>(config_.expert_rank.size()); }

  /// int32 elements of the scratch memory of a fresh dispatch.
  int64_t scratch_elements(int64_t num_tokens) const;

  // Calls. Each returns its number, for check().

  /// First half of a fresh dispatch: counts, routing. wait_sizes() follows.
  int64_t notify(const HtDispatchArgs& args, int32_t* scratch, cudaStream_t stream);
  /// Blocks the host until the sizes are known. If the call has ended with an error, completes it
  /// on `stream` and throws.
  const CallRecord& wait_sizes(int64_t call, cudaStream_t stream);
  /// Second half. `has_memory` false: tells the peers that this rank has none for its rows.
  void send(int64_t call, const HtDispatchArgs& args, bool has_memory, cudaStream_t stream);
  /// A whole dispatch whose memory is known: with a capacity (`scratch` given) or a cached handle.
  int64_t dispatch(const HtDispatchArgs& args, int32_t* scratch, cudaStream_t stream);
  int64_t combine(const HtCombineArgs& args, cudaStream_t stream);
  int64_t barrier(cudaStream_t stream);
  int64_t refuse(const std::string& reason, cudaStream_t stream);

  /// Throws the error of a call; false while it runs. True for calls too old to have a record:
  /// new ones wait for those that are under way, and a failed wait ends the buffer.
  bool check(int64_t call);

  /// Leaves the group and unmaps the peers. Waits for the device. Idempotent.
  void destroy();

 private:
  void check_usable() const;
  int64_t new_call();
  CallRecord* record_of(int64_t call) const { return records_ + call % kNumRecords; }
  PostArgs make_post(Op op, const HtSizes& sizes) const;
  void throw_error(const CallRecord& record);

  Config config_;
  int64_t control_bytes_;
  std::shared_ptr<Pool> pool_;
  DeviceGroup group_{};
  CallRecord* records_ = nullptr;  // pinned, seen by the device
  int64_t num_calls_ = 0;
  int32_t* expert_tables_ = nullptr;
  std::string failure_;
  bool is_destroyed_ = false;
};

}  // namespace ep::cuda

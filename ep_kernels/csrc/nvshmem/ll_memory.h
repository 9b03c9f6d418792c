#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "cuda/ll_group.h"
#include "cuda/ll_owner.h"

namespace ep::nvshmem {

/// Which ranks' memory kernels address. That of others, and of those that cannot be addressed, is
/// reached by puts.
enum class Direct : int32_t {
  kNone = 0,  ///< this rank's own only
  kNode = 1,  ///< ranks of its node
  kAll = 2,   ///< all that NVSHMEM has mapped
};

/// Symmetric memory for low-latency calls between ranks of several nodes: what a cuda::Buffer is to
/// those of one.
///
///   | control words, as of a buffer | region |     and, where a rank is far from another one,
///   | rows for far ranks and their results |
class LlMemory : public cuda::LlOwner {
 public:
  struct Config {
    int device, rank, num_ranks, num_local_ranks;
    int64_t region_bytes;  ///< low_latency_bytes, the same on all ranks
    int64_t timeout_us;
    Direct direct;
    std::vector<int> pes;  ///< by rank
    std::vector<int32_t> expert_rank;
  };

  /// Collective over all PEs. Nobody may make a call before all have made theirs.
  explicit LlMemory(const Config& config);
  ~LlMemory() override;
  LlMemory(const LlMemory&) = delete;
  LlMemory& operator=(const LlMemory&) = delete;

  const cuda::DeviceGroup& group() const override { return group_; }
  const std::vector<int32_t>& expert_rank() const override { return config_.expert_rank; }
  std::string name_of(int rank) const override;
  int device() const override { return config_.device; }
  int64_t timeout_us() const override { return config_.timeout_us; }
  void check_usable() const override;
  void fail(const std::string& why) override;

  /// Takes memory for rows of far ranks. Collective over all PEs, also over those that have none.
  void add_far_rows();

  uint8_t* region() const;
  const cuda::LlFar& far() const { return far_; }

  /// Tells the peers that this rank makes no calls any more; of memory that has failed, those only
  /// that it stores to, since a put to a rank that is gone may not return. Waits for the device.
  void leave();
  /// Collective over all PEs. Waits for the device. Without it the memory stays taken.
  void destroy();

 private:
  struct DeviceFree {
    void operator()(int32_t* memory) const;
  };

  Config config_;
  cuda::DeviceGroup group_{};
  cuda::LlFar far_{};
  uint8_t* memory_ = nullptr;
  std::unique_ptr<int32_t, DeviceFree> expert_tables_;
  std::string failure_;
  bool has_left_ = false;
};

/// One block: writes "departed" to the lines of all other ranks, or of those that are stored to.
void launch_ll_leave(const cuda::LlGroup& group, bool tells_far, cudaStream_t stream);

}  // namespace ep::nvshmem

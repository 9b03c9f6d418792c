#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cuda/group.h"

namespace ep::cuda {

/// Whose memory low-latency calls use, and with whom they fail.
class LlOwner {
 public:
  virtual ~LlOwner() = default;

  virtual const DeviceGroup& group() const = 0;
  /// [num_experts]
  virtual const std::vector<int32_t>& expert_rank() const = 0;
  /// Of a rank, for people.
  virtual std::string name_of(int rank) const = 0;
  virtual int device() const = 0;
  virtual int64_t timeout_us() const = 0;
  /// Throws if it was destroyed or has failed.
  virtual void check_usable() const = 0;
  /// A call has run out of time: no more calls.
  virtual void fail(const std::string& why) = 0;
};

}  // namespace ep::cuda

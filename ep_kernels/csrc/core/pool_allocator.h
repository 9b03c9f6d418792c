#pragma once

#include <cstdint>
#include <map>
#include <mutex>

namespace ep {

/// First-fit allocator of byte ranges in a pool; knows offsets only, never touches the memory.
/// Lowest addresses are reused first, so that the touched part of a sparse pool stays small.
class PoolAllocator {
 public:
  static constexpr int64_t kAlignment = 256;

  explicit PoolAllocator(int64_t num_bytes);

  /// Offset of a free range of at least `num_bytes` (rounded up to kAlignment, at least one unit).
  /// Throws DeviceError if none is left.
  int64_t allocate(int64_t num_bytes);

  /// Returns a range. Throws ConfigError if `offset` is not the start of an allocated one.
  void free(int64_t offset);

  int64_t num_live() const;
  int64_t used_bytes() const;
  int64_t peak_bytes() const;  ///< the most that was in use at once

 private:
  mutable std::mutex mutex_;
  std::map<int64_t, int64_t> free_;  // offset -> bytes, never adjacent
  std::map<int64_t, int64_t> live_;
  int64_t num_bytes_, used_bytes_ = 0, peak_bytes_ = 0;
};

}  // namespace ep

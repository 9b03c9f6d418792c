#include "core/pool_allocator.h"

#include <algorithm>
#include <iterator>

#include "core/check.h"
#include "core/math.h"

namespace ep {

PoolAllocator::PoolAllocator(int64_t num_bytes) : num_bytes_(num_bytes) {
  free_.emplace(0, num_bytes);
}

int64_t PoolAllocator::allocate(int64_t num_bytes) {
  const int64_t size = align_up(std::max<int64_t>(num_bytes, 1), kAlignment);
  std::lock_guard<std::mutex> lock(mutex_);
  const auto block =
      std::find_if(free_.begin(), free_.end(), [&](const auto& b) { return b.second >= size; });
  if (block == free_.end())
    throw DeviceError(concat("the pool of ", num_bytes_,
                             " bytes (pool_bytes) has no free range of ", num_bytes,
                             " bytes: ", live_.size(), " results hold ", used_bytes_,
                             " bytes; free results or raise pool_bytes"));
  const int64_t offset = block->first, rest = block->second - size;
  free_.erase(block);
  if (rest > 0) free_.emplace(offset + size, rest);
  live_.emplace(offset, size);
  used_bytes_ += size;
  peak_bytes_ = std::max(peak_bytes_, used_bytes_);
  return offset;
}

void PoolAllocator::free(int64_t offset) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto block = live_.find(offset);
  EP_CHECK(block != live_.end(), "offset=", offset, " is not an allocated range of the pool");
  int64_t begin = offset, size = block->second;
  used_bytes_ -= size;
  live_.erase(block);

  auto next = free_.lower_bound(begin);
  if (next != free_.end() && next->first == begin + size) {
    size += next->second;
    next = free_.erase(next);
  }
  if (next != free_.begin()) {
    const auto previous = std::prev(next);
    if (previous->first + previous->second == begin) {
      begin = previous->first;
      size += previous->second;
      free_.erase(previous);
    }
  }
  free_.emplace(begin, size);
}

int64_t PoolAllocator::num_live() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return static_cast<int64_t>(live_.size());
}

int64_t PoolAllocator::used_bytes() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return used_bytes_;
}

int64_t PoolAllocator::peak_bytes() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return peak_bytes_;
}

}  // namespace ep

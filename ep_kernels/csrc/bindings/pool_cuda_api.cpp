#include "bindings/pool_cuda_api.h"

#include <memory>
#include <mutex>
#include <unordered_map>
#include <unordered_set>

#include "bindings/cuda_handles.h"

namespace {

/// A range of a pool that torch holds.
struct Segment {
  std::shared_ptr<ep::cuda::Pool> pool;
  int64_t offset;
  EpCudaBuffer* buffer;  ///< null once it is gone
};

/// All ranges that torch holds, by address, and the buffers that there are. Torch frees from any
/// thread; a buffer may end while another thread has chosen it.
struct Segments {
  std::mutex mutex;
  std::unordered_map<void*, Segment> by_address;
  std::unordered_set<EpCudaBuffer*> buffers;
};

/// NOTE: never destroyed, since torch may free memory while the process ends.
Segments& segments() {
  static Segments* const all = new Segments;
  return *all;
}

thread_local EpCudaBuffer* chosen_buffer = nullptr;

}  // namespace

EpCudaBuffer* ep_cuda_torch_choose(EpCudaBuffer* buffer) {
  EpCudaBuffer* const before = chosen_buffer;
  chosen_buffer = buffer;
  return before;
}

void* ep_cuda_torch_allocate(ssize_t num_bytes, int device, void* stream) {
  EpCudaBuffer* const buffer = chosen_buffer;
  std::lock_guard<std::mutex> lock(segments().mutex);
  if (segments().buffers.count(buffer) == 0 || buffer->impl.device() != device) return nullptr;
  void* address = nullptr;
  // NOTE: torch takes no exception here; it raises its own when it gets no memory.
  ep::guarded(nullptr, [&] {
    buffer->impl.wait_for_freed(static_cast<cudaStream_t>(stream));
    ep::cuda::Block block;
    block.allocate(buffer->impl.pool(), num_bytes);
    void* const taken = buffer->impl.pool_base() + block.offset;
    segments().by_address[taken] = {block.pool, block.offset, buffer};
    block.pool.reset();
    address = taken;
  });
  return address;
}

void ep_cuda_torch_free(void* address, size_t, void* stream) {
  // NOTE: under the lock, so that the buffer is not deleted meanwhile.
  std::lock_guard<std::mutex> lock(segments().mutex);
  const auto found = segments().by_address.find(address);
  if (found == segments().by_address.end()) return;
  const Segment& segment = found->second;
  ep::guarded(nullptr, [&] {
    if (segment.buffer) segment.buffer->impl.note_free(static_cast<cudaStream_t>(stream));
    segment.pool->allocator.free(segment.offset);
  });
  segments().by_address.erase(found);
}

void ep_cuda_torch_know(EpCudaBuffer* buffer) {
  std::lock_guard<std::mutex> lock(segments().mutex);
  segments().buffers.insert(buffer);
}

void ep_cuda_torch_forget(EpCudaBuffer* buffer) {
  std::lock_guard<std::mutex> lock(segments().mutex);
  segments().buffers.erase(buffer);
  for (auto& [address, segment] : segments().by_address)
    if (segment.buffer == buffer) segment.buffer = nullptr;
}

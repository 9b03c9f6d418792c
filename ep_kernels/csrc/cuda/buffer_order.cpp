// How a call is ordered: after the calls before it, with its caller's stream, and after the work
// that uses memory of the pool which is free since.

#include <algorithm>
#include <chrono>
#include <thread>

#include "core/check.h"
#include "cuda/buffer.h"
#include "cuda/check_cuda.h"
#include "cuda/kernels.h"

namespace ep::cuda {

/// Takes a record, chooses the stream of the call, and makes it wait for what the call has to come
/// after: the call before it, the caller's work, and work that uses memory which is free since.
int64_t Buffer::begin_call(const CallOrder& order) {
  CallRecord& record = *record_of(num_calls_);
  wait_for_record(record);
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  EP_CHECK_CUDA(cudaStreamIsCapturing(order.caller, &capture));
  const bool is_captured = capture != cudaStreamCaptureStatusNone;
  // NOTE: a call that its caller waits for anyway runs on the caller's stream: each of the two hops
  // between streams would cost as much as a launch.
  const cudaStream_t stream = order.is_async || !order.follows_caller ? stream_ : order.caller;
  if (num_calls_ > 0 && last_.stream != stream && last_.is_captured == is_captured)
    EP_CHECK_CUDA(cudaStreamWaitEvent(stream, end_event(num_calls_ - 1), 0));
  if (order.previous) EP_CHECK_CUDA(cudaStreamWaitEvent(stream, order.previous, 0));
  if (order.follows_caller && stream != order.caller) {
    EP_CHECK_CUDA(cudaEventRecord(begin_event_, order.caller));
    EP_CHECK_CUDA(cudaStreamWaitEvent(stream, begin_event_, 0));
  }
  for (auto& [freeing, freed] : freed_) {
    // What was freed before a capture began is not in use any more when its graph runs.
    if (!freed.is_pending || is_captured || (freeing == order.caller && order.follows_caller))
      continue;
    EP_CHECK_CUDA(cudaStreamWaitEvent(stream, freed.event, 0));
    freed.is_pending = false;
  }
  last_ = {stream, is_captured};
  record.has_sizes = 0;
  std::fill_n(record.stamps, kNumStamps, uint64_t{0});
  if (!is_captured)  // it runs when its graph does, if ever
    __atomic_store_n(&record.status, static_cast<int32_t>(CallStatus::kRunning), __ATOMIC_RELEASE);
  return num_calls_++;
}

void Buffer::wait_for_record(const CallRecord& record) const {
  using Clock = std::chrono::steady_clock;
  const auto deadline = Clock::now() + std::chrono::microseconds(2 * config_.timeout_us);
  while (__atomic_load_n(&record.status, __ATOMIC_ACQUIRE) ==
         static_cast<int32_t>(CallStatus::kRunning)) {
    if (Clock::now() > deadline)
      throw DeviceError(concat("call ", num_calls_ - kNumRecords, " is still under way after ",
                               2e-6 * static_cast<double>(config_.timeout_us),
                               " s and holds a record that a new call needs"));
    std::this_thread::sleep_for(std::chrono::microseconds(50));
  }
}

void Buffer::finish_call(int64_t call, const CallOrder& order) {
  launch_finish(group_, record_of(call), last_.stream);
  end_call(call, order);
}

/// The kernel that finishes the call has been launched.
void Buffer::end_call(int64_t call, const CallOrder& order) {
  EP_CHECK_CUDA(cudaEventRecord(end_event(call), last_.stream));
  if (!order.is_async && last_.stream != order.caller)
    EP_CHECK_CUDA(cudaStreamWaitEvent(order.caller, end_event(call), 0));
}

void Buffer::note_free(cudaStream_t stream) {
  if (is_destroyed_) return;
  DeviceGuard guard(config_.device);
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  EP_CHECK_CUDA(cudaStreamIsCapturing(stream, &capture));
  if (capture != cudaStreamCaptureStatusNone) return;
  Freed& freed = freed_[stream];
  if (!freed.event) EP_CHECK_CUDA(cudaEventCreateWithFlags(&freed.event, cudaEventDisableTiming));
  EP_CHECK_CUDA(cudaEventRecord(freed.event, stream));
  freed.is_pending = true;
}

void Buffer::wait_for_freed(cudaStream_t stream) {
  if (is_destroyed_) return;
  DeviceGuard guard(config_.device);
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  EP_CHECK_CUDA(cudaStreamIsCapturing(stream, &capture));
  if (capture != cudaStreamCaptureStatusNone) return;
  for (const auto& [freeing, freed] : freed_)
    if (freeing != stream) EP_CHECK_CUDA(cudaStreamWaitEvent(stream, freed.event, 0));
}

void Buffer::make_stream_wait(int64_t call, cudaStream_t stream) {
  if (is_destroyed_ || is_too_old(call)) return;
  DeviceGuard guard(config_.device);
  EP_CHECK_CUDA(cudaStreamWaitEvent(stream, end_event(call), 0));
}

}  // namespace ep::cuda

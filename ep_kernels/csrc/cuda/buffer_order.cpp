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

int64_t Buffer::begin_call(const CallOrder& order, int64_t* waited_us) {
  // NOTE: a call that its caller waits for anyway runs on the caller's stream: each of the two hops
  // between streams would cost as much as a launch.
  stream_of_call_ = order.is_async || !order.follows_caller ? stream_ : order.caller;
  const unsigned long long capture = capture_of(order.caller);
  group_.is_captured = capture != 0;
  group_.waited_us = waited_us;
  return capture != 0 ? begin_captured_call(order, capture) : begin_eager_call(order);
}

/// Takes a record, and makes the stream of the call wait for what the call has to come after: the
/// call before it, the caller's work, and work that uses memory which is free since.
int64_t Buffer::begin_eager_call(const CallOrder& order) {
  CallRecord& record = *record_of(num_calls_);
  wait_for_record(record);
  if (num_calls_ > 0 && eager_stream_ != stream_of_call_)
    EP_CHECK_CUDA(cudaStreamWaitEvent(stream_of_call_, end_event(num_calls_ - 1), 0));
  follow(order);
  follow_freed(order.follows_caller ? order.caller : nullptr);
  eager_stream_ = stream_of_call_;
  record.has_sizes = 0;
  std::fill_n(record.stamps, kNumStamps, uint64_t{0});
  __atomic_store_n(&record.status, static_cast<int32_t>(CallStatus::kRunning), __ATOMIC_RELEASE);
  return num_calls_++;
}

/// The same for a call that runs when its graph does, if ever, any number of times: its order is
/// that of its capture. What was freed before is not in use any more then.
int64_t Buffer::begin_captured_call(const CallOrder& order, unsigned long long capture) {
  if (capture == capture_ && captured_stream_ != stream_of_call_)
    EP_CHECK_CUDA(cudaStreamWaitEvent(stream_of_call_,
                                      end_event(kFirstCaptured + num_captured_calls_ - 1), 0));
  follow(order);
  capture_ = capture;
  captured_stream_ = stream_of_call_;
  return kFirstCaptured + num_captured_calls_++;
}

/// Makes the stream of the call wait for what its caller says.
void Buffer::follow(const CallOrder& order) {
  if (order.previous) EP_CHECK_CUDA(cudaStreamWaitEvent(stream_of_call_, order.previous, 0));
  if (!order.follows_caller || stream_of_call_ == order.caller) return;
  EP_CHECK_CUDA(cudaEventRecord(begin_event_, order.caller));
  EP_CHECK_CUDA(cudaStreamWaitEvent(stream_of_call_, begin_event_, 0));
}

/// Makes the stream of the call wait for work on memory that is free since a call last did; not for
/// that of `followed`, which the call comes after anyway.
void Buffer::follow_freed(cudaStream_t followed) {
  std::lock_guard<std::mutex> lock(freed_mutex_);
  for (auto& [freeing, freed] : freed_) {
    if (!freed.is_pending || (followed && freeing == followed)) continue;
    EP_CHECK_CUDA(cudaStreamWaitEvent(stream_of_call_, freed.event, 0));
    freed.is_pending = false;
  }
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
  launch_finish(group_, record_of(call), stream_of_call_);
  end_call(call, order);
}

/// The kernel that finishes the call has been launched.
void Buffer::end_call(int64_t call, const CallOrder& order) {
  EP_CHECK_CUDA(cudaEventRecord(end_event(call), stream_of_call_));
  if (!order.is_async && stream_of_call_ != order.caller)
    EP_CHECK_CUDA(cudaStreamWaitEvent(order.caller, end_event(call), 0));
}

void Buffer::note_free(cudaStream_t stream) {
  if (is_destroyed_) return;
  DeviceGuard guard(config_.device);
  if (capture_of(stream) != 0) return;
  std::lock_guard<std::mutex> lock(freed_mutex_);
  Freed& freed = freed_[stream];
  if (!freed.event) EP_CHECK_CUDA(cudaEventCreateWithFlags(&freed.event, cudaEventDisableTiming));
  EP_CHECK_CUDA(cudaEventRecord(freed.event, stream));
  freed.is_pending = true;
}

void Buffer::wait_for_freed(cudaStream_t stream) {
  if (is_destroyed_) return;
  DeviceGuard guard(config_.device);
  if (capture_of(stream) != 0) return;
  std::lock_guard<std::mutex> lock(freed_mutex_);
  for (const auto& [freeing, freed] : freed_)
    if (freeing != stream) EP_CHECK_CUDA(cudaStreamWaitEvent(stream, freed.event, 0));
}

void Buffer::make_stream_wait(int64_t call, cudaStream_t stream) {
  if (is_destroyed_ || is_too_old(call)) return;
  DeviceGuard guard(config_.device);
  // Outside of its capture, the end of a captured call is that of its graph.
  if (is_captured(call) && capture_of(stream) != capture_) return;
  EP_CHECK_CUDA(cudaStreamWaitEvent(stream, end_event(call), 0));
}

}  // namespace ep::cuda

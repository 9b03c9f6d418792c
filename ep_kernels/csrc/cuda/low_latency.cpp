// The low-latency calls on the host: halves, records, streams. The twin of cpu/low_latency.cpp; the
// protocol is in the kernels, cuda/ll_kernels.h.

#include "cuda/low_latency.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <thread>

#include "core/check.h"
#include "core/ll_layout.h"
#include "cuda/check_cuda.h"
#include "cuda/device_guard.h"
#include "cuda/ll_kernels.h"

namespace ep::cuda {
namespace {

using Clock = std::chrono::steady_clock;

bool is_running(const LlRecord& record) {
  return __atomic_load_n(&record.status, __ATOMIC_ACQUIRE) ==
         static_cast<int32_t>(LlStatus::kRunning);
}

void set_status(LlRecord& record, LlStatus status) {
  __atomic_store_n(&record.status, static_cast<int32_t>(status), __ATOMIC_RELEASE);
}

template <typename T>
T* allocate(size_t num_elements) {
  void* memory = nullptr;
  EP_CHECK_CUDA(cudaMalloc(&memory, std::max<size_t>(1, num_elements) * sizeof(T)));
  EP_CHECK_CUDA(cudaMemset(memory, 0, std::max<size_t>(1, num_elements) * sizeof(T)));
  return static_cast<T*>(memory);
}

}  // namespace

LowLatency::LowLatency(LlOwner& owner, const Config& config)
    : owner_(owner), config_(config), num_local_(0), calls_(kNumRecords) {
  const DeviceGroup& group = owner.group();
  EP_CHECK(group.num_experts <= kMaxLlExperts, "num_experts=", group.num_experts, " exceeds ",
           kMaxLlExperts, ", the limit of low-latency mode");
  group_.group = group;
  group_.layout = LlControlLayout(group.num_ranks, group.num_experts);
  group_.half_bytes = ll_half_bytes(config.region_bytes, group_.layout.num_bytes);
  EP_CHECK(group_.half_bytes > 0, "low_latency_bytes=", config.region_bytes,
           " leaves no room for rows: ", group_.layout.num_bytes, " bytes are control words");
  group_.mask_silent_ranks = config.mask_silent_ranks;
  group_.far = config.far;
  for (const int32_t rank : owner.expert_rank())
    num_local_ = std::max<int>(num_local_, ++group_.num_local[rank]);
  for (int rank = 0; rank < group.num_ranks; ++rank)
    group_.regions[rank] = group.pool(rank) + config.region;

  DeviceGuard guard(owner.device());
  group_.state = allocate<LlState>(1);
  EP_CHECK_CUDA(cudaMemset(&group_.state->bad, 0xff, sizeof(group_.state->bad)));
  group_.counts = allocate<int32_t>(size_t{2} * group.num_local_experts * group.num_ranks);
  void* records = nullptr;
  EP_CHECK_CUDA(cudaHostAlloc(&records, (kNumRecords + 1) * sizeof(LlRecord), cudaHostAllocMapped));
  records_ = static_cast<LlRecord*>(records);
  for (int i = 0; i <= kNumRecords; ++i) {
    records_[i] = LlRecord{};
    set_status(records_[i], LlStatus::kOk);
  }
  EP_CHECK_CUDA(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
  EP_CHECK_CUDA(cudaEventCreateWithFlags(&order_event_, cudaEventDisableTiming));
  EP_CHECK_CUDA(cudaDeviceSynchronize());
}

/// The buffer has waited for the device.
LowLatency::~LowLatency() {
  cudaEventDestroy(order_event_);
  cudaStreamDestroy(stream_);
  cudaFreeHost(records_);
  cudaFree(group_.counts);
  cudaFree(group_.state);
}

// Order.

/// Makes `stream` come after the last low-latency call of this buffer, which another stream may
/// have. Graphs are ordered by who launches them.
void LowLatency::order(cudaStream_t stream) {
  const unsigned long long capture = capture_of(stream);
  if (has_last_stream_ && last_stream_ != stream && last_capture_ == capture &&
      capture_of(last_stream_) == capture) {
    EP_CHECK_CUDA(cudaEventRecord(order_event_, last_stream_));
    EP_CHECK_CUDA(cudaStreamWaitEvent(stream, order_event_, 0));
  }
  last_stream_ = stream;
  last_capture_ = capture;
  has_last_stream_ = true;
}

/// Takes a record that nobody needs any more; after order().
LowLatency::Call& LowLatency::open_call(LlOp op, cudaStream_t stream) {
  const auto deadline = Clock::now() + std::chrono::microseconds(2 * owner_.timeout_us() + 1000000);
  for (int64_t i = next_number_;; ++i) {
    Call& call = calls_[i % kNumRecords];
    LlRecord& record = records_[i % kNumRecords];
    if (!call.is_pending && !is_running(record)) {
      call = Call{};
      call.number = next_number_++;
      call.op = op;
      call.stream = stream;
      call.is_captured = last_capture_ != 0;
      call.record = call.is_captured ? records_ + kNumRecords : &record;
      if (!call.is_captured) set_status(record, LlStatus::kRunning);
      return call;
    }
    if (i % kNumRecords != kNumRecords - 1) continue;
    if (Clock::now() > deadline)
      throw DeviceError(concat(kNumRecords, " low-latency calls are still under way after ",
                               2e-6 * static_cast<double>(owner_.timeout_us()), " s"));
    std::this_thread::sleep_for(std::chrono::microseconds(20));
  }
}

/// Runs checks of arguments; tells the peers, who make the same call, why this rank does not.
template <typename Check>
void LowLatency::refusing(cudaStream_t stream, Check&& check) {
  try {
    check();
  } catch (const ConfigError& error) {
    refuse(error.what(), stream);
    throw;
  }
}

// Calls.

const LlGroup& LowLatency::group_of(const Call& call) {
  group_.is_captured = call.is_captured;
  return group_;
}

LlDispatchCall LowLatency::dispatch_call(const Call& call, bool is_whole) const {
  return {call.dispatch_args, call.record, call.half, held(), is_whole};
}

LlCombineCall LowLatency::combine_call(const Call& call, bool is_whole) const {
  return {call.combine_args, halves_[call.half].sizes, call.record, call.half, held(), is_whole};
}

LowLatency::Started LowLatency::dispatch(const LlDispatchArgs& args, Receive receive,
                                         cudaStream_t stream) {
  check_usable();
  DeviceGuard guard(owner_.device());
  int index = 0;
  refusing(stream, [&] {
    validate(args);
    check_fits(args.sizes);
    index = free_half();
  });
  order(stream);
  Call& call = open_call(LlOp::kDispatch, stream);
  call.half = index;
  call.dispatch = call.number;
  call.dispatch_args = args;
  const bool is_whole = receive == Receive::kNow;
  launch_ll_dispatch_send(group_of(call), dispatch_call(call, is_whole), stream);
  halves_[index] = Half{call.number, args.sizes, is_whole, false};
  next_half_ = 1 - index;
  if (!is_whole) finish(call, receive, stream);
  const int64_t control_bytes = static_cast<int64_t>(group_.layout.num_bytes);
  return {call.number, config_.region + control_bytes + index * group_.half_bytes};
}

LowLatency::Started LowLatency::combine(const LlCombineArgs& args, Receive receive,
                                        cudaStream_t stream) {
  check_usable();
  DeviceGuard guard(owner_.device());
  const auto dispatch = static_cast<int64_t>(args.dispatch);
  int index = 0;
  refusing(stream, [&] {
    drop_released();
    index = half_of(dispatch);
    const Half& half = halves_[index];
    EP_CHECK(half.is_received, "handle (of low-latency dispatch ", dispatch,
             "): run the hook of its dispatch first");
    EP_CHECK(!half.is_combining, "handle (of low-latency dispatch ", dispatch,
             ") is being combined already");
    validate(args, half.sizes);
  });
  order(stream);
  Call& call = open_call(LlOp::kCombine, stream);
  call.half = index;
  call.dispatch = dispatch;
  call.combine_args = args;
  halves_[index].is_combining = true;
  if (receive == Receive::kNow && args.is_zero_copy) {
    enqueue_receive(call, true, stream);
  } else {
    launch_ll_combine_send(group_of(call), combine_call(call, false), stream);
    finish(call, receive, stream);
  }
  return {call.number, 0};
}

/// The receive half, and before it in the same kernel the send half if `is_whole`.
void LowLatency::enqueue_receive(Call& call, bool is_whole, cudaStream_t stream) {
  Half& half = halves_[call.half];
  call.stream = stream;
  call.is_pending = false;
  if (call.op == LlOp::kDispatch) {
    launch_ll_dispatch_receive(group_of(call), dispatch_call(call, false), stream);
    half.is_received = true;
  } else {
    launch_ll_combine_receive(group_of(call), combine_call(call, is_whole), stream);
    half.dispatch = -1;
    half.is_received = half.is_combining = false;
  }
}

void LowLatency::finish(Call& call, Receive receive, cudaStream_t stream) {
  call.is_pending = true;
  if (receive == Receive::kLater) return;
  cudaStream_t where = receive == Receive::kAsync ? stream_ : stream;
  if (where != stream) {
    EP_CHECK_CUDA(cudaEventRecord(order_event_, stream));
    EP_CHECK_CUDA(cudaStreamWaitEvent(where, order_event_, 0));
    last_stream_ = where;
  }
  enqueue_receive(call, false, where);
}

void LowLatency::receive(int64_t number, cudaStream_t stream) {
  check_usable();
  DeviceGuard guard(owner_.device());
  drop_released();
  auto* call = const_cast<Call*>(find(number));
  EP_CHECK(call && call->is_pending, "hook of low-latency call ", number,
           ": its receive half is over, or its handle was dropped");
  order(stream);
  enqueue_receive(*call, false, stream);
}

void LowLatency::launch_plain(const Call& call, const std::string& text, cudaStream_t stream) {
  LlPlainCall plain{};
  plain.record = call.record;
  plain.op = static_cast<int32_t>(call.op);
  plain.held = held();
  std::memcpy(plain.text, text.data(), std::min(text.size(), size_t{kMaxText - 1}));
  launch_ll_plain(group_of(call), plain, stream);
}

void LowLatency::barrier(cudaStream_t stream) {
  check_usable();
  DeviceGuard guard(owner_.device());
  order(stream);
  const Call& call = open_call(LlOp::kBarrier, stream);
  launch_plain(call, "", stream);
  wait(call.number);
}

void LowLatency::refuse(const std::string& reason, cudaStream_t stream) {
  check_usable();
  DeviceGuard guard(owner_.device());
  order(stream);
  const Call& call = open_call(LlOp::kRefused, stream);
  launch_plain(call, reason, stream);
}

// Masks.

void LowLatency::mask(int rank, cudaStream_t stream) {
  check_usable();
  DeviceGuard guard(owner_.device());
  order(stream);
  launch_ll_mask(group_, {ll_bit(rank), 1, held()}, stream);
}

void LowLatency::unmask(int rank, cudaStream_t stream) {
  check_usable();
  DeviceGuard guard(owner_.device());
  drop_released();
  order(stream);
  const LlRanks ranks = rank < 0 ? ll_all(group_.group.num_ranks) : ll_bit(rank);
  launch_ll_mask(group_, {ranks, 0, held()}, stream);
  LlRanks silent = 0;
  EP_CHECK_CUDA(cudaMemcpyAsync(&silent, &group_.state->answer, sizeof(silent),
                                cudaMemcpyDeviceToHost, stream));
  EP_CHECK_CUDA(cudaStreamSynchronize(stream));
  for (int peer = 0; peer < group_.group.num_ranks; ++peer)
    if (ll_has(silent, peer)) {
      LlRecord record{};
      record.timeout = {group_.group.rank, static_cast<int32_t>(Phase::kReturn), peer, 1, 0};
      throw TimeoutError(timeout_text(record), record.timeout);
    }
}

LlRanks LowLatency::masked(cudaStream_t stream) {
  check_usable();
  DeviceGuard guard(owner_.device());
  order(stream);
  LlRanks masked = 0;
  EP_CHECK_CUDA(cudaMemcpyAsync(&masked, &group_.state->masked, sizeof(masked),
                                cudaMemcpyDeviceToHost, stream));
  EP_CHECK_CUDA(cudaStreamSynchronize(stream));
  return masked;
}

void LowLatency::stamps(uint64_t* out, cudaStream_t stream) {
  DeviceGuard guard(owner_.device());
  EP_CHECK_CUDA(cudaMemcpyAsync(out, group_.state->stamps, sizeof(group_.state->stamps),
                                cudaMemcpyDeviceToHost, stream));
  EP_CHECK_CUDA(cudaStreamSynchronize(stream));
}

}  // namespace ep::cuda

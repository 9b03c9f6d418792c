// What the host keeps of low-latency calls: which half holds what, and how calls have ended.

#include <algorithm>
#include <chrono>
#include <thread>

#include "core/check.h"
#include "core/ll_layout.h"
#include "cuda/check_cuda.h"
#include "cuda/device_guard.h"
#include "cuda/low_latency.h"

namespace ep::cuda {

// Halves.

void LowLatency::release(int64_t dispatch) {
  std::lock_guard<std::mutex> lock(released_mutex_);
  released_.push_back(dispatch);
}

/// Lets go of the dispatches whose handles are gone.
void LowLatency::drop_released() {
  std::vector<int64_t> numbers;
  {
    std::lock_guard<std::mutex> lock(released_mutex_);
    numbers.swap(released_);
  }
  for (const int64_t number : numbers) {
    for (Call& call : calls_) {
      if (call.dispatch != number || !call.is_pending) continue;
      call.is_pending = false;  // its receive half will not run
      if (!call.is_captured)
        __atomic_store_n(&call.record->status, static_cast<int32_t>(LlStatus::kOk),
                         __ATOMIC_RELEASE);
    }
    for (Half& half : halves_)
      if (half.dispatch == number) half = Half{};
  }
}

int LowLatency::free_half() {
  drop_released();
  for (int half : {next_half_, 1 - next_half_})
    if (halves_[half].dispatch < 0) return half;
  throw ConfigError(
      concat("two low-latency results are alive, the limit: combine, or let go of, "
             "that of call ",
             halves_[0].dispatch, " or ", halves_[1].dispatch));
}

int LowLatency::half_of(int64_t dispatch) const {
  for (int index = 0; index < 2; ++index)
    if (halves_[index].dispatch >= 0 && halves_[index].dispatch == dispatch) return index;
  throw ConfigError(concat("handle (of low-latency dispatch ", dispatch,
                           ") was combined already: its rows are gone"));
}

/// Bits of the halves that hold a result.
int LowLatency::held() const {
  return (halves_[0].dispatch >= 0 ? 1 : 0) | (halves_[1].dispatch >= 0 ? 2 : 0);
}

void LowLatency::check_fits(const LlSizes& sizes) const {
  const DeviceGroup& group = group_.group;
  const auto needed =
      static_cast<int64_t>(LlHalfLayout(sizes, group.num_ranks, num_local_).num_bytes);
  EP_CHECK(needed <= group_.half_bytes, "low_latency_bytes=", config_.region_bytes,
           " is too small: num_max_tokens_per_rank=", sizes.num_max_tokens_per_rank,
           " and hidden=", sizes.hidden, " need ",
           ll_region_bytes(sizes, group.num_ranks, group.num_experts, num_local_));
}

// Outcomes.

/// Also of graphs that were replayed since.
void LowLatency::check_usable() {
  owner_.check_usable();
  LlRecord& record = records_[kNumRecords];
  const int32_t status = __atomic_load_n(&record.status, __ATOMIC_ACQUIRE);
  if (status == static_cast<int32_t>(LlStatus::kOk)) return;
  const LlRecord copy = record;
  record.status = static_cast<int32_t>(LlStatus::kOk);
  throw_status(copy);
}

const LowLatency::Call* LowLatency::find(int64_t number) const {
  const auto is_it = [&](const Call& call) { return call.number == number; };
  const auto found = std::find_if(calls_.begin(), calls_.end(), is_it);
  return found == calls_.end() ? nullptr : &*found;
}

bool LowLatency::is_finished(int64_t number) const {
  const Call* call = find(number);
  return !call || call->is_captured || call->is_pending ||
         __atomic_load_n(&call->record->status, __ATOMIC_ACQUIRE) !=
             static_cast<int32_t>(LlStatus::kRunning);
}

void LowLatency::wait(int64_t number) {
  using Clock = std::chrono::steady_clock;
  const Call* call = find(number);
  if (!call || call->is_pending) return;
  DeviceGuard guard(owner_.device());
  const auto start = Clock::now();
  constexpr auto kSpin = std::chrono::microseconds(500);
  while (!is_finished(number)) {
    if (Clock::now() - start < kSpin) continue;
    std::this_thread::sleep_for(std::chrono::microseconds(20));
    const cudaError_t state = cudaStreamQuery(call->stream);
    if (state == cudaSuccess && !is_finished(number))
      throw DeviceError(concat("low-latency call ", number, " ended without a result"));
    if (state != cudaSuccess && state != cudaErrorNotReady) EP_CHECK_CUDA(state);
  }
  check(number);
}

void LowLatency::check(int64_t number) {
  const Call* call = find(number);
  if (call && !call->is_captured && is_finished(number)) throw_error(*call);
}

void LowLatency::make_stream_wait(int64_t number, cudaStream_t stream) {
  const Call* call = find(number);
  if (!call || call->is_pending || call->stream == stream) return;
  DeviceGuard guard(owner_.device());
  EP_CHECK_CUDA(cudaEventRecord(order_event_, call->stream));
  EP_CHECK_CUDA(cudaStreamWaitEvent(stream, order_event_, 0));
}

std::string LowLatency::timeout_text(const LlRecord& record) const {
  const TimeoutRecord& timeout = record.timeout;
  const char* phase = phase_name(static_cast<Phase>(timeout.phase));
  switch (static_cast<LlLoss>(record.detail[0])) {
    case LlLoss::kLeft:
      return concat(owner_.name_of(timeout.peer), " has masked rank ", timeout.rank,
                    ", which was waiting for it ", phase);
    case LlLoss::kGone:
      return concat(owner_.name_of(timeout.peer), " has gone or gave up while rank ", timeout.rank,
                    " was waiting for it ", phase);
    case LlLoss::kLate:
      break;
  }
  return concat("rank ", timeout.rank, " waited ", static_cast<double>(owner_.timeout_us()) * 1e-6,
                " s for ", owner_.name_of(timeout.peer), " ", phase, ": expected ",
                timeout.expected, ", seen ", timeout.seen);
}

/// What a rank found wrong with its own arguments on the device.
std::string LowLatency::refusal(const LlRecord& record) const {
  const int64_t* detail = record.detail;
  const std::string who =
      record.rank == group_.group.rank ? "" : concat("rank ", record.rank, " refused this call: ");
  switch (static_cast<LlStatus>(record.status)) {
    case LlStatus::kBadExpert:
      return concat(who, "topk_idx[", detail[0], ", ", detail[1], "]=", detail[2],
                    " is outside [-1, num_experts=", group_.group.num_experts, ")");
    case LlStatus::kTwice:
      return concat(who, "topk_idx[", detail[0], "] chooses expert ", detail[2],
                    " twice, the second time at position ", detail[1]);
    case LlStatus::kOtherIdx:
      return concat(who, "topk_idx[", detail[0], ", ", detail[1], "]=", detail[2],
                    ", but this handle dispatched ", detail[3]);
    case LlStatus::kNoDispatch:
      return concat(who, "the dispatch of this handle has failed");
    default:
      return concat(who, record.text);
  }
}

/// A failed call leaves its half as it was before: free after a dispatch, held after a combine.
void LowLatency::throw_error(const Call& call) {
  const LlRecord& record = *call.record;
  const auto status = static_cast<LlStatus>(record.status);
  if (status == LlStatus::kOk || status == LlStatus::kRunning) return;
  Half& half = halves_[call.half];
  if (call.op == LlOp::kDispatch && half.dispatch == call.number) half = Half{};
  if (call.op == LlOp::kCombine && half.dispatch < 0) {
    half.dispatch = call.dispatch;
    half.is_received = true;
  }
  throw_status(record);
}

void LowLatency::throw_status(const LlRecord& record) {
  switch (static_cast<LlStatus>(record.status)) {
    case LlStatus::kDisagree:
      throw DisagreementError(ll_disagreement(static_cast<int>(record.detail[0]),
                                              static_cast<int>(record.detail[1]), record.detail[2],
                                              record.rank, record.detail[3]));
    case LlStatus::kReader:
      throw DisagreementError(concat("ranks disagree on which low-latency result is alive: rank ",
                                     record.detail[0], " has let go of that of call ",
                                     record.detail[1], ", rank ", record.rank, " has not"));
    case LlStatus::kTimeout:
      owner_.fail(timeout_text(record));
      throw TimeoutError(timeout_text(record), record.timeout);
    default:
      throw DisagreementError(refusal(record));
  }
}

}  // namespace ep::cuda

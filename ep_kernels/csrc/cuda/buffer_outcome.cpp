// How calls end: whether they have, and the errors of those that went wrong.

#include <algorithm>

#include "core/check.h"
#include "cuda/buffer.h"
#include "cuda/check_cuda.h"

namespace ep::cuda {
namespace {

std::string bad_choice(const CallRecord& record, int num_experts) {
  const auto& [token, k, expert, unused] = record.detail;
  (void)unused;
  if (static_cast<CallStatus>(record.status) == CallStatus::kTwice)
    return concat("topk_idx[", token, "] chooses expert ", expert,
                  " twice, the second time at position ", k);
  return concat("topk_idx[", token, ", ", k, "]=", expert,
                " is outside [-1, num_experts=", num_experts, ")");
}

}  // namespace

void Buffer::check_usable() const {
  EP_CHECK(!is_destroyed_, "this buffer was destroyed and cannot be used any more");
  if (!failure_.empty())
    throw DeviceError("this buffer failed and cannot be used any more: " + failure_);
}

void Buffer::fail(const std::string& why) {
  if (failure_.empty()) failure_ = why;
}

bool Buffer::is_finished(int64_t call) const {
  return is_destroyed_ || is_too_old(call) ||
         __atomic_load_n(&record_of(call)->status, __ATOMIC_ACQUIRE) !=
             static_cast<int32_t>(CallStatus::kRunning);
}

void Buffer::wait(int64_t call) {
  if (is_destroyed_ || is_too_old(call)) return;
  DeviceGuard guard(config_.device);
  if (!is_captured(call)) EP_CHECK_CUDA(cudaEventSynchronize(end_event(call)));
  check(call);
}

void Buffer::stamps(int64_t call, uint64_t (&out)[kNumStamps]) const {
  std::fill_n(out, kNumStamps, uint64_t{0});
  if (!is_destroyed_ && !is_too_old(call)) std::copy_n(record_of(call)->stamps, kNumStamps, out);
}

void Buffer::check(int64_t call) {
  if (is_destroyed_ || is_too_old(call)) return;
  CallRecord& record = *record_of(call);
  const auto status = static_cast<CallStatus>(__atomic_load_n(&record.status, __ATOMIC_ACQUIRE));
  if (status == CallStatus::kOk || status == CallStatus::kRunning) return;
  const CallRecord found = record;
  if (is_captured(call))
    __atomic_store_n(&record.status, static_cast<int32_t>(CallStatus::kOk), __ATOMIC_RELEASE);
  throw_error(found);
}

void Buffer::throw_error(const CallRecord& record) {
  const bool is_own = record.rank == config_.rank;
  const std::string who = is_own ? "" : concat("rank ", record.rank, " refused this call: ");
  switch (static_cast<CallStatus>(record.status)) {
    case CallStatus::kDisagree:
      throw DisagreementError(disagreement(static_cast<int>(record.detail[0]), record.detail[1],
                                           record.rank, record.detail[2]));
    case CallStatus::kRefused:
      throw DisagreementError(who + record.text);
    case CallStatus::kBadExpert:
    case CallStatus::kTwice:
      throw DisagreementError(who + bad_choice(record, num_experts()));
    case CallStatus::kTooManyRows:
      throw DisagreementError(concat("rank ", record.rank, " would receive ", record.detail[0],
                                     " rows; 2^31 is the limit"));
    case CallStatus::kNoMemory:
      throw DeviceError(
          concat("rank ", record.rank, " has no memory for its rows: its pool is full"));
    case CallStatus::kTimeout: {
      const TimeoutRecord& timeout = record.timeout;
      const std::string message =
          concat(peer_problem(timeout.peer), "rank ", timeout.rank, " waited up to ",
                 static_cast<double>(config_.timeout_us) * 1e-6, " s for rank ", timeout.peer, " ",
                 phase_name(static_cast<Phase>(timeout.phase)), ": expected ", timeout.expected,
                 ", seen ", timeout.seen);
      failure_ = message;
      throw TimeoutError(message, timeout);
    }
    default:
      throw DeviceError("this buffer failed and cannot be used any more: " + failure_);
  }
}

/// What peers have said that explains why a wait for `culprit` ended, or nothing.
std::string Buffer::peer_problem(int culprit) const {
  std::vector<PeerLine> lines(config_.num_ranks);
  EP_CHECK_CUDA(cudaMemcpy(lines.data(), pool_->segment + group_.layout().peer_lines,
                           lines.size() * sizeof(PeerLine), cudaMemcpyDeviceToHost));
  if (lines[culprit].departed) return concat("rank ", culprit, " has destroyed its buffer; ");
  for (int peer = 0; peer < config_.num_ranks; ++peer) {
    const PeerLine& line = lines[peer];
    if (peer != config_.rank && line.failed && line.culprit == culprit)
      return concat("rank ", peer, " gave up on rank ", culprit, ", which it had asked ",
                    phase_name(static_cast<Phase>(line.culprit_phase)), "; ");
  }
  return "";
}

}  // namespace ep::cuda

// Low-latency mode on the host: halves, windows, and ranks that are left out.
// docs/low-latency.md gives the rules and their reasons.

#include <algorithm>

#include "core/check.h"
#include "cpu/low_latency.h"

namespace ep::cpu {

// Halves.

void LowLatency::release(uint64_t dispatch) {
  std::lock_guard<std::mutex> lock(released_mutex_);
  released_.push_back(dispatch);
}

/// Lets go of the dispatches whose handles are gone.
void LowLatency::drop_released() {
  std::vector<uint64_t> numbers;
  {
    std::lock_guard<std::mutex> lock(released_mutex_);
    numbers.swap(released_);
  }
  for (uint64_t number : numbers)
    for (Half& half : halves_) {
      if (!half.dispatch || half.dispatch->number != number) continue;
      const auto is_of_it = [&](const std::shared_ptr<Call>& call) {
        return &halves_[call->half] == &half;
      };
      // What peers still write is awaited before the half is offered again.
      for (const std::shared_ptr<Call>& call : calls_)
        if (is_of_it(call)) collect(*call);
      calls_.erase(std::remove_if(calls_.begin(), calls_.end(), is_of_it), calls_.end());
      half.dispatch.reset();
    }
}

int LowLatency::free_half() {
  drop_released();
  for (int half : {next_half_, 1 - next_half_})
    if (!halves_[half].dispatch) return half;
  throw ConfigError(
      concat("two low-latency results are alive, the limit: combine, or let go of, "
             "that of call ",
             halves_[0].dispatch->number, " or ", halves_[1].dispatch->number));
}

int LowLatency::half_of(uint64_t dispatch) const {
  for (int index = 0; index < 2; ++index)
    if (halves_[index].dispatch && halves_[index].dispatch->number == dispatch) return index;
  throw ConfigError(concat("handle (of low-latency dispatch ", dispatch,
                           ") was combined already: its rows are gone"));
}

void LowLatency::check_fits(const LlSizes& sizes) const {
  const Group& group = buffer_.group();
  int num_local = 0;
  for (int rank = 0; rank < group.num_ranks; ++rank)
    num_local = std::max(num_local, num_local_experts(group, rank));
  const auto needed =
      static_cast<int64_t>(LlHalfLayout(sizes, group.num_ranks, num_local).num_bytes);
  EP_CHECK(needed <= half_bytes_, "low_latency_bytes=", config_.region_bytes,
           " is too small: num_max_tokens_per_rank=", sizes.num_max_tokens_per_rank,
           " and hidden=", sizes.hidden, " need ",
           ll_region_bytes(sizes, group.num_ranks, group.num_experts, num_local));
}

// Windows.

/// Gives the half a new window if a rank that was masked since may still write to the old one.
/// Throws DeviceError, and leaves the half as it was, if the pool is full.
void LowLatency::refresh_window(Half& half, uint64_t number) {
  const RankSet& masked = exchange_.masked();
  if (masked.is_within(half.strangers)) return;
  const int64_t window = buffer_.pool()->allocator.allocate(half_bytes_);
  quarantines_.push_back({half.window, number});
  half.window = window;
  half.strangers = masked;
}

/// Frees the windows that nobody writes to any more.
void LowLatency::end_quarantines() {
  for (int rank = 0; rank < buffer_.group().num_ranks; ++rank)
    if (!exchange_.is_active(rank) && !exchange_.has_ended(rank)) return;
  const auto is_over = [&](const Quarantine& old) {
    // An active rank may have been in that call with another view until it posted the next one.
    if (old.number + 3 > next_number_) return false;
    const int64_t offset = old.window - config_.exchange.region;
    if (offset < 0 || offset >= config_.region_bytes) buffer_.pool()->allocator.free(old.window);
    return true;
  };
  quarantines_.erase(std::remove_if(quarantines_.begin(), quarantines_.end(), is_over),
                     quarantines_.end());
}

// Masks.

RankSet LowLatency::active_ranks() const {
  RankSet active;
  for (int rank = 0; rank < buffer_.group().num_ranks; ++rank)
    if (exchange_.is_active(rank)) active.add(rank);
  return active;
}

/// Leaves out whom `peer` leaves out; also `peer`, if that is us.
void LowLatency::adopt(int peer, const RankSet& masked) {
  if (masked.is_within(exchange_.masked())) return;
  const int self = buffer_.group().rank;
  if (masked.has(self)) return exchange_.mask(peer);
  for (int rank = 0; rank < buffer_.group().num_ranks; ++rank)
    if (masked.has(rank)) exchange_.mask(rank);
}

void LowLatency::mask(int rank) {
  run([&] {
    EP_CHECK(rank != buffer_.group().rank, "rank=", rank,
             " is this rank, which cannot mask itself");
    exchange_.mask(rank);
  });
}

void LowLatency::unmask(int rank) {
  std::exception_ptr silent;
  run([&] {
    for (int peer = 0; peer < buffer_.group().num_ranks; ++peer) {
      if ((rank >= 0 && peer != rank) || peer == buffer_.group().rank) continue;
      if (exchange_.is_active(peer) && !exchange_.has_left(peer)) continue;
      if (std::exception_ptr error = unmask_one(peer)) silent = error;
    }
  });
  if (silent) std::rethrow_exception(silent);
}

/// Returns the error if the rank does not answer: it stays masked, and the buffer as it was.
std::exception_ptr LowLatency::unmask_one(int rank) {
  exchange_.mask(rank);
  for (const std::shared_ptr<Call>& call : calls_) collect(*call);
  try {
    next_number_ = exchange_.unmask(rank, next_number_);
  } catch (const TimeoutError&) {
    return std::current_exception();
  }
  for (Half& half : halves_) {
    half.strangers.remove(rank);
    half.last = half.dispatch ? half.last : 0;
    if (half.dispatch) half.dispatch->peers.remove(rank);
  }
  return nullptr;
}

RankSet LowLatency::masked() {
  RankSet masked;
  run([&] { masked = exchange_.masked(); });
  return masked;
}

}  // namespace ep::cpu

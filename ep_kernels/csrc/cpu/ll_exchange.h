#pragma once

#include <cstdint>
#include <string>

#include "core/check.h"
#include "core/ll_layout.h"
#include "core/ll_protocol.h"
#include "cpu/exchange.h"
#include "runtime/doorbell.h"

namespace ep::cpu {

/// The low-latency words that all ranks share, and who is masked. Waits are for one peer; those of
/// one step share a deadline, so that a rank which waits for several silent ones is not late itself
/// for peers that wait for it. With `mask_silent_ranks` a peer that cannot come, or is late, is
/// masked, and the wait says so; without, the wait throws TimeoutError.
class LlExchange {
 public:
  struct Config {
    int64_t region;  ///< pool offset of the region, the same on all ranks
    bool mask_silent_ranks;
  };

  LlExchange(Exchange& exchange, const Config& config);

  int rank() const { return exchange_.config().rank; }
  int num_ranks() const { return exchange_.config().num_ranks; }
  const LlControlLayout& layout() const { return layout_; }

  // Masks

  const RankSet& masked() const { return masked_; }
  bool is_active(int rank) const { return !masked_.has(rank); }
  /// Leaves `peer` out from now on, and tells it.
  void mask(int peer);
  /// Whether `peer` has left this rank out, and both are not together again yet.
  bool has_left(int peer) const { return mask_state(peer) != kLlTogether; }
  /// Takes `peer` back; it must do the same. Returns the number of the next call.
  uint64_t unmask(int peer, uint64_t next_number);
  bool has_ended(int peer) const { return exchange_.has_ended(peer); }

  // The steps of a call. `number` is the number of the call.

  /// That of a step which begins now.
  Clock::time_point make_deadline() const {
    return Clock::now() + std::chrono::microseconds(exchange_.config().timeout_us);
  }

  /// Announces the call to all active ranks. `counts` is [num_experts] or null.
  void send_post(uint64_t number, int attempt, const LlPost& post, const int32_t* counts);
  /// Waits until `peer` has posted the call and is_enough(post, is_final) holds; is_final: it will
  /// not post again. False: it is masked now.
  template <typename IsEnough>
  bool wait_post(uint64_t number, int peer, LlPost* post, Clock::time_point deadline,
                 IsEnough&& is_enough) {
    return wait(peer, Phase::kPost, ll_post_flag(number, 0), deadline, [&](uint64_t* seen) {
      const bool is_final = has_done(number, peer);  // before the post, which none follows then
      return read_post(number, peer, post, seen) && is_enough(*post, is_final);
    });
  }
  /// Counts that came with the post of `src`.
  const int32_t* counts(uint64_t number, int src) const;

  /// Says that this rank has placed its rows, under `view`.
  void send_done(uint64_t number, const RankSet& view);
  bool has_done(uint64_t number, int peer) const;
  /// Waits for send_done() of `peer`; its view. False: it is masked now.
  bool wait_done(uint64_t number, int peer, RankSet* view, Clock::time_point deadline);

 private:
  template <typename T>
  T* word(int rank, size_t offset) const {
    return reinterpret_cast<T*>(exchange_.pool(rank) + config_.region + offset);
  }
  LlMaskLine& mask_line(int owner, int src) const {
    return word<LlMaskLine>(owner, layout_.mask_lines)[src];
  }
  /// The wish of `peer`, which is gone then, so that it cannot be withdrawn; kLlMasked if none.
  uint64_t take_wish(int peer);
  uint64_t mask_state(int peer) const { return load_flag(&mask_line(rank(), peer).state); }
  uint64_t* post_flag(uint64_t number, int owner, int src) const {
    return word<uint64_t>(owner, layout_.post_flags) + layout_.slot(number, src);
  }
  LlPost& post(uint64_t number, int owner, int src) const {
    return *word<LlPost>(owner, layout_.posts + layout_.slot(number, src) * layout_.post_stride);
  }
  LlDoneLine& done_line(uint64_t number, int owner, int src) const {
    return word<LlDoneLine>(owner, layout_.done_lines)[layout_.slot(number, src)];
  }

  /// Copies the post of `peer` if it is there, whole.
  bool read_post(uint64_t number, int peer, LlPost* post, uint64_t* seen) const;
  /// Waits for ready(seen), which tells the value of the awaited word, too.
  template <typename Ready>
  bool wait(int peer, Phase phase, uint64_t expected, Clock::time_point deadline, Ready&& ready);
  std::string problem(TimeoutRecord& record) const;
  std::string too_late(const TimeoutRecord& record) const;

  Exchange& exchange_;
  Config config_;
  LlControlLayout layout_;
  RankSet masked_;
};

template <typename Ready>
bool LlExchange::wait(int peer, Phase phase, uint64_t expected, Clock::time_point deadline,
                      Ready&& ready) {
  uint64_t seen = 0;
  TimeoutRecord record{rank(), static_cast<int32_t>(phase), peer, static_cast<int64_t>(expected),
                       0};
  std::string what;
  const auto is_over = [&] {
    if (ready(&seen)) return true;
    record.seen = static_cast<int64_t>(seen);
    return !what.empty();
  };
  const auto look = [&] {
    what = problem(record);
    // The peer may have written the word, and left, since it was last looked at.
    if (!what.empty() && ready(&seen)) what.clear();
  };
  const bool is_in_time = wait_until(exchange_.doorbell(rank()), deadline, is_over, look);
  if (is_in_time && what.empty()) return true;
  if (!config_.mask_silent_ranks) throw TimeoutError(is_in_time ? what : too_late(record), record);
  mask(peer);
  return false;
}

}  // namespace ep::cpu

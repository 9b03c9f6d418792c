#include "cpu/ll_exchange.h"

#include <algorithm>
#include <cstring>

namespace ep::cpu {
namespace {

bool replace(uint64_t* word, uint64_t from, uint64_t to) {
  return __atomic_compare_exchange_n(word, &from, to, /*weak=*/false, __ATOMIC_SEQ_CST,
                                     __ATOMIC_SEQ_CST);
}

}  // namespace

LlExchange::LlExchange(Exchange& exchange, const Config& config)
    : exchange_(exchange),
      config_(config),
      layout_(exchange.config().num_ranks, exchange.config().num_experts) {}

void LlExchange::mask(int peer) {
  if (masked_.has(peer)) return;
  masked_.add(peer);
  __atomic_store_n(&mask_line(peer, rank()).state, kLlMasked, __ATOMIC_SEQ_CST);
  ring(exchange_.doorbell(peer));
}

uint64_t LlExchange::unmask(int peer, uint64_t next_number) {
  uint64_t* theirs = &mask_line(peer, rank()).state;
  const uint64_t wish = ll_wish(next_number);
  store_flag(theirs, wish);
  ring(exchange_.doorbell(peer));

  TimeoutRecord record{rank(), static_cast<int32_t>(Phase::kReturn), peer, 1, 0};
  std::string what;
  const auto look = [&] { what = exchange_.peer_problem(record); };
  uint64_t answer = kLlMasked;  // the wish of the peer, once it is taken
  const auto is_over = [&] { return (answer = take_wish(peer)) > kLlMasked || !what.empty(); };
  wait_until(exchange_.doorbell(rank()), make_deadline(), is_over, look);
  if (answer <= kLlMasked && !replace(theirs, wish, kLlMasked)) {
    // The peer has taken our wish. Its own was here before; it is not if the peer has left again.
    answer = take_wish(peer);
    if (answer <= kLlMasked) store_flag(theirs, kLlMasked);
  }
  if (answer <= kLlMasked) throw TimeoutError(what.empty() ? too_late(record) : what, record);
  masked_.remove(peer);
  return std::max(next_number, answer - ll_wish(0));
}

uint64_t LlExchange::take_wish(int peer) {
  uint64_t* state = &mask_line(rank(), peer).state;
  const uint64_t wish = load_flag(state);
  return wish > kLlMasked && replace(state, wish, kLlTogether) ? wish : kLlMasked;
}

void LlExchange::send_post(uint64_t number, int attempt, const LlPost& post,
                           const int32_t* counts) {
  const size_t count_bytes = sizeof(int32_t) * exchange_.config().num_experts;
  for (int peer = 0; peer < num_ranks(); ++peer) {
    if (!is_active(peer)) continue;
    uint64_t* flag = post_flag(number, peer, rank());
    LlPost& slot = this->post(number, peer, rank());
    if (attempt > 0) {  // the peer may be reading: what it copies meanwhile does not count
      __atomic_store_n(flag, 0, __ATOMIC_RELAXED);
      __atomic_thread_fence(__ATOMIC_SEQ_CST);
    }
    slot = post;
    if (counts) std::memcpy(reinterpret_cast<int32_t*>(&slot + 1), counts, count_bytes);
    store_flag(flag, ll_post_flag(number, attempt));
    ring(exchange_.doorbell(peer));
  }
}

bool LlExchange::read_post(uint64_t number, int peer, LlPost* post, uint64_t* seen) const {
  const uint64_t* flag = post_flag(number, rank(), peer);
  *seen = load_flag(flag);
  if (*seen < ll_post_flag(number, 0)) return false;
  *post = this->post(number, rank(), peer);
  __atomic_thread_fence(__ATOMIC_ACQUIRE);
  return __atomic_load_n(flag, __ATOMIC_RELAXED) == *seen;
}

const int32_t* LlExchange::counts(uint64_t number, int src) const {
  return reinterpret_cast<const int32_t*>(&post(number, rank(), src) + 1);
}

void LlExchange::send_done(uint64_t number, const RankSet& view) {
  for (int peer = 0; peer < num_ranks(); ++peer) {
    if (!is_active(peer)) continue;
    LlDoneLine& line = done_line(number, peer, rank());
    line.view = view;
    store_flag(&line.flag, number + 1);
    ring(exchange_.doorbell(peer));
  }
}

bool LlExchange::has_done(uint64_t number, int peer) const {
  return load_flag(&done_line(number, rank(), peer).flag) >= number + 1;
}

bool LlExchange::wait_done(uint64_t number, int peer, RankSet* view, Clock::time_point deadline) {
  const LlDoneLine& line = done_line(number, rank(), peer);
  const bool is_there = wait(peer, Phase::kRows, number + 1, deadline, [&](uint64_t* seen) {
    *seen = load_flag(&line.flag);
    return *seen >= number + 1;
  });
  if (is_there) *view = line.view;
  return is_there;
}

std::string LlExchange::problem(TimeoutRecord& record) const {
  std::string what = exchange_.peer_problem(record);
  if (what.empty() && has_left(record.peer))
    what = concat("rank ", record.peer, " has masked rank ", rank(), ", which was waiting for it ",
                  phase_name(static_cast<Phase>(record.phase)));
  return what;
}

std::string LlExchange::too_late(const TimeoutRecord& record) const {
  return concat("rank ", rank(), " waited ", exchange_.config().timeout_us * 1e-6, " s for rank ",
                record.peer, " ", phase_name(static_cast<Phase>(record.phase)), ": expected ",
                record.expected, ", seen ", record.seen);
}

}  // namespace ep::cpu

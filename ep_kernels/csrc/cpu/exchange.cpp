#include "cpu/exchange.h"

#include <unistd.h>

#include <algorithm>
#include <cstring>

namespace ep::cpu {
namespace {

/// Counts the time of a wait, piece by piece, for the ranks that were to blame for it.
struct WaitCount {
  Clock::time_point since;
  int awaited;         ///< from `since` on
  int64_t* waited_us;  ///< [num_ranks] or null

  /// Up to now for `awaited`, from now on for `next`.
  void add(int next) {
    if (!waited_us) return;
    const auto now = Clock::now();
    const auto waited = std::chrono::duration_cast<std::chrono::microseconds>(now - since);
    // NOTE: calls of one buffer may wait at the same time: a fresh dispatch for the counts on its
    // caller's thread, an asynchronous call before it on the queue's.
    __atomic_fetch_add(waited_us + awaited, waited.count(), __ATOMIC_RELAXED);
    since = now;
    awaited = next;
  }
};

}  // namespace

Exchange::Exchange(const Config& config)
    : config_(config),
      local_begin_(config.rank / config.num_local_ranks * config.num_local_ranks),
      local_end_(local_begin_ + config.num_local_ranks),
      layout_(config.num_ranks, config.num_experts),
      segments_(config.num_ranks) {
  const size_t num_bytes = layout_.num_bytes + static_cast<size_t>(config.pool_bytes);
  segments_[config.rank] = std::make_shared<SharedSegment>(SharedSegment::create(num_bytes));
}

void Exchange::attach(const int64_t* pids, const int32_t* fds) {
  const size_t num_bytes = segments_[config_.rank]->size();
  processes_.clear();
  for (int local = 0; local < config_.num_local_ranks; ++local) {
    processes_.emplace_back(pids[local]);
    const int peer = local_begin_ + local;
    if (peer == config_.rank) continue;
    segments_[peer] =
        std::make_shared<SharedSegment>(SharedSegment::open(pids[local], fds[local], num_bytes));
  }
}

void Exchange::close_files() { segments_[config_.rank]->close_file(); }

std::shared_ptr<SharedSegment> Exchange::detach() {
  for (int peer = local_begin_; peer < local_end_; ++peer) {
    if (!segments_[peer]) continue;
    __atomic_store_n(&line(peer, config_.rank).departed, 1u, __ATOMIC_RELEASE);
    ring(doorbell(peer));
    if (peer != config_.rank) segments_[peer].reset();
  }
  return std::move(segments_[config_.rank]);
}

void Exchange::wait_slot(uint64_t seq, int64_t* waited_us) {
  if (seq < kNumSlots) return;
  for (int peer = local_begin_; peer < local_end_; ++peer)
    wait_flag(&line(config_.rank, peer).done, seq + 1 - kNumSlots, peer, Phase::kSlot, waited_us);
}

void Exchange::send_post(uint64_t seq, int src, const Post& post, const int32_t* counts) {
  const size_t slot = layout_.slot(seq, src);
  const size_t num_counts = static_cast<size_t>(config_.num_ranks) + config_.num_experts;
  for (int peer = local_begin_; peer < local_end_; ++peer) {
    auto* destination = word<uint8_t>(peer, layout_.posts + slot * layout_.post_stride);
    std::memcpy(destination, &post, sizeof(Post));
    if (counts) std::memcpy(destination + sizeof(Post), counts, num_counts * sizeof(int32_t));
    store_flag(word<uint64_t>(peer, layout_.post_flags) + slot, seq + 1);
    ring(doorbell(peer));
  }
}

void Exchange::wait_posts(uint64_t seq, int64_t* waited_us) {
  for (int peer = 0; peer < config_.num_ranks; ++peer)
    wait_flag(word<uint64_t>(config_.rank, layout_.post_flags) + layout_.slot(seq, peer), seq + 1,
              peer, Phase::kPost, waited_us);
  check_agreement(seq);
}

const Post& Exchange::post(uint64_t seq, int src) const {
  return *word<Post>(config_.rank, layout_.posts + layout_.slot(seq, src) * layout_.post_stride);
}

CountMatrix Exchange::counts(uint64_t seq) const {
  CountMatrix counts;
  for (int src = 0; src < config_.num_ranks; ++src)
    counts.push_back(reinterpret_cast<const int32_t*>(&post(seq, src) + 1));
  return counts;
}

void Exchange::send_offer(uint64_t seq, int src, const OfferSlot& offer) {
  const size_t slot = layout_.slot(seq, src);
  for (int peer = local_begin_; peer < local_end_; ++peer) {
    word<OfferSlot>(peer, layout_.offers)[slot] = offer;
    store_flag(word<uint64_t>(peer, layout_.offer_flags) + slot, seq + 1);
    ring(doorbell(peer));
  }
}

std::vector<Offer> Exchange::wait_offers(uint64_t seq, int64_t* waited_us) {
  std::vector<Offer> offers;
  for (int peer = 0; peer < config_.num_ranks; ++peer) {
    const size_t slot = layout_.slot(seq, peer);
    wait_flag(word<uint64_t>(config_.rank, layout_.offer_flags) + slot, seq + 1, peer,
              Phase::kOffer, waited_us);
    offers.push_back(word<OfferSlot>(config_.rank, layout_.offers)[slot].offer);
  }
  for (int peer = 0; peer < config_.num_ranks; ++peer)
    if (offers[peer].failed)
      throw NoMemoryError(
          concat("rank ", peer, " has no memory for its rows: ",
                 word<OfferSlot>(config_.rank, layout_.offers)[layout_.slot(seq, peer)].text));
  return offers;
}

void Exchange::send_done(uint64_t seq) {
  for (int peer = local_begin_; peer < local_end_; ++peer) {
    store_flag(&line(peer, config_.rank).done, seq + 1);
    ring(doorbell(peer));
  }
}

void Exchange::wait_done(uint64_t seq, int64_t* waited_us) {
  for (int peer = local_begin_; peer < local_end_; ++peer)
    wait_flag(&line(config_.rank, peer).done, seq + 1, peer, Phase::kDone, waited_us);
}

void Exchange::send_failed(const TimeoutRecord& record) {
  for (int peer = local_begin_; peer < local_end_; ++peer) {
    PeerLine& own = line(peer, config_.rank);
    own.culprit = record.peer;
    own.culprit_phase = record.phase;
    __atomic_store_n(&own.failed, 1u, __ATOMIC_RELEASE);
    ring(doorbell(peer));
  }
}

void Exchange::send_waiting_for(int rank) {
  for (int peer = local_begin_; peer < local_end_; ++peer)
    __atomic_store_n(&line(peer, config_.rank).waiting_for, rank + 1, __ATOMIC_RELEASE);
}

void Exchange::wait_flag(const uint64_t* flag, uint64_t expected, int peer, Phase phase,
                         int64_t* waited_us) {
  const auto start = Clock::now();
  TimeoutRecord record{config_.rank, static_cast<int32_t>(phase), peer,
                       static_cast<int64_t>(expected), 0};
  WaitCount count{start, peer, waited_us};
  const auto ready = [&] {
    const uint64_t seen = load_flag(flag);
    record.seen = static_cast<int64_t>(seen);
    return seen >= expected;
  };
  const auto check = [&] {
    count.add(awaited_through(proxy_of(peer)));
    const std::string problem = peer_problem(record);
    // The peer may have written the word, and left, since it was last looked at.
    if (!problem.empty() && !ready()) throw TimeoutError(problem, record);
  };
  const auto deadline = start + std::chrono::microseconds(config_.timeout_us);
  bool has_come = wait_until(doorbell(config_.rank), deadline, ready, check);
  if (!has_come && waits_for_network(proxy_of(peer)))
    has_come = wait_until(doorbell(config_.rank), deadline + verdict_time(), ready, check);
  if (!has_come) throw_expired(record);
  count.add(peer);
}

/// The verdict of a proxy whose wait for another node goes on: that one may wait for a third, which
/// is lost. The network's deadlines are a tenth later than ours (lanes.py); whoever waits over the
/// network for us asks for half a second more, and must hear from us in that time.
Clock::duration Exchange::verdict_time() const {
  return std::chrono::microseconds(config_.timeout_us / 10) + std::chrono::milliseconds(250);
}

bool Exchange::waits_for_network(int proxy) const {
  return awaited_through(proxy) != proxy && !processes_[proxy - local_begin_].is_stopped();
}

int Exchange::awaited_through(int proxy) const {
  const int remote = __atomic_load_n(&line(config_.rank, proxy).waiting_for, __ATOMIC_ACQUIRE) - 1;
  return remote >= 0 ? remote : proxy;
}

void Exchange::throw_expired(TimeoutRecord& record) const {
  const int peer = record.peer;
  std::string text = concat("rank ", config_.rank, " waited ", config_.timeout_us * 1e-6,
                            " s for rank ", peer, " ", phase_name(static_cast<Phase>(record.phase)),
                            ": expected ", record.expected, ", seen ", record.seen);
  const int proxy = proxy_of(peer);
  record.peer = waits_for_network(proxy) ? awaited_through(proxy) : proxy;
  if (proxy != peer) text += concat(", which rank ", proxy, " speaks for");
  if (record.peer != proxy)
    text += concat("; rank ", proxy, " waits for a message of rank ", record.peer);
  throw TimeoutError(text, record);
}

std::string Exchange::peer_problem(TimeoutRecord& waiting) const {
  const int peer = proxy_of(waiting.peer);
  const PeerLine& state = line(config_.rank, peer);
  std::string what;
  int culprit = peer;
  if (__atomic_load_n(&state.failed, __ATOMIC_ACQUIRE) && peer != config_.rank) {
    culprit = state.culprit;
    what = culprit == peer
               ? concat("rank ", peer, " failed during a call")
               : concat("rank ", peer, " gave up on rank ", culprit, ", which it had asked ",
                        phase_name(static_cast<Phase>(state.culprit_phase)));
  } else if (__atomic_load_n(&state.departed, __ATOMIC_ACQUIRE)) {
    what = concat("rank ", peer, " has destroyed its buffer");
  } else if (processes_[peer - local_begin_].has_ended()) {
    what = concat("the process of rank ", peer, " has ended");
  } else {
    return what;
  }
  const int awaited = waiting.peer;
  waiting.peer = culprit;
  return concat(what, "; rank ", config_.rank, " was waiting for rank ", awaited, " ",
                phase_name(static_cast<Phase>(waiting.phase)), ": expected ", waiting.expected,
                ", seen ", waiting.seen);
}

void Exchange::check_agreement(uint64_t seq) const {
  for (int src = 0; src < config_.num_ranks; ++src)
    EP_CHECK_AGREED(post(seq, src).fields[kFieldOp] != static_cast<int64_t>(Op::kRefused), "rank ",
                    src, " refused this call: ", post(seq, src).text);
  for (int src = 1; src < config_.num_ranks; ++src)
    for (int field = 0; field < kNumPostFields; ++field) {
      const int64_t here = post(seq, 0).fields[field], there = post(seq, src).fields[field];
      EP_CHECK_AGREED(here == there, disagreement(field, here, src, there));
    }
}

}  // namespace ep::cpu

// Low-latency mode on the host: how calls are announced, and what all ranks must agree on.

#include "core/check.h"
#include "cpu/low_latency.h"

namespace ep::cpu {

uint64_t LowLatency::open_call() {
  const uint64_t number = next_number_++;
  // Slots: what the peers wrote for call number - 2 has to be read before this call is posted.
  for (const std::shared_ptr<Call>& call : calls_)
    if (call->number + 2 <= number) collect(*call);
  if (!quarantines_.empty()) end_quarantines();
  return number;
}

LlPost LowLatency::make_post(LlOp op, const LlSizes& sizes) const {
  LlPost post{};
  post.fields[kLlFieldOp] = static_cast<int64_t>(op);
  post.fields[kLlFieldMaxTokens] = sizes.num_max_tokens_per_rank;
  post.fields[kLlFieldHidden] = sizes.hidden;
  post.fields[kLlFieldFormat] = sizes.format;
  for (int half = 0; half < 2; ++half)
    post.held[half] = halves_[half].dispatch ? halves_[half].last : 0;
  return post;
}

/// A rank that overwrites rows which another may still read: ranks let go of different results.
void LowLatency::check_no_reader(const std::vector<LlPost>& posts) const {
  const int num_ranks = buffer_.group().num_ranks;
  for (int owner = 0; owner < num_ranks; ++owner)
    for (int reader = 0; reader < num_ranks; ++reader) {
      if (!exchange_.is_active(owner) || !exchange_.is_active(reader)) continue;
      const uint64_t reused = posts[owner].reused;
      EP_CHECK_AGREED(
          reused == 0 || (posts[reader].held[0] != reused && posts[reader].held[1] != reused),
          "ranks disagree on which low-latency result is alive: rank ", owner,
          " has let go of that of call ", reused - 1, ", rank ", reader, " has not");
    }
}

/// Posts that this rank refuses the call, and waits as all do until everybody has posted it.
void LowLatency::post_refusal(uint64_t number, int attempt, const std::string& reason) {
  LlPost mine = make_post(LlOp::kRefused, LlSizes{});
  reason.copy(mine.text, kMaxText - 1);
  mine.masked = exchange_.masked();
  exchange_.send_post(number, attempt, mine, nullptr);
  LlPost post{};
  const auto deadline = exchange_.make_deadline();
  for (int peer = 0; peer < buffer_.group().num_ranks; ++peer)
    if (exchange_.is_active(peer) && exchange_.wait_post(number, peer, &post, deadline,
                                                         [](const LlPost&, bool) { return true; }))
      adopt(peer, post.masked);
}

/// refresh_window() in a call that is open: the peers wait for a post, whatever happens.
void LowLatency::refresh_window_or_refuse(Half& half, uint64_t number, int attempt) {
  try {
    refresh_window(half, number);
  } catch (const DeviceError& error) {
    post_refusal(number, attempt, error.what());
    throw;
  }
}

/// Posts the call and waits until all active ranks have; for a dispatch, which has a half, until
/// they all have the same view, or have gone ahead with another one.
std::vector<LlPost> LowLatency::agree(uint64_t number, Half* half, LlPost& mine,
                                      const int32_t* counts) {
  std::vector<LlPost> posts(buffer_.group().num_ranks);
  for (int attempt = 0;; ++attempt) {
    mine.masked = exchange_.masked();
    if (half) refresh_window_or_refuse(*half, number, attempt);
    if (half) mine.window = half->window;
    exchange_.send_post(number, attempt, mine, counts);
    // A new one for each attempt: peers may have waited as long as this rank before they try again.
    const auto deadline = exchange_.make_deadline();
    for (int peer = 0; peer < buffer_.group().num_ranks; ++peer) {
      const auto is_enough = [&](const LlPost& post, bool is_final) {
        return !half || post.masked == mine.masked || !post.masked.is_within(mine.masked) ||
               post.fields[kLlFieldOp] != mine.fields[kLlFieldOp] || is_final;
      };
      if (exchange_.is_active(peer) &&
          exchange_.wait_post(number, peer, &posts[peer], deadline, is_enough))
        adopt(peer, posts[peer].masked);
    }
    if (!half || exchange_.masked() == mine.masked) return posts;
  }
}

void LowLatency::check_agreement(const std::vector<LlPost>& posts, const RankSet& members) const {
  int first = -1;
  for (int src = 0; src < buffer_.group().num_ranks; ++src) {
    if (!members.has(src)) continue;
    if (first < 0) first = src;
    EP_CHECK_AGREED(posts[src].fields[kLlFieldOp] != static_cast<int64_t>(LlOp::kRefused), "rank ",
                    src, " refused this call: ", posts[src].text);
  }
  for (int src = 0; src < buffer_.group().num_ranks; ++src)
    for (int field = 0; members.has(src) && field < kNumLlFields; ++field) {
      const int64_t here = posts[first].fields[field], there = posts[src].fields[field];
      EP_CHECK_AGREED(here == there, ll_disagreement(field, first, here, src, there));
    }
}

}  // namespace ep::cpu

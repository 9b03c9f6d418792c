// Low-latency mode on the host: the receive halves.

#include <algorithm>

#include "core/recv_stats.h"
#include "cpu/low_latency.h"

namespace ep::cpu {
namespace {

int64_t microseconds_since(Clock::time_point start) {
  return std::chrono::duration_cast<std::chrono::microseconds>(Clock::now() - start).count();
}

void add_stats(const Group& group, const LlDispatch& dispatch, const int32_t* arrived_counts) {
  const LlDispatchArgs& args = dispatch.args;
  if (!args.cumulative_recv_stats) return;
  for (int local = 0; local < num_local_experts(group, group.rank); ++local)
    add_recv_tokens(args.cumulative_recv_stats, args.cumulative_stats_bytes, local,
                    arrived_counts[local]);
}

void add_waits(const std::vector<int64_t>& waited_us, int64_t* stats) {
  if (!stats) return;
  for (size_t rank = 0; rank < waited_us.size(); ++rank) stats[rank] += waited_us[rank];
}

}  // namespace

/// Waits for what the peers wrote for a call, so that its slot may be used again.
void LowLatency::collect(Call& call) {
  if (call.is_collected) return;
  const auto deadline = exchange_.make_deadline();
  call.waited_us.assign(buffer_.group().num_ranks, 0);
  for (int peer = 0; peer < buffer_.group().num_ranks; ++peer) {
    if (!call.peers.has(peer) || !exchange_.is_active(peer)) continue;
    const auto start = Clock::now();
    bool has_come = false;
    if (call.op == LlOp::kDispatch) {
      RankSet view;
      has_come = exchange_.wait_done(call.number, peer, &view, deadline) &&
                 view == halves_[call.half].dispatch->view;
    } else {
      LlPost& post = call.posts[peer];
      has_come = exchange_.wait_post(call.number, peer, &post, deadline,
                                     [](const LlPost&, bool) { return true; });
      if (has_come) adopt(peer, post.masked);
      call.combine.windows[peer] = post.window;
    }
    call.waited_us[peer] = microseconds_since(start);
    if (has_come) call.arrived.add(peer);
  }
  call.is_collected = true;
}

void LowLatency::receive_call(Call& call) {
  collect(call);
  const auto self = std::find_if(calls_.begin(), calls_.end(),
                                 [&](const auto& each) { return each.get() == &call; });
  const std::shared_ptr<Call> keep = self == calls_.end() ? nullptr : *self;
  if (keep) calls_.erase(self);
  call.op == LlOp::kDispatch ? receive_dispatch(call) : receive_combine(call);
}

void LowLatency::receive_dispatch(Call& call) {
  const Group& group = buffer_.group();
  Half& half = halves_[call.half];
  LlDispatch& dispatch = *half.dispatch;
  const LlDispatchArgs& args = dispatch.args;
  std::vector<int32_t> arrived_counts(num_local_experts(group, group.rank), 0);
  for (int src = 0; src < group.num_ranks; ++src) {
    const bool has_come = call.arrived.has(src);
    args.missing[src] = !has_come;
    if (!has_come && dispatch.peers.has(src)) {
      clear_rows(buffer_.transfer(), dispatch, src);
      dispatch.peers.remove(src);
    }
    for (size_t local = 0; has_come && local < arrived_counts.size(); ++local)
      arrived_counts[local] += dispatch.recv_counts[local * group.num_ranks + src];
  }
  std::copy(dispatch.recv_counts.begin(), dispatch.recv_counts.end(), args.recv_rank_counts);
  for (size_t local = 0; local < arrived_counts.size(); ++local) {
    const int32_t* counts = dispatch.recv_counts.data() + local * group.num_ranks;
    args.recv_count[local] = 0;
    for (int src = 0; src < group.num_ranks; ++src) args.recv_count[local] += counts[src];
  }
  add_stats(group, dispatch, arrived_counts.data());
  add_waits(call.waited_us, args.wait_recv_cost_stats);
  half.is_received = true;
}

void LowLatency::receive_combine(Call& call) {
  const Group& group = buffer_.group();
  Half& half = halves_[call.half];
  LlDispatch& dispatch = *half.dispatch;
  half.is_combining = false;
  check_agreement(call.posts, call.arrived);
  RankSet sources;
  bool is_changed = true;
  while (is_changed) {
    sources = RankSet{};
    for (int src = 0; src < group.num_ranks; ++src)
      if (dispatch.peers.has(src) && call.arrived.has(src) && exchange_.is_active(src))
        sources.add(src);
    reduce_rows(buffer_.transfer(), dispatch, call.combine, sources);
    // Look back: an owner that has masked us may have overwritten rows while we read them.
    is_changed = false;
    __atomic_thread_fence(__ATOMIC_ACQUIRE);
    for (int src = 0; src < group.num_ranks; ++src)
      if (sources.has(src) && exchange_.has_left(src)) {
        exchange_.mask(src);
        is_changed = true;
      }
  }
  for (int src = 0; src < group.num_ranks; ++src)
    call.combine.args.missing[src] = !sources.has(src);
  add_waits(call.waited_us, call.combine.args.wait_recv_cost_stats);
  half.dispatch.reset();
}

}  // namespace ep::cpu

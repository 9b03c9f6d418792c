// The low-latency calls on the host: which step comes after which. Send halves are here, receive
// halves in cpu/ll_receive.cpp, what ranks agree on in cpu/ll_agreement.cpp, masks and windows in
// cpu/ll_masking.cpp, the shared words in cpu/ll_exchange.cpp, the transfers in cpu/ll_dispatch.cpp
// and cpu/ll_combine.cpp.
//
//   dispatch   send      count, post, agree on a view, place rows, send rows, done
//              receive   wait for all done, zero what is missing, counts
//   combine    send      stage rows, post
//              receive   wait for all posts, reduce rows, look back, release the half

#include "cpu/low_latency.h"

#include <algorithm>
#include <cstring>

#include "core/check.h"

namespace ep::cpu {
LowLatency::LowLatency(Buffer& buffer, const Config& config)
    : buffer_(buffer), config_(config), exchange_(buffer.exchange(), config.exchange) {
  EP_CHECK(buffer.group().num_ranks <= RankSet::kMaxRanks, "num_ranks=", buffer.group().num_ranks,
           " exceeds ", RankSet::kMaxRanks, ", the limit of low-latency mode");
  const size_t control_bytes = exchange_.layout().num_bytes;
  half_bytes_ = ll_half_bytes(config.region_bytes, control_bytes);
  EP_CHECK(half_bytes_ > 0, "low_latency_bytes=", config.region_bytes,
           " leaves no room for rows: ", control_bytes, " bytes are control words");
  for (int half = 0; half < 2; ++half)
    halves_[half].window =
        config.exchange.region + static_cast<int64_t>(control_bytes) + half * half_bytes_;
}

/// Runs a step of a call; the peers learn of it if this rank cannot go on.
void LowLatency::failing(const std::function<void()>& step) {
  buffer_.check_usable();
  try {
    step();
  } catch (const TimeoutError& error) {
    buffer_.fail(error.what(), error.record);
    throw;
  } catch (const Error&) {  // refused
    throw;
  } catch (const std::exception& error) {  // no thread, no memory of the process
    buffer_.fail_alone(error.what());
    throw;
  }
}

/// Runs a step of a call in the order of the buffer's calls.
void LowLatency::run(const std::function<void()>& body) {
  buffer_.check_usable();
  buffer_.start(/*is_async=*/false, [&] { failing(body); })->rethrow();
}

/// Runs checks of arguments; tells the peers, who make the same call, why this rank does not.
void LowLatency::refusing(const std::function<void()>& check) {
  try {
    check();
  } catch (const ConfigError& error) {
    refuse_call(error.what());
    throw;
  }
}

LowLatency::Started LowLatency::finish(const std::shared_ptr<Call>& call, Receive receive) {
  Started started{call->number, halves_[call->half].window, nullptr};
  if (receive == Receive::kLater) return started;
  started.op = buffer_.start(receive == Receive::kAsync,
                             [this, call] { failing([&] { receive_call(*call); }); });
  if (receive == Receive::kNow) started.op->rethrow();
  return started;
}

LowLatency::Started LowLatency::dispatch(const LlDispatchArgs& args, Receive receive) {
  std::shared_ptr<Call> call;
  run([&] { call = send_dispatch(args); });
  return finish(call, receive);
}

LowLatency::Started LowLatency::combine(const LlCombineArgs& args, Receive receive) {
  std::shared_ptr<Call> call;
  run([&] { call = send_combine(args); });
  return finish(call, receive);
}

void LowLatency::receive(uint64_t number) {
  run([&] {
    for (const std::shared_ptr<Call>& call : calls_)
      if (call->number == number) return receive_call(*std::shared_ptr<Call>(call));
    throw ConfigError(concat("hook of low-latency call ", number,
                             ": its receive half is over, or its handle was dropped"));
  });
}

void LowLatency::barrier() {
  run([&] {
    const uint64_t number = open_call();
    LlPost mine = make_post(LlOp::kBarrier, LlSizes{});
    check_agreement(agree(number, nullptr, mine, nullptr), active_ranks());
  });
}

void LowLatency::refuse(const std::string& reason) {
  run([&] { refuse_call(reason); });
}

void LowLatency::refuse_call(const std::string& reason) { post_refusal(open_call(), 0, reason); }

// Send halves.

std::shared_ptr<LowLatency::Call> LowLatency::send_dispatch(const LlDispatchArgs& args) {
  const Group& group = buffer_.group();
  std::vector<int32_t> counts(group.num_ranks + group.num_experts);
  int index = 0;
  refusing([&] {
    validate(args);
    check_fits(args.sizes);
    count_rows(group, args.topk_idx, args.sizes.num_tokens, args.sizes.num_topk, counts.data(),
               nullptr);
    index = free_half();
  });
  const uint64_t number = open_call();
  Half& half = halves_[index];
  LlPost mine = make_post(LlOp::kDispatch, args.sizes);
  mine.reused = half.last;
  const std::vector<LlPost> posts = agree(number, &half, mine, counts.data() + group.num_ranks);
  check_agreement(posts, active_ranks());
  check_no_reader(posts);

  half.dispatch = make_dispatch(number, args, mine, posts);
  half.last = number + 1;
  half.is_received = half.is_combining = false;
  next_half_ = 1 - index;
  auto call = std::make_shared<Call>();
  call->number = number;
  call->half = index;
  call->peers = half.dispatch->peers;
  calls_.push_back(call);

  place_rows(buffer_.transfer(), *half.dispatch);
  send_rows(buffer_.transfer(), *half.dispatch);
  exchange_.send_done(number, half.dispatch->view);
  return call;
}

std::shared_ptr<LlDispatch> LowLatency::make_dispatch(uint64_t number, const LlDispatchArgs& args,
                                                      const LlPost& mine,
                                                      const std::vector<LlPost>& posts) const {
  const Group& group = buffer_.group();
  auto dispatch = std::make_shared<LlDispatch>();
  dispatch->number = number;
  dispatch->args = args;
  dispatch->view = mine.masked;
  dispatch->windows.resize(group.num_ranks);
  dispatch->next_row.assign(group.num_experts, 0);
  dispatch->recv_counts.assign(
      static_cast<size_t>(num_local_experts(group, group.rank)) * group.num_ranks, 0);
  for (int src = 0; src < group.num_ranks; ++src) {
    // A rank with another view has gone ahead without us.
    if (!exchange_.is_active(src) || posts[src].masked != mine.masked) continue;
    dispatch->peers.add(src);
    dispatch->windows[src] = posts[src].window;
    const int32_t* counts = exchange_.counts(number, src);
    for (int expert = 0; expert < group.num_experts; ++expert) {
      if (src < group.rank) dispatch->next_row[expert] += counts[expert];
      if (group.placement.rank_of[expert] == group.rank)
        dispatch->recv_counts[group.placement.local_of[expert] * group.num_ranks + src] =
            counts[expert];
    }
  }
  return dispatch;
}

std::shared_ptr<LowLatency::Call> LowLatency::send_combine(const LlCombineArgs& args) {
  auto call = std::make_shared<Call>();
  refusing([&] {
    call->half = half_of(args.dispatch);
    const Half& half = halves_[call->half];
    EP_CHECK(half.is_received, "handle (of low-latency dispatch ", args.dispatch,
             "): run the hook of its dispatch first");
    EP_CHECK(!half.is_combining, "handle (of low-latency dispatch ", args.dispatch,
             ") is being combined already");
    validate(args, half.dispatch->args.sizes);
    check_routing(args, half.dispatch->args.sizes);
  });
  call->number = open_call();
  call->op = LlOp::kCombine;
  Half& half = halves_[call->half];
  call->combine.number = call->number;
  call->combine.args = args;
  call->combine.windows.resize(buffer_.group().num_ranks);
  call->peers = active_ranks();
  call->posts.resize(buffer_.group().num_ranks);
  half.is_combining = true;
  calls_.push_back(call);

  stage_rows(buffer_.transfer(), *half.dispatch, call->combine);
  LlPost mine = make_post(LlOp::kCombine, half.dispatch->args.sizes);
  mine.fields[kLlFieldDispatch] = static_cast<int64_t>(args.dispatch);
  mine.fields[kLlFieldWire] = args.wire;
  mine.window = half.window;
  mine.masked = exchange_.masked();
  exchange_.send_post(call->number, 0, mine, nullptr);
  return call;
}

}  // namespace ep::cpu

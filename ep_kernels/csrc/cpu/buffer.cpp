// The calls of a buffer on the host: which protocol step comes after which. The steps themselves
// are in cpu/exchange.cpp, the transfers in cpu/ht_*.cpp.
//
//   fresh dispatch    notify:  post counts, wait for all posts, plan rows
//                     send:    offer memory, wait for offers, send rows, done, wait for all done
//   with capacity or  post counts and memory, wait for all posts, plan rows, send rows, done,
//   cached handle     wait for all done
//   combine           stage rows, post memory, wait for all posts, reduce rows, done,
//                     wait for all done

#include "cpu/buffer.h"

#include <algorithm>
#include <cstring>

#include "core/check.h"

namespace ep::cpu {
namespace {

void copy_text(char (&to)[kMaxText], const std::string& text) {
  const size_t length = std::min(text.size(), size_t{kMaxText - 1});
  std::memcpy(to, text.data(), length);
  to[length] = '\0';
}

}  // namespace

Offer recv_offer(const HtDispatchArgs& args) {
  return {0, args.recv_x, args.recv_scales, args.recv_topk_idx, args.recv_topk_weights};
}

Offer rows_offer(const HtCombineArgs& args) {
  return {0, args.pool_x, -1, -1, args.pool_topk_weights};
}

OfferSlot make_offer(const HtDispatchArgs& args, const std::string& error) {
  OfferSlot slot{recv_offer(args), {}};
  slot.offer.failed = !error.empty();
  copy_text(slot.text, error);
  return slot;
}

Buffer::Buffer(const Config& config) : config_(config), expert_local_(config.expert_rank.size()) {
  const Exchange::Config& exchange = config_.exchange;
  std::vector<int32_t> num_local(exchange.num_ranks, 0);
  for (size_t expert = 0; expert < config_.expert_rank.size(); ++expert) {
    const int32_t rank = config_.expert_rank[expert];
    EP_CHECK(rank >= 0 && rank < exchange.num_ranks, "expert_to_rank[", expert, "]=", rank,
             " is outside num_ranks=", exchange.num_ranks);
    expert_local_[expert] = num_local[rank]++;
  }
  group_ = {exchange.rank,
            exchange.num_ranks,
            exchange.num_experts,
            {config_.expert_rank.data(), expert_local_.data()}};
  exchange_ = std::make_unique<Exchange>(exchange);
  pool_ = std::make_shared<Pool>(exchange.pool_bytes);
  pool_base_ = exchange_->pool(exchange.rank);
}

Buffer::~Buffer() { destroy(); }

void Buffer::destroy() {
  if (is_destroyed_) return;
  is_destroyed_ = true;
  queue_.drain();
  pool_->memory = exchange_->detach();
}

void Buffer::check_usable() {
  EP_CHECK(!is_destroyed_, "this buffer was destroyed and cannot be used any more");
  std::lock_guard<std::mutex> lock(failure_mutex_);
  if (!failure_.empty())
    throw DeviceError("this buffer failed and cannot be used any more: " + failure_);
}

uint64_t Buffer::next_seq() {
  check_usable();
  return num_calls_++;
}

void Buffer::fail(const std::string& message, const TimeoutRecord& record) {
  {
    std::lock_guard<std::mutex> lock(failure_mutex_);
    failure_ = message;
  }
  exchange_->send_failed(record);
}

void Buffer::fail_alone(const std::string& reason) {
  TimeoutRecord record;
  record.rank = record.peer = group_.rank;
  record.phase = static_cast<int32_t>(Phase::kDone);
  fail(concat("rank ", group_.rank, " failed during a call: ", reason), record);
}

template <typename Body>
void Buffer::run_call(uint64_t seq, Body&& body) {
  check_usable();
  try {
    body();
  } catch (const TimeoutError& error) {
    fail(error.what(), error.record);
    throw;
  } catch (const ConfigError&) {  // of all ranks: nothing is sent
    exchange_->send_done(seq);
    throw;
  } catch (const NoMemoryError&) {
    exchange_->send_done(seq);
    throw;
  } catch (const std::exception& error) {  // "done" would mean that this rank's rows are there
    fail_alone(error.what());
    throw;
  }
}

std::shared_ptr<PendingOp> Buffer::start(bool is_async, std::function<void()> body) {
  auto op = std::make_shared<PendingOp>(std::move(body));
  if (!is_async) {
    queue_.run(op);
    return op;
  }
  try {
    queue_.submit(op);
  } catch (const std::exception& error) {  // no thread for it
    fail_alone(error.what());
    throw;
  }
  return op;
}

Post Buffer::make_post(Op op, const HtSizes& sizes) const {
  Post post{};
  fill_fields(op, sizes, post.fields);
  post.capacity = sizes.capacity;
  return post;
}

Post Buffer::make_refusal(const std::string& reason) const {
  Post post{};
  post.fields[kFieldOp] = static_cast<int64_t>(Op::kRefused);
  copy_text(post.text, reason);
  return post;
}

std::vector<Offer> Buffer::posted_offers(uint64_t seq) const {
  std::vector<Offer> offers;
  for (int src = 0; src < group_.num_ranks; ++src)
    offers.push_back(exchange_->post(seq, src).offer);
  return offers;
}

std::vector<int64_t> Buffer::posted_capacities(uint64_t seq) const {
  std::vector<int64_t> capacities;
  for (int src = 0; src < group_.num_ranks; ++src)
    capacities.push_back(exchange_->post(seq, src).capacity);
  return capacities;
}

void Buffer::move_rows(uint64_t seq, const HtDispatchArgs& args, const std::vector<Offer>& offers) {
  send_rows(transfer(), args, offers);
  fill_padding(transfer(), args);
  exchange_->send_done(seq);
  exchange_->wait_done(seq, args.wait_recv_cost_stats);
  add_recv_stats(group_, args);
}

uint64_t Buffer::notify(const HtDispatchArgs& args) {
  check_usable();
  std::vector<int32_t> counts(group_.num_ranks + group_.num_experts);
  try {
    validate(args);
    count_rows(group_, args.routing.topk_idx, args.sizes.num_tokens, args.sizes.num_topk,
               counts.data(), nullptr);
  } catch (const ConfigError& error) {
    refuse(error.what());
    throw;
  }
  const uint64_t seq = next_seq();
  const auto exchange_counts = [&] {
    clear_routing(group_, args.sizes, args.routing);
    exchange_->wait_slot(seq, args.wait_recv_cost_stats);
    exchange_->send_post(seq, group_.rank, make_post(Op::kDispatch, args.sizes), counts.data());
    exchange_->wait_posts(seq, args.wait_recv_cost_stats);
    plan_rows(group_, args.sizes, exchange_->counts(seq), posted_capacities(seq).data(),
              args.routing);
  };
  run_call(seq, [&] {
    try {
      exchange_counts();
    } catch (const ConfigError&) {
      queue_.drain();  // "done" must not overtake the calls before this one
      throw;
    }
  });
  return seq;
}

std::shared_ptr<PendingOp> Buffer::send(uint64_t seq, const HtDispatchArgs& args,
                                        const std::string& offer_error, bool is_async) {
  exchange_->send_offer(seq, group_.rank, make_offer(args, offer_error));
  return start(is_async, [this, seq, args] {
    run_call(seq,
             [&] { move_rows(seq, args, exchange_->wait_offers(seq, args.wait_recv_cost_stats)); });
  });
}

std::shared_ptr<PendingOp> Buffer::dispatch(const HtDispatchArgs& args, bool is_async,
                                            uint64_t* call_seq) {
  check_usable();
  const bool is_fresh = args.sizes.handle_seq < 0;
  std::vector<int32_t> counts;
  try {
    validate(args);
    if (is_fresh) {
      counts.resize(group_.num_ranks + group_.num_experts);
      count_rows(group_, args.routing.topk_idx, args.sizes.num_tokens, args.sizes.num_topk,
                 counts.data(), nullptr);
    }
  } catch (const ConfigError& error) {
    refuse(error.what());
    throw;
  }
  const uint64_t seq = *call_seq = next_seq();
  Post post = make_post(is_fresh ? Op::kDispatch : Op::kCachedDispatch, args.sizes);
  post.offer = recv_offer(args);
  return start(is_async, [this, seq, args, post, counts, is_fresh] {
    run_call(seq, [&] {
      if (is_fresh) clear_routing(group_, args.sizes, args.routing);
      exchange_->wait_slot(seq, args.wait_recv_cost_stats);
      exchange_->send_post(seq, group_.rank, post, counts.empty() ? nullptr : counts.data());
      exchange_->wait_posts(seq, args.wait_recv_cost_stats);
      if (!counts.empty())
        plan_rows(group_, args.sizes, exchange_->counts(seq), posted_capacities(seq).data(),
                  args.routing);
      move_rows(seq, args, posted_offers(seq));
    });
  });
}

std::shared_ptr<PendingOp> Buffer::combine(const HtCombineArgs& args, bool is_async) {
  check_usable();
  try {
    validate(args);
  } catch (const ConfigError& error) {
    refuse(error.what());
    throw;
  }
  const uint64_t seq = next_seq();
  Post post = make_post(Op::kCombine, args.sizes);
  post.offer = rows_offer(args);
  return start(is_async, [this, seq, args, post] {
    run_call(seq, [&] {
      exchange_->wait_slot(seq, args.wait_recv_cost_stats);
      stage_rows(transfer(), args);
      exchange_->send_post(seq, group_.rank, post, nullptr);
      exchange_->wait_posts(seq, args.wait_recv_cost_stats);
      reduce_rows(transfer(), args, posted_offers(seq));
      exchange_->send_done(seq);
      exchange_->wait_done(seq, args.wait_recv_cost_stats);
    });
  });
}

std::shared_ptr<PendingOp> Buffer::barrier() {
  const uint64_t seq = next_seq();
  return start(/*is_async=*/false, [this, seq] {
    run_call(seq, [&] {
      exchange_->wait_slot(seq);
      exchange_->send_post(seq, group_.rank, make_post(Op::kBarrier, HtSizes{}), nullptr);
      exchange_->wait_posts(seq);
      exchange_->send_done(seq);
      exchange_->wait_done(seq);
    });
  });
}

void Buffer::refuse(const std::string& reason) {
  const uint64_t seq = next_seq();
  queue_.drain();
  run_call(seq, [&] {
    exchange_->wait_slot(seq);
    exchange_->send_post(seq, group_.rank, make_refusal(reason), nullptr);
    exchange_->send_done(seq);
  });
}

}  // namespace ep::cpu

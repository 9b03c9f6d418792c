#include "bindings/lane_api.h"

#include <algorithm>
#include <string>

#include "bindings/handles.h"
#include "core/check.h"

using ep::guarded;
using ep::cpu::LanePost;

namespace {

int64_t num_counts(const ep::Group& group) { return int64_t{group.num_ranks} + group.num_experts; }

void fill_post(const EpBuffer* buffer, const ep::Post& content, LanePost* post) {
  *post = LanePost{};
  post->post = content;
  std::fill_n(post->counts(), num_counts(buffer->impl.group()), 0);
}

std::vector<ep::Offer> to_vector(const EpBuffer* buffer, const ep::Offer* offers) {
  return {offers, offers + buffer->impl.group().num_ranks};
}

}  // namespace

void ep_lane_abi_sizes(int32_t sizes[7]) {
  sizes[0] = sizeof(LanePost);
  sizes[1] = sizeof(ep::OfferSlot);
  sizes[2] = sizeof(ep::LaneTokensArgs);
  sizes[3] = sizeof(ep::LanePackArgs);
  sizes[4] = sizeof(ep::LanePlanArgs);
  sizes[5] = sizeof(ep::LaneSums);
  sizes[6] = sizeof(ep::LaneMergeArgs);
}

// Messages

int64_t ep_lane_post_bytes(const EpBuffer* buffer) {
  return static_cast<int64_t>(sizeof(LanePost)) + 4 * num_counts(buffer->impl.group());
}

int32_t ep_lane_dispatch_post(EpBuffer* buffer, const ep::HtDispatchArgs* args,
                              int64_t chunk_tokens, LanePost* post, EpError* error) {
  return guarded(error, [&] {
    validate(*args);
    const ep::HtSizes& sizes = args->sizes;
    const bool is_fresh = sizes.handle_seq < 0;
    const ep::Op op = is_fresh ? ep::Op::kDispatch : ep::Op::kCachedDispatch;
    fill_post(buffer, buffer->impl.make_post(op, sizes), post);
    post->post.offer = ep::cpu::recv_offer(*args);
    post->num_tokens = sizes.num_tokens;
    post->chunk_tokens = chunk_tokens;
    post->num_topk = sizes.num_topk;
    if (is_fresh)
      ep::count_rows(buffer->impl.group(), args->routing.topk_idx, sizes.num_tokens, sizes.num_topk,
                     post->counts(), nullptr);
  });
}

int32_t ep_lane_combine_post(EpBuffer* buffer, const ep::HtCombineArgs* args, LanePost* post,
                             EpError* error) {
  return guarded(error, [&] {
    validate(*args);
    fill_post(buffer, buffer->impl.make_post(ep::Op::kCombine, args->sizes), post);
    post->post.offer = ep::cpu::rows_offer(*args);
  });
}

int32_t ep_lane_barrier_post(EpBuffer* buffer, LanePost* post, EpError* error) {
  return guarded(error, [&] {
    fill_post(buffer, buffer->impl.make_post(ep::Op::kBarrier, ep::HtSizes{}), post);
  });
}

int32_t ep_lane_refusal(EpBuffer* buffer, const char* reason, LanePost* post, EpError* error) {
  return guarded(error, [&] { fill_post(buffer, buffer->impl.make_refusal(reason), post); });
}

int32_t ep_lane_offer(const ep::HtDispatchArgs* args, const char* no_memory, ep::OfferSlot* offer,
                      EpError* error) {
  return guarded(error, [&] { *offer = ep::cpu::make_offer(*args, no_memory); });
}

// Steps

int32_t ep_lane_begin(EpBuffer* buffer, uint64_t* seq, EpError* error) {
  return guarded(error, [&] { *seq = buffer->impl.next_seq(); });
}

int32_t ep_lane_check_usable(EpBuffer* buffer, EpError* error) {
  return guarded(error, [&] { buffer->impl.check_usable(); });
}

int32_t ep_lane_wait_slot(EpBuffer* buffer, uint64_t seq, int64_t* waited_us, EpError* error) {
  return guarded(error, [&] { buffer->impl.exchange().wait_slot(seq, waited_us); });
}

int32_t ep_lane_send_post(EpBuffer* buffer, uint64_t seq, int32_t src, const LanePost* post,
                          EpError* error) {
  return guarded(error,
                 [&] { buffer->impl.exchange().send_post(seq, src, post->post, post->counts()); });
}

int32_t ep_lane_wait_posts(EpBuffer* buffer, uint64_t seq, ep::Offer* offers, int64_t* waited_us,
                           EpError* error) {
  return guarded(error, [&] {
    buffer->impl.exchange().wait_posts(seq, waited_us);
    const std::vector<ep::Offer> posted = buffer->impl.posted_offers(seq);
    std::copy(posted.begin(), posted.end(), offers);
  });
}

int32_t ep_lane_send_offer(EpBuffer* buffer, uint64_t seq, int32_t src, const ep::OfferSlot* offer,
                           EpError* error) {
  return guarded(error, [&] { buffer->impl.exchange().send_offer(seq, src, *offer); });
}

int32_t ep_lane_wait_offers(EpBuffer* buffer, uint64_t seq, ep::Offer* offers, int64_t* waited_us,
                            EpError* error) {
  return guarded(error, [&] {
    const std::vector<ep::Offer> found = buffer->impl.exchange().wait_offers(seq, waited_us);
    std::copy(found.begin(), found.end(), offers);
  });
}

int32_t ep_lane_done(EpBuffer* buffer, uint64_t seq, EpError* error) {
  return guarded(error, [&] { buffer->impl.exchange().send_done(seq); });
}

int32_t ep_lane_wait_done(EpBuffer* buffer, uint64_t seq, int64_t* waited_us, EpError* error) {
  return guarded(error, [&] { buffer->impl.exchange().wait_done(seq, waited_us); });
}

int32_t ep_lane_waiting_for(EpBuffer* buffer, int32_t rank, EpError* error) {
  return guarded(error, [&] { buffer->impl.exchange().send_waiting_for(rank); });
}

int32_t ep_lane_fail(EpBuffer* buffer, int32_t peer, int32_t phase, const char* message,
                     EpError* error) {
  return guarded(error, [&] {
    ep::TimeoutRecord record;
    record.rank = buffer->impl.group().rank;
    record.phase = phase;
    record.peer = peer;
    buffer->impl.fail(message, record);
  });
}

// Planning

int32_t ep_lane_clear_routing(EpBuffer* buffer, const ep::HtDispatchArgs* args, EpError* error) {
  return guarded(error,
                 [&] { ep::clear_routing(buffer->impl.group(), args->sizes, args->routing); });
}

namespace {

ep::RankRange ranks_of_node(const EpBuffer* buffer) {
  const int num_local = buffer->impl.num_local_ranks();
  const int begin = buffer->impl.group().rank / num_local * num_local;
  return {begin, begin + num_local};
}

}  // namespace

int32_t ep_lane_plan(EpBuffer* buffer, uint64_t seq, const ep::HtDispatchArgs* args,
                     EpError* error) {
  return guarded(error, [&] {
    const ep::Group& group = buffer->impl.group();
    const ep::HtSizes& sizes = args->sizes;
    const ep::HtRouting& routing = args->routing;
    const ep::CountMatrix counts = buffer->impl.exchange().counts(seq);
    const std::vector<int64_t> capacities = buffer->impl.posted_capacities(seq);
    ep::plan_receive(group, sizes, counts, capacities[group.rank], routing);
    std::vector<int64_t> next = ep::first_rows(group, sizes, counts, group.rank);
    ep::plan_tokens(
        group, static_cast<ep::Layout>(sizes.layout),
        {routing.topk_idx, routing.rows, routing.routes, sizes.num_tokens, sizes.num_topk},
        ranks_of_node(buffer), capacities.data(), next.data());
  });
}

int32_t ep_lane_first_rows(EpBuffer* buffer, uint64_t seq, int32_t src, const ep::HtSizes* sizes,
                           int64_t* next, EpError* error) {
  return guarded(error, [&] {
    const std::vector<int64_t> rows =
        ep::first_rows(buffer->impl.group(), *sizes, buffer->impl.exchange().counts(seq), src);
    std::copy(rows.begin(), rows.end(), next);
  });
}

int32_t ep_lane_plan_tokens(EpBuffer* buffer, uint64_t seq, const ep::LanePlanArgs* args,
                            EpError* error) {
  return guarded(error, [&] {
    std::copy_n(args->choices, args->num_tokens * args->num_topk, args->topk_idx);
    ep::plan_tokens(buffer->impl.group(), static_cast<ep::Layout>(args->layout),
                    {args->topk_idx, args->rows, args->routes, args->num_tokens,
                     static_cast<int>(args->num_topk)},
                    ranks_of_node(buffer), buffer->impl.posted_capacities(seq).data(), args->next);
  });
}

int32_t ep_lane_tokens(EpBuffer* buffer, const ep::LaneTokensArgs* args, EpError* error) {
  return guarded(error, [&] {
    ep::cpu::lane_tokens(buffer->impl.group(), buffer->impl.num_local_ranks(), *args);
  });
}

// Transfers

int32_t ep_lane_pack(EpBuffer* buffer, const ep::LanePackArgs* args, EpError* error) {
  return guarded(error, [&] { ep::cpu::lane_pack(buffer->impl.transfer(), *args); });
}

int32_t ep_lane_send_rows(EpBuffer* buffer, const ep::HtDispatchArgs* args, const ep::Offer* offers,
                          EpError* error) {
  return guarded(error, [&] {
    ep::cpu::send_rows(buffer->impl.transfer(), *args, to_vector(buffer, offers));
  });
}

int32_t ep_lane_fill_padding(EpBuffer* buffer, const ep::HtDispatchArgs* args, EpError* error) {
  return guarded(error, [&] { ep::cpu::fill_padding(buffer->impl.transfer(), *args); });
}

int32_t ep_lane_stage_rows(EpBuffer* buffer, const ep::HtCombineArgs* args, EpError* error) {
  return guarded(error, [&] { ep::cpu::stage_rows(buffer->impl.transfer(), *args); });
}

int32_t ep_lane_reduce_rows(EpBuffer* buffer, const ep::HtCombineArgs* args,
                            const ep::Offer* offers, EpError* error) {
  return guarded(error, [&] {
    ep::cpu::reduce_rows(buffer->impl.transfer(), *args, to_vector(buffer, offers));
  });
}

int32_t ep_lane_merge(EpBuffer* buffer, const ep::LaneMergeArgs* args, EpError* error) {
  return guarded(error, [&] { ep::cpu::lane_merge(buffer->impl.transfer(), *args); });
}

#pragma once

#include "bindings/c_api.h"
#include "cpu/lane.h"

// The steps of a call over several nodes, one function each, and the messages between nodes:
// ep_kernels/hierarchical.py orders the steps and carries the messages (docs/multi-node.md).
// Functions return an EpStatus, as in c_api.h. `seq` is the number of the call; `offers` is
// [num_ranks]; `waited_us`, [num_ranks] or null, is where the call counts its waits.

/// Sizes of LanePost, OfferSlot, LaneTokensArgs, LanePackArgs, LanePlanArgs, LaneSums,
/// LaneMergeArgs: Python compares.
EP_API void ep_lane_abi_sizes(int32_t sizes[7]);

// Messages. A post is a LanePost with its counts, ep_lane_post_bytes() long; an offer is an
// OfferSlot. Posts of a dispatch throw ConfigError for bad arguments.

EP_API int64_t ep_lane_post_bytes(const EpBuffer* buffer);
EP_API int32_t ep_lane_dispatch_post(EpBuffer* buffer, const ep::HtDispatchArgs* args,
                                     int64_t chunk_tokens, ep::cpu::LanePost* post, EpError* error);
EP_API int32_t ep_lane_combine_post(EpBuffer* buffer, const ep::HtCombineArgs* args,
                                    ep::cpu::LanePost* post, EpError* error);
EP_API int32_t ep_lane_barrier_post(EpBuffer* buffer, ep::cpu::LanePost* post, EpError* error);
EP_API int32_t ep_lane_refusal(EpBuffer* buffer, const char* reason, ep::cpu::LanePost* post,
                               EpError* error);
EP_API int32_t ep_lane_offer(const ep::HtDispatchArgs* args, const char* no_memory,
                             ep::OfferSlot* offer, EpError* error);

// Steps.

EP_API int32_t ep_lane_begin(EpBuffer* buffer, uint64_t* seq, EpError* error);
EP_API int32_t ep_lane_check_usable(EpBuffer* buffer, EpError* error);
EP_API int32_t ep_lane_wait_slot(EpBuffer* buffer, uint64_t seq, int64_t* waited_us,
                                 EpError* error);
EP_API int32_t ep_lane_send_post(EpBuffer* buffer, uint64_t seq, int32_t src,
                                 const ep::cpu::LanePost* post, EpError* error);
/// Also writes the offers that came with the posts.
EP_API int32_t ep_lane_wait_posts(EpBuffer* buffer, uint64_t seq, ep::Offer* offers,
                                  int64_t* waited_us, EpError* error);
EP_API int32_t ep_lane_send_offer(EpBuffer* buffer, uint64_t seq, int32_t src,
                                  const ep::OfferSlot* offer, EpError* error);
EP_API int32_t ep_lane_wait_offers(EpBuffer* buffer, uint64_t seq, ep::Offer* offers,
                                   int64_t* waited_us, EpError* error);
EP_API int32_t ep_lane_done(EpBuffer* buffer, uint64_t seq, EpError* error);
EP_API int32_t ep_lane_wait_done(EpBuffer* buffer, uint64_t seq, int64_t* waited_us,
                                 EpError* error);
/// Says for which rank of another node this rank waits, -1 = none.
EP_API int32_t ep_lane_waiting_for(EpBuffer* buffer, int32_t rank, EpError* error);
/// Ends all use of the buffer: this rank gave up on `peer`.
EP_API int32_t ep_lane_fail(EpBuffer* buffer, int32_t peer, int32_t phase, const char* message,
                            EpError* error);

// Planning: of this rank as a receiver and of its tokens for its own node; of another source.

EP_API int32_t ep_lane_clear_routing(EpBuffer* buffer, const ep::HtDispatchArgs* args,
                                     EpError* error);
EP_API int32_t ep_lane_plan(EpBuffer* buffer, uint64_t seq, const ep::HtDispatchArgs* args,
                            EpError* error);
/// next: [max(num_ranks, num_experts)]
EP_API int32_t ep_lane_first_rows(EpBuffer* buffer, uint64_t seq, int32_t src,
                                  const ep::HtSizes* sizes, int64_t* next, EpError* error);
EP_API int32_t ep_lane_plan_tokens(EpBuffer* buffer, uint64_t seq, const ep::LanePlanArgs* args,
                                   EpError* error);
EP_API int32_t ep_lane_tokens(EpBuffer* buffer, const ep::LaneTokensArgs* args, EpError* error);

// Transfers, of a batch or of a part of it.

EP_API int32_t ep_lane_pack(EpBuffer* buffer, const ep::LanePackArgs* args, EpError* error);
EP_API int32_t ep_lane_send_rows(EpBuffer* buffer, const ep::HtDispatchArgs* args,
                                 const ep::Offer* offers, EpError* error);
EP_API int32_t ep_lane_fill_padding(EpBuffer* buffer, const ep::HtDispatchArgs* args,
                                    EpError* error);
EP_API int32_t ep_lane_stage_rows(EpBuffer* buffer, const ep::HtCombineArgs* args, EpError* error);
EP_API int32_t ep_lane_reduce_rows(EpBuffer* buffer, const ep::HtCombineArgs* args,
                                   const ep::Offer* offers, EpError* error);
EP_API int32_t ep_lane_merge(EpBuffer* buffer, const ep::LaneMergeArgs* args, EpError* error);

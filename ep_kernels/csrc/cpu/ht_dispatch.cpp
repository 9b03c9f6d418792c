// High-throughput dispatch on the host: the transfer, once every rank knows where its rows go.
//
//   all threads   copy each row to its final place in the pool of its destination   send_rows
//   all threads   zero the padding of this rank's own groups                        fill_padding
//
// Notify, offers and completion are in cpu/buffer.cpp.

#include <algorithm>

#include "core/math.h"
#include "core/recv_stats.h"
#include "core/types.h"
#include "cpu/copy.h"
#include "cpu/ht.h"

namespace ep::cpu {
namespace {

/// Base addresses of one destination's results.
struct Destination {
  uint8_t *x, *scales, *topk_weights;
  int64_t* topk_idx;
};

std::vector<Destination> destinations(const Transfer& transfer, const std::vector<Offer>& offers) {
  std::vector<Destination> result;
  for (int dst = 0; dst < transfer.group.num_ranks; ++dst) {
    if (!transfer.exchange.is_local(dst)) {
      result.push_back({});
      continue;
    }
    uint8_t* pool = transfer.exchange.pool(dst);
    const auto at = [&](int64_t offset) { return offset < 0 ? nullptr : pool + offset; };
    const Offer& offer = offers[dst];
    result.push_back({at(offer.x), at(offer.scales), at(offer.topk_weights),
                      reinterpret_cast<int64_t*>(at(offer.topk_idx))});
  }
  return result;
}

/// What travels beside a row in the rank-major layout: the choices that the destination serves,
/// as its local experts, and their weights; -1 and 0 for the others.
void send_choices(const Transfer& transfer, const HtDispatchArgs& args, const Destination& to,
                  int dst, int64_t token, int64_t row) {
  const int num_topk = args.sizes.num_topk, weight_bytes = args.sizes.weight_bytes;
  const int32_t* local_of = transfer.group.placement.local_of;
  const int64_t* choices = args.routing.topk_idx + token * num_topk;
  const int32_t* routes = args.routing.routes + token * num_topk;
  for (int k = 0; k < num_topk; ++k) {
    const bool is_served = route_rank(routes[k]) == dst;
    const int64_t element = row * num_topk + k;
    if (to.topk_idx) to.topk_idx[element] = is_served ? local_of[choices[k]] : -1;
    if (!to.topk_weights) continue;
    uint8_t* weight = to.topk_weights + element * weight_bytes;
    if (is_served) {
      std::memcpy(weight, args.topk_weights + (token * num_topk + k) * weight_bytes, weight_bytes);
    } else {
      std::memset(weight, 0, weight_bytes);
    }
  }
}

void send_token(const Transfer& transfer, const HtDispatchArgs& args,
                const std::vector<Destination>& to, int64_t token, Stores stores) {
  const HtSizes& sizes = args.sizes;
  const bool by_expert = static_cast<Layout>(sizes.layout) == Layout::kExpertMajor;
  const int32_t* routes = args.routing.routes + token * sizes.num_topk;
  for (int k = 0; k < sizes.num_topk; ++k) {
    if (!carries_row(routes[k])) continue;
    const int dst = route_rank(routes[k]);
    const int64_t row = args.routing.rows[token * sizes.num_topk + k];
    copy_row(to[dst].x + row * sizes.row_bytes, args.x + token * sizes.row_bytes, sizes.row_bytes,
             stores);
    if (sizes.scale_bytes > 0)
      std::memcpy(to[dst].scales + row * sizes.scale_bytes, args.scales + token * sizes.scale_bytes,
                  sizes.scale_bytes);
    if (!by_expert) {
      send_choices(transfer, args, to[dst], dst, token, row);
    } else if (sizes.weight_bytes > 0) {
      std::memcpy(to[dst].topk_weights + row * sizes.weight_bytes,
                  args.topk_weights + (token * sizes.num_topk + k) * sizes.weight_bytes,
                  sizes.weight_bytes);
    }
  }
}

/// Zeroes rows [begin, end) of this rank's own results.
void zero_rows(const Destination& own, const HtSizes& sizes, int64_t begin, int64_t end) {
  if (begin >= end) return;
  const int64_t num_rows = end - begin;
  const auto zero = [&](uint8_t* base, int64_t row_bytes) {
    if (base) std::memset(base + begin * row_bytes, 0, num_rows * row_bytes);
  };
  zero(own.x, sizes.row_bytes);
  zero(own.scales, sizes.scale_bytes);
  zero(own.topk_weights, sizes.weight_bytes);
}

/// Marks rows [begin, end) of a rank-major result as serving no choice.
void clear_choices(const Destination& own, const HtSizes& sizes, int64_t begin, int64_t end) {
  if (begin >= end) return;
  const int64_t first = begin * sizes.num_topk, count = (end - begin) * sizes.num_topk;
  if (own.topk_idx) std::fill_n(own.topk_idx + first, count, int64_t{-1});
  if (own.topk_weights)
    std::memset(own.topk_weights + first * sizes.weight_bytes, 0, count * sizes.weight_bytes);
}

}  // namespace

void send_rows(const Transfer& transfer, const HtDispatchArgs& args,
               const std::vector<Offer>& offers) {
  const std::vector<Destination> to = destinations(transfer, offers);
  const int num_threads = args.sizes.num_threads;
  const Stores stores =
      choose_stores(args.sizes.num_tokens * args.sizes.num_topk * args.sizes.row_bytes);
  transfer.threads.run(num_threads, [&](int thread) {
    const Range tokens = split_evenly(args.sizes.num_tokens, thread, num_threads);
    for (int64_t token = tokens.begin; token < tokens.end; ++token)
      send_token(transfer, args, to, token, stores);
    finish_stores();
  });
}

void fill_padding(const Transfer& transfer, const HtDispatchArgs& args) {
  uint8_t* pool = transfer.exchange.pool(transfer.group.rank);
  const auto at = [&](int64_t offset) { return offset < 0 ? nullptr : pool + offset; };
  const Destination own{at(args.recv_x), at(args.recv_scales), at(args.recv_topk_weights),
                        reinterpret_cast<int64_t*>(at(args.recv_topk_idx))};
  const HtSizes& sizes = args.sizes;
  const int64_t capacity = sizes.capacity;
  if (static_cast<Layout>(sizes.layout) == Layout::kRankMajor) {
    if (capacity >= 0) clear_choices(own, sizes, args.routing.recv_sizes[0], capacity);
    return;
  }
  const int64_t* offsets = args.routing.expert_offsets;
  for (int expert = 0; expert < transfer.group.num_experts; ++expert) {
    if (transfer.group.placement.rank_of[expert] != transfer.group.rank) continue;
    const int local = transfer.group.placement.local_of[expert];
    const int64_t end = capacity < 0 ? offsets[local + 1] : std::min(offsets[local + 1], capacity);
    zero_rows(own, sizes, offsets[local] + args.routing.num_recv_tokens_per_expert[local], end);
  }
}

void add_recv_stats(const Group& group, const HtDispatchArgs& args) {
  if (!args.cumulative_recv_stats) return;
  for (int local = 0; local < num_local_experts(group, group.rank); ++local)
    add_recv_tokens(args.cumulative_recv_stats, args.cumulative_stats_bytes, local,
                    args.routing.num_recv_tokens_per_expert[local]);
}

}  // namespace ep::cpu

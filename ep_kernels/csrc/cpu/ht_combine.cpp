// High-throughput combine on the host.
//
//   all threads   copy rows that peers will read into the pool, unless they are there   stage_rows
//   all threads   read each token's rows from their ranks and sum them in fixed order   reduce_rows
//
// Announcement and completion are in cpu/buffer.cpp.

#include <algorithm>

#include "core/math.h"
#include "core/types.h"
#include "cpu/copy.h"
#include "cpu/ht.h"
#include "cpu/reduce.h"

namespace ep::cpu {
namespace {

bool is_expert_major(const HtSizes& sizes) {
  return static_cast<Layout>(sizes.layout) == Layout::kExpertMajor;
}

/// Base addresses of the rows of one rank.
struct Source {
  const uint8_t *x, *topk_weights;
};

std::vector<Source> sources(const Transfer& transfer, const HtCombineArgs& args,
                            const std::vector<Offer>& offers) {
  std::vector<Source> result;
  for (int src = 0; src < transfer.group.num_ranks; ++src) {
    if (!transfer.exchange.is_local(src)) {
      result.push_back({});
      continue;
    }
    const uint8_t* pool = transfer.exchange.pool(src);
    result.push_back({pool + offers[src].x, pool + offers[src].topk_weights});
  }
  result[transfer.group.rank] = {args.x, args.topk_weights};  // own rows were not staged
  return result;
}

/// A row of a token: which rank holds it, and where.
struct RowRef {
  int rank;
  int64_t row;
};

/// The rows of a token in the order in which they are added: rank-major by ascending rank,
/// expert-major by ascending position in topk_idx.
///
/// Example: rank_of the choices {1, 0, 1}, rows {7, 3, 7}: rank-major {(0,3), (1,7)}.
void list_rows(const HtCombineArgs& args, int64_t token, std::vector<RowRef>& refs) {
  refs.clear();
  const int num_topk = args.sizes.num_topk;
  for (int64_t choice = token * num_topk; choice < (token + 1) * num_topk; ++choice)
    if (carries_row(args.routing.routes[choice]))
      refs.push_back({route_rank(args.routing.routes[choice]), args.routing.rows[choice]});
  if (!is_expert_major(args.sizes))
    std::sort(refs.begin(), refs.end(),
              [](const RowRef& a, const RowRef& b) { return a.rank < b.rank; });
}

void collect_weights(const HtCombineArgs& args, const std::vector<Source>& from, int64_t token) {
  const int num_topk = args.sizes.num_topk, weight_bytes = args.sizes.weight_bytes;
  for (int k = 0; k < num_topk; ++k) {
    const int64_t choice = token * num_topk + k, row = args.routing.rows[choice];
    uint8_t* out = args.out_topk_weights + choice * weight_bytes;
    if (row < 0) {
      std::memset(out, 0, weight_bytes);
      continue;
    }
    const int src = route_rank(args.routing.routes[choice]);
    const int64_t element = is_expert_major(args.sizes) ? row : row * num_topk + k;
    std::memcpy(out, from[src].topk_weights + element * weight_bytes, weight_bytes);
  }
}

void reduce_tokens(const HtCombineArgs& args, const std::vector<Source>& from, Range tokens) {
  const HtSizes& sizes = args.sizes;
  const RowType type = static_cast<RowType>(sizes.row_type);
  const ReduceFn reduce = select_reduce(type);
  std::vector<RowRef> refs;
  std::vector<const void*> rows;
  for (int64_t token = tokens.begin; token < tokens.end; ++token) {
    list_rows(args, token, refs);
    rows.clear();
    for (const RowRef& ref : refs) rows.push_back(from[ref.rank].x + ref.row * sizes.row_bytes);

    const Biases biases(args.bias, token * sizes.row_bytes);
    reduce({args.out + token * sizes.row_bytes, rows.data(), biases.rows,
            static_cast<int>(rows.size()), biases.count, sizes.row_bytes / element_bytes(type)});
    if (args.out_topk_weights) collect_weights(args, from, token);
  }
}

/// Copies rows [0, num_rows) except the ranges that only this rank reads.
void stage(const Transfer& transfer, const HtCombineArgs& args, const uint8_t* src, uint8_t* dst,
           int64_t row_bytes, int num_groups) {
  const int num_threads = args.sizes.num_threads;
  const bool is_aligned = row_bytes % 16 == 0;
  const Stores stores = is_aligned ? choose_stores(args.num_rows * row_bytes) : Stores::kCached;
  transfer.threads.run(num_threads, [&](int thread) {
    const Range part = split_evenly(args.num_rows, thread, num_threads);
    int64_t row = part.begin;
    const auto copy_until = [&](int64_t end) {
      if (end > row)
        copy_row(dst + row * row_bytes, src + row * row_bytes, (end - row) * row_bytes, stores);
    };
    for (int group = 0; group < num_groups; ++group) {
      const int64_t begin = args.routing.own_rows[2 * group];
      const int64_t end = args.routing.own_rows[2 * group + 1];
      if (end <= row || begin >= part.end) continue;
      copy_until(std::min(begin, part.end));
      row = std::max(row, end);
    }
    copy_until(part.end);
    finish_stores();
  });
}

}  // namespace

void stage_rows(const Transfer& transfer, const HtCombineArgs& args) {
  int num_groups = 1;
  if (is_expert_major(args.sizes))
    num_groups = num_local_experts(transfer.group, transfer.group.rank);
  uint8_t* pool = transfer.exchange.pool(transfer.group.rank);
  if (args.stage_x)
    stage(transfer, args, args.x, pool + args.pool_x, args.sizes.row_bytes, num_groups);
  if (args.stage_topk_weights) {
    const int64_t per_row = is_expert_major(args.sizes) ? 1 : args.sizes.num_topk;
    stage(transfer, args, args.topk_weights, pool + args.pool_topk_weights,
          per_row * args.sizes.weight_bytes, num_groups);
  }
}

void reduce_rows(const Transfer& transfer, const HtCombineArgs& args,
                 const std::vector<Offer>& offers) {
  const std::vector<Source> from = sources(transfer, args, offers);
  const int num_threads = args.sizes.num_threads;
  transfer.threads.run(num_threads, [&](int thread) {
    reduce_tokens(args, from, split_evenly(args.sizes.num_tokens, thread, num_threads));
  });
}

}  // namespace ep::cpu

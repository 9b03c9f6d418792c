// Work on the messages of a lane.
//
//   lane_tokens   which tokens go to a node, in which chunks, with which choices
//   lane_pack     a chunk of a dispatch from the rows of its tokens
//   lane_merge    result rows from the sums of all nodes
//
// Tokens of other sources are planned by plan_tokens(), written by send_rows() and summed by
// reduce_rows(), like the rank's own.

#include "cpu/lane.h"

#include <algorithm>
#include <cstring>

#include "core/math.h"
#include "core/routing.h"
#include "cpu/copy.h"
#include "cpu/reduce.h"

namespace ep::cpu {
namespace {

bool is_on_node(const Group& group, int num_local, int64_t expert, int node) {
  return expert >= 0 && group.placement.rank_of[expert] / num_local == node;
}

/// Where the sums of one token are, by ascending node, and its weights.
class TokenSums {
 public:
  explicit TokenSums(const LaneMergeArgs& args) : args_(args) {}

  void find(int64_t token) {
    rows_.clear();
    weights_.clear();
    for (int node = 0; node < args_.num_nodes; ++node) {
      if (node == args_.own_node) {
        rows_.push_back(args_.own_sums + (token - args_.first_token) * args_.row_bytes);
        continue;
      }
      const LaneSums& sums = args_.nodes[node];
      const int32_t* end = sums.tokens + sums.num_tokens;
      const int32_t* found = std::lower_bound(sums.tokens, end, token);
      if (found == end || *found != token) continue;
      const int64_t index = found - sums.tokens;
      rows_.push_back(sums.rows + index * args_.row_bytes);
      if (sums.topk_weights)
        weights_.push_back(sums.topk_weights + index * args_.num_topk * args_.weight_bytes);
    }
  }

  const std::vector<const void*>& rows() const { return rows_; }
  const std::vector<const uint8_t*>& weights() const { return weights_; }

 private:
  const LaneMergeArgs& args_;
  std::vector<const void*> rows_;
  std::vector<const uint8_t*> weights_;
};

void merge_token(const LaneMergeArgs& args, ReduceFn reduce, const TokenSums& sums, int64_t token) {
  const Biases biases(args.bias, token * args.row_bytes);
  const RowType type = static_cast<RowType>(args.row_type);
  reduce({args.out + token * args.row_bytes, sums.rows().data(), biases.rows,
          static_cast<int>(sums.rows().size()), biases.count,
          args.row_bytes / element_bytes(type)});
  // A choice is served by one node, the others have all bits 0.
  const int64_t num_bytes = args.num_topk * args.weight_bytes;
  for (const uint8_t* weights : sums.weights())
    for (int64_t i = 0; i < num_bytes; ++i)
      args.out_topk_weights[token * num_bytes + i] |= weights[i];
}

}  // namespace

void lane_tokens(const Group& group, int num_local, const LaneTokensArgs& args) {
  int64_t count = 0;
  for (int64_t token = 0; token < args.num_tokens; ++token) {
    if (token % args.chunk_tokens == 0) args.bounds[token / args.chunk_tokens] = count;
    int32_t* choices = args.choices + count * args.num_topk;
    bool goes = false;
    for (int64_t k = 0; k < args.num_topk; ++k) {
      const int64_t expert = args.topk_idx[token * args.num_topk + k];
      const bool is_there = is_on_node(group, num_local, expert, args.node);
      choices[k] = is_there ? static_cast<int32_t>(expert) : -1;
      goes |= is_there;
    }
    if (goes) args.tokens[count++] = static_cast<int32_t>(token);
  }
  args.bounds[ceil_div(args.num_tokens, args.chunk_tokens)] = count;
}

void lane_pack(const Transfer& transfer, const LanePackArgs& args) {
  uint8_t* rows = args.message;
  uint8_t* scales = rows + args.num_tokens * args.row_bytes;
  uint8_t* weights = scales + args.num_tokens * args.scale_bytes;
  const int64_t weights_bytes = args.num_topk * args.weight_bytes;
  const auto pack_token = [&](int64_t i) {
    const int64_t token = args.tokens[i];
    copy_row(rows + i * args.row_bytes, args.x + token * args.row_bytes, args.row_bytes,
             Stores::kCached);
    if (args.scale_bytes > 0)
      std::memcpy(scales + i * args.scale_bytes, args.scales + token * args.scale_bytes,
                  args.scale_bytes);
    if (weights_bytes > 0)
      std::memcpy(weights + i * weights_bytes, args.topk_weights + token * weights_bytes,
                  weights_bytes);
  };
  transfer.threads.run(args.num_threads, [&](int thread) {
    const Range part = split_evenly(args.num_tokens, thread, args.num_threads);
    for (int64_t i = part.begin; i < part.end; ++i) pack_token(i);
  });
}

void lane_merge(const Transfer& transfer, const LaneMergeArgs& args) {
  const ReduceFn reduce = select_reduce(static_cast<RowType>(args.row_type));
  transfer.threads.run(args.num_threads, [&](int thread) {
    const Range part = split_evenly(args.num_tokens, thread, args.num_threads);
    TokenSums sums(args);
    for (int64_t token = args.first_token + part.begin; token < args.first_token + part.end;
         ++token) {
      sums.find(token);
      merge_token(args, reduce, sums, token);
    }
  });
}

}  // namespace ep::cpu

#include "core/ht_plan.h"

#include <algorithm>

#include "core/check.h"
#include "core/math.h"

namespace ep {
namespace {

int num_local_experts(const Group& group) {
  const int32_t* rank_of = group.placement.rank_of;
  return static_cast<int>(std::count(rank_of, rank_of + group.num_experts, group.rank));
}

bool is_expert_major(const HtSizes& sizes) {
  return static_cast<Layout>(sizes.layout) == Layout::kExpertMajor;
}

void check_choice(const Group& group, const int64_t* choices, int64_t token, int k) {
  const int64_t expert = choices[k];
  EP_CHECK(expert >= -1 && expert < group.num_experts, "topk_idx[", token, ", ", k, "]=", expert,
           " is outside [-1, num_experts=", group.num_experts, ")");
  if (expert < 0) return;
  for (int i = 0; i < k; ++i)
    EP_CHECK(choices[i] != expert, "topk_idx[", token, "] chooses expert ", expert,
             " twice, at positions ", i, " and ", k);
}

/// Tokens of all ranks, and of the ranks before this one, for one column of the count matrix.
struct ColumnSum {
  int64_t before, total;
};

ColumnSum sum_column(const Group& group, const CountMatrix& counts_of, int column) {
  ColumnSum sum{0, 0};
  for (int src = 0; src < group.num_ranks; ++src) {
    if (src == group.rank) sum.before = sum.total;
    sum.total += counts_of[src][column];
  }
  return sum;
}

/// Next row for each column (destination rank, or expert) of this rank's own rows; also this
/// rank's side as a receiver: sizes, group starts, ranges of its own rows.
std::vector<int64_t> rank_major_bases(const Group& group, const CountMatrix& counts_of,
                                      const HtRouting& routing) {
  std::vector<int64_t> next(group.num_ranks);
  for (int dst = 0; dst < group.num_ranks; ++dst) {
    const ColumnSum sum = sum_column(group, counts_of, dst);
    next[dst] = sum.before;
    if (dst != group.rank) continue;
    routing.recv_sizes[0] = routing.recv_sizes[1] = sum.total;
    routing.own_rows[0] = sum.before;
    routing.own_rows[1] = sum.before + counts_of[group.rank][dst];
  }
  for (int expert = 0; expert < group.num_experts; ++expert)
    if (group.placement.rank_of[expert] == group.rank)
      routing.num_recv_tokens_per_expert[group.placement.local_of[expert]] =
          sum_column(group, counts_of, group.num_ranks + expert).total;
  return next;
}

std::vector<int64_t> expert_major_bases(const Group& group, const HtSizes& sizes,
                                        const CountMatrix& counts_of, const HtRouting& routing) {
  std::vector<int64_t> next(group.num_experts), group_end(group.num_ranks, 0);
  int64_t num_real_rows = 0;
  for (int expert = 0; expert < group.num_experts; ++expert) {
    const int dst = group.placement.rank_of[expert];
    const ColumnSum sum = sum_column(group, counts_of, group.num_ranks + expert);
    const int64_t begin = group_end[dst];
    next[expert] = begin + sum.before;
    group_end[dst] = begin + align_up(sum.total, int64_t{sizes.expert_alignment});
    if (dst != group.rank) continue;
    const int local = group.placement.local_of[expert];
    routing.num_recv_tokens_per_expert[local] = sum.total;
    routing.expert_offsets[local] = begin;
    routing.expert_offsets[local + 1] = group_end[dst];
    routing.own_rows[2 * local] = next[expert];
    routing.own_rows[2 * local + 1] =
        next[expert] + counts_of[group.rank][group.num_ranks + expert];
    num_real_rows += sum.total;
  }
  routing.recv_sizes[0] = group_end[group.rank];
  routing.recv_sizes[1] = num_real_rows;
  return next;
}

/// Rows that arrive for this rank but lie past its capacity.
int64_t count_overflow(const Group& group, const HtSizes& sizes, const HtRouting& routing,
                       int64_t capacity) {
  if (capacity < 0) return 0;
  if (!is_expert_major(sizes)) return std::max<int64_t>(0, routing.recv_sizes[1] - capacity);
  int64_t overflow = 0;
  for (int expert = 0; expert < group.num_experts; ++expert) {
    if (group.placement.rank_of[expert] != group.rank) continue;
    const int local = group.placement.local_of[expert];
    const int64_t count = routing.num_recv_tokens_per_expert[local];
    const int64_t kept = std::clamp<int64_t>(capacity - routing.expert_offsets[local], 0, count);
    overflow += count - kept;
  }
  return overflow;
}

}  // namespace

void count_rows(const Group& group, const int64_t* topk_idx, int64_t num_tokens, int num_topk,
                int32_t* counts, uint8_t* is_token_in_rank) {
  std::fill_n(counts, group.num_ranks + group.num_experts, 0);
  std::vector<int64_t> last_token(group.num_ranks, -1);
  for (int64_t token = 0; token < num_tokens; ++token) {
    const int64_t* choices = topk_idx + token * num_topk;
    for (int k = 0; k < num_topk; ++k) {
      check_choice(group, choices, token, k);
      if (choices[k] < 0) continue;
      const int dst = group.placement.rank_of[choices[k]];
      ++counts[group.num_ranks + choices[k]];
      if (last_token[dst] == token) continue;
      last_token[dst] = token;
      ++counts[dst];
      if (is_token_in_rank) is_token_in_rank[token * group.num_ranks + dst] = 1;
    }
  }
}

void clear_routing(const Group& group, const HtSizes& sizes, const HtRouting& routing) {
  const int num_local = num_local_experts(group);
  const int64_t num_choices = sizes.num_tokens * sizes.num_topk;
  std::fill_n(routing.rows, num_choices, kNoRoute);
  std::fill_n(routing.routes, num_choices, kNoRoute);
  std::fill_n(routing.num_recv_tokens_per_expert, num_local, 0);
  std::fill_n(routing.expert_offsets, num_local + 1, 0);
  std::fill_n(routing.own_rows, 2 * (is_expert_major(sizes) ? num_local : 1), 0);
  std::fill_n(routing.recv_sizes, 3, 0);
  std::fill_n(routing.rank_counts, group.num_ranks * group.num_ranks, 0);
}

void plan_rows(const Group& group, const HtSizes& sizes, const CountMatrix& counts_of,
               const int64_t* capacities, const HtRouting& routing) {
  const bool by_expert = is_expert_major(sizes);
  std::vector<int64_t> next = by_expert ? expert_major_bases(group, sizes, counts_of, routing)
                                        : rank_major_bases(group, counts_of, routing);
  const int64_t num_rows = routing.recv_sizes[0];
  EP_CHECK_AGREED(num_rows < (int64_t{1} << 31), "rank ", group.rank, " would receive ", num_rows,
                  " rows; 2^31 is the limit");
  routing.recv_sizes[2] = count_overflow(group, sizes, routing, capacities[group.rank]);
  for (int src = 0; src < group.num_ranks; ++src)
    std::copy_n(counts_of[src], group.num_ranks, routing.rank_counts + src * group.num_ranks);

  std::vector<int64_t> last_token(group.num_ranks, -1);
  for (int64_t token = 0; token < sizes.num_tokens; ++token) {
    const int64_t* choices = routing.topk_idx + token * sizes.num_topk;
    int32_t* rows = routing.rows + token * sizes.num_topk;
    int32_t* routes = routing.routes + token * sizes.num_topk;
    for (int k = 0; k < sizes.num_topk; ++k) {
      rows[k] = routes[k] = kNoRoute;
      if (choices[k] < 0) continue;
      const int dst = group.placement.rank_of[choices[k]];
      const bool is_shared = !by_expert && last_token[dst] == token;
      last_token[dst] = token;
      int64_t& next_row = next[by_expert ? choices[k] : dst];
      const int64_t row = is_shared ? next_row - 1 : next_row++;
      if (capacities[dst] >= 0 && row >= capacities[dst]) continue;
      rows[k] = static_cast<int32_t>(row);
      routes[k] = is_shared ? dst | kSharedRow : dst;
    }
  }
}

}  // namespace ep

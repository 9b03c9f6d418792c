#include "core/ht_plan.h"

#include <algorithm>

#include "core/check.h"
#include "core/math.h"

namespace ep {
namespace {

bool is_expert_major(const HtSizes& sizes) {
  return static_cast<Layout>(sizes.layout) == Layout::kExpertMajor;
}

void check_choice(int num_experts, const int64_t* choices, int64_t token, int k) {
  const int64_t expert = choices[k];
  EP_CHECK(expert >= -1 && expert < num_experts, "topk_idx[", token, ", ", k, "]=", expert,
           " is outside [-1, num_experts=", num_experts, ")");
  if (expert < 0) return;
  for (int i = 0; i < k; ++i)
    EP_CHECK(choices[i] != expert, "topk_idx[", token, "] chooses expert ", expert,
             " twice, at positions ", i, " and ", k);
}

/// Tokens of all ranks, and of the ranks before `src`, for one column of the count matrix.
struct ColumnSum {
  int64_t before, total;
};

ColumnSum sum_column(const CountMatrix& counts_of, int src, int column) {
  ColumnSum sum{0, 0};
  for (int rank = 0; rank < static_cast<int>(counts_of.size()); ++rank) {
    if (rank == src) sum.before = sum.total;
    sum.total += counts_of[rank][column];
  }
  return sum;
}

void receive_by_rank(const Group& group, const CountMatrix& counts_of, const HtRouting& routing) {
  const ColumnSum sum = sum_column(counts_of, group.rank, group.rank);
  routing.recv_sizes[0] = routing.recv_sizes[1] = sum.total;
  routing.own_rows[0] = sum.before;
  routing.own_rows[1] = sum.before + counts_of[group.rank][group.rank];
  for (int expert = 0; expert < group.num_experts; ++expert)
    if (group.placement.rank_of[expert] == group.rank)
      routing.num_recv_tokens_per_expert[group.placement.local_of[expert]] =
          sum_column(counts_of, group.rank, group.num_ranks + expert).total;
}

void receive_by_expert(const Group& group, const HtSizes& sizes, const CountMatrix& counts_of,
                       const HtRouting& routing) {
  int64_t begin = 0, num_real_rows = 0;
  for (int expert = 0; expert < group.num_experts; ++expert) {
    if (group.placement.rank_of[expert] != group.rank) continue;
    const int local = group.placement.local_of[expert], column = group.num_ranks + expert;
    const ColumnSum sum = sum_column(counts_of, group.rank, column);
    routing.num_recv_tokens_per_expert[local] = sum.total;
    routing.own_rows[2 * local] = begin + sum.before;
    routing.own_rows[2 * local + 1] = begin + sum.before + counts_of[group.rank][column];
    routing.expert_offsets[local] = begin;
    begin += align_up(sum.total, int64_t{sizes.expert_alignment});
    routing.expert_offsets[local + 1] = begin;
    num_real_rows += sum.total;
  }
  routing.recv_sizes[0] = begin;
  routing.recv_sizes[1] = num_real_rows;
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

/// Checks the rows of every rank: one that went on alone would wait for those that cannot.
void check_num_rows(const Group& group, const HtSizes& sizes, const CountMatrix& counts_of) {
  std::vector<int64_t> num_rows(group.num_ranks, 0);
  if (is_expert_major(sizes)) {
    for (int expert = 0; expert < group.num_experts; ++expert)
      num_rows[group.placement.rank_of[expert]] +=
          align_up(sum_column(counts_of, group.rank, group.num_ranks + expert).total,
                   int64_t{sizes.expert_alignment});
  } else {
    for (int rank = 0; rank < group.num_ranks; ++rank)
      num_rows[rank] = sum_column(counts_of, group.rank, rank).total;
  }
  for (int rank = 0; rank < group.num_ranks; ++rank)
    EP_CHECK_AGREED(num_rows[rank] < (int64_t{1} << 31), "rank ", rank, " would receive ",
                    num_rows[rank], " rows; 2^31 is the limit");
}

}  // namespace

int num_local_experts(const Group& group, int rank) {
  const int32_t* rank_of = group.placement.rank_of;
  return static_cast<int>(std::count(rank_of, rank_of + group.num_experts, rank));
}

void check_choices(int num_experts, const int64_t* topk_idx, int64_t num_tokens, int num_topk) {
  for (int64_t token = 0; token < num_tokens; ++token)
    for (int k = 0; k < num_topk; ++k)
      check_choice(num_experts, topk_idx + token * num_topk, token, k);
}

void count_rows(const Group& group, const int64_t* topk_idx, int64_t num_tokens, int num_topk,
                int32_t* counts, uint8_t* is_token_in_rank) {
  std::fill_n(counts, group.num_ranks + group.num_experts, 0);
  std::vector<int64_t> last_token(group.num_ranks, -1);
  for (int64_t token = 0; token < num_tokens; ++token) {
    const int64_t* choices = topk_idx + token * num_topk;
    for (int k = 0; k < num_topk; ++k) {
      check_choice(group.num_experts, choices, token, k);
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
  const int num_local = num_local_experts(group, group.rank);
  const int64_t num_choices = sizes.num_tokens * sizes.num_topk;
  std::fill_n(routing.rows, num_choices, kNoRoute);
  std::fill_n(routing.routes, num_choices, kNoRoute);
  std::fill_n(routing.num_recv_tokens_per_expert, num_local, 0);
  std::fill_n(routing.expert_offsets, num_local + 1, 0);
  std::fill_n(routing.own_rows, 2 * (is_expert_major(sizes) ? num_local : 1), 0);
  std::fill_n(routing.recv_sizes, 3, 0);
  std::fill_n(routing.rank_counts, group.num_ranks * group.num_ranks, 0);
}

void plan_receive(const Group& group, const HtSizes& sizes, const CountMatrix& counts_of,
                  int64_t capacity, const HtRouting& routing) {
  check_num_rows(group, sizes, counts_of);
  if (is_expert_major(sizes)) {
    receive_by_expert(group, sizes, counts_of, routing);
  } else {
    receive_by_rank(group, counts_of, routing);
  }
  routing.recv_sizes[2] = count_overflow(group, sizes, routing, capacity);
  for (int src = 0; src < group.num_ranks; ++src)
    std::copy_n(counts_of[src], group.num_ranks, routing.rank_counts + src * group.num_ranks);
}

std::vector<int64_t> first_rows(const Group& group, const HtSizes& sizes,
                                const CountMatrix& counts_of, int src) {
  if (!is_expert_major(sizes)) {
    std::vector<int64_t> next(group.num_ranks);
    for (int dst = 0; dst < group.num_ranks; ++dst)
      next[dst] = sum_column(counts_of, src, dst).before;
    return next;
  }
  std::vector<int64_t> next(group.num_experts), group_end(group.num_ranks, 0);
  for (int expert = 0; expert < group.num_experts; ++expert) {
    const ColumnSum sum = sum_column(counts_of, src, group.num_ranks + expert);
    int64_t& end = group_end[group.placement.rank_of[expert]];
    next[expert] = end + sum.before;
    end += align_up(sum.total, int64_t{sizes.expert_alignment});
  }
  return next;
}

void plan_tokens(const Group& group, Layout layout, const SourceTokens& tokens, RankRange served,
                 const int64_t* capacities, int64_t* next) {
  const bool by_expert = layout == Layout::kExpertMajor;
  std::vector<int64_t> last_token(group.num_ranks, -1);
  for (int64_t token = 0; token < tokens.num_tokens; ++token) {
    const int64_t* choices = tokens.topk_idx + token * tokens.num_topk;
    int32_t* rows = tokens.rows + token * tokens.num_topk;
    int32_t* routes = tokens.routes + token * tokens.num_topk;
    for (int k = 0; k < tokens.num_topk; ++k) {
      rows[k] = routes[k] = kNoRoute;
      if (choices[k] < 0) continue;
      const int dst = group.placement.rank_of[choices[k]];
      if (dst < served.begin || dst >= served.end) continue;
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

void plan_rows(const Group& group, const HtSizes& sizes, const CountMatrix& counts_of,
               const int64_t* capacities, const HtRouting& routing) {
  plan_receive(group, sizes, counts_of, capacities[group.rank], routing);
  std::vector<int64_t> next = first_rows(group, sizes, counts_of, group.rank);
  plan_tokens(group, static_cast<Layout>(sizes.layout),
              {routing.topk_idx, routing.rows, routing.routes, sizes.num_tokens, sizes.num_topk},
              {0, group.num_ranks}, capacities, next.data());
}

}  // namespace ep

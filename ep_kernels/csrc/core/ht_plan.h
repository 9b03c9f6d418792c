#pragma once

#include <cstdint>
#include <vector>

#include "core/ht_args.h"
#include "core/routing.h"
#include "core/types.h"

// Who sends how many rows where, and on which row each of them lands: prefix sums over the counts
// of all ranks, with no communication.

namespace ep {

struct Group {
  int rank, num_ranks, num_experts;
  Placement placement;
};

/// Number of experts of a rank.
int num_local_experts(const Group& group, int rank);

/// Throws ConfigError for an expert out of range or chosen twice by one token.
void check_choices(int num_experts, const int64_t* topk_idx, int64_t num_tokens, int num_topk);

/// Counts of one rank's batch: rows for each rank, then tokens for each expert.
/// Throws ConfigError for an expert out of range or chosen twice by one token.
///
/// `is_token_in_rank` ([num_tokens, num_ranks] bytes) may be null.
void count_rows(const Group& group, const int64_t* topk_idx, int64_t num_tokens, int num_topk,
                int32_t* counts, uint8_t* is_token_in_rank);

/// The counts of every rank: counts_of[s][d] for d < num_ranks are rows from rank s to rank d in
/// the rank-major layout, counts_of[s][num_ranks + e] tokens of rank s for expert e.
using CountMatrix = std::vector<const int32_t*>;

/// Makes `routing` that of a dispatch which moves nothing: what a handle holds if the call fails.
void clear_routing(const Group& group, const HtSizes& sizes, const HtRouting& routing);

/// Fills the routing of a fresh dispatch on this rank. `capacities[d]` is the capacity of rank d,
/// -1 = none; rows past it get -1.
///
/// Example, expert-major, alignment 4, one rank with two experts that got 3 and 2 rows: groups
/// start at rows 0 and 4, rows 3, 6 and 7 are padding, expert_offsets = {0, 4, 8}.
void plan_rows(const Group& group, const HtSizes& sizes, const CountMatrix& counts_of,
               const int64_t* capacities, const HtRouting& routing);

// The parts of plan_rows, for ranks that send for others too.

/// This rank's side as a receiver: counts, offsets, ranges of its own rows, overflow.
/// Throws DisagreementError, on all ranks, if any of them would receive too many rows.
void plan_receive(const Group& group, const HtSizes& sizes, const CountMatrix& counts_of,
                  int64_t capacity, const HtRouting& routing);

/// Row of the next token of rank `src` in each column: destination rank (rank-major) or expert.
std::vector<int64_t> first_rows(const Group& group, const HtSizes& sizes,
                                const CountMatrix& counts_of, int src);

/// Consecutive tokens of one source, and where the rows of their choices are written down.
struct SourceTokens {
  const int64_t* topk_idx;  ///< [num_tokens, num_topk]
  int32_t *rows, *routes;   ///< [num_tokens, num_topk]
  int64_t num_tokens;
  int num_topk;
};

/// Ranks [begin, end).
struct RankRange {
  int begin, end;
};

/// Takes rows from `next`, which first_rows() made and which is advanced, for the choices that live
/// on the `served` ranks; the others get -1. The tokens of a source may come in several calls, but
/// in order, and all that have choices on a served rank must come.
void plan_tokens(const Group& group, Layout layout, const SourceTokens& tokens, RankRange served,
                 const int64_t* capacities, int64_t* next);

}  // namespace ep

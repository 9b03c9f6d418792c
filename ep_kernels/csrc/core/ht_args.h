#pragma once

#include <cstdint>

namespace ep {

// Everything a high-throughput call reads and writes, the same for both backends. Fields are in
// the order: inputs, routing, outputs, sizes. T tokens, K = num_topk, N received rows,
// L local experts, G row groups (L in the expert-major layout, 1 in the rank-major one), R ranks.
// The Python mirror of these structs is ep_kernels/_native.py; ep_abi_sizes() compares the two.

/// Sizes of a call that dispatch and combine share.
struct HtSizes {
  int64_t num_tokens;        ///< T
  int64_t row_bytes;         ///< bytes of a row of x
  int64_t scale_bytes;       ///< bytes of the scales of a row, 0 = none
  int64_t capacity;          ///< rows the caller allows, -1 = as many as arrive
  int64_t handle_seq;        ///< number of the dispatch whose routing is used, -1 = a fresh one
  int32_t num_topk;          ///< K
  int32_t weight_bytes;      ///< bytes of one topk weight, 0 = none
  int32_t layout;            ///< Layout
  int32_t row_type;          ///< RowType
  int32_t expert_alignment;  ///< rows of an expert group are padded to a multiple of it
  int32_t num_threads;       ///< workers (CPU) or SMs (CUDA)
  int32_t scale_type;        ///< ScaleType
};

/// The routing of one dispatch: input of a cached dispatch and of combine, output of a fresh one.
struct HtRouting {
  const int64_t* topk_idx;  ///< [T, K] expert of each choice, -1 = none; a fresh dispatch only
  int32_t* rows;            ///< [T, K] row of each choice on its rank, -1 = none or dropped
  int32_t* routes;          ///< [T, K] where each choice is served, see core/routing.h
  int64_t* num_recv_tokens_per_expert;  ///< [L] rows without padding
  int64_t* expert_offsets;              ///< [L + 1] first row of each group; expert-major only
  int64_t* own_rows;     ///< [G, 2] half-open ranges of the rows that came from this rank itself
  int64_t* recv_sizes;   ///< [3] rows with padding, rows without, rows dropped for capacity
  int64_t* rank_counts;  ///< [R, R] tokens of rank s (row) that have a choice on rank d (column)
};

struct HtDispatchArgs {
  const uint8_t* x;             ///< [T, row_bytes]
  const uint8_t* scales;        ///< [T, scale_bytes]
  const uint8_t* topk_weights;  ///< [T, K, weight_bytes]
  HtRouting routing;
  int64_t recv_x, recv_scales, recv_topk_idx, recv_topk_weights;  ///< pool offsets, -1 = none
  int64_t recv_chain;  ///< pool offset of int32 [N] chain words (core/routing.h), -1 = none (CUDA)
  void* cumulative_recv_stats;     ///< [L] tokens received are added, or null
  int64_t* wait_recv_cost_stats;   ///< [R] microseconds waited are added, or null
  int64_t cumulative_stats_bytes;  ///< of one element: 4 or 8
  HtSizes sizes;
};

struct HtCombineArgs {
  const uint8_t* x;             ///< [N, row_bytes]
  const uint8_t* topk_weights;  ///< [N, K] (rank-major) or [N] (expert-major), or null
  const uint8_t* bias[2];       ///< each [T, row_bytes] or null
  HtRouting routing;
  int64_t pool_x, pool_topk_weights;    ///< pool offsets where peers read; staging if not x itself
  int32_t stage_x, stage_topk_weights;  ///< nonzero: copy x to pool_x first
  uint8_t* out;                         ///< [T, row_bytes]
  uint8_t* out_topk_weights;            ///< [T, K] or null
  int64_t* wait_recv_cost_stats;        ///< [R] microseconds waited are added, or null
  int64_t num_rows;                     ///< rows of x
  HtSizes sizes;
};

/// Preconditions common to both backends. Throw ConfigError.
void validate(const HtDispatchArgs& args);
void validate(const HtCombineArgs& args);

}  // namespace ep

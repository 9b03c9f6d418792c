#pragma once

#include <cstdint>

#include "core/types.h"

namespace ep {

// Everything a low-latency call reads and writes, the same for both backends; docs/low-latency.md
// has the symbols. Fields are in the order: inputs, routing, outputs, sizes. The Python mirror of
// these structs is ep_kernels/_native_ll.py; ep_ll_abi_sizes() compares the two.

/// What the rows of a dispatch are on their way and on arrival.
enum class LlFormat : int32_t {
  kBF16 = 0,
  kFP8 = 1,         ///< e4m3, an fp32 scale per 128 channels
  kFP8Rounded = 2,  ///< the same, scales are powers of two
  kFP8UE8M0 = 3,    ///< powers of two as exponent bytes, four to an int32
};

/// What the rows of a combine are on their way.
enum class LlWire : int32_t { kBF16 = 0, kFP8 = 1 };

constexpr int kScaleGroup = 128;  ///< channels that share a scale

struct LlSizes {
  int64_t num_tokens;               ///< T
  int64_t num_max_tokens_per_rank;  ///< M
  int64_t hidden;                   ///< H
  int32_t num_topk;                 ///< K
  int32_t format;                   ///< LlFormat
  int32_t num_threads;              ///< workers (CPU) or SMs (CUDA)
  int32_t unused;
};

struct LlDispatchArgs {
  const uint16_t* x;               ///< [T, H] bf16
  const int64_t* topk_idx;         ///< [T, K] expert of each choice, -1 = none
  int32_t* experts;                ///< [T, K] out: copy of topk_idx for the handle
  int32_t* rows;                   ///< [T, K] out: row in the expert's block, -1 = not sent
  int32_t* recv_count;             ///< [L] out: rows of each local expert
  int32_t* recv_rank_counts;       ///< [L, R] out: rows of each local expert from each rank
  uint8_t* missing;                ///< [R] out: nonzero = nothing valid came from this rank
  void* cumulative_recv_stats;     ///< [L] rows received are added, or null
  int64_t* wait_recv_cost_stats;   ///< [R] microseconds waited are added, or null
  int64_t cumulative_stats_bytes;  ///< of one element: 4 or 8
  LlSizes sizes;
};

struct LlCombineArgs {
  const uint16_t* x;              ///< [L, R * M, H] bf16
  const int64_t* topk_idx;        ///< [T, K], must be the one dispatched
  const float* topk_weights;      ///< [T, K]
  const int32_t* experts;         ///< [T, K] of the handle
  const int32_t* rows;            ///< [T, K] of the handle
  uint16_t* out;                  ///< [T, H] bf16
  uint8_t* missing;               ///< [R] out: nonzero = the experts of this rank added nothing
  int64_t* wait_recv_cost_stats;  ///< [R] microseconds waited are added, or null
  uint64_t dispatch;              ///< number of the dispatch
  int32_t wire;                   ///< LlWire
  int32_t is_zero_copy;           ///< nonzero: x is the window's part for combine
};

/// Preconditions common to both backends. Throw ConfigError.
void validate(const LlDispatchArgs& args);
void validate(const LlCombineArgs& args, const LlSizes& sizes);

/// That topk_idx is the one dispatched, in host memory. Throws ConfigError.
void check_routing(const LlCombineArgs& args, const LlSizes& sizes);

}  // namespace ep

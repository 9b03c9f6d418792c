#pragma once

#include "core/math.h"
#include "cuda/ll_rows.cuh"
#include "cuda/ll_wire.cuh"

// Where rows for far ranks, and their results, lie in this rank's memory:
//
//   LlFar::rows, a half    [E, M] rows of 2 H bytes. Of expert e, the first n are this rank's rows
//   for
//                          it in the order of tokens: dispatch packs rows there, then their scales
//                          [n, scales] behind M rows; combine finds the results of the same rows
//                          there
//   a half of the region   scales of rows from far ranks land behind the transposed ones, row by
//   row

namespace ep::cuda {

__device__ __forceinline__ uint8_t* ll_far_expert(const LlGroup& g, const LlSizes& sizes, int half,
                                                  int64_t expert) {
  return g.far.rows + half * g.far.half_bytes +
         expert * sizes.num_max_tokens_per_rank * sizes.hidden * 2;
}

/// Bytes of a row of dispatch, and of its scales.
__device__ __forceinline__ int64_t ll_row_bytes(const LlSizes& sizes) {
  return sizes.hidden * (sizes.format == 0 ? 2 : 1);
}
__device__ __forceinline__ int64_t ll_scales_of_row(const LlSizes& sizes) {
  return ll_scale_bytes(static_cast<LlFormat>(sizes.format), sizes.hidden);
}

/// Where dispatch packs this rank's row number `row` for an expert. Scales of the next channels
/// follow one another.
__device__ __forceinline__ LlTarget ll_far_target(const LlGroup& g, const LlSizes& sizes, int half,
                                                  int64_t expert, int64_t row) {
  uint8_t* base = ll_far_expert(g, sizes, half, expert);
  const int64_t row_bytes = ll_row_bytes(sizes);
  return {base + row * row_bytes,
          base + sizes.num_max_tokens_per_rank * row_bytes + row * ll_scales_of_row(sizes)};
}

__device__ __forceinline__ bool ll_is_far_target(const LlGroup& g, const LlTarget& target) {
  if (!ll_has_far(g)) return false;
  return target.row >= g.far.rows && target.row < g.far.rows + 2 * g.far.half_bytes;
}

/// Where the result of that row comes.
__device__ __forceinline__ const uint8_t* ll_far_result(const LlGroup& g, const LlSizes& sizes,
                                                        int half, int64_t expert, int64_t row) {
  return ll_far_expert(g, sizes, half, expert) + row * sizes.hidden * 2;
}

/// Offset in a half, of a rank with `num_local` experts, where scales from far ranks land.
__device__ __forceinline__ size_t ll_landing_offset(const LlHalfLayout& half, const LlSizes& sizes,
                                                    int num_local, int64_t local, int64_t row) {
  const int64_t num_bytes = ll_scales_of_row(sizes), of_expert = half.rows_per_expert * num_bytes;
  return half.scales + align_up(static_cast<size_t>(num_local * of_expert), size_t{16}) +
         static_cast<size_t>(local * of_expert + row * num_bytes);
}

}  // namespace ep::cuda

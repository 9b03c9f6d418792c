#pragma once

#include <cstdint>

#include "core/types.h"

namespace ep::cpu {

/// Adds rows in the order given, starting from +0, then the biases, and rounds once to the element
/// type (nearest, ties to even; every NaN becomes the canonical quiet NaN). Accumulates in fp32,
/// fp64 rows in fp64. With weights a row is multiplied by its weight first, and the product is
/// rounded before it is added. All variants give the same bits.
struct ReduceArgs {
  void* out;                  ///< [hidden]
  const void* const* rows;    ///< [num_rows] -> [hidden]
  const void* const* biases;  ///< [num_biases] -> [hidden]
  int num_rows, num_biases;
  int64_t hidden;                  ///< elements
  const float* weights = nullptr;  ///< [num_rows], or null: every row counts once
};

/// The biases of one token, whose rows begin `offset` bytes into those that are given.
struct Biases {
  Biases(const uint8_t* const (&given)[2], int64_t offset) {
    for (const uint8_t* bias : given)
      if (bias) rows[count++] = bias + offset;
  }

  const void* rows[2] = {};
  int count = 0;
};

using ReduceFn = void (*)(const ReduceArgs&);

/// The fastest variant that this processor runs. Throws ConfigError for FP8 rows.
ReduceFn select_reduce(RowType type);

/// Which variant select_reduce() takes: "avx512", "avx2" or "scalar". The environment variable
/// EP_KERNELS_SIMD lowers it.
const char* simd_name();

namespace scalar {
ReduceFn reduce_fn(RowType type);
}
namespace avx2 {
ReduceFn reduce_fn(RowType type);
}
namespace avx512 {
ReduceFn reduce_fn(RowType type);
}

}  // namespace ep::cpu

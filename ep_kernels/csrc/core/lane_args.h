#pragma once

#include <cstdint>

// Arguments of the steps that make and read what crosses the network, for both backends
// (docs/multi-node.md). K = num_topk. The Python mirror is ep_kernels/_native_lane.py.

namespace ep {

/// Tokens of a batch that have a choice on `node`, and where chunks begin among them.
///
/// Example: tokens {0, 3, 4, 9} go to the node, chunks of 4 tokens: bounds {0, 2, 3, 4}.
struct LaneTokensArgs {
  const int64_t* topk_idx;  ///< [num_tokens, num_topk]
  int32_t* tokens;          ///< out, [num_tokens]
  int32_t* choices;         ///< out, [num_tokens, num_topk]: of these tokens, -1 = not on the node
  int64_t* bounds;          ///< out, [number of chunks + 1]
  int64_t num_tokens, chunk_tokens, num_topk;
  int32_t node;
};

/// A chunk of a dispatch: rows, scales, weights.
struct LanePackArgs {
  const uint8_t *x, *scales, *topk_weights;
  const int32_t* tokens;  ///< [num_tokens] tokens of the batch
  uint8_t* message;       ///< out
  int64_t num_tokens, row_bytes, scale_bytes, weight_bytes, num_topk;
  int32_t num_threads;
};

/// The choices of a source on another node, to be planned.
struct LanePlanArgs {
  const int32_t* choices;  ///< [num_tokens, num_topk]
  int64_t* topk_idx;       ///< out, the same as int64
  int32_t *rows, *routes;  ///< out
  int64_t* next;           ///< rows of the source, see first_rows()
  int64_t num_tokens, num_topk;
  int32_t layout;
};

/// Sums of one node for some tokens of a chunk.
struct LaneSums {
  const int32_t* tokens;        ///< [num_tokens] tokens of the batch, ascending
  const uint8_t* rows;          ///< [num_tokens, row_bytes]
  const uint8_t* topk_weights;  ///< [num_tokens, num_topk] or null; all bits 0 where not served
  int64_t num_tokens;
};

/// Tokens [first_token, first_token + num_tokens) of a combine: adds the sums of all nodes.
struct LaneMergeArgs {
  const LaneSums* nodes;      ///< [num_nodes], in host memory; the own node's entry is not read
  const uint8_t* own_sums;    ///< [num_tokens, row_bytes]
  const uint8_t* bias[2];     ///< each [T, row_bytes] or null
  uint8_t* out;               ///< [T, row_bytes]
  uint8_t* out_topk_weights;  ///< [T, num_topk] or null; has the own node's weights
  int64_t first_token, num_tokens, row_bytes, weight_bytes, num_topk;
  int32_t own_node, num_nodes, row_type, num_threads;
};

}  // namespace ep

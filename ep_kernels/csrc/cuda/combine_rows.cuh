#pragma once

#include <cstdint>

#include "core/ht_args.h"
#include "core/math.h"
#include "core/routing.h"
#include "core/types.h"
#include "cuda/device/elements.cuh"
#include "cuda/device/warp.cuh"

// The rows of a token of a combine, read from their ranks and added; for one node and for several.
// `From` tells where the rows and the weights of a rank begin: x_of(rank), weights_of(rank).

namespace ep::cuda {

constexpr int kRowsAtOnce = 8;
constexpr int kVectorsPerItem = 256;

EP_HOST_DEVICE bool is_expert_major(const HtCombineArgs& args) {
  return static_cast<Layout>(args.sizes.layout) == Layout::kExpertMajor;
}

/// A choice of a token: where it was served, and on which row.
struct Choice {
  int32_t route, row;
};

__device__ inline Choice load_choice(const HtCombineArgs& args, int64_t token, int k) {
  if (k >= args.sizes.num_topk) return {kNoRoute, -1};
  const int64_t choice = token * args.sizes.num_topk + k;
  return {__ldg(args.routing.routes + choice), __ldg(args.routing.rows + choice)};
}

/// A part of a token's row: item `item` of this launch.
struct Item {
  int64_t token;
  int first, end;  // vectors

  __device__ Item(const HtCombineArgs& args, int items_per_row, int64_t item) {
    const int num_vectors = static_cast<int>(args.sizes.row_bytes / sizeof(uint4));
    const int part = static_cast<int>(item % items_per_row);
    token = item / items_per_row;
    first = static_cast<int>(int64_t{num_vectors} * part / items_per_row);
    end = static_cast<int>(int64_t{num_vectors} * (part + 1) / items_per_row);
  }
};

/// Fills list[] with the addresses of the token's rows, in the order of addition: expert-major as
/// in topk_idx, rank-major by rank. All lanes, each with its choice among the first 32; returns how
/// many.
template <typename From>
__device__ int list_rows(const HtCombineArgs& args, const From& from, int64_t token, Choice own,
                         const uint4** list) {
  const int num_topk = args.sizes.num_topk, lane = threadIdx.x % kWarpSize;
  const int32_t* routes = args.routing.routes + token * num_topk;
  const bool by_expert = is_expert_major(args);
  int count = 0;
  for (int first = 0; first < num_topk; first += kWarpSize) {
    if (first > 0) own = load_choice(args, token, first + lane);
    const int32_t route = own.route;
    const unsigned listed = __ballot_sync(kAllLanes, carries_row(route));
    int position = count + __popc(listed & ((1u << lane) - 1));
    if (!by_expert && carries_row(route)) {
      position = 0;  // rows of lower ranks come first
      for (int other = 0; other < num_topk; ++other) {
        const int32_t other_route = __ldg(routes + other);
        position += carries_row(other_route) && other_route < route;
      }
    }
    if (carries_row(route))
      list[position] = reinterpret_cast<const uint4*>(from.x_of(route) +
                                                      int64_t{own.row} * args.sizes.row_bytes);
    count += __popc(listed);
  }
  __syncwarp();
  return count;
}

/// Adds vectors `i` of up to kRowsAtOnce rows, whose addresses are in shared memory; all loads are
/// under way before the first addition.
template <typename Element>
__device__ __forceinline__ void add_rows(typename Element::Acc (&sum)[Element::kPerVector],
                                         const uint4* const* rows, int count, int i) {
  uint4 parts[kRowsAtOnce];
#pragma unroll
  for (int row = 0; row < kRowsAtOnce; ++row)
    if (row < count) parts[row] = load_once(rows[row] + i);
#pragma unroll
  for (int row = 0; row < kRowsAtOnce; ++row)
    if (row < count) Element::add(sum, parts[row]);
}

/// Adds the biases at vector `i` behind byte `begin` of the result.
template <typename Element>
__device__ __forceinline__ void add_biases(const HtCombineArgs& args, int64_t begin, int i,
                                           typename Element::Acc (&sum)[Element::kPerVector]) {
#pragma unroll
  for (int bias = 0; bias < 2; ++bias)
    if (args.bias[bias])
      Element::add(sum, load_once(reinterpret_cast<const uint4*>(args.bias[bias] + begin) + i));
}

/// Writes the sums of an item. A lane has the vectors of kRowsAtOnce rows under way at a time.
template <typename Element>
__device__ void reduce_item(const HtCombineArgs& args, const Item& item, const uint4* const* list,
                            int count) {
  const int64_t begin = item.token * args.sizes.row_bytes;
#pragma unroll 1
  for (int i = item.first + static_cast<int>(threadIdx.x) % kWarpSize; i < item.end;
       i += kWarpSize) {
    typename Element::Acc sum[Element::kPerVector] = {};
    for (int first = 0; first < count; first += kRowsAtOnce)
      add_rows<Element>(sum, list + first, count - first, i);
    add_biases<Element>(args, begin, i, sum);
    store_once(reinterpret_cast<uint4*>(args.out + begin) + i, Element::store(sum));
  }
}

template <typename From>
__device__ void collect_weights(const HtCombineArgs& args, const From& from, int64_t token) {
  const int num_topk = args.sizes.num_topk, weight_bytes = args.sizes.weight_bytes;
  const int lane = threadIdx.x % kWarpSize;
  for (int k = lane; k < num_topk; k += kWarpSize) {
    const int64_t choice = token * num_topk + k, row = args.routing.rows[choice];
    uint64_t value = 0;
    if (row >= 0) {
      const uint8_t* weights = from.weights_of(route_rank(args.routing.routes[choice]));
      const int64_t element = is_expert_major(args) ? row : row * num_topk + k;
      value = weight_bytes == 4 ? reinterpret_cast<const uint32_t*>(weights)[element]
                                : reinterpret_cast<const uint64_t*>(weights)[element];
    }
    if (weight_bytes == 4)
      reinterpret_cast<uint32_t*>(args.out_topk_weights)[choice] = static_cast<uint32_t>(value);
    else
      reinterpret_cast<uint64_t*>(args.out_topk_weights)[choice] = value;
  }
}

}  // namespace ep::cuda

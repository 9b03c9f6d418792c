// High-throughput combine on the GPU.
//
//   reduce   each warp   list the rows of a token in the order of addition      list_rows
//                        read them from their ranks, add, add biases, round     reduce_token
//                        weights of the choices                                 collect_weights

#include <algorithm>

#include "core/math.h"
#include "core/types.h"
#include "cuda/check_cuda.h"
#include "cuda/device/dependent_launch.cuh"
#include "cuda/device/elements.cuh"
#include "cuda/device/work.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/protocol.cuh"

namespace ep::cuda {
namespace {

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kNumThreads = 1024;
constexpr int kNumWarps = kNumThreads / kWarpSize;
constexpr int kRowsAtOnce = 8;
constexpr int kVectorsPerItem = 256;

__device__ bool is_expert_major(const HtCombineArgs& args) {
  return static_cast<Layout>(args.sizes.layout) == Layout::kExpertMajor;
}

/// Base addresses of every rank's rows, in shared memory.
struct Sources {
  const uint8_t* x[kMaxRanks];
  const uint8_t* topk_weights[kMaxRanks];

  /// All threads.
  __device__ void fill(const DeviceGroup& group, const HtCombineArgs& args) {
    for (int rank = threadIdx.x; rank < group.num_ranks; rank += blockDim.x) {
      const Offer offer = group.state->offers[rank];
      const bool is_own = rank == group.rank;
      x[rank] = is_own ? args.x : group.pool(rank) + offer.x;
      topk_weights[rank] = is_own ? args.topk_weights : group.pool(rank) + offer.topk_weights;
    }
    __syncthreads();
  }
};

/// A choice of a token: where it was served, and on which row.
struct Choice {
  int32_t route, row;
};

__device__ Choice load_choice(const HtCombineArgs& args, int64_t token, int k) {
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
__device__ int list_rows(const HtCombineArgs& args, const Sources& from, int64_t token, Choice own,
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
      list[position] =
          reinterpret_cast<const uint4*>(from.x[route] + int64_t{own.row} * args.sizes.row_bytes);
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

/// Adds the biases to the sum of vector `i` of a token and writes it.
template <typename Element>
__device__ __forceinline__ void finish_sum(const HtCombineArgs& args, int64_t token, int i,
                                           typename Element::Acc (&sum)[Element::kPerVector]) {
  const int64_t begin = token * args.sizes.row_bytes;
#pragma unroll
  for (int bias = 0; bias < 2; ++bias)
    if (args.bias[bias])
      Element::add(sum, load_once(reinterpret_cast<const uint4*>(args.bias[bias] + begin) + i));
  store_once(reinterpret_cast<uint4*>(args.out + begin) + i, Element::store(sum));
}

/// Loads under way at once are kVectors vectors of kRowsAtOnce / kVectors rows: the fewer rows a
/// token can have, the more vectors of each, since bytes under way hide the latency of a link. A
/// token has more rows only if kVectors is 1.
template <typename Element, int kVectors>
__device__ void reduce_item(const HtCombineArgs& args, const Item& item, const uint4* const* list,
                            int count) {
  constexpr int kRows = kRowsAtOnce / kVectors;
#pragma unroll 1
  for (int i = item.first + static_cast<int>(threadIdx.x) % kWarpSize; i < item.end;
       i += kVectors * kWarpSize) {
    typename Element::Acc sum[Element::kPerVector] = {};
    if constexpr (kVectors == 1) {
      for (int first = 0; first < count; first += kRows)
        add_rows<Element>(sum, list + first, count - first, i);
      finish_sum<Element>(args, item.token, i, sum);
    } else {
      uint4 parts[kVectors][kRows];
#pragma unroll
      for (int v = 0; v < kVectors; ++v)
#pragma unroll
        for (int row = 0; row < kRows; ++row)
          if (row < count && i + v * kWarpSize < item.end)
            parts[v][row] = load_once(list[row] + i + v * kWarpSize);
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        if (i + v * kWarpSize >= item.end) return;
#pragma unroll
        for (auto& value : sum) value = 0;
#pragma unroll
        for (int row = 0; row < kRows; ++row)
          if (row < count) Element::add(sum, parts[v][row]);
        finish_sum<Element>(args, item.token, i + v * kWarpSize, sum);
      }
    }
  }
}

__device__ void collect_weights(const HtCombineArgs& args, const Sources& from, int64_t token) {
  const int num_topk = args.sizes.num_topk, weight_bytes = args.sizes.weight_bytes;
  const int lane = threadIdx.x % kWarpSize;
  for (int k = lane; k < num_topk; k += kWarpSize) {
    const int64_t choice = token * num_topk + k, row = args.routing.rows[choice];
    uint64_t value = 0;
    if (row >= 0) {
      const uint8_t* weights = from.topk_weights[route_rank(args.routing.routes[choice])];
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

template <typename Element, int kVectors>
__device__ void reduce_tokens(const DeviceGroup& group, const HtCombineArgs& args) {
  extern __shared__ const uint4* shared_lists[];
  __shared__ Sources from;
  from.fill(group, args);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const uint4** list = shared_lists + warp * args.sizes.num_topk;
  const auto num_vectors = static_cast<int>(args.sizes.row_bytes / sizeof(uint4));
  const int items_per_row = ceil_div(num_vectors, kVectorsPerItem);
  const int64_t num_items = args.sizes.num_tokens * items_per_row;
  const WorkQueue queue{&group.state->next_item};
  int64_t i = queue.first();
  uint32_t asked = queue.ask();
  Choice next = i < num_items ? load_choice(args, i / items_per_row, lane) : Choice{kNoRoute, -1};
  for (int64_t after; i < num_items; i = after) {
    const Item item(args, items_per_row, i);
    const int count = list_rows(args, from, item.token, next, list);
    after = queue.answer(asked);
    if (after < num_items) {
      asked = queue.ask();
      next = load_choice(args, after / items_per_row, lane);
    }
    reduce_item<Element, kVectors>(args, item, list, count);
    if (args.out_topk_weights && item.first == 0) collect_weights(args, from, item.token);
    __syncwarp();
  }
}

template <typename Element, int kVectors>
__global__ void __launch_bounds__(kNumThreads, 1)
    reduce_kernel(const __grid_constant__ DeviceGroup group,
                  const __grid_constant__ HtCombineArgs args, CallRecord* record) {
  wait_for_kernel_before();
  if (is_running(group)) {
    if (blockIdx.x == 0 && threadIdx.x == 0) stamp(record, kStampMoving);
    reduce_tokens<Element, kVectors>(group, args);
  }
  if (is_last_block(group)) finish(group, record);
}

template <typename Element, int kVectors>
void launch(const DeviceGroup& group, const HtCombineArgs& args, CallRecord* record,
            cudaStream_t stream) {
  constexpr int kMaxShared = 160 << 10;
  const auto kernel = reduce_kernel<Element, kVectors>;
  const int list_bytes = static_cast<int>(sizeof(uint4*)) * std::max(1, args.sizes.num_topk);
  const int num_warps = std::clamp(kMaxShared / list_bytes, 1, kNumWarps);
  const int shared_bytes = num_warps * list_bytes;
  EP_CHECK_CUDA(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  const int num_blocks = args.sizes.num_tokens > 0 ? args.sizes.num_threads : 1;
  launch_early(kernel, {num_blocks, num_warps * kWarpSize, shared_bytes}, stream, group, args,
               record);
}

/// Takes the variant for the most rows that a token can have.
template <typename Element>
void launch(const DeviceGroup& group, const HtCombineArgs& args, CallRecord* record,
            cudaStream_t stream) {
  const bool by_expert = static_cast<Layout>(args.sizes.layout) == Layout::kExpertMajor;
  const int max_rows = std::min(args.sizes.num_topk, by_expert ? INT32_MAX : group.num_ranks);
  if (max_rows <= kRowsAtOnce / 4) return launch<Element, 4>(group, args, record, stream);
  if (max_rows <= kRowsAtOnce / 2) return launch<Element, 2>(group, args, record, stream);
  return launch<Element, 1>(group, args, record, stream);
}

}  // namespace

void launch_reduce(const DeviceGroup& group, const HtCombineArgs& args, CallRecord* record,
                   cudaStream_t stream) {
  switch (static_cast<RowType>(args.sizes.row_type)) {
    case RowType::kBF16:
      return launch<BF16>(group, args, record, stream);
    case RowType::kFP16:
      return launch<FP16>(group, args, record, stream);
    case RowType::kFP32:
      return launch<FP32>(group, args, record, stream);
    case RowType::kFP64:
      return launch<FP64>(group, args, record, stream);
    case RowType::kFP8:
      break;
  }
  throw ConfigError("x: FP8 rows cannot be combined");
}

}  // namespace ep::cuda

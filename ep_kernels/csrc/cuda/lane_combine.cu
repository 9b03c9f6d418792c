// Combine over several nodes on the GPU.
//
//   reduce   each warp   list a token's rows on this node in the order of addition   list_rows
//                        add them and round                                          reduce_item
//                        weights of the choices that the node serves collect_weights
//   merge    each warp   list the sums of a token by ascending node                  list_sums
//                        add them, add biases, round                                 reduce_item
//                        weights of the nodes that served its choices                merge_weights
//
// What is shared with one node is in cuda/combine_rows.cuh.

#include <algorithm>

#include "core/check.h"
#include "cuda/check_cuda.h"
#include "cuda/combine_rows.cuh"
#include "cuda/lane.h"
#include "cuda/launch.h"

namespace ep::cuda {
namespace {

constexpr int kNumThreads = 512;
constexpr int kNumWarps = kNumThreads / kWarpSize;
constexpr int kMaxListBytes = 96 << 10;

__device__ int64_t first_item() {
  return int64_t{blockIdx.x} * (blockDim.x / kWarpSize) + threadIdx.x / kWarpSize;
}

__device__ int64_t item_stride() { return int64_t{gridDim.x} * (blockDim.x / kWarpSize); }

__device__ int items_per_row(int64_t row_bytes) {
  return static_cast<int>(
      ceil_div(row_bytes / static_cast<int64_t>(sizeof(uint4)), int64_t{kVectorsPerItem}));
}

template <typename Element>
__global__ void __launch_bounds__(kNumThreads)
    reduce_kernel(const __grid_constant__ HtCombineArgs args,
                  const __grid_constant__ Sources from) {
  extern __shared__ const uint4* shared_lists[];
  const uint4** list = shared_lists + threadIdx.x / kWarpSize * args.sizes.num_topk;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int per_row = items_per_row(args.sizes.row_bytes);
  for (int64_t i = first_item(); i < args.sizes.num_tokens * per_row; i += item_stride()) {
    const Item item(args, per_row, i);
    const Choice own = load_choice(args, item.token, lane);
    const int count = list_rows(args, from, item.token, own, list);
    reduce_item<Element>(args, item, list, count);
    if (args.out_topk_weights && item.first == 0) collect_weights(args, from, item.token);
    __syncwarp();  // the list is read
  }
}

/// Sums of a token, by ascending node.
struct SumList {
  const uint4* rows[kMaxNodes];
  const uint8_t* weights[kMaxNodes];  // null where there are none
};

/// Index of `token` among the tokens of a node's sums, -1 if it is not there.
__device__ int64_t find_token(const LaneSums& sums, int64_t token) {
  int64_t begin = 0, end = sums.num_tokens;
  while (begin < end) {
    const int64_t middle = (begin + end) / 2;
    if (sums.tokens[middle] < token)
      begin = middle + 1;
    else
      end = middle;
  }
  return begin < sums.num_tokens && sums.tokens[begin] == token ? begin : -1;
}

/// All lanes, one per node; returns how many.
__device__ int list_sums(const LaneMergeArgs& args, const NodeSums& sums, int64_t token,
                         SumList& list) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  int count = 0;
  for (int first = 0; first < args.num_nodes; first += kWarpSize) {
    const int node = first + lane;
    const uint8_t *row = nullptr, *weights = nullptr;
    if (node == args.own_node) {
      row = args.own_sums + (token - args.first_token) * args.row_bytes;
    } else if (node < args.num_nodes) {
      const LaneSums& of = sums.of[node];
      const int64_t index = find_token(of, token);
      if (index >= 0) row = of.rows + index * args.row_bytes;
      if (index >= 0 && of.topk_weights)
        weights = of.topk_weights + index * args.num_topk * args.weight_bytes;
    }
    const unsigned listed = __ballot_sync(kAllLanes, row != nullptr);
    const int position = count + __popc(listed & ((1u << lane) - 1));
    if (row) {
      list.rows[position] = reinterpret_cast<const uint4*>(row);
      list.weights[position] = weights;
    }
    count += __popc(listed);
  }
  __syncwarp();
  return count;
}

/// A choice is served by one node, the others have all bits 0. All lanes.
__device__ void merge_weights(const LaneMergeArgs& args, const SumList& list, int count,
                              int64_t token) {
  const int64_t num_words = args.num_topk * args.weight_bytes / 4;
  auto* out = reinterpret_cast<uint32_t*>(args.out_topk_weights) + token * num_words;
  for (int64_t i = threadIdx.x % kWarpSize; i < num_words; i += kWarpSize) {
    uint32_t word = out[i];
    for (int j = 0; j < count; ++j)
      if (list.weights[j]) word |= reinterpret_cast<const uint32_t*>(list.weights[j])[i];
    out[i] = word;
  }
}

/// What reduce_item() needs of a combine.
__device__ HtCombineArgs as_combine(const LaneMergeArgs& args) {
  HtCombineArgs combine{};
  combine.bias[0] = args.bias[0];
  combine.bias[1] = args.bias[1];
  combine.out = args.out;
  combine.sizes.row_bytes = args.row_bytes;
  return combine;
}

template <typename Element>
__global__ void __launch_bounds__(kNumThreads)
    merge_kernel(const __grid_constant__ LaneMergeArgs args,
                 const __grid_constant__ NodeSums sums) {
  __shared__ SumList lists[kNumWarps];
  SumList& list = lists[threadIdx.x / kWarpSize];
  const HtCombineArgs combine = as_combine(args);
  const int per_row = items_per_row(args.row_bytes);
  for (int64_t i = first_item(); i < args.num_tokens * per_row; i += item_stride()) {
    Item item(combine, per_row, i);
    item.token += args.first_token;
    const int count = list_sums(args, sums, item.token, list);
    reduce_item<Element>(combine, item, list.rows, count);
    if (args.out_topk_weights && item.first == 0) merge_weights(args, list, count, item.token);
    __syncwarp();  // the list is read
  }
}

template <typename Element>
void launch(const HtCombineArgs& args, const Sources& from, cudaStream_t stream) {
  const auto kernel = reduce_kernel<Element>;
  const int list_bytes = static_cast<int>(sizeof(uint4*)) * std::max(1, args.sizes.num_topk);
  const int num_warps = std::clamp(kMaxListBytes / list_bytes, 1, kNumWarps);
  const int shared_bytes = num_warps * list_bytes;
  EP_CHECK_CUDA(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  kernel<<<args.sizes.num_threads, num_warps * kWarpSize, shared_bytes, stream>>>(args, from);
  EP_CHECK_CUDA(cudaGetLastError());
}

template <typename Element>
void launch(const LaneMergeArgs& args, const NodeSums& sums, cudaStream_t stream) {
  merge_kernel<Element><<<args.num_threads, kNumThreads, 0, stream>>>(args, sums);
  EP_CHECK_CUDA(cudaGetLastError());
}

/// launch() for the type of the rows.
template <typename Args, typename Inputs>
void launch_for(int32_t row_type, const Args& args, const Inputs& inputs, cudaStream_t stream) {
  switch (static_cast<RowType>(row_type)) {
    case RowType::kBF16:
      return launch<BF16>(args, inputs, stream);
    case RowType::kFP16:
      return launch<FP16>(args, inputs, stream);
    case RowType::kFP32:
      return launch<FP32>(args, inputs, stream);
    case RowType::kFP64:
      return launch<FP64>(args, inputs, stream);
    case RowType::kFP8:
      break;
  }
  throw ConfigError("x: FP8 rows cannot be combined");
}

}  // namespace

void launch_lane_reduce(const HtCombineArgs& args, const Sources& from, cudaStream_t stream) {
  if (args.sizes.num_tokens > 0) launch_for(args.sizes.row_type, args, from, stream);
}

void launch_lane_merge(const LaneMergeArgs& args, const NodeSums& sums, cudaStream_t stream) {
  if (args.num_tokens > 0) launch_for(args.row_type, args, sums, stream);
}

}  // namespace ep::cuda

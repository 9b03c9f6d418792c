// High-throughput combine on the GPU.
//
//   reduce   each warp   list the rows of a token in the order of addition      list_rows
//                        read them from their ranks, add, add biases, round     reduce_item
//                        weights of the choices                                 collect_weights
//
// These are in cuda/combine_rows.cuh. Tokens of few rows, the usual case, take another way to the
// same sums, through shared memory (cuda/combine_staged.cuh).

#include <algorithm>

#include "core/math.h"
#include "core/types.h"
#include "cuda/check_cuda.h"
#include "cuda/combine_rows.cuh"
#include "cuda/combine_staged.cuh"
#include "cuda/device/dependent_launch.cuh"
#include "cuda/device/elements.cuh"
#include "cuda/device/work.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/protocol.cuh"

namespace ep::cuda {
namespace {

constexpr int kNumThreads = 1024;
constexpr int kNumWarps = kNumThreads / kWarpSize;

/// Base addresses of every rank's rows, in shared memory.
struct Sources {
  const uint8_t* x[kMaxRanks];
  const uint8_t* topk_weights[kMaxRanks];

  __device__ const uint8_t* x_of(int rank) const { return x[rank]; }
  __device__ const uint8_t* weights_of(int rank) const { return topk_weights[rank]; }

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

template <typename Element>
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
    reduce_item<Element>(args, item, list, count);
    if (args.out_topk_weights && item.first == 0) collect_weights(args, from, item.token);
    __syncwarp();
  }
}

template <typename Element>
__global__ void __launch_bounds__(kNumThreads, 1)
    reduce_kernel(const __grid_constant__ DeviceGroup group,
                  const __grid_constant__ HtCombineArgs args, CallRecord* record) {
  wait_for_kernel_before();
  if (is_running(group)) {
    if (blockIdx.x == 0 && threadIdx.x == 0) stamp(group, kStampMoving);
    reduce_tokens<Element>(group, args);
  }
  if (is_last_block(group)) finish(group, record);
}

template <typename Element, int kRows>
__global__ void __launch_bounds__(kStagedWarps* kWarpSize, 1)
    staged_reduce_kernel(const __grid_constant__ DeviceGroup group,
                         const __grid_constant__ HtCombineArgs args, CallRecord* record) {
  wait_for_kernel_before();
  if (is_running(group)) {
    if (blockIdx.x == 0 && threadIdx.x == 0) stamp(group, kStampMoving);
    __shared__ Sources from;
    from.fill(group, args);
    reduce_staged<Element, kRows>(args, from, WorkQueue{&group.state->next_item});
  }
  if (is_last_block(group)) finish(group, record);
}

/// One block per SM, each of at most `max_warps` warps with `warp_bytes` of shared memory: as many
/// as have room in `max_bytes`.
LaunchShape shape_of_warps(const HtCombineArgs& args, int max_warps, int warp_bytes,
                           int max_bytes) {
  const int num_warps = std::clamp(max_bytes / warp_bytes, 1, max_warps);
  const int num_blocks = args.sizes.num_tokens > 0 ? args.sizes.num_threads : 1;
  return {num_blocks, num_warps * kWarpSize, num_warps * warp_bytes};
}

template <typename... Parameters>
void launch(void (*kernel)(Parameters...), const LaunchShape& shape, const DeviceGroup& group,
            const HtCombineArgs& args, CallRecord* record, cudaStream_t stream) {
  EP_CHECK_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     shape.shared_bytes));
  launch_early(kernel, shape, stream, group, args, record);
}

template <typename Element, int kRows>
void launch_staged(const DeviceGroup& group, const HtCombineArgs& args, CallRecord* record,
                   cudaStream_t stream) {
  const int max_bytes = max_shared_bytes() - static_cast<int>(sizeof(Sources)) - 1024;
  const LaunchShape shape = shape_of_warps(args, kStagedWarps, kStagedWarpBytes, max_bytes);
  launch(staged_reduce_kernel<Element, kRows>, shape, group, args, record, stream);
}

/// Takes the way for the most rows that a token can have.
template <typename Element>
void launch(const DeviceGroup& group, const HtCombineArgs& args, CallRecord* record,
            cudaStream_t stream) {
  const int num_topk = args.sizes.num_topk;
  const int max_rows = is_expert_major(args) ? num_topk : std::min(num_topk, group.num_ranks);
  if (num_topk <= kWarpSize && max_rows <= kMaxStagedRows) {
    if (max_rows <= 2) return launch_staged<Element, 2>(group, args, record, stream);
    if (max_rows <= 4) return launch_staged<Element, 4>(group, args, record, stream);
    return launch_staged<Element, 8>(group, args, record, stream);
  }
  constexpr int kMaxListBytes = 160 << 10;
  const int list_bytes = static_cast<int>(sizeof(uint4*)) * std::max(1, num_topk);
  const LaunchShape shape = shape_of_warps(args, kNumWarps, list_bytes, kMaxListBytes);
  launch(reduce_kernel<Element>, shape, group, args, record, stream);
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

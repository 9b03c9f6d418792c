// High-throughput dispatch on the GPU: the transfer, once every rank knows where its rows go.
//
//   send   each warp   a piece of a token's row -> shared memory            load
//                      shared memory -> every destination of the token      store
//                      scales, choices, weights beside the first piece      send_side_data
//   pad    each block  zero the padding of this rank's own groups           pad_kernel

#include <algorithm>

#include "core/math.h"
#include "core/types.h"
#include "cuda/check_cuda.h"
#include "cuda/device/bulk_copy.cuh"
#include "cuda/device/elements.cuh"
#include "cuda/kernels.h"
#include "cuda/protocol.cuh"

namespace ep::cuda {
namespace {

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kNumStages = 2;
constexpr int kMaxWarps = 16;
constexpr int kMaxPieceBytes = 16 << 10;
constexpr int kSharedBytes = 208 << 10;  // leaves room for the barriers
constexpr int kPadThreads = 256;

/// How rows are cut into pieces that fit a stage of shared memory.
struct Pieces {
  int num_per_row;
  int num_bytes;  // of a full piece
};

/// One destination of a token, held by the lane of its choice.
struct Destination {
  bool is_sent;
  int rank;
  int32_t row;
};

__device__ Destination destination(const DeviceGroup& group, const HtDispatchArgs& args,
                                   int64_t token, int k) {
  const int num_topk = args.sizes.num_topk;
  Destination to{false, -1, -1};
  if (k >= num_topk) return to;
  const int64_t* choices = args.routing.topk_idx + token * num_topk;
  to.row = args.routing.rows[token * num_topk + k];
  if (to.row < 0) return to;
  to.rank = group.placement.rank_of[choices[k]];
  to.is_sent = static_cast<Layout>(args.sizes.layout) == Layout::kExpertMajor ||
               is_first_choice_on_rank(group.placement, choices, k);
  return to;
}

__device__ uint8_t* at(const DeviceGroup& group, int rank, int64_t offset) {
  return group.pool(rank) + offset;
}

__device__ void copy_scales(uint8_t* dst, const uint8_t* src, int64_t num_bytes, int lane) {
  for (int64_t i = lane * 4; i < num_bytes; i += kWarpSize * 4)
    *reinterpret_cast<uint32_t*>(dst + i) = *reinterpret_cast<const uint32_t*>(src + i);
}

__device__ void copy_weight(uint8_t* dst, const uint8_t* src, int weight_bytes) {
  if (weight_bytes == 4)
    *reinterpret_cast<uint32_t*>(dst) = *reinterpret_cast<const uint32_t*>(src);
  else
    *reinterpret_cast<uint64_t*>(dst) = *reinterpret_cast<const uint64_t*>(src);
}

/// Rank-major: the choices that `rank` serves, and their weights, beside row `row`. All lanes.
__device__ void send_choices(const DeviceGroup& group, const HtDispatchArgs& args, int64_t token,
                             int rank, int32_t row, int lane) {
  const Offer& offer = group.state->offers[rank];
  const int num_topk = args.sizes.num_topk, weight_bytes = args.sizes.weight_bytes;
  for (int k = lane; k < num_topk; k += kWarpSize) {
    const int64_t choice = token * num_topk + k, element = int64_t{row} * num_topk + k;
    const int64_t expert = args.routing.topk_idx[choice];
    const bool is_served = rank_of_choice(group.placement, expert) == rank;
    if (offer.topk_idx >= 0)
      reinterpret_cast<int64_t*>(at(group, rank, offer.topk_idx))[element] =
          is_served ? group.placement.local_of[expert] : -1;
    if (offer.topk_weights < 0) continue;
    const uint64_t zero = 0;
    const uint8_t* weight = is_served ? args.topk_weights + choice * weight_bytes
                                      : reinterpret_cast<const uint8_t*>(&zero);
    copy_weight(at(group, rank, offer.topk_weights) + element * weight_bytes, weight, weight_bytes);
  }
}

/// What travels beside the rows of a token. All lanes; `to` is each lane's destination.
__device__ void send_side_data(const DeviceGroup& group, const HtDispatchArgs& args, int64_t token,
                               int k, const Destination& to, int lane) {
  const HtSizes& sizes = args.sizes;
  const bool by_expert = static_cast<Layout>(sizes.layout) == Layout::kExpertMajor;
  if (by_expert && to.is_sent && sizes.weight_bytes > 0)
    copy_weight(at(group, to.rank, group.state->offers[to.rank].topk_weights) +
                    int64_t{to.row} * sizes.weight_bytes,
                args.topk_weights + (token * sizes.num_topk + k) * sizes.weight_bytes,
                sizes.weight_bytes);
  if (by_expert && sizes.scale_bytes == 0) return;
  for (unsigned left = __ballot_sync(kAllLanes, to.is_sent); left != 0; left &= left - 1) {
    const int source = __ffs(left) - 1;
    const int rank = __shfl_sync(kAllLanes, to.rank, source);
    const int32_t row = __shfl_sync(kAllLanes, to.row, source);
    if (sizes.scale_bytes > 0)
      copy_scales(at(group, rank, group.state->offers[rank].scales) + row * sizes.scale_bytes,
                  args.scales + token * sizes.scale_bytes, sizes.scale_bytes, lane);
    if (!by_expert) send_choices(group, args, token, rank, row, lane);
  }
}

/// A piece of a token's row: item `item` of this launch.
struct Item {
  int64_t token;
  int64_t begin;  // bytes into the row
  uint32_t num_bytes;

  __device__ Item(const HtDispatchArgs& args, const Pieces& pieces, int64_t item)
      : token(item / pieces.num_per_row),
        begin(item % pieces.num_per_row * pieces.num_bytes),
        num_bytes(
            static_cast<uint32_t>(min(int64_t{pieces.num_bytes}, args.sizes.row_bytes - begin))) {}
};

/// Sends side data, and for each destination calls store(destination of the piece). All lanes.
template <typename Store>
__device__ void send_item(const DeviceGroup& group, const HtDispatchArgs& args, const Item& item,
                          int lane, Store&& store) {
  for (int first = 0; first < args.sizes.num_topk; first += kWarpSize) {
    const Destination to = destination(group, args, item.token, first + lane);
    store(to, to.is_sent ? at(group, to.rank, group.state->offers[to.rank].x) +
                               to.row * args.sizes.row_bytes + item.begin
                         : nullptr);
    if (item.begin == 0) send_side_data(group, args, item.token, first + lane, to, lane);
  }
}

#if defined(EP_HAS_BULK_COPY) || !defined(__CUDA_ARCH__)

/// One warp's stages in shared memory, used in turn.
struct Stages {
  uint8_t* bytes;
  uint64_t* barriers;
  int piece_bytes;

  __device__ uint8_t* stage(int64_t step) const { return bytes + step % kNumStages * piece_bytes; }
  __device__ uint64_t* barrier(int64_t step) const { return barriers + step % kNumStages; }
  __device__ uint32_t parity(int64_t step) const { return (step / kNumStages) & 1; }
};

#endif

#if defined(EP_HAS_BULK_COPY)

__device__ void load(const HtDispatchArgs& args, const Item& item, const Stages& stages,
                     int64_t step) {
  bulk_load(stages.stage(step), args.x + item.token * args.sizes.row_bytes + item.begin,
            item.num_bytes, stages.barrier(step));
}

/// Sends items first, first + stride, ... through shared memory, one stage ahead.
__device__ void send_items(const DeviceGroup& group, const HtDispatchArgs& args,
                           const Pieces& pieces, const Stages& stages, Range items, int stride) {
  const int lane = threadIdx.x % kWarpSize;
  if (lane == 0) {
    for (int i = 0; i < kNumStages; ++i) init_barrier(stages.barriers + i);
    fence_barrier_init();
    if (items.begin < items.end) load(args, Item(args, pieces, items.begin), stages, 0);
  }
  __syncwarp();
  int64_t step = 0;
  for (int64_t i = items.begin; i < items.end; i += stride, ++step) {
    wait_stores_read<0>();  // each lane's own stores out of the next stage
    __syncwarp();
    if (lane == 0 && i + stride < items.end)
      load(args, Item(args, pieces, i + stride), stages, step + 1);
    wait_barrier(stages.barrier(step), stages.parity(step));
    const Item item(args, pieces, i);
    send_item(group, args, item, lane, [&](const Destination& to, uint8_t* dst) {
      if (to.is_sent) bulk_store(dst, stages.stage(step), item.num_bytes);
    });
    commit_stores();
  }
  wait_stores_written();
}

#else

/// Sends items first, first + stride, ... through registers.
__device__ void send_items(const DeviceGroup& group, const HtDispatchArgs& args,
                           const Pieces& pieces, Range items, int stride) {
  const int lane = threadIdx.x % kWarpSize;
  for (int64_t i = items.begin; i < items.end; i += stride) {
    const Item item(args, pieces, i);
    const auto* src =
        reinterpret_cast<const uint4*>(args.x + item.token * args.sizes.row_bytes + item.begin);
    send_item(group, args, item, lane, [&](const Destination& to, uint8_t* dst) {
      for (unsigned left = __ballot_sync(kAllLanes, to.is_sent); left != 0; left &= left - 1) {
        const auto address =
            __shfl_sync(kAllLanes, reinterpret_cast<uint64_t>(dst), __ffs(left) - 1);
        for (uint32_t j = lane; j < item.num_bytes / 16; j += kWarpSize)
          store_once(reinterpret_cast<uint4*>(address) + j, __ldg(src + j));
      }
    });
  }
}

#endif

__global__ void __launch_bounds__(kMaxWarps* kWarpSize)
    send_kernel(const __grid_constant__ DeviceGroup group,
                const __grid_constant__ HtDispatchArgs args,
                const __grid_constant__ Pieces pieces) {
  if (!is_running(group)) return;
  const int num_warps = blockDim.x / kWarpSize, warp = threadIdx.x / kWarpSize;
  const Range items{int64_t{blockIdx.x} * num_warps + warp,
                    args.sizes.num_tokens * pieces.num_per_row};
  const int stride = gridDim.x * num_warps;
#if defined(EP_HAS_BULK_COPY)
  extern __shared__ __align__(128) uint8_t shared_bytes[];
  __shared__ uint64_t barriers[kMaxWarps * kNumStages];
  const Stages stages{shared_bytes + warp * kNumStages * pieces.num_bytes,
                      barriers + warp * kNumStages, pieces.num_bytes};
  send_items(group, args, pieces, stages, items, stride);
#else
  send_items(group, args, pieces, items, stride);
#endif
}

__device__ void zero_rows(uint8_t* base, int64_t row_bytes, int64_t begin, int64_t end) {
  // Rows of side data are multiples of 4 bytes only.
  auto* words = reinterpret_cast<uint32_t*>(base + begin * row_bytes);
  for (int64_t i = threadIdx.x; i < (end - begin) * row_bytes / 4; i += blockDim.x) words[i] = 0;
}

/// Blocks take this rank's experts in turn; rank-major: block 0 marks the unused rows.
__global__ void __launch_bounds__(kPadThreads)
    pad_kernel(const __grid_constant__ DeviceGroup group,
               const __grid_constant__ HtDispatchArgs args) {
  if (!is_running(group)) return;
  const HtSizes& sizes = args.sizes;
  if (static_cast<Layout>(sizes.layout) == Layout::kRankMajor) {
    const int64_t begin = min(args.routing.recv_sizes[0], sizes.capacity) * sizes.num_topk;
    const int64_t end = sizes.capacity * sizes.num_topk, stride = int64_t{gridDim.x} * blockDim.x;
    for (int64_t i = begin + blockIdx.x * blockDim.x + threadIdx.x; i < end; i += stride) {
      if (args.recv_topk_idx >= 0)
        reinterpret_cast<int64_t*>(at(group, group.rank, args.recv_topk_idx))[i] = -1;
      const uint64_t zero = 0;
      if (args.recv_topk_weights >= 0)
        copy_weight(at(group, group.rank, args.recv_topk_weights) + i * sizes.weight_bytes,
                    reinterpret_cast<const uint8_t*>(&zero), sizes.weight_bytes);
    }
    return;
  }
  for (int expert = blockIdx.x; expert < group.num_experts; expert += gridDim.x) {
    if (group.placement.rank_of[expert] != group.rank) continue;
    const int local = group.placement.local_of[expert];
    const int64_t begin =
        args.routing.expert_offsets[local] + args.routing.num_recv_tokens_per_expert[local];
    int64_t end = args.routing.expert_offsets[local + 1];
    if (sizes.capacity >= 0) end = min(end, sizes.capacity);
    if (begin >= end) continue;
    zero_rows(at(group, group.rank, args.recv_x), sizes.row_bytes, begin, end);
    if (args.recv_scales >= 0)
      zero_rows(at(group, group.rank, args.recv_scales), sizes.scale_bytes, begin, end);
    if (args.recv_topk_weights >= 0)
      zero_rows(at(group, group.rank, args.recv_topk_weights), sizes.weight_bytes, begin, end);
  }
}

Pieces cut_rows(int64_t row_bytes) {
  const int64_t num_per_row = ceil_div(row_bytes, int64_t{kMaxPieceBytes});
  const int64_t num_bytes = align_up(ceil_div(row_bytes, num_per_row), int64_t{16});
  return {static_cast<int>(num_per_row), static_cast<int>(num_bytes)};
}

}  // namespace

void launch_send(const DeviceGroup& group, const HtDispatchArgs& args, cudaStream_t stream) {
  if (args.sizes.num_tokens == 0) return;
  const Pieces pieces = cut_rows(args.sizes.row_bytes);
  const int stages_bytes = kNumStages * pieces.num_bytes;
  const int num_warps = std::clamp(kSharedBytes / stages_bytes, 1, kMaxWarps);
  const int shared_bytes = num_warps * stages_bytes;
  EP_CHECK_CUDA(
      cudaFuncSetAttribute(send_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  send_kernel<<<args.sizes.num_threads, num_warps * kWarpSize, shared_bytes, stream>>>(group, args,
                                                                                       pieces);
  EP_CHECK_CUDA(cudaGetLastError());
}

void launch_pad(const DeviceGroup& group, const HtDispatchArgs& args, cudaStream_t stream) {
  const bool by_expert = static_cast<Layout>(args.sizes.layout) == Layout::kExpertMajor;
  if (by_expert ? args.sizes.expert_alignment == 1 : args.sizes.capacity < 0) return;
  pad_kernel<<<args.sizes.num_threads, kPadThreads, 0, stream>>>(group, args);
  EP_CHECK_CUDA(cudaGetLastError());
}

}  // namespace ep::cuda

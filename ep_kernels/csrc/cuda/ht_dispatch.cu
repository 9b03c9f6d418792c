// High-throughput dispatch on the GPU: the transfer, once every rank knows where its rows go.
//
//   send   each warp   a piece of a token's row -> shared memory            load
//                      shared memory -> every destination of the token      store
//                      scales, choices, weights beside the first piece      send_side_data
//   pad    each block  zero the padding of this rank's own groups           pad_results

#include <algorithm>

#include "core/math.h"
#include "core/types.h"
#include "cuda/check_cuda.h"
#include "cuda/device/bulk_copy.cuh"
#include "cuda/device/dependent_launch.cuh"
#include "cuda/device/elements.cuh"
#include "cuda/device/work.cuh"
#include "cuda/ht_stats.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/protocol.cuh"

namespace ep::cuda {
namespace {

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kNumStages = 2;
constexpr int kMaxWarps = 16;
constexpr int kMaxPieceBytes = 4 << 10;
constexpr int kSharedBytes = 208 << 10;  // leaves room for the barriers

/// How rows are cut into pieces that fit a stage of shared memory.
struct Pieces {
  int num_per_row;
  int num_bytes;  // of a full piece
};

/// Base addresses of every rank's results, in shared memory. Null where there are none.
struct Destinations {
  uint8_t* x[kMaxRanks];
  uint8_t* scales[kMaxRanks];
  uint8_t* topk_weights[kMaxRanks];
  int64_t* topk_idx[kMaxRanks];

  /// All threads.
  __device__ void fill(const DeviceGroup& group) {
    for (int rank = threadIdx.x; rank < group.num_ranks; rank += blockDim.x) {
      const Offer offer = group.state->offers[rank];
      uint8_t* pool = group.pool(rank);
      const auto at = [&](int64_t offset) { return offset < 0 ? nullptr : pool + offset; };
      x[rank] = at(offer.x);
      scales[rank] = at(offer.scales);
      topk_weights[rank] = at(offer.topk_weights);
      topk_idx[rank] = reinterpret_cast<int64_t*>(at(offer.topk_idx));
    }
    __syncthreads();
  }
};

/// A lane's choice of a token: where it is served, and on which row.
struct Choice {
  int32_t route, row;

  __device__ bool is_sent() const { return carries_row(route); }
};

__device__ Choice load_choice(const HtDispatchArgs& args, int64_t token, int k) {
  if (k >= args.sizes.num_topk) return {kNoRoute, -1};
  const int64_t choice = token * args.sizes.num_topk + k;
  return {__ldg(args.routing.routes + choice), __ldg(args.routing.rows + choice)};
}

__device__ void copy_scales(uint8_t* dst, const uint8_t* src, int64_t num_bytes, int lane) {
  for (int64_t i = lane * 4; i < num_bytes; i += kWarpSize * 4)
    *reinterpret_cast<uint32_t*>(dst + i) = __ldg(reinterpret_cast<const uint32_t*>(src + i));
}

__device__ uint64_t load_weight(const HtDispatchArgs& args, int64_t choice) {
  return args.sizes.weight_bytes == 4
             ? __ldg(reinterpret_cast<const uint32_t*>(args.topk_weights) + choice)
             : __ldg(reinterpret_cast<const unsigned long long*>(args.topk_weights) + choice);
}

__device__ void store_weight(uint8_t* base, int64_t element, uint64_t weight, int weight_bytes) {
  if (weight_bytes == 4)
    reinterpret_cast<uint32_t*>(base)[element] = static_cast<uint32_t>(weight);
  else
    reinterpret_cast<uint64_t*>(base)[element] = weight;
}

/// What travels beside the rows of a token, for choices first ... first + 31 as destinations. All
/// lanes; `own` is each lane's choice.
__device__ void send_side_data(const DeviceGroup& group, const HtDispatchArgs& args,
                               const Destinations& to, int64_t token, int first, Choice own) {
  const HtSizes& sizes = args.sizes;
  const int lane = threadIdx.x % kWarpSize, num_topk = sizes.num_topk;
  const bool by_expert = static_cast<Layout>(sizes.layout) == Layout::kExpertMajor;
  const bool has_weights = sizes.weight_bytes > 0, has_scales = sizes.scale_bytes > 0;
  const bool has_choices = !by_expert && (has_weights || sizes.handle_seq < 0);
  if (by_expert && has_weights && own.is_sent())
    store_weight(to.topk_weights[route_rank(own.route)], own.row,
                 load_weight(args, token * num_topk + first + lane), sizes.weight_bytes);
  if (!has_scales && !has_choices) return;
  for (unsigned left = __ballot_sync(kAllLanes, own.is_sent()); left != 0; left &= left - 1) {
    const int source = __ffs(left) - 1;
    const int rank = route_rank(__shfl_sync(kAllLanes, own.route, source));
    const int64_t row = __shfl_sync(kAllLanes, own.row, source);
    if (has_scales)
      copy_scales(to.scales[rank] + row * sizes.scale_bytes,
                  args.scales + token * sizes.scale_bytes, sizes.scale_bytes, lane);
    for (int k = lane; has_choices && k < num_topk; k += kWarpSize) {
      const int64_t choice = token * num_topk + k;
      const bool is_served = route_rank(__ldg(args.routing.routes + choice)) == rank;
      if (to.topk_idx[rank])
        to.topk_idx[rank][row * num_topk + k] =
            is_served ? group.placement.local_of[args.routing.topk_idx[choice]] : -1;
      if (has_weights)
        store_weight(to.topk_weights[rank], row * num_topk + k,
                     is_served ? load_weight(args, choice) : 0, sizes.weight_bytes);
    }
  }
}

/// A piece of a token's row: item `item` of this launch.
struct Item {
  int64_t token;
  int64_t begin;  // bytes into the row
  uint32_t num_bytes;

  __device__ Item(const HtDispatchArgs& args, const Pieces& pieces, int64_t item)
      : token(pieces.num_per_row == 1 ? item : item / pieces.num_per_row),
        begin((item - token * pieces.num_per_row) * pieces.num_bytes),
        num_bytes(
            static_cast<uint32_t>(min(int64_t{pieces.num_bytes}, args.sizes.row_bytes - begin))) {}
};

/// Calls store(destination of the piece, or null) for 32 choices at a time, and sends side data
/// with the first piece. All lanes; `own` is each lane's choice among the first 32.
template <typename Store>
__device__ void send_item(const DeviceGroup& group, const HtDispatchArgs& args,
                          const Destinations& to, const Item& item, Choice own, Store&& store) {
  const int lane = threadIdx.x % kWarpSize;
  for (int first = 0; first < args.sizes.num_topk; first += kWarpSize) {
    if (first > 0) own = load_choice(args, item.token, first + lane);
    store(own.is_sent() ? to.x[own.route] + own.row * args.sizes.row_bytes + item.begin : nullptr);
    if (item.begin == 0) send_side_data(group, args, to, item.token, first, own);
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

/// Sends pieces of rows through shared memory, one stage ahead.
__device__ void send_items(const DeviceGroup& group, const HtDispatchArgs& args,
                           const Destinations& to, const Pieces& pieces, const Stages& stages) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t num_items = args.sizes.num_tokens * pieces.num_per_row;
  const WorkQueue queue{&group.state->next_item};
  int64_t i = queue.first();
  uint32_t asked = queue.ask();
  Choice next{kNoRoute, -1};
  if (i < num_items) next = load_choice(args, i / pieces.num_per_row, lane);
  if (lane == 0) {
    for (int j = 0; j < kNumStages; ++j) init_barrier(stages.barriers + j);
    fence_barrier_init();
    if (i < num_items) load(args, Item(args, pieces, i), stages, 0);
  }
  __syncwarp();
  for (int64_t step = 0, after; i < num_items; i = after, ++step) {
    const Item item(args, pieces, i);
    const Choice own = next;
    after = queue.answer(asked);
    if (after < num_items) {
      asked = queue.ask();
      const Item ahead(args, pieces, after);
      next = load_choice(args, ahead.token, lane);
      if (lane == 0) {
        wait_stores_read<0>();  // the stores out of the next stage
        load(args, ahead, stages, step + 1);
      }
    }
    wait_barrier(stages.barrier(step), stages.parity(step));
    send_item(group, args, to, item, own, [&](uint8_t* dst) {
      for (unsigned left = __ballot_sync(kAllLanes, dst != nullptr); left != 0; left &= left - 1) {
        const auto address =
            __shfl_sync(kAllLanes, reinterpret_cast<uint64_t>(dst), __ffs(left) - 1);
        if (lane == 0)
          bulk_store(reinterpret_cast<uint8_t*>(address), stages.stage(step), item.num_bytes);
      }
    });
    if (lane == 0) commit_stores();
  }
  if (lane == 0) {
    wait_stores_written();
    fence_async_stores();
  }
}

#else

/// Sends pieces of rows through registers.
__device__ void send_items(const DeviceGroup& group, const HtDispatchArgs& args,
                           const Destinations& to, const Pieces& pieces) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t num_items = args.sizes.num_tokens * pieces.num_per_row;
  const WorkQueue queue{&group.state->next_item};
  for (int64_t i = queue.first(); i < num_items; i = queue.answer(queue.ask())) {
    const Item item(args, pieces, i);
    const auto* src =
        reinterpret_cast<const uint4*>(args.x + item.token * args.sizes.row_bytes + item.begin);
    const Choice own = load_choice(args, item.token, lane);
    send_item(group, args, to, item, own, [&](uint8_t* dst) {
      for (unsigned left = __ballot_sync(kAllLanes, dst != nullptr); left != 0; left &= left - 1) {
        const auto address =
            __shfl_sync(kAllLanes, reinterpret_cast<uint64_t>(dst), __ffs(left) - 1);
        for (uint32_t j = lane; j < item.num_bytes / 16; j += kWarpSize)
          store_once(reinterpret_cast<uint4*>(address) + j, __ldg(src + j));
      }
    });
  }
}

#endif

__device__ void zero_rows(uint8_t* base, int64_t row_bytes, int64_t begin, int64_t end) {
  // Rows of side data are multiples of 4 bytes only.
  auto* words = reinterpret_cast<uint32_t*>(base + begin * row_bytes);
  for (int64_t i = threadIdx.x; i < (end - begin) * row_bytes / 4; i += blockDim.x) words[i] = 0;
}

/// Fills what no peer writes: in expert-major results the padding of this rank's groups, which
/// blocks take in turn; in rank-major ones the unused rows' choices. All threads.
__device__ void pad_results(const DeviceGroup& group, const HtDispatchArgs& args) {
  const HtSizes& sizes = args.sizes;
  uint8_t* own = group.pool(group.rank);
  if (static_cast<Layout>(sizes.layout) == Layout::kRankMajor) {
    if (sizes.capacity < 0) return;
    const int64_t begin = min(args.routing.recv_sizes[0], sizes.capacity) * sizes.num_topk;
    const int64_t end = sizes.capacity * sizes.num_topk, stride = int64_t{gridDim.x} * blockDim.x;
    for (int64_t i = begin + blockIdx.x * blockDim.x + threadIdx.x; i < end; i += stride) {
      if (args.recv_topk_idx >= 0) reinterpret_cast<int64_t*>(own + args.recv_topk_idx)[i] = -1;
      if (args.recv_topk_weights >= 0)
        store_weight(own + args.recv_topk_weights, i, 0, sizes.weight_bytes);
    }
    return;
  }
  if (sizes.expert_alignment == 1) return;
  for (int expert = blockIdx.x; expert < group.num_experts; expert += gridDim.x) {
    if (group.placement.rank_of[expert] != group.rank) continue;
    const int local = group.placement.local_of[expert];
    const int64_t begin =
        args.routing.expert_offsets[local] + args.routing.num_recv_tokens_per_expert[local];
    int64_t end = args.routing.expert_offsets[local + 1];
    if (sizes.capacity >= 0) end = min(end, sizes.capacity);
    if (begin >= end) continue;
    zero_rows(own + args.recv_x, sizes.row_bytes, begin, end);
    if (args.recv_scales >= 0) zero_rows(own + args.recv_scales, sizes.scale_bytes, begin, end);
    if (args.recv_topk_weights >= 0)
      zero_rows(own + args.recv_topk_weights, sizes.weight_bytes, begin, end);
  }
}

/// All threads.
__device__ void send_rows(const DeviceGroup& group, const HtDispatchArgs& args,
                          const Pieces& pieces) {
  __shared__ Destinations to;
  to.fill(group);
#if defined(EP_HAS_BULK_COPY)
  const int warp = threadIdx.x / kWarpSize;
  extern __shared__ __align__(128) uint8_t shared_bytes[];
  __shared__ uint64_t barriers[kMaxWarps * kNumStages];
  const Stages stages{shared_bytes + warp * kNumStages * pieces.num_bytes,
                      barriers + warp * kNumStages, pieces.num_bytes};
  send_items(group, args, to, pieces, stages);
#else
  send_items(group, args, to, pieces);
#endif
}

__global__ void __launch_bounds__(kMaxWarps* kWarpSize)
    send_kernel(const __grid_constant__ DeviceGroup group,
                const __grid_constant__ HtDispatchArgs args, const __grid_constant__ Pieces pieces,
                CallRecord* record) {
  wait_for_kernel_before();
  if (is_running(group)) {
    if (blockIdx.x == 0 && threadIdx.x == 0) stamp(record, kStampMoving);
    send_rows(group, args, pieces);
    pad_results(group, args);
    if (blockIdx.x == 0) add_recv_stats(group, args);
  }
  finish_if_last(group, record);
}

Pieces cut_rows(int64_t row_bytes) {
  const int64_t num_per_row = ceil_div(row_bytes, int64_t{kMaxPieceBytes});
  const int64_t num_bytes = align_up(ceil_div(row_bytes, num_per_row), int64_t{16});
  return {static_cast<int>(num_per_row), static_cast<int>(num_bytes)};
}

}  // namespace

void launch_send(const DeviceGroup& group, const HtDispatchArgs& args, CallRecord* record,
                 cudaStream_t stream) {
  const Pieces pieces = cut_rows(args.sizes.row_bytes);
  const int stages_bytes = kNumStages * pieces.num_bytes;
  const int num_warps = std::clamp(kSharedBytes / stages_bytes, 1, kMaxWarps);
  const int shared_bytes = num_warps * stages_bytes;
  EP_CHECK_CUDA(
      cudaFuncSetAttribute(send_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  const LaunchShape shape{args.sizes.num_threads, num_warps * kWarpSize, shared_bytes};
  launch_early(send_kernel, shape, stream, group, args, pieces, record);
}

}  // namespace ep::cuda

// High-throughput dispatch on the GPU: the transfer, once every rank knows where its rows go.
//
//   send   each warp   a piece of a token's row -> every destination        send_items
//                      its scales, beside the first piece
//                      choices, weights, chain words beside it              send_side_data
//   pad    each block  what no peer writes in this rank's results           ht_padding.cuh
//
// Expert-major, a rank on another device gets a row once per token: the first of its rows there,
// and for each of them the word that chains it to the next (core/routing.h); ht_copies.cu does the
// rest.

#include "core/routing.h"
#include "core/types.h"
#include "cuda/device/dependent_launch.cuh"
#include "cuda/device/work.cuh"
#include "cuda/ht_padding.cuh"
#include "cuda/ht_rows.cuh"
#include "cuda/ht_stats.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/protocol.cuh"

namespace ep::cuda {
namespace {

/// Base addresses of every rank's results, in shared memory. Null where there are none.
struct Destinations {
  uint8_t* x[kMaxRanks];
  uint8_t* scales[kMaxRanks];
  uint8_t* topk_weights[kMaxRanks];
  int64_t* topk_idx[kMaxRanks];
  int32_t* chain[kMaxRanks];

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
      chain[rank] = reinterpret_cast<int32_t*>(at(offer.chain));
    }
    __syncthreads();
  }
};

/// A lane's choice of a token: where it is served, and on which row.
struct Choice {
  int32_t route = kNoRoute, row = -1;
  uint64_t weight = 0;  ///< that goes with the row, expert-major

  __device__ bool is_sent() const { return carries_row(route); }
};

__device__ uint64_t load_weight(const HtDispatchArgs& args, int64_t choice) {
  return args.sizes.weight_bytes == 4
             ? __ldg(reinterpret_cast<const uint32_t*>(args.topk_weights) + choice)
             : __ldg(reinterpret_cast<const unsigned long long*>(args.topk_weights) + choice);
}

__device__ bool is_by_expert(const HtDispatchArgs& args) {
  return static_cast<Layout>(args.sizes.layout) == Layout::kExpertMajor;
}

__device__ Choice load_choice(const HtDispatchArgs& args, int64_t token, int k) {
  Choice own;
  if (k >= args.sizes.num_topk) return own;
  const int64_t choice = token * args.sizes.num_topk + k;
  own.route = __ldg(args.routing.routes + choice);
  own.row = __ldg(args.routing.rows + choice);
  if (is_by_expert(args) && args.sizes.weight_bytes > 0) own.weight = load_weight(args, choice);
  return own;
}

__device__ void store_weight(uint8_t* base, int64_t element, uint64_t weight, int weight_bytes) {
  if (weight_bytes == 4)
    reinterpret_cast<uint32_t*>(base)[element] = static_cast<uint32_t>(weight);
  else
    reinterpret_cast<uint64_t*>(base)[element] = weight;
}

/// What a rank on another device is told of a lane's row, among 32 choices of a token.
struct Link {
  bool is_carrier;  ///< the row itself goes there
  int32_t word;     ///< of its chain
};

/// Chains the rows that lanes have on the same rank, by ascending position. Elsewhere each row goes
/// by itself. All lanes.
__device__ Link link_rows(const DeviceGroup& group, const Destinations& to, const Choice& own) {
  if (group.remote_ranks == 0) return {own.is_sent(), kEndOfChain};
  const int lane = threadIdx.x % kWarpSize;
  const unsigned same = __match_any_sync(kAllLanes, own.route), up_to_own = (2u << lane) - 1;
  const unsigned after = same & ~up_to_own;
  const bool is_first = (same & up_to_own) == 1u << lane;
  const int32_t row_after = __shfl_sync(kAllLanes, own.row, after ? __ffs(after) - 1 : lane);
  if (!own.is_sent()) return {false, kEndOfChain};
  if (!group.is_remote(own.route) || to.chain[own.route] == nullptr) return {true, kEndOfChain};
  const int32_t next = after ? row_after : kEndOfChain;
  return {is_first, is_first ? first_in_chain(next) : later_in_chain(next)};
}

/// What travels beside the rows of a token, for 32 choices as destinations. All lanes; `own` is
/// each lane's choice.
__device__ void send_side_data(const DeviceGroup& group, const HtDispatchArgs& args,
                               const Destinations& to, int64_t token, const Choice& own,
                               const Link& link) {
  const HtSizes& sizes = args.sizes;
  const int num_topk = sizes.num_topk;
  const bool has_weights = sizes.weight_bytes > 0;
  if (is_by_expert(args)) {
    if (!own.is_sent()) return;
    if (has_weights)
      store_weight(to.topk_weights[own.route], own.row, own.weight, sizes.weight_bytes);
    if (to.chain[own.route]) to.chain[own.route][own.row] = link.word;
    return;
  }
  if (!has_weights && sizes.handle_seq >= 0) return;
  for (unsigned left = __ballot_sync(kAllLanes, own.is_sent()); left != 0; left &= left - 1) {
    const int source = __ffs(left) - 1;
    const int rank = __shfl_sync(kAllLanes, own.route, source);
    const int64_t row = __shfl_sync(kAllLanes, own.row, source);
    for (int k = threadIdx.x % kWarpSize; k < num_topk; k += kWarpSize) {
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
  Piece piece;

  __device__ Item(const Pieces& pieces, int64_t item)
      : token(pieces.num_per_row == 1 ? item : item / pieces.num_per_row),
        piece(pieces, item - token * pieces.num_per_row) {}
  __device__ Source source(const HtDispatchArgs& args) const {
    return {args.x + token * args.sizes.row_bytes + piece.begin,
            args.scales + token * args.sizes.scale_bytes};
  }
  /// In the row of a choice.
  __device__ Target target(const HtDispatchArgs& args, const Destinations& to,
                           const Choice& own) const {
    return {to.x[own.route] + own.row * args.sizes.row_bytes + piece.begin,
            to.scales[own.route] + own.row * args.sizes.scale_bytes};
  }
};

/// Calls store(target of this lane) for 32 choices at a time, and sends side data with the first
/// piece. All lanes; `own` is each lane's choice among the first 32.
template <typename Store>
__device__ void send_item(const DeviceGroup& group, const HtDispatchArgs& args,
                          const Destinations& to, const Item& item, Choice own, Store&& store) {
  const int lane = threadIdx.x % kWarpSize;
  for (int first = 0; first < args.sizes.num_topk; first += kWarpSize) {
    if (first > 0) own = load_choice(args, item.token, first + lane);
    const Link link = link_rows(group, to, own);
    store(link.is_carrier ? item.target(args, to, own) : Target{});
    if (item.piece.is_first()) send_side_data(group, args, to, item.token, own, link);
  }
}

#if defined(EP_HAS_BULK_COPY)

/// Sends pieces of rows through shared memory, one stage ahead.
__device__ void send_items(const DeviceGroup& group, const HtDispatchArgs& args,
                           const Destinations& to, const Pieces& pieces) {
  const Stages stages = stages_of_warp(pieces);
  const int lane = threadIdx.x % kWarpSize;
  const int64_t num_items = args.sizes.num_tokens * pieces.num_per_row;
  const WorkQueue queue{&group.state->next_item};
  int64_t i = queue.first();
  uint32_t asked = queue.ask();
  Choice next;
  if (i < num_items) next = load_choice(args, i / pieces.num_per_row, lane);
  if (lane == 0) {
    stages.init();
    const Item item(pieces, i);
    if (i < num_items) stages.load(0, item.piece, item.source(args));
  }
  __syncwarp();
  for (int64_t step = 0, after; i < num_items; i = after, ++step) {
    const Item item(pieces, i);
    const Choice own = next;
    after = queue.answer(asked);
    if (after < num_items) {
      asked = queue.ask();
      const Item ahead(pieces, after);
      next = load_choice(args, ahead.token, lane);
      if (lane == 0) {
        wait_stores_read<0>();  // the stores out of the next stage
        stages.load(step + 1, ahead.piece, ahead.source(args));
      }
    }
    stages.wait(step);
    send_item(group, args, to, item, own, [&](const Target& target) {
      stages.store(step, item.piece, item.source(args), target);
    });
    if (lane == 0) commit_stores();
  }
  if (lane == 0) finish_stores();
}

#else

/// Sends pieces of rows through registers.
__device__ void send_items(const DeviceGroup& group, const HtDispatchArgs& args,
                           const Destinations& to, const Pieces& pieces) {
  const int64_t num_items = args.sizes.num_tokens * pieces.num_per_row;
  const WorkQueue queue{&group.state->next_item};
  for (int64_t i = queue.first(); i < num_items; i = queue.answer(queue.ask())) {
    const Item item(pieces, i);
    const Choice own = load_choice(args, item.token, threadIdx.x % kWarpSize);
    send_item(group, args, to, item, own,
              [&](const Target& target) { copy_piece(item.piece, item.source(args), target); });
  }
}

#endif

/// All threads.
__device__ void send_rows(const DeviceGroup& group, const HtDispatchArgs& args,
                          const Pieces& pieces) {
  __shared__ Destinations to;
  to.fill(group);
  send_items(group, args, to, pieces);
}

__global__ void __launch_bounds__(kRowWarps* kWarpSize)
    send_kernel(const __grid_constant__ DeviceGroup group,
                const __grid_constant__ HtDispatchArgs args, const __grid_constant__ Pieces pieces,
                CallRecord* record) {
  wait_for_kernel_before();
  if (is_running(group)) {
    if (blockIdx.x == 0 && threadIdx.x == 0) stamp(group, kStampMoving);
    send_rows(group, args, pieces);
    pad_results(group, args);
    if (blockIdx.x == 0) add_recv_stats(group, args);
  }
  if (!is_last_block(group)) return;
  if (args.recv_chain >= 0)
    hand_over(group, record);
  else
    finish(group, record);
}

}  // namespace

void prepare_send() { allow_stages(send_kernel); }

void launch_send(const DeviceGroup& group, const HtDispatchArgs& args, CallRecord* record,
                 cudaStream_t stream) {
  const bool are_aligned = reinterpret_cast<uintptr_t>(args.scales) % 16 == 0;
  const Pieces pieces = cut_rows(args.sizes, are_aligned);
  launch_early(send_kernel, shape_for_rows(args.sizes, pieces), stream, group, args, pieces,
               record);
}

}  // namespace ep::cuda

// Second part of a dispatch to expert-major rows on a rank that has peers on other devices: those
// wrote a token's row once, and the chain of its other rows here (core/routing.h).
//
//   copy   each warp   the chain words of a few rows, a piece of each row that begins a chain
//                      the other rows of the chain                            rows_of_chain
//                      the piece -> each of them
//
// Runs when all ranks are done with the call, so that no block waits for a peer.

#include "core/math.h"
#include "cuda/device/dependent_launch.cuh"
#include "cuda/device/work.cuh"
#include "cuda/ht_rows.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/protocol.cuh"

namespace ep::cuda {
namespace {

constexpr int kRowsPerItem = 8;

/// The results of this rank.
struct Results {
  uint8_t *x, *scales;
  const int32_t* chain;
  int64_t row_bytes, scale_bytes, num_rows;

  __device__ Results(const DeviceGroup& group, const HtDispatchArgs& args)
      : x(group.pool(group.rank) + args.recv_x),
        scales(group.pool(group.rank) + args.recv_scales),
        chain(reinterpret_cast<const int32_t*>(group.pool(group.rank) + args.recv_chain)),
        row_bytes(args.sizes.row_bytes),
        scale_bytes(args.sizes.scale_bytes),
        num_rows(args.routing.recv_sizes[0]) {
    if (args.sizes.capacity >= 0) num_rows = min(num_rows, args.sizes.capacity);
  }
  __device__ Target at(int64_t row, const Piece& piece) const {
    Target place;
    place.x = x + row * row_bytes + piece.begin;
    place.scales = scales + row * scale_bytes;
    return place;
  }
  __device__ int32_t word(int64_t row) const { return __ldcg(chain + row); }
};

/// Gives each lane one of the rows behind the first of a chain, which is no longer than a warp has
/// lanes. All lanes.
__device__ Target rows_of_chain(const Results& results, const Piece& piece, int32_t first_word) {
  Target own;
  int lane = 0;
  for (int32_t row = next_in_chain(first_word); row != kEndOfChain && lane < kWarpSize; ++lane) {
    if (lane == static_cast<int>(threadIdx.x % kWarpSize)) own = results.at(row, piece);
    row = next_in_chain(results.word(row));
  }
  return own;
}

#if defined(EP_HAS_BULK_COPY)

/// Copies pieces along chains, each through the next stage.
struct Copier {
  Stages stages;
  int64_t step = 0;

  __device__ explicit Copier(const Pieces& pieces) : stages(stages_of_warp(pieces)) {
    if (threadIdx.x % kWarpSize == 0) stages.init();
    __syncwarp();
  }
  __device__ void copy(const Results& results, const Piece& piece, int64_t row, int32_t word) {
    const Target first = results.at(row, piece);
    const Source from{first.x, first.scales};
    if (threadIdx.x % kWarpSize == 0) {
      wait_stores_read<kNumStages - 1>();  // the stores out of this stage
      stages.load(step, piece, from);
    }
    const Target own = rows_of_chain(results, piece, word);
    stages.wait(step);
    stages.store(step, piece, from, own);
    if (threadIdx.x % kWarpSize == 0) commit_stores();
    ++step;
  }
  __device__ void finish() {
    if (threadIdx.x % kWarpSize == 0) finish_stores();
  }
};

#else

struct Copier {
  __device__ explicit Copier(const Pieces&) {}
  __device__ void copy(const Results& results, const Piece& piece, int64_t row, int32_t word) {
    const Target first = results.at(row, piece);
    copy_piece(piece, {first.x, first.scales}, rows_of_chain(results, piece, word));
  }
  __device__ void finish() {}
};

#endif

/// All threads. An item is a piece of a few rows that follow each other.
__device__ void copy_rows(const DeviceGroup& group, const HtDispatchArgs& args,
                          const Pieces& pieces) {
  const Results results(group, args);
  const int lane = threadIdx.x % kWarpSize;
  const int64_t num_items = ceil_div(results.num_rows, int64_t{kRowsPerItem}) * pieces.num_per_row;
  const WorkQueue queue{&group.state->next_item};
  Copier copier(pieces);
  for (int64_t i = queue.first(); i < num_items;) {
    const uint32_t asked = queue.ask();
    const int64_t first = i / pieces.num_per_row * kRowsPerItem;
    const Piece piece(pieces, i % pieces.num_per_row);
    const bool is_mine = lane < kRowsPerItem && first + lane < results.num_rows;
    const int32_t own = is_mine ? results.word(first + lane) : kEndOfChain;
    for (unsigned left = __ballot_sync(kAllLanes, begins_chain(own)); left != 0; left &= left - 1) {
      const int source = __ffs(left) - 1;
      copier.copy(results, piece, first + source, __shfl_sync(kAllLanes, own, source));
    }
    i = queue.answer(asked);
  }
  copier.finish();
}

__global__ void __launch_bounds__(kRowWarps* kWarpSize)
    copy_kernel(const __grid_constant__ DeviceGroup group,
                const __grid_constant__ HtDispatchArgs args, const __grid_constant__ Pieces pieces,
                CallRecord* record) {
  wait_for_kernel_before();
  if (is_running(group)) copy_rows(group, args, pieces);
  if (is_last_block(group) && threadIdx.x == 0) close_call(group, record);
}

}  // namespace

void prepare_copies() { allow_stages(copy_kernel); }

void launch_copies(const DeviceGroup& group, const HtDispatchArgs& args, CallRecord* record,
                   cudaStream_t stream) {
  const Pieces pieces = cut_rows(args.sizes, true);  // as all results in a pool are
  launch_early(copy_kernel, shape_for_rows(args.sizes, pieces), stream, group, args, pieces,
               record);
}

}  // namespace ep::cuda

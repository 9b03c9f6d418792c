#pragma once

#include <cstdint>

#include "core/math.h"
#include "cuda/combine_rows.cuh"
#include "cuda/device/async_copy.cuh"
#include "cuda/device/work.cuh"

// The rows of a token of a combine, by way of shared memory: a warp adds a piece of each row while
// the next pieces are on their way, so that a link is busy all the time, whatever its latency. For
// tokens of at most kMaxStagedRows rows, chosen by at most a warp's lanes.
//
//   take     all lanes   an item; where each lane's row is, and when its turn is   ItemReader::take
//   fetch    all lanes   a piece of each row -> its place in the stage ItemReader::fetch add each
//   lane   the vectors that it has copied, in the order of addition; biases; round
//
// Routes of an item, and its number, are asked for when the item before is begun: the answers come
// behind all rows that were asked for earlier, several microseconds over a link.

namespace ep::cuda {

constexpr int kStagedWarps = 24;  ///< of a block, or as many as have room
constexpr int kNumStages = 2;
constexpr int kStageVectors = (4 << 10) / static_cast<int>(sizeof(uint4));
constexpr int kStagedWarpBytes = kNumStages * kStageVectors * static_cast<int>(sizeof(uint4));
constexpr int kMaxStagedRows = 8;
constexpr int kVectorsPerStagedItem = 512;

/// A piece of a token's rows that is on its way.
struct StagedPiece {
  int64_t token;
  int first, end;  ///< vectors of a row
  int count;       ///< rows; -1: no piece is left
};

/// One warp's items: takes them from the queue and fetches their rows, piece by piece. `kRows`: the
/// most that a token has; the fewer, the larger a piece of each. All lanes call each function.
template <int kRows, typename From>
class ItemReader {
 public:
  static constexpr int kPieceVectors = kStageVectors / kRows;

  __device__ ItemReader(const HtCombineArgs& args, const From& from, const WorkQueue& queue)
      : args_(args), from_(from), queue_(queue) {
    const auto num_vectors = static_cast<int>(args.sizes.row_bytes / sizeof(uint4));
    items_per_row_ = ceil_div(num_vectors, kVectorsPerStagedItem);
    num_items_ = args.sizes.num_tokens * items_per_row_;
    ahead_ = queue.first();
    prepare();
  }

  /// Starts to copy the next piece of each row to `stage`, where turn t has place t.
  __device__ StagedPiece fetch(uint4* stage) {
    if (piece_.end >= item_end_ && !take()) return {0, 0, 0, -1};
    piece_.first = piece_.end;
    piece_.end = min(piece_.first + kPieceVectors, item_end_);
    const int lane = threadIdx.x % kWarpSize;
    for (unsigned left = listed_; left != 0; left &= left - 1) {
      const int source = __ffs(left) - 1;
      const uint4* global = row_of(source) + piece_.first;
      uint4* shared = stage + __shfl_sync(kAllLanes, turn_, source) * kPieceVectors;
#pragma unroll
      for (int i = 0; i < kPieceVectors; i += kWarpSize)
        if (piece_.first + i + lane < piece_.end) copy_async(shared + i + lane, global + i + lane);
    }
    return piece_;
  }

 private:
  /// Asks for what the next take() needs: the choices of the item ahead, and another item.
  __device__ void prepare() {
    choice_ = {kNoRoute, -1};
    if (ahead_ >= num_items_) return;
    choice_ = load_choice(args_, ahead_ / items_per_row_, threadIdx.x % kWarpSize);
    asked_ = queue_.ask();
  }

  /// Begins the item ahead. False: none is left.
  __device__ bool take() {
    if (ahead_ >= num_items_) return false;
    const Item item(args_, items_per_row_, ahead_);
    const bool is_listed = carries_row(choice_.route);
    listed_ = __ballot_sync(kAllLanes, is_listed);
    turn_ = turn_of(choice_.route);
    row_ = is_listed ? from_.x_of(choice_.route) + int64_t{choice_.row} * args_.sizes.row_bytes
                     : nullptr;
    piece_ = {item.token, item.first, item.first, __popc(listed_)};
    item_end_ = item.end;
    ahead_ = queue_.answer(asked_);
    prepare();
    return true;
  }

  /// When a lane's row is added: expert-major in the order of topk_idx, rank-major by rank.
  __device__ int turn_of(int32_t route) const {
    if (is_expert_major(args_)) return __popc(listed_ & ((1u << threadIdx.x % kWarpSize) - 1));
    int turn = 0;
    for (unsigned left = listed_; left != 0; left &= left - 1)
      turn += __shfl_sync(kAllLanes, route, __ffs(left) - 1) < route;
    return turn;
  }

  __device__ const uint4* row_of(int lane) const {
    const auto address = reinterpret_cast<unsigned long long>(row_);
    return reinterpret_cast<const uint4*>(__shfl_sync(kAllLanes, address, lane));
  }

  const HtCombineArgs& args_;
  const From& from_;
  const WorkQueue queue_;
  int64_t num_items_, ahead_;
  int items_per_row_;
  uint32_t asked_ = 0;
  Choice choice_{};
  // The item that is being fetched: where its last piece was, and each lane's row.
  StagedPiece piece_{0, 0, 0, -1};
  int item_end_ = 0, turn_ = 0;
  unsigned listed_ = 0;
  const uint8_t* row_ = nullptr;
};

/// Writes the sum of the pieces in `stage`, which are here. All lanes.
template <typename Element, int kRows>
__device__ void add_staged(const HtCombineArgs& args, const StagedPiece& piece,
                           const uint4* stage) {
  constexpr int kPieceVectors = kStageVectors / kRows;
  const int num_vectors = piece.end - piece.first;
  const int64_t begin = piece.token * args.sizes.row_bytes + piece.first * int64_t{sizeof(uint4)};
  const bool is_biased = args.bias[0] || args.bias[1];
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x) % kWarpSize; i < num_vectors; i += kWarpSize) {
    typename Element::Acc sum[Element::kPerVector] = {};
    uint4 parts[kRows];
#pragma unroll
    for (int row = 0; row < kRows; ++row)
      if (row < piece.count) parts[row] = stage[row * kPieceVectors + i];
#pragma unroll
    for (int row = 0; row < kRows; ++row)
      if (row < piece.count) Element::add(sum, parts[row]);
    if (is_biased) add_biases<Element>(args, begin, i, sum);
    store_once(reinterpret_cast<uint4*>(args.out + begin) + i, Element::store(sum));
  }
}

/// Sums the items that the warp takes from `queue`, kNumStages pieces under way at a time. All
/// threads; kStagedWarpBytes of shared memory for each warp.
template <typename Element, int kRows, typename From>
__device__ void reduce_staged(const HtCombineArgs& args, const From& from, const WorkQueue& queue) {
  extern __shared__ __align__(128) uint4 staged_vectors[];
  uint4* const stages = staged_vectors + threadIdx.x / kWarpSize * (kNumStages * kStageVectors);
  const auto stage_of = [&](int step) { return stages + step % kNumStages * kStageVectors; };
  ItemReader<kRows, From> reader(args, from, queue);
  StagedPiece under_way[kNumStages];  // the oldest first
#pragma unroll
  for (int step = 0; step < kNumStages; ++step) {
    under_way[step] = reader.fetch(stage_of(step));
    commit_copies();
  }
  for (int step = 0; under_way[0].count >= 0; ++step) {
    const StagedPiece piece = under_way[0];
    wait_copies<kNumStages - 1>();
    add_staged<Element, kRows>(args, piece, stage_of(step));
    if (args.out_topk_weights && piece.first == 0) collect_weights(args, from, piece.token);
#pragma unroll
    for (int i = 0; i + 1 < kNumStages; ++i) under_way[i] = under_way[i + 1];
    under_way[kNumStages - 1] = reader.fetch(stage_of(step));
    commit_copies();
  }
}

}  // namespace ep::cuda

#pragma once

#include <cstdint>

#include "core/ht_args.h"
#include "core/math.h"
#include "cuda/check_cuda.h"
#include "cuda/device/bulk_copy.cuh"
#include "cuda/device/elements.cuh"
#include "cuda/device/warp.cuh"
#include "cuda/launch.h"

// Rows on their way: each piece is read once and written to up to 32 places. By bulk copies through
// shared memory where the device has them, else through registers; scales go the way of the rows if
// they are aligned like them.

namespace ep::cuda {

constexpr int kNumStages = 2;
constexpr int kRowWarps = 16;
constexpr int kMaxPieceBytes = 4 << 10;
constexpr int kMaxScaleBytes = 512;  // that have room beside a piece
constexpr int kMaxStageBytes = kMaxPieceBytes + kMaxScaleBytes;

/// How rows are cut into pieces that fit a stage of shared memory.
struct Pieces {
  int64_t row_bytes;
  int num_per_row;
  int num_bytes;         // of a full piece
  int scale_bytes;       // of a row
  bool are_scales_bulk;  // they travel through the stage of the first piece

  EP_HOST_DEVICE int scales_begin() const { return align_up(num_bytes, 128); }
  EP_HOST_DEVICE int stage_bytes() const {
    return scales_begin() + (are_scales_bulk ? align_up(scale_bytes, 128) : 0);
  }
};

/// `are_aligned`: the scales that are read begin at a multiple of 16 bytes.
inline Pieces cut_rows(const HtSizes& sizes, bool are_aligned) {
  const int64_t num_per_row = ceil_div(sizes.row_bytes, int64_t{kMaxPieceBytes});
  const int64_t num_bytes = align_up(ceil_div(sizes.row_bytes, num_per_row), int64_t{16});
  const int64_t scale_bytes = sizes.scale_bytes;
  return {sizes.row_bytes, static_cast<int>(num_per_row), static_cast<int>(num_bytes),
          static_cast<int>(scale_bytes),
          are_aligned && scale_bytes <= kMaxScaleBytes && scale_bytes % 16 == 0};
}

/// Once per kernel that moves rows and device.
template <typename Kernel>
void allow_stages(Kernel* kernel) {
  if (has_sm90_features())
    EP_CHECK_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                       kRowWarps * kNumStages * kMaxStageBytes));
}

inline LaunchShape shape_for_rows(const HtSizes& sizes, const Pieces& pieces) {
  const int stages_bytes = kRowWarps * kNumStages * pieces.stage_bytes();
  return {sizes.num_threads, kRowWarps * kWarpSize, has_sm90_features() ? stages_bytes : 0};
}

/// A piece of a row; the first one takes the row's scales along.
struct Piece {
  int64_t begin;  ///< bytes into the row
  uint32_t num_bytes, scale_bytes;

  __device__ Piece(const Pieces& pieces, int64_t index)
      : begin(index * pieces.num_bytes),
        num_bytes(static_cast<uint32_t>(min(int64_t{pieces.num_bytes}, pieces.row_bytes - begin))),
        scale_bytes(index == 0 ? static_cast<uint32_t>(pieces.scale_bytes) : 0) {}
  __device__ bool is_first() const { return begin == 0; }
};

/// Where a piece is read.
struct Source {
  const uint8_t *x, *scales;
};

/// Where a lane wants the piece. Null: nowhere.
struct Target {
  uint8_t *x = nullptr, *scales = nullptr;
};

/// The pointer of another lane. All lanes.
__device__ inline uint8_t* pointer_of(uint8_t* own, int lane) {
  const auto address = reinterpret_cast<unsigned long long>(own);
  return reinterpret_cast<uint8_t*>(__shfl_sync(kAllLanes, address, lane));
}

/// All lanes.
__device__ inline void copy_scales(uint8_t* dst, const uint8_t* src, uint32_t num_bytes) {
  for (uint32_t i = threadIdx.x % kWarpSize * 4; i < num_bytes; i += kWarpSize * 4)
    *reinterpret_cast<uint32_t*>(dst + i) = __ldg(reinterpret_cast<const uint32_t*>(src + i));
}

#if defined(EP_HAS_BULK_COPY)

/// One warp's stages in shared memory, used in turn: step 0, 1, ...
struct Stages {
  uint8_t* bytes;
  uint64_t* barriers;
  const Pieces& pieces;

  __device__ uint8_t* x(int64_t step) const {
    return bytes + step % kNumStages * pieces.stage_bytes();
  }
  __device__ uint8_t* scales(int64_t step) const { return x(step) + pieces.scales_begin(); }
  __device__ uint64_t* barrier(int64_t step) const { return barriers + step % kNumStages; }

  /// One lane, first of all.
  __device__ void init() const {
    for (int i = 0; i < kNumStages; ++i) init_barrier(barriers + i);
    fence_barrier_init();
  }

  /// Starts to read a piece. One lane.
  __device__ void load(int64_t step, const Piece& piece, const Source& from) const {
    const uint32_t scale_bytes = pieces.are_scales_bulk ? piece.scale_bytes : 0;
    expect_bytes(barrier(step), piece.num_bytes + scale_bytes);
    bulk_load_expected(x(step), from.x, piece.num_bytes, barrier(step));
    if (scale_bytes > 0) bulk_load_expected(scales(step), from.scales, scale_bytes, barrier(step));
  }

  /// Waits for the piece. All lanes.
  __device__ void wait(int64_t step) const { wait_barrier(barrier(step), (step / kNumStages) & 1); }

  /// Starts to write a piece that is here to the target of every lane. All lanes; the first one
  /// commits the stores.
  __device__ void store(int64_t step, const Piece& piece, const Source& from,
                        const Target& own) const {
    const bool is_mover = threadIdx.x % kWarpSize == 0;
    for (unsigned left = __ballot_sync(kAllLanes, own.x != nullptr); left != 0; left &= left - 1) {
      const int lane = __ffs(left) - 1;
      uint8_t* const dst = pointer_of(own.x, lane);
      if (is_mover) bulk_store(dst, x(step), piece.num_bytes);
      if (piece.scale_bytes == 0) continue;
      uint8_t* const dst_scales = pointer_of(own.scales, lane);
      if (!pieces.are_scales_bulk)
        copy_scales(dst_scales, from.scales, piece.scale_bytes);
      else if (is_mover)
        bulk_store(dst_scales, scales(step), piece.scale_bytes);
    }
  }
};

/// The stages of this warp. All threads.
__device__ inline Stages stages_of_warp(const Pieces& pieces) {
  extern __shared__ __align__(128) uint8_t shared_bytes[];
  __shared__ uint64_t barriers[kRowWarps * kNumStages];
  const int first = threadIdx.x / kWarpSize * kNumStages;
  return {shared_bytes + first * pieces.stage_bytes(), barriers + first, pieces};
}

/// Waits until what one lane has stored is written, and orders it before what it publishes.
__device__ inline void finish_stores() {
  wait_stores_written();
  fence_async_stores();
}

#else

/// Copies a piece to the target of every lane through registers. All lanes.
__device__ inline void copy_piece(const Piece& piece, const Source& from, const Target& own) {
  const auto* src = reinterpret_cast<const uint4*>(from.x);
  for (unsigned left = __ballot_sync(kAllLanes, own.x != nullptr); left != 0; left &= left - 1) {
    const int lane = __ffs(left) - 1;
    auto* const dst = reinterpret_cast<uint4*>(pointer_of(own.x, lane));
    for (uint32_t i = threadIdx.x % kWarpSize; i < piece.num_bytes / 16; i += kWarpSize)
      store_once(dst + i, __ldg(src + i));
    if (piece.scale_bytes > 0)
      copy_scales(pointer_of(own.scales, lane), from.scales, piece.scale_bytes);
  }
}

#endif  // EP_HAS_BULK_COPY

}  // namespace ep::cuda

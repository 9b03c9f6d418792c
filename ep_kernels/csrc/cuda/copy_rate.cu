// A copy by the instructions that dispatch uses, to learn how fast they are here.

#include "core/math.h"
#include "cuda/check_cuda.h"
#include "cuda/device/bulk_copy.cuh"
#include "cuda/device/warp.cuh"
#include "cuda/kernels.h"

namespace ep::cuda {
namespace {

constexpr int kNumWarps = 16;
constexpr int kNumStages = 2;
constexpr int kPieceBytes = static_cast<int>(kCopyUnit);
constexpr int kSharedBytes = kNumWarps * kNumStages * kPieceBytes;

/// Warps take pieces in turn; a load is under way while the piece before it is stored.
__global__ void __launch_bounds__(kNumWarps* kWarpSize)
    copy_kernel(uint8_t* dst, const uint8_t* src, int64_t num_pieces) {
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int64_t first = int64_t{blockIdx.x} * kNumWarps + warp;
  const int64_t stride = int64_t{gridDim.x} * kNumWarps;
#if defined(EP_HAS_BULK_COPY)
  extern __shared__ __align__(128) uint8_t shared_bytes[];
  __shared__ uint64_t barriers[kNumWarps * kNumStages];
  if (threadIdx.x % kWarpSize != 0) return;
  uint8_t* stages = shared_bytes + warp * kNumStages * kPieceBytes;
  uint64_t* barrier = barriers + warp * kNumStages;
  const auto load = [&](int64_t piece, int64_t step) {
    const auto stage = step % kNumStages;
    bulk_load(stages + stage * kPieceBytes, src + piece * kPieceBytes, kPieceBytes,
              barrier + stage);
  };
  for (int i = 0; i < kNumStages; ++i) init_barrier(barrier + i);
  fence_barrier_init();
  if (first < num_pieces) load(first, 0);
  int64_t step = 0;
  for (int64_t piece = first; piece < num_pieces; piece += stride, ++step) {
    if (piece + stride < num_pieces) {
      wait_stores_read<0>();
      load(piece + stride, step + 1);
    }
    wait_barrier(barrier + step % kNumStages, (step / kNumStages) & 1);
    bulk_store(dst + piece * kPieceBytes, stages + step % kNumStages * kPieceBytes, kPieceBytes);
    commit_stores();
  }
  wait_stores_written();
#else
  for (int64_t piece = first; piece < num_pieces; piece += stride) {
    const auto* from = reinterpret_cast<const uint4*>(src + piece * kPieceBytes);
    auto* to = reinterpret_cast<uint4*>(dst + piece * kPieceBytes);
    for (int i = threadIdx.x % kWarpSize; i < kPieceBytes / 16; i += kWarpSize) to[i] = from[i];
  }
#endif
}

}  // namespace

void launch_copy(uint8_t* dst, const uint8_t* src, int64_t num_bytes, int num_blocks,
                 cudaStream_t stream) {
  EP_CHECK_CUDA(
      cudaFuncSetAttribute(copy_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
  copy_kernel<<<num_blocks, kNumWarps * kWarpSize, kSharedBytes, stream>>>(dst, src,
                                                                           num_bytes / kPieceBytes);
  EP_CHECK_CUDA(cudaGetLastError());
}

}  // namespace ep::cuda

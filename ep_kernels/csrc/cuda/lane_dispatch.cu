// Dispatch over several nodes on the GPU: rows into messages, and to the ranks of a node.
//
//   pack      each warp   a piece of a token's row -> message                  pack_item
//                         scales and weights beside the first piece
//   send      each warp   a piece of a token's row -> its rows on the node     send_item
//                         scales, choices, weights beside the first piece      send_side_data
//   padding   each block  zero the padding of this rank's own groups           zero_groups
//                         or mark unused rows as serving no choice             clear_choices
//
// Weights and scales are moved in words of 4 bytes: in a message they are aligned to no more.

#include "core/math.h"
#include "core/routing.h"
#include "core/types.h"
#include "cuda/check_cuda.h"
#include "cuda/device/elements.cuh"
#include "cuda/device/warp.cuh"
#include "cuda/lane.h"
#include "cuda/launch.h"

namespace ep::cuda {
namespace {

constexpr int kNumThreads = 512;
constexpr int kVectorsPerItem = 256;
constexpr int kUnroll = 4;

__device__ int64_t first_item() {
  return int64_t{blockIdx.x} * (blockDim.x / kWarpSize) + threadIdx.x / kWarpSize;
}

__device__ int64_t item_stride() { return int64_t{gridDim.x} * (blockDim.x / kWarpSize); }

/// A piece of a row: item `item` of a launch.
struct Piece {
  int64_t index;   // of the row
  int first, end;  // vectors

  __device__ Piece(int64_t row_bytes, int pieces_per_row, int64_t item) {
    const auto num_vectors = static_cast<int>(row_bytes / static_cast<int64_t>(sizeof(uint4)));
    const auto part = static_cast<int>(item % pieces_per_row);
    index = item / pieces_per_row;
    first = static_cast<int>(int64_t{num_vectors} * part / pieces_per_row);
    end = static_cast<int>(int64_t{num_vectors} * (part + 1) / pieces_per_row);
  }
};

EP_HOST_DEVICE int pieces_per_row(int64_t row_bytes) {
  return static_cast<int>(
      ceil_div(row_bytes / static_cast<int64_t>(sizeof(uint4)), int64_t{kVectorsPerItem}));
}

/// All lanes: vectors [first, end) of a row. Loads of kUnroll vectors are under way at once.
__device__ void copy_piece(uint8_t* dst, const uint8_t* src, const Piece& piece) {
  const auto* from = reinterpret_cast<const uint4*>(src);
  auto* to = reinterpret_cast<uint4*>(dst);
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  for (int begin = piece.first + lane; begin < piece.end; begin += kUnroll * kWarpSize) {
    uint4 parts[kUnroll];
#pragma unroll
    for (int j = 0; j < kUnroll; ++j)
      if (begin + j * kWarpSize < piece.end) parts[j] = from[begin + j * kWarpSize];
#pragma unroll
    for (int j = 0; j < kUnroll; ++j)
      if (begin + j * kWarpSize < piece.end) store_once(to + begin + j * kWarpSize, parts[j]);
  }
}

/// All lanes.
__device__ void copy_words(uint8_t* dst, const uint8_t* src, int64_t num_bytes) {
  const auto* from = reinterpret_cast<const uint32_t*>(src);
  auto* to = reinterpret_cast<uint32_t*>(dst);
  for (int64_t i = threadIdx.x % kWarpSize; i < num_bytes / 4; i += kWarpSize) to[i] = from[i];
}

__global__ void __launch_bounds__(kNumThreads)
    pack_kernel(const __grid_constant__ LanePackArgs args) {
  uint8_t* scales = args.message + args.num_tokens * args.row_bytes;
  uint8_t* weights = scales + args.num_tokens * args.scale_bytes;
  const int64_t weights_bytes = args.num_topk * args.weight_bytes;
  const int num_pieces = pieces_per_row(args.row_bytes);
  for (int64_t item = first_item(); item < args.num_tokens * num_pieces; item += item_stride()) {
    const Piece piece(args.row_bytes, num_pieces, item);
    const int64_t token = args.tokens[piece.index];
    copy_piece(args.message + piece.index * args.row_bytes, args.x + token * args.row_bytes, piece);
    if (piece.first > 0) continue;
    copy_words(scales + piece.index * args.scale_bytes, args.scales + token * args.scale_bytes,
               args.scale_bytes);
    copy_words(weights + piece.index * weights_bytes, args.topk_weights + token * weights_bytes,
               weights_bytes);
  }
}

/// All lanes: what travels beside the row of a token on local rank `local`, which choice `k`
/// carries.
__device__ void send_side_data(const NodeGroup& node, const HtDispatchArgs& args,
                               const Destinations& to, int64_t token, int k, int local) {
  const HtSizes& sizes = args.sizes;
  const int64_t first = token * sizes.num_topk, row = args.routing.rows[first + k];
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int weight_bytes = sizes.weight_bytes, weight_words = weight_bytes / 4;
  copy_words(to.scales[local] + row * sizes.scale_bytes, args.scales + token * sizes.scale_bytes,
             sizes.scale_bytes);
  if (static_cast<Layout>(sizes.layout) == Layout::kExpertMajor) {
    copy_words(to.topk_weights[local] + row * weight_bytes,
               args.topk_weights + (first + k) * weight_bytes, weight_bytes);
    return;
  }
  const auto* weights = reinterpret_cast<const uint32_t*>(args.topk_weights);
  auto* sent_weights = reinterpret_cast<uint32_t*>(to.topk_weights[local]);
  for (int j = lane; j < sizes.num_topk; j += kWarpSize) {
    const bool is_served = route_rank(args.routing.routes[first + j]) == node.first_rank + local;
    const int64_t element = row * sizes.num_topk + j;
    if (to.topk_idx[local])
      to.topk_idx[local][element] =
          is_served ? node.local_of[args.routing.topk_idx[first + j]] : -1;
    for (int word = 0; sent_weights && word < weight_words; ++word)
      sent_weights[element * weight_words + word] =
          is_served ? weights[(first + j) * weight_words + word] : 0;
  }
}

__global__ void __launch_bounds__(kNumThreads)
    send_kernel(const __grid_constant__ NodeGroup node, const __grid_constant__ HtDispatchArgs args,
                const __grid_constant__ Destinations to) {
  const HtSizes& sizes = args.sizes;
  const int num_pieces = pieces_per_row(sizes.row_bytes);
  for (int64_t item = first_item(); item < sizes.num_tokens * num_pieces; item += item_stride()) {
    const Piece piece(sizes.row_bytes, num_pieces, item);
    for (int k = 0; k < sizes.num_topk; ++k) {
      const int64_t choice = piece.index * sizes.num_topk + k;
      const int32_t route = args.routing.routes[choice];
      if (!carries_row(route)) continue;
      const int local = route_rank(route) - node.first_rank;
      copy_piece(to.x[local] + args.routing.rows[choice] * sizes.row_bytes,
                 args.x + piece.index * sizes.row_bytes, piece);
      if (piece.first == 0) send_side_data(node, args, to, piece.index, k, local);
    }
  }
}

__device__ void zero_rows(uint8_t* base, int64_t row_bytes, int64_t begin, int64_t end) {
  auto* words = reinterpret_cast<uint32_t*>(base + begin * row_bytes);
  for (int64_t i = threadIdx.x; i < (end - begin) * row_bytes / 4; i += blockDim.x) words[i] = 0;
}

/// Groups of this rank, which blocks take in turn.
__device__ void zero_groups(const NodeGroup& node, const HtDispatchArgs& args, uint8_t* pool) {
  const HtSizes& sizes = args.sizes;
  for (int local = blockIdx.x; local < node.num_local_experts; local += gridDim.x) {
    const int64_t begin =
        args.routing.expert_offsets[local] + args.routing.num_recv_tokens_per_expert[local];
    int64_t end = args.routing.expert_offsets[local + 1];
    if (sizes.capacity >= 0) end = min(end, sizes.capacity);
    if (begin >= end) continue;
    zero_rows(pool + args.recv_x, sizes.row_bytes, begin, end);
    if (args.recv_scales >= 0) zero_rows(pool + args.recv_scales, sizes.scale_bytes, begin, end);
    if (args.recv_topk_weights >= 0)
      zero_rows(pool + args.recv_topk_weights, sizes.weight_bytes, begin, end);
  }
}

__device__ void clear_choices(const HtDispatchArgs& args, uint8_t* pool) {
  const HtSizes& sizes = args.sizes;
  const int64_t begin = args.routing.recv_sizes[0] * sizes.num_topk;
  const int64_t end = sizes.capacity * sizes.num_topk, stride = int64_t{gridDim.x} * blockDim.x;
  const int weight_words = sizes.weight_bytes / 4;
  auto* topk_idx = reinterpret_cast<int64_t*>(pool + args.recv_topk_idx);
  auto* weights = reinterpret_cast<uint32_t*>(pool + args.recv_topk_weights);
  for (int64_t i = begin + int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < end; i += stride) {
    if (args.recv_topk_idx >= 0) topk_idx[i] = -1;
    for (int word = 0; args.recv_topk_weights >= 0 && word < weight_words; ++word)
      weights[i * weight_words + word] = 0;
  }
}

__global__ void __launch_bounds__(kNumThreads)
    padding_kernel(const __grid_constant__ NodeGroup node,
                   const __grid_constant__ HtDispatchArgs args, uint8_t* pool) {
  if (static_cast<Layout>(args.sizes.layout) == Layout::kExpertMajor)
    zero_groups(node, args, pool);
  else
    clear_choices(args, pool);
}

}  // namespace

void launch_lane_pack(const LanePackArgs& args, cudaStream_t stream) {
  if (args.num_tokens > 0) pack_kernel<<<args.num_threads, kNumThreads, 0, stream>>>(args);
  EP_CHECK_CUDA(cudaGetLastError());
}

void launch_lane_send(const NodeGroup& node, const HtDispatchArgs& args, const Destinations& to,
                      cudaStream_t stream) {
  if (args.sizes.num_tokens > 0)
    send_kernel<<<args.sizes.num_threads, kNumThreads, 0, stream>>>(node, args, to);
  EP_CHECK_CUDA(cudaGetLastError());
}

void launch_lane_padding(const NodeGroup& node, const HtDispatchArgs& args, uint8_t* pool,
                         cudaStream_t stream) {
  const bool by_expert = static_cast<Layout>(args.sizes.layout) == Layout::kExpertMajor;
  if (by_expert || args.sizes.capacity >= 0)
    padding_kernel<<<args.sizes.num_threads, kNumThreads, 0, stream>>>(node, args, pool);
  EP_CHECK_CUDA(cudaGetLastError());
}

}  // namespace ep::cuda

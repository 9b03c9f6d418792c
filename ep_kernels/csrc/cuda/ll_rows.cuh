#pragma once

#include <cstdint>

#include "core/fp8.h"
#include "core/ll_layout.h"
#include "cuda/device/elements.cuh"
#include "cuda/device/warp.cuh"
#include "cuda/ll_group.h"

// Rows of low-latency mode, a piece of a row per warp: how a piece becomes what travels, and how it
// is weighed and summed. The bits are those of cpu/ll_cast_loops.h and cpu/reduce*.

namespace ep::cuda {

__device__ __forceinline__ uint16_t ll_half_word(const uint4& v, int i) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
  return static_cast<uint16_t>(words[i / 2] >> (16 * (i % 2)));
}

/// One lane's part of a piece, as it travels.
struct LlPiece {
  uint4 data;
  float scale;
};

/// Where a choice of a token goes: its row and the first scale of it; null: nowhere.
struct LlTarget {
  uint8_t* row;
  uint8_t* scales;
};

/// The pieces of rows that travel as bf16: 8 channels per lane.
struct LlSendBF16 {
  static constexpr int kChannels = 8 * kWarpSize;

  static __device__ __forceinline__ LlPiece load(const LlDispatchArgs& args, int64_t token,
                                                 int piece, int lane) {
    const int64_t channel = int64_t{piece} * kChannels + 8 * lane;
    if (channel >= args.sizes.hidden) return {};
    const uint16_t* x = args.x + token * args.sizes.hidden + channel;
    return {load_once(reinterpret_cast<const uint4*>(x)), 0.0f};
  }

  static __device__ __forceinline__ void store(const LlDispatchArgs& args, const LlPiece& piece,
                                               const LlTarget& to, int number, int64_t, int lane) {
    const int64_t channel = int64_t{number} * kChannels + 8 * lane;
    if (channel < args.sizes.hidden)
      store_once(reinterpret_cast<uint4*>(to.row + 2 * channel), piece.data);
  }
};

/// Two elements as e4m3, the first one lower: float_to_e4m3() of each, below 464.
__device__ __forceinline__ uint32_t ll_cast_pair(float first, float second) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(second), "f"(first));
  return pair;
#else
  return float_to_e4m3(first) | uint32_t{float_to_e4m3(second)} << 8;
#endif
}

/// Four channels, two words of bf16, as e4m3.
__device__ __forceinline__ uint32_t ll_cast_four(uint32_t low, uint32_t high, float inverse) {
  const auto scaled = [&](uint32_t bits) { return __fmul_rn(__uint_as_float(bits), inverse); };
  return ll_cast_pair(scaled(low << 16), scaled(low & 0xffff0000u)) |
         ll_cast_pair(scaled(high << 16), scaled(high & 0xffff0000u)) << 16;
}

/// Sixteen channels as e4m3.
__device__ __forceinline__ uint4 ll_cast(const uint4& low, const uint4& high, float inverse) {
  return {ll_cast_four(low.x, low.y, inverse), ll_cast_four(low.z, low.w, inverse),
          ll_cast_four(high.x, high.y, inverse), ll_cast_four(high.z, high.w, inverse)};
}

/// The pieces of rows that travel as e4m3: 16 channels per lane, 8 lanes to a scale.
template <LlFormat kFormat>
struct LlSendFP8 {
  static constexpr int kChannels = 16 * kWarpSize;
  static constexpr int kLanesOfGroup = kScaleGroup / 16;

  /// All lanes. Casts a piece of a row.
  static __device__ __forceinline__ LlPiece cast(const uint16_t* row, int64_t hidden, int piece,
                                                 int lane) {
    const int64_t channel = int64_t{piece} * kChannels + 16 * lane;
    uint4 low{}, high{};
    if (channel < hidden) {
      low = load_once(reinterpret_cast<const uint4*>(row + channel));
      high = load_once(reinterpret_cast<const uint4*>(row + channel) + 1);
    }
    int largest = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      largest = max(largest, static_cast<int>(bf16_magnitude(ll_half_word(low, i))));
      largest = max(largest, static_cast<int>(bf16_magnitude(ll_half_word(high, i))));
    }
#pragma unroll
    for (int mask = kLanesOfGroup / 2; mask > 0; mask /= 2)
      largest = max(largest, __shfl_xor_sync(kAllLanes, largest, mask));
    const Fp8Scale scale = make_fp8_scale(static_cast<int16_t>(largest), kFormat != LlFormat::kFP8);
    return {ll_cast(low, high, scale.inverse), scale.scale};
  }

  static __device__ __forceinline__ LlPiece load(const LlDispatchArgs& args, int64_t token,
                                                 int piece, int lane) {
    return cast(args.x + token * args.sizes.hidden, args.sizes.hidden, piece, lane);
  }

  /// All lanes. The scales of the next channels lie `stride` elements further.
  static __device__ __forceinline__ void store(const LlDispatchArgs& args, const LlPiece& piece,
                                               const LlTarget& to, int number, int64_t stride,
                                               int lane) {
    const int64_t channel = int64_t{number} * kChannels + 16 * lane;
    if (channel < args.sizes.hidden)
      store_once(reinterpret_cast<uint4*>(to.row + channel), piece.data);
    constexpr int kGroups = kWarpSize / kLanesOfGroup;
    if constexpr (kFormat == LlFormat::kFP8UE8M0) {
      uint32_t packed = 0;
#pragma unroll
      for (int i = 0; i < kGroups; ++i)
        packed |= uint32_t{ue8m0(__shfl_sync(kAllLanes, piece.scale, i * kLanesOfGroup))}
                  << (8 * i);
      if (lane == 0)
        store_kept(reinterpret_cast<uint32_t*>(to.scales + number * stride * 4), packed);
    } else {
      const int group = number * kGroups + lane / kLanesOfGroup;
      if (lane % kLanesOfGroup == 0 && group < args.sizes.hidden / kScaleGroup)
        store_kept(reinterpret_cast<uint32_t*>(to.scales + group * stride * 4),
                   __float_as_uint(piece.scale));
    }
  }
};

/// Offset of the first scale of a row in its half.
__device__ __forceinline__ size_t ll_scale_offset(const LlHalfLayout& half, const LlSizes& sizes,
                                                  int64_t local, int64_t row) {
  const int64_t scale_bytes = ll_scale_bytes(static_cast<LlFormat>(sizes.format), sizes.hidden);
  return half.scales + static_cast<size_t>(local * scale_bytes * half.rows_per_expert + 4 * row);
}

/// Whether the rows of a combine travel as e4m3.
__device__ __forceinline__ bool ll_is_compressed(const LlCombineCall& call) {
  return static_cast<LlWire>(call.args.wire) == LlWire::kFP8;
}

/// Bytes from a compressed row of combine to its scales: they follow it.
EP_HOST_DEVICE int64_t ll_wire_scales(int64_t hidden) { return align_up(hidden, int64_t{64}); }

}  // namespace ep::cuda

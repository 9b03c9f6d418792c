#pragma once

#include "nvshmem/exchange.cuh"

// Producers and consumers: rows gathered by token and copied out in the order of their arrival, or
// bytes as they are.

namespace ep::nvshmem {

constexpr int kWarpSize = 32;

/// Lanes of a warp: copies a row in units of T, past the first-level cache.
template <typename T>
__device__ __forceinline__ void copy_units(uint8_t* dst, const uint8_t* src, int64_t num_units) {
  constexpr int kUnroll = 4;
  const auto* from = reinterpret_cast<const T*>(src);
  auto* to = reinterpret_cast<T*>(dst);
  int64_t i = threadIdx.x % kWarpSize;
  for (; i + (kUnroll - 1) * kWarpSize < num_units; i += kUnroll * kWarpSize) {
    T units[kUnroll];
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) units[k] = __ldcg(from + i + k * kWarpSize);
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) to[i + k * kWarpSize] = units[k];
  }
  for (; i < num_units; i += kWarpSize) to[i] = __ldcg(from + i);
}

__device__ __forceinline__ void copy_row(uint8_t* dst, const uint8_t* src, int64_t num_bytes) {
  const auto alignment = reinterpret_cast<uintptr_t>(dst) | reinterpret_cast<uintptr_t>(src) |
                         static_cast<uintptr_t>(num_bytes);
  if (alignment % 16 == 0)
    copy_units<uint4>(dst, src, num_bytes / 16);
  else if (alignment % 4 == 0)
    copy_units<uint32_t>(dst, src, num_bytes / 4);
  else
    copy_units<unsigned char>(dst, src, num_bytes);
}

/// All threads: calls `copy(row)` for each token of a piece, a warp each.
template <typename Copy>
__device__ __forceinline__ void for_rows(const Piece& piece, const Copy& copy) {
  const int num_warps = static_cast<int>(blockDim.x) / kWarpSize;
  for (int64_t row = threadIdx.x / kWarpSize; row < piece.num_tokens; row += num_warps) copy(row);
}

/// Packs the rows of tokens [first_entry, ...) of `tokens`.
struct Gather {
  __device__ void operator()(const Piece& piece, uint8_t* payload) const {
    for_rows(piece, [&](int64_t row) {
      const int64_t entry = piece.first_entry + row;
      const int64_t src_row = piece.args.tokens ? piece.args.tokens[entry] : entry;
      for (int i = 0; i < kMaxLaneSections; ++i) {
        const LaneSection& section = piece.args.sections[i];
        if (section.bytes > 0)
          copy_row(payload + piece.layout.sections[i] + row * section.bytes,
                   section.src + src_row * section.bytes, section.bytes);
      }
    });
  }
};

/// Copies rows to rows [first_entry, ...) of the destination.
struct CopyOut {
  __device__ void operator()(const Piece& piece, const uint8_t* payload) const {
    for_rows(piece, [&](int64_t row) {
      const int64_t dst_row = piece.first_entry + row;
      for (int i = 0; i < kMaxLaneSections; ++i) {
        const LaneSection& section = piece.args.sections[i];
        if (section.bytes > 0)
          copy_row(section.dst + dst_row * section.bytes,
                   payload + piece.layout.sections[i] + row * section.bytes, section.bytes);
      }
    });
  }
};

/// All threads: copies bytes, in large units if addresses allow.
__device__ __forceinline__ void copy_bytes(uint8_t* dst, const uint8_t* src, int64_t num_bytes) {
  constexpr int64_t kStripe = 16 * kWarpSize * 4;  // what a warp copies at once
  const int64_t num_warps = blockDim.x / kWarpSize;
  for (int64_t begin = threadIdx.x / kWarpSize * kStripe; begin < num_bytes;
       begin += num_warps * kStripe) {
    const int64_t left = num_bytes - begin, size = left < kStripe ? left : kStripe;
    const int64_t whole = size / 16 * 16;
    copy_row(dst + begin, src + begin, whole);
    copy_row(dst + begin + whole, src + begin + whole, size - whole);
  }
}

/// A "token" is a byte of section 0, and `first_entry` its place in the source or destination.
struct PackBytes {
  __device__ void operator()(const Piece& piece, uint8_t* payload) const {
    copy_bytes(payload + piece.layout.sections[0], piece.args.sections[0].src + piece.first_entry,
               piece.num_tokens);
  }
};

struct UnpackBytes {
  __device__ void operator()(const Piece& piece, const uint8_t* payload) const {
    copy_bytes(piece.args.sections[0].dst + piece.first_entry, payload + piece.layout.sections[0],
               piece.num_tokens);
  }
};

}  // namespace ep::nvshmem

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

// Elements of a row, sixteen bytes at a time, and their sums. The bits are those of
// cpu/reduce_scalar.h: sums in order, one rounding, one NaN.

namespace ep::cuda {

/// Reads memory that is used once, past the caches.
__device__ __forceinline__ uint4 load_once(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

__device__ __forceinline__ void store_once(uint4* p, const uint4& v) { __stcs(p, v); }

/// Writes a part of a sector that others will fill: it is to stay in L2 until then, or memory is
/// read and written for every part.
__device__ __forceinline__ void store_kept(uint32_t* p, uint32_t v) {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  asm volatile("st.global.L2::cache_hint.u32 [%0], %1, %2;" ::"l"(p), "r"(v), "l"(policy)
               : "memory");
}

/// Eight sums as four words of two 16-bit elements: pack(low, high) rounds two at once, which is
/// several times as fast as one by one, but keeps no NaN as `round` does.
template <typename Pack, typename Round>
__device__ __forceinline__ uint4 pack_halves(const float (&sum)[8], Pack&& pack, Round&& round) {
  uint32_t words[4];
  float total = 0;  // NaN if any of them is
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    words[i] = pack(sum[2 * i], sum[2 * i + 1]);
    total += sum[2 * i] + sum[2 * i + 1];
  }
  if (isnan(total)) {
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = round(sum[2 * i]) | round(sum[2 * i + 1]) << 16;
  }
  return {words[0], words[1], words[2], words[3]};
}

struct BF16 {
  using Acc = float;
  static constexpr int kPerVector = 8;
  static __device__ __forceinline__ void add(float (&sum)[8], const uint4& v) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sum[2 * i] += __uint_as_float(words[i] << 16);
      sum[2 * i + 1] += __uint_as_float(words[i] & 0xffff0000u);
    }
  }
  static __device__ __forceinline__ uint32_t round(float value) {
    return isnan(value) ? 0x7fc0u : __bfloat16_as_ushort(__float2bfloat16_rn(value));
  }
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    uint32_t word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
  }
  static __device__ __forceinline__ uint4 store(const float (&sum)[8]) {
    return pack_halves(sum, pack, round);
  }
};

struct FP16 {
  using Acc = float;
  static constexpr int kPerVector = 8;
  static __device__ __forceinline__ void add(float (&sum)[8], const uint4& v) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sum[2 * i] += __half2float(__ushort_as_half(static_cast<uint16_t>(words[i])));
      sum[2 * i + 1] += __half2float(__ushort_as_half(static_cast<uint16_t>(words[i] >> 16)));
    }
  }
  static __device__ __forceinline__ uint32_t round(float value) {
    return isnan(value) ? 0x7e00u : __half_as_ushort(__float2half_rn(value));
  }
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    uint32_t word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
  }
  static __device__ __forceinline__ uint4 store(const float (&sum)[8]) {
    return pack_halves(sum, pack, round);
  }
};

struct FP32 {
  using Acc = float;
  static constexpr int kPerVector = 4;
  static __device__ __forceinline__ void add(float (&sum)[4], const uint4& v) {
    sum[0] += __uint_as_float(v.x);
    sum[1] += __uint_as_float(v.y);
    sum[2] += __uint_as_float(v.z);
    sum[3] += __uint_as_float(v.w);
  }
  static __device__ __forceinline__ uint32_t bits(float value) {
    return isnan(value) ? 0x7fc00000u : __float_as_uint(value);
  }
  static __device__ __forceinline__ uint4 store(const float (&sum)[4]) {
    return {bits(sum[0]), bits(sum[1]), bits(sum[2]), bits(sum[3])};
  }
};

struct FP64 {
  using Acc = double;
  static constexpr int kPerVector = 2;
  static __device__ __forceinline__ double element(uint32_t low, uint32_t high) {
    return __hiloint2double(static_cast<int>(high), static_cast<int>(low));
  }
  static __device__ __forceinline__ void add(double (&sum)[2], const uint4& v) {
    sum[0] += element(v.x, v.y);
    sum[1] += element(v.z, v.w);
  }
  static __device__ __forceinline__ uint2 bits(double value) {
    if (isnan(value)) return {0u, 0x7ff80000u};
    return {static_cast<uint32_t>(__double2loint(value)),
            static_cast<uint32_t>(__double2hiint(value))};
  }
  static __device__ __forceinline__ uint4 store(const double (&sum)[2]) {
    const uint2 a = bits(sum[0]), b = bits(sum[1]);
    return {a.x, a.y, b.x, b.y};
  }
};

}  // namespace ep::cuda

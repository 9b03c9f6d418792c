#pragma once

#include <cstdint>

// Loads, stores and time that other devices and the host can rely on.

namespace ep::cuda {

/// Publishes `value` in a word that a peer waits for.
///
/// Writer  one thread, after the stores it announces.   Reader  load_flag() on the peer.
/// Order   release.sys: the announced stores are visible before the value is.
__device__ __forceinline__ void store_flag(uint64_t* flag, uint64_t value) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(flag), "l"(value) : "memory");
}

/// Stores and loads of words that say themselves whether they are there. No order.
__device__ __forceinline__ void store_relaxed(uint64_t* word, uint64_t value) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(word), "l"(value) : "memory");
}
__device__ __forceinline__ uint64_t load_relaxed(const uint64_t* word) {
  uint64_t value;
  asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
  return value;
}

/// Order: acquire.sys, pairs with store_flag().
__device__ __forceinline__ uint64_t load_flag(const uint64_t* flag) {
  uint64_t value;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(flag) : "memory");
  return value;
}

/// Order: acquire.sys. For words the host or a peer sets once.
__device__ __forceinline__ uint32_t load_word(const uint32_t* word) {
  uint32_t value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
  return value;
}

/// Order: release.sys.
__device__ __forceinline__ void store_word(uint32_t* word, uint32_t value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(word), "r"(value) : "memory");
}

/// Nanoseconds since some moment, the same on all SMs of a device.
__device__ __forceinline__ uint64_t now_ns() {
  uint64_t ns;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(ns));
  return ns;
}

}  // namespace ep::cuda

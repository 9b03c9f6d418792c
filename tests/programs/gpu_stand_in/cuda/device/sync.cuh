#pragma once

#include <cuda_runtime_api.h>

#include <chrono>
#include <cstdint>
#include <thread>

// Takes the place of csrc/cuda/device/sync.cuh.

namespace ep::cuda {

/// Blocks that wait look again and again: now and then they leave the core to others.
inline uint64_t load_flag(const uint64_t* flag) {
  constexpr int kLoadsPerSleep = 32;
  static thread_local int num_loads = 0;
  if (++num_loads % kLoadsPerSleep == 0)
    std::this_thread::sleep_for(std::chrono::microseconds(500));
  return __atomic_load_n(flag, __ATOMIC_ACQUIRE);
}
inline uint32_t load_word(const uint32_t* word) { return __atomic_load_n(word, __ATOMIC_ACQUIRE); }
inline void store_word(uint32_t* word, uint32_t value) {
  __atomic_store_n(word, value, __ATOMIC_RELEASE);
}
inline uint64_t now_ns() {
  return static_cast<uint64_t>(std::chrono::steady_clock::now().time_since_epoch().count());
}

}  // namespace ep::cuda

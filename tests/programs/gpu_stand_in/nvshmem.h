#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

// The part of NVSHMEM that an exchange uses. Puts and signals are delivered later, by another
// thread, in any order: all that a transport over a network promises is that a put's signal comes
// after its bytes.

constexpr int NVSHMEM_SIGNAL_SET = 1, NVSHMEM_CMP_GE = 1;

inline thread_local int own_pe = 0;

class Network {
 public:
  static Network& get() {
    static Network network;
    return network;
  }

  std::vector<uint8_t*> heaps;

  /// The address of `pointer` of this PE at another.
  uint8_t* at(const void* pointer, int pe) const {
    return heaps[pe] + (static_cast<const uint8_t*>(pointer) - heaps[own_pe]);
  }

  void send(void* dst, const void* src, size_t num_bytes, uint64_t* word, uint64_t value) {
    const std::lock_guard<std::mutex> lock(mutex_);
    under_way_.push_back({dst, src, num_bytes, word, value});
  }

  void start(unsigned seed) {
    is_running_ = true;
    thread_ = std::thread([this, seed] { deliver(seed); });
  }
  void stop() {
    is_running_ = false;
    thread_.join();
  }

 private:
  struct Put {
    void* dst;
    const void* src;  // read when it is delivered
    size_t num_bytes;
    uint64_t* word;
    uint64_t value;
  };

  void deliver(unsigned seed) {
    std::mt19937 random(seed);
    for (bool is_empty = false; is_running_ || !is_empty;) {
      Put put{};
      {
        const std::lock_guard<std::mutex> lock(mutex_);
        is_empty = under_way_.empty();
        if (!is_empty) {
          std::swap(under_way_[random() % under_way_.size()], under_way_.back());
          put = under_way_.back();
          under_way_.pop_back();
        }
      }
      if (is_empty) {
        std::this_thread::sleep_for(std::chrono::microseconds(20));
        continue;
      }
      if (put.num_bytes > 0) std::memcpy(put.dst, put.src, put.num_bytes);
      __atomic_store_n(put.word, put.value, __ATOMIC_RELEASE);
    }
  }

  std::mutex mutex_;
  std::vector<Put> under_way_;
  std::atomic<bool> is_running_{false};
  std::thread thread_;
};

inline void* nvshmem_ptr(const void* pointer, int pe) { return Network::get().at(pointer, pe); }

inline void nvshmemx_signal_op(uint64_t* word, uint64_t value, int, int pe) {
  Network& network = Network::get();
  auto* there = reinterpret_cast<uint64_t*>(network.at(word, pe));
  network.send(nullptr, nullptr, 0, there, value);
}

inline void nvshmemx_putmem_signal_nbi_block(void* dst, const void* src, size_t num_bytes,
                                             uint64_t* word, uint64_t value, int, int pe) {
  __syncthreads();
  Network& network = Network::get();
  auto* there = reinterpret_cast<uint64_t*>(network.at(word, pe));
  if (threadIdx.x == 0) network.send(network.at(dst, pe), src, num_bytes, there, value);
  __syncthreads();
}

inline int nvshmem_uint64_test(uint64_t* word, int, uint64_t value) {
  if (__atomic_load_n(word, __ATOMIC_ACQUIRE) < value) std::abort();  // asked for before it came
  return 1;
}

#pragma once

#include <cstdint>

// Bulk copies between global and shared memory by the copy engine of an SM (sm_90 and newer). Sizes
// and addresses are multiples of 16 bytes.

namespace ep::cuda {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define EP_HAS_BULK_COPY 1
#endif

#if defined(EP_HAS_BULK_COPY)

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

/// Makes a barrier that one arrival and the announced bytes complete.
__device__ __forceinline__ void init_barrier(uint64_t* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)));
}

/// Makes initialised barriers known to the copy engine.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

/// Announces the bytes of a phase of a barrier, once per phase.
__device__ __forceinline__ void expect_bytes(uint64_t* barrier, uint32_t num_bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(num_bytes)
      : "memory");
}

/// Starts a copy into shared memory of bytes that are announced; `barrier` completes its phase when
/// all of them are there.
__device__ __forceinline__ void bulk_load_expected(void* dst, const void* src, uint32_t num_bytes,
                                                   uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(dst)),
      "l"(src), "r"(num_bytes), "r"(shared_address(barrier))
      : "memory");
}

/// Starts a copy into shared memory that is a phase of `barrier` alone.
__device__ __forceinline__ void bulk_load(void* dst, const void* src, uint32_t num_bytes,
                                          uint64_t* barrier) {
  expect_bytes(barrier, num_bytes);
  bulk_load_expected(dst, src, num_bytes, barrier);
}

/// Waits for the phase of `parity` of a barrier. Bounded by the copy, which needs no peer.
__device__ __forceinline__ void wait_barrier(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

/// Starts a copy out of shared memory, as part of this thread's next group.
__device__ __forceinline__ void bulk_store(void* dst, const void* src, uint32_t num_bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(dst),
               "r"(shared_address(src)), "r"(num_bytes)
               : "memory");
}

/// Closes this thread's group of stores.
__device__ __forceinline__ void commit_stores() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

/// Waits until at most `kNumLeft` groups of this thread still read shared memory.
template <int kNumLeft>
__device__ __forceinline__ void wait_stores_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kNumLeft) : "memory");
}

/// Waits until all stores of this thread are written.
__device__ __forceinline__ void wait_stores_written() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

/// Orders written bulk stores before what this thread publishes by ordinary stores.
__device__ __forceinline__ void fence_async_stores() {
  asm volatile("fence.proxy.async;" ::: "memory");
}

#endif  // EP_HAS_BULK_COPY

}  // namespace ep::cuda

#include "bindings/nvshmem_ll_api.h"

#include <memory>

#include "bindings/ll_cuda_handles.h"
#include "nvshmem/ll_memory.h"

using ep::guarded;
using ep::cuda::LowLatency;
using ep::nvshmem::LlMemory;

struct EpNvshmemLlMemory {
  explicit EpNvshmemLlMemory(const LlMemory::Config& config) : impl(config) {}
  LlMemory impl;
};

void ep_nvshmem_ll_abi_sizes(int32_t sizes[4]) {
  sizes[0] = sizeof(EpNvshmemLlConfig);
  ep_cuda_ll_abi_sizes(sizes + 1);
}

int32_t ep_nvshmem_ll_memory_create(const EpNvshmemLlConfig* config, EpNvshmemLlMemory** memory,
                                    uint64_t* region, int32_t* num_far, EpError* error) {
  return guarded(error, [&] {
    const LlMemory::Config created{
        config->device,
        config->rank,
        config->num_ranks,
        config->num_local_ranks,
        config->region_bytes,
        config->timeout_us,
        static_cast<ep::nvshmem::Direct>(config->direct),
        {config->pes, config->pes + config->num_ranks},
        {config->expert_rank, config->expert_rank + config->num_experts}};
    auto made = std::make_unique<EpNvshmemLlMemory>(created);
    *region = reinterpret_cast<uint64_t>(made->impl.region());
    *num_far = __builtin_popcountll(made->impl.far().ranks);
    *memory = made.release();
  });
}

int32_t ep_nvshmem_ll_memory_add_far_rows(EpNvshmemLlMemory* memory, EpError* error) {
  return guarded(error, [&] { memory->impl.add_far_rows(); });
}

int32_t ep_nvshmem_ll_create(EpNvshmemLlMemory* memory, int64_t region_bytes,
                             EpCudaLowLatency** low_latency, EpError* error) {
  return guarded(error, [&] {
    LlMemory& owner = memory->impl;
    const LowLatency::Config config{0, region_bytes, false, owner.far()};
    *low_latency = new EpCudaLowLatency{{owner, config}, owner.group().num_ranks};
  });
}

int32_t ep_nvshmem_ll_memory_leave(EpNvshmemLlMemory* memory, EpError* error) {
  return guarded(error, [&] { memory->impl.leave(); });
}

int32_t ep_nvshmem_ll_memory_destroy(EpNvshmemLlMemory* memory, EpError* error) {
  return guarded(error, [&] { memory->impl.destroy(); });
}

void ep_nvshmem_ll_memory_delete(EpNvshmemLlMemory* memory) { delete memory; }

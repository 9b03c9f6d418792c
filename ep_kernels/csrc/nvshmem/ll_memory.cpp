#include "nvshmem/ll_memory.h"

#include <nvshmem_host.h>

#include <algorithm>

#include "core/check.h"
#include "core/ll_layout.h"
#include "cuda/check_cuda.h"
#include "cuda/device_guard.h"

namespace ep::nvshmem {
namespace {

/// Of each half: at most half as many rows as a half of the region has room for.
int64_t far_half_bytes(int64_t region_bytes, int num_ranks, int num_experts) {
  const LlControlLayout words(num_ranks, num_experts);
  const auto alignment = static_cast<int64_t>(kLlAlignment);
  return align_up(ll_half_bytes(region_bytes, words.num_bytes) / 2, alignment);
}

/// Symmetric memory. Collective.
uint8_t* allocate(int64_t num_bytes) {
  void* memory = nvshmem_align(kLlAlignment, static_cast<size_t>(num_bytes));
  if (memory == nullptr)
    throw DeviceError(concat("the symmetric heap has no ", num_bytes,
                             " bytes left; set NVSHMEM_SYMMETRIC_SIZE before the first buffer"));
  return static_cast<uint8_t*>(memory);
}

bool is_addressed(const LlMemory::Config& config, int peer, const void* address) {
  if (peer == config.rank) return true;
  const bool is_of_node = peer / config.num_local_ranks == config.rank / config.num_local_ranks;
  const bool is_wanted =
      config.direct == Direct::kAll || (config.direct == Direct::kNode && is_of_node);
  return is_wanted && nvshmem_ptr(address, config.pes[peer]) != nullptr;
}

}  // namespace

LlMemory::LlMemory(const Config& config) : config_(config) {
  const int num_ranks = config.num_ranks, num_experts = static_cast<int>(config.expert_rank.size());
  EP_CHECK(num_ranks <= cuda::kMaxRanks, "group: ", num_ranks, " ranks, the limit is ",
           cuda::kMaxRanks);
  cuda::DeviceGuard guard(config.device);
  const ControlLayout control(num_ranks, num_experts);
  const int64_t region_bytes = align_up(config.region_bytes, static_cast<int64_t>(kLlAlignment));
  std::vector<int32_t> tables(config.expert_rank), num_local(num_ranks, 0);
  for (const int32_t rank : config.expert_rank) tables.push_back(num_local[rank]++);
  EP_CHECK(num_local[config.rank] <= cuda::kMaxLocalExperts, "num_experts=", num_experts, ": rank ",
           config.rank, " owns ", num_local[config.rank], ", the limit is ",
           cuda::kMaxLocalExperts);
  const size_t table_bytes = tables.size() * sizeof(int32_t);
  int32_t* on_device = nullptr;
  EP_CHECK_CUDA(cudaMalloc(reinterpret_cast<void**>(&on_device), table_bytes));
  expert_tables_.reset(on_device);
  EP_CHECK_CUDA(cudaMemcpy(on_device, tables.data(), table_bytes, cudaMemcpyHostToDevice));
  // Symmetric memory last: a rank that throws behind it could not give it back alone.
  memory_ = allocate(static_cast<int64_t>(control.num_bytes) + region_bytes);
  const LlControlLayout words(num_ranks, num_experts);
  const int64_t zeroed = static_cast<int64_t>(control.num_bytes) +
                         std::min(region_bytes, static_cast<int64_t>(words.num_bytes));
  EP_CHECK_CUDA(cudaMemset(memory_, 0, static_cast<size_t>(zeroed)));
  group_.rank = config.rank;
  group_.num_ranks = num_ranks;
  group_.num_experts = num_experts;
  group_.num_local_experts = num_local[config.rank];
  group_.placement = {on_device, on_device + num_experts};
  group_.timeout_ns = static_cast<uint64_t>(config.timeout_us) * 1000;
  for (int peer = 0; peer < num_ranks; ++peer) {
    const bool is_direct = is_addressed(config, peer, memory_);
    far_.pes[peer] = static_cast<int16_t>(config.pes[peer]);
    if (!is_direct) far_.ranks |= cuda::ll_bit(peer);
    group_.segments[peer] = is_direct && peer != config.rank
                                ? static_cast<uint8_t*>(nvshmem_ptr(memory_, config.pes[peer]))
                                : memory_;
  }
  EP_CHECK_CUDA(cudaDeviceSynchronize());
}

void LlMemory::add_far_rows() {
  cuda::DeviceGuard guard(config_.device);
  far_.half_bytes = far_half_bytes(config_.region_bytes, group_.num_ranks, group_.num_experts);
  if (far_.half_bytes == 0) return;  // nor has the region room, which calls are told
  far_.rows = allocate(2 * far_.half_bytes);
}

// NOTE: symmetric memory is given back by destroy() only, as that needs all PEs.
LlMemory::~LlMemory() = default;

void LlMemory::DeviceFree::operator()(int32_t* memory) const { cudaFree(memory); }

std::string LlMemory::name_of(int rank) const {
  return concat("rank ", rank, " of node ", rank / config_.num_local_ranks);
}

void LlMemory::check_usable() const {
  EP_CHECK(!has_left_, "this buffer was destroyed and cannot be used any more");
  if (!failure_.empty())
    throw ConfigError(concat("this buffer has failed and cannot be used any more: ", failure_));
}

void LlMemory::fail(const std::string& why) {
  if (failure_.empty()) failure_ = why;
}

uint8_t* LlMemory::region() const { return group_.pool(config_.rank); }

void LlMemory::leave() {
  if (has_left_) return;
  has_left_ = true;
  cuda::DeviceGuard guard(config_.device);
  cuda::LlGroup group{};
  group.group = group_;
  group.far = far_;
  EP_CHECK_CUDA(cudaDeviceSynchronize());
  launch_ll_leave(group, /*tells_far=*/failure_.empty(), nullptr);
  EP_CHECK_CUDA(cudaDeviceSynchronize());
}

void LlMemory::destroy() {
  if (memory_ == nullptr) return;
  cuda::DeviceGuard guard(config_.device);
  EP_CHECK_CUDA(cudaDeviceSynchronize());
  nvshmem_free(memory_);
  if (far_.rows != nullptr) nvshmem_free(far_.rows);
  memory_ = far_.rows = nullptr;
}

}  // namespace ep::nvshmem

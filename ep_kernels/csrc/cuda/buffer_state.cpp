// What a buffer owns: its memory, records, streams and events, and the segments of its peers.

#include <algorithm>

#include "core/check.h"
#include "core/ll_layout.h"
#include "core/math.h"
#include "core/types.h"
#include "cuda/buffer.h"
#include "cuda/check_cuda.h"
#include "cuda/kernels.h"

namespace ep::cuda {
namespace {

template <typename T>
void allocate_device(T** memory, size_t num_bytes) {
  void* address = nullptr;
  EP_CHECK_CUDA(cudaMalloc(&address, num_bytes));
  *memory = static_cast<T*>(address);
}

}  // namespace

Pool::Pool(int on_device, int64_t control_bytes, int64_t pool_bytes)
    : device(on_device), allocator(pool_bytes) {
  DeviceGuard guard(device);
  // NOTE: peers map an allocation of any other size with small pages, at half the write rate.
  constexpr int64_t kPageBytes = int64_t{2} << 20;
  const int64_t num_bytes = align_up(control_bytes + pool_bytes, kPageBytes);
  allocate_device(&segment, static_cast<size_t>(num_bytes));
  EP_CHECK_CUDA(cudaMemset(segment, 0, static_cast<size_t>(control_bytes)));
}

Pool::~Pool() {
  int previous = 0;
  cudaGetDevice(&previous);
  cudaSetDevice(device);
  cudaFree(segment);
  cudaSetDevice(previous);
}

void Received::allocate(const std::shared_ptr<Pool>& pool, const HtSizes& sizes, int64_t num_rows,
                        bool chains_rows) {
  const auto take = [&](Block& block, int64_t bytes_per_row) {
    if (bytes_per_row > 0) block.allocate(pool, num_rows * bytes_per_row);
  };
  const bool by_expert = static_cast<Layout>(sizes.layout) == Layout::kExpertMajor;
  const int64_t choices_per_row = by_expert ? 1 : sizes.num_topk;
  take(x, sizes.row_bytes);
  take(scales, sizes.scale_bytes);
  if (!by_expert) take(topk_idx, choices_per_row * int64_t{sizeof(int64_t)});
  take(topk_weights, choices_per_row * sizes.weight_bytes);
  if (by_expert && chains_rows) take(chain, sizeof(int32_t));
}

Buffer::Buffer(const Config& config) : config_(config) {
  EP_CHECK(config.num_ranks <= kMaxRanks, "group: ", config.num_ranks, " ranks, the limit is ",
           kMaxRanks);
  DeviceGuard guard(config.device);
  control_bytes_ = static_cast<int64_t>(ControlLayout(config.num_ranks, num_experts()).num_bytes);
  pool_ = std::make_shared<Pool>(config.device, control_bytes_, config.pool_bytes);
  const LlControlLayout words(config.num_ranks, num_experts());
  const int64_t num_words =
      std::min(config.low_latency_bytes, static_cast<int64_t>(words.num_bytes));
  EP_CHECK_CUDA(cudaMemset(pool_->segment + control_bytes_, 0, static_cast<size_t>(num_words)));
  EP_CHECK_CUDA(cudaDeviceSynchronize());
  prepare_send();
  prepare_copies();

  std::vector<int32_t> tables(config.expert_rank), num_local(config.num_ranks, 0);
  for (const int32_t rank : config.expert_rank) tables.push_back(num_local[rank]++);
  EP_CHECK(num_local[config.rank] <= kMaxLocalExperts, "num_experts=", num_experts(), ": rank ",
           config.rank, " owns ", num_local[config.rank], ", the limit is ", kMaxLocalExperts);
  allocate_device(&expert_tables_, tables.size() * sizeof(int32_t));
  EP_CHECK_CUDA(cudaMemcpy(expert_tables_, tables.data(), tables.size() * sizeof(int32_t),
                           cudaMemcpyHostToDevice));
  LocalState state{};
  state.bad_choice[0] = INT64_MAX;
  allocate_device(&group_.state, sizeof(LocalState));
  EP_CHECK_CUDA(cudaMemcpy(group_.state, &state, sizeof(LocalState), cudaMemcpyHostToDevice));
  void* records = nullptr;
  EP_CHECK_CUDA(
      cudaHostAlloc(&records, (kNumRecords + 1) * sizeof(CallRecord), cudaHostAllocMapped));
  records_ = static_cast<CallRecord*>(records);
  for (int i = 0; i < kNumRecords + 1; ++i) {
    records_[i] = CallRecord{};
    records_[i].status = static_cast<int32_t>(CallStatus::kOk);
  }

  int lowest_priority = 0, highest_priority = 0;
  EP_CHECK_CUDA(cudaDeviceGetStreamPriorityRange(&lowest_priority, &highest_priority));
  // Few blocks that peers wait for go before the many of a GEMM.
  EP_CHECK_CUDA(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, highest_priority));
  EP_CHECK_CUDA(cudaEventCreateWithFlags(&begin_event_, cudaEventDisableTiming));
  for (auto* events : {&end_events_, &captured_end_events_}) {
    events->resize(kNumRecords);
    for (cudaEvent_t& event : *events)
      EP_CHECK_CUDA(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  }

  group_.rank = config.rank;
  group_.num_ranks = config.num_ranks;
  group_.num_experts = num_experts();
  group_.num_local_experts = num_local[config.rank];
  group_.placement = {expert_tables_, expert_tables_ + num_experts()};
  group_.timeout_ns = static_cast<uint64_t>(config.timeout_us) * 1000;
  group_.segments[config.rank] = pool_->segment;
}

Buffer::~Buffer() {
  try {
    destroy();
  } catch (const Error&) {
    // A dead context cannot be left in better order.
  }
}

cudaIpcMemHandle_t Buffer::memory_handle() const {
  DeviceGuard guard(config_.device);
  cudaIpcMemHandle_t handle;
  EP_CHECK_CUDA(cudaIpcGetMemHandle(&handle, pool_->segment));
  return handle;
}

void Buffer::attach(const cudaIpcMemHandle_t* handles, uint64_t remote_ranks) {
  DeviceGuard guard(config_.device);
  group_.remote_ranks = remote_ranks;
  for (int peer = 0; peer < config_.num_ranks; ++peer) {
    if (peer == config_.rank) continue;
    void* segment = nullptr;
    EP_CHECK_CUDA(cudaIpcOpenMemHandle(&segment, handles[peer], cudaIpcMemLazyEnablePeerAccess));
    group_.segments[peer] = static_cast<uint8_t*>(segment);
  }
}

void Buffer::destroy() {
  if (is_destroyed_) return;
  is_destroyed_ = true;
  DeviceGuard guard(config_.device);
  EP_CHECK_CUDA(cudaDeviceSynchronize());
  const ControlLayout layout = group_.layout();
  const uint32_t departed = 1;
  const size_t offset =
      layout.peer_lines + config_.rank * sizeof(PeerLine) + offsetof(PeerLine, departed);
  for (int peer = 0; peer < config_.num_ranks; ++peer) {
    uint8_t* segment = group_.segments[peer];
    if (peer == config_.rank || segment == nullptr) continue;
    EP_CHECK_CUDA(
        cudaMemcpy(segment + offset, &departed, sizeof(departed), cudaMemcpyHostToDevice));
    EP_CHECK_CUDA(cudaIpcCloseMemHandle(segment));
    group_.segments[peer] = nullptr;
  }
  for (const auto* events : {&end_events_, &captured_end_events_})
    for (cudaEvent_t event : *events) EP_CHECK_CUDA(cudaEventDestroy(event));
  for (const auto& [stream, freed] : freed_) EP_CHECK_CUDA(cudaEventDestroy(freed.event));
  EP_CHECK_CUDA(cudaEventDestroy(begin_event_));
  EP_CHECK_CUDA(cudaStreamDestroy(stream_));
  for (int32_t* memory : old_scratch_) EP_CHECK_CUDA(cudaFree(memory));
  EP_CHECK_CUDA(cudaFree(scratch_));
  EP_CHECK_CUDA(cudaFree(group_.state));
  EP_CHECK_CUDA(cudaFree(expert_tables_));
  EP_CHECK_CUDA(cudaFreeHost(records_));
}

/// Before a dispatch with new routing. Memory that graphs may use stays. If there is none, the
/// peers learn that this rank does not make the call.
void Buffer::take_scratch(int64_t num_tokens, const CallOrder& order) {
  const int64_t needed = (num_chunks(num_tokens) + 1) * (config_.num_ranks + num_experts());
  if (needed <= scratch_elements_) return;
  int32_t* memory = nullptr;
  try {
    allocate_device(&memory, static_cast<size_t>(needed) * sizeof(int32_t));
  } catch (const DeviceError& error) {
    refuse(error.what(), order);
    throw;
  }
  if (scratch_) old_scratch_.push_back(scratch_);
  scratch_ = memory;
  scratch_elements_ = needed;
}

}  // namespace ep::cuda

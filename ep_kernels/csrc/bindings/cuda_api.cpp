#include "bindings/cuda_api.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <utility>

#include "bindings/cuda_handles.h"
#include "bindings/pool_cuda_api.h"
#include "cuda/kernels.h"

using ep::guarded;

struct EpCudaBlock {
  std::shared_ptr<ep::cuda::Pool> pool;
  int64_t offset;
};

static_assert(sizeof(EpReceive) == 5 * 3 * sizeof(int64_t));

namespace {

cudaStream_t as_stream(void* stream) { return static_cast<cudaStream_t>(stream); }

ep::cuda::CallOrder as_order(const EpCallOrder* order) {
  return {as_stream(order->caller), static_cast<cudaEvent_t>(order->previous), order->is_async != 0,
          order->follows_caller != 0};
}

/// Makes the caller the owner of a block.
void hand_out(EpCudaBuffer* buffer, ep::cuda::Block& block, EpReceivedRows* rows) {
  rows->offset = block.offset;
  if (!block.pool) return;
  rows->block = new EpCudaBlock{std::move(block.pool), block.offset};
  block.pool.reset();
  rows->address = buffer->impl.pool_base() + block.offset;
}

}  // namespace

void ep_cuda_abi_sizes(int32_t sizes[8]) {
  sizes[0] = sizeof(EpCallOrder);
  sizes[1] = sizeof(EpCudaConfig);
  sizes[2] = sizeof(ep::HtSizes);
  sizes[3] = sizeof(ep::HtRouting);
  sizes[4] = sizeof(ep::HtDispatchArgs);
  sizes[5] = sizeof(ep::HtCombineArgs);
  sizes[6] = sizeof(EpReceive);
  sizes[7] = sizeof(EpFreshCounts);
}

int32_t ep_cuda_buffer_create(const EpCudaConfig* config, EpCudaBuffer** buffer, uint8_t* handle,
                              EpError* error) {
  return guarded(error, [&] {
    ep::cuda::Buffer::Config created{config->device,
                                     config->rank,
                                     config->num_ranks,
                                     config->pool_bytes,
                                     config->timeout_us,
                                     config->low_latency_bytes,
                                     {}};
    created.expert_rank.assign(config->expert_rank, config->expert_rank + config->num_experts);
    auto made = std::make_unique<EpCudaBuffer>(created);
    const cudaIpcMemHandle_t memory = made->impl.memory_handle();
    std::memcpy(handle, &memory, sizeof(memory));
    ep_cuda_torch_know(made.get());
    *buffer = made.release();
  });
}

int32_t ep_cuda_buffer_attach(EpCudaBuffer* buffer, const uint8_t* handles, uint64_t remote_ranks,
                              EpError* error) {
  return guarded(error, [&] {
    buffer->impl.attach(reinterpret_cast<const cudaIpcMemHandle_t*>(handles), remote_ranks);
  });
}

int32_t ep_cuda_chains_rows(EpCudaBuffer* buffer) { return buffer->impl.chains_rows(); }

int32_t ep_cuda_buffer_destroy(EpCudaBuffer* buffer, EpError* error) {
  return guarded(error, [&] { buffer->impl.destroy(); });
}

void ep_cuda_buffer_delete(EpCudaBuffer* buffer) {
  ep_cuda_torch_forget(buffer);
  delete buffer;
}

int32_t ep_cuda_block_allocate(EpCudaBuffer* buffer, int64_t num_bytes, EpCudaBlock** block,
                               void** address, int64_t* offset, EpError* error) {
  return guarded(error, [&] {
    const auto& pool = buffer->impl.pool();
    *offset = pool->allocator.allocate(num_bytes);
    *block = new EpCudaBlock{pool, *offset};
    *address = buffer->impl.pool_base() + *offset;
  });
}

void ep_cuda_note_free(EpCudaBuffer* buffer, void* stream) {
  guarded(nullptr, [&] { buffer->impl.note_free(as_stream(stream)); });
}

int32_t ep_cuda_wait_for_freed(EpCudaBuffer* buffer, void* stream, EpError* error) {
  return guarded(error, [&] { buffer->impl.wait_for_freed(as_stream(stream)); });
}

void ep_cuda_block_free(EpCudaBlock* block) {
  block->pool->allocator.free(block->offset);
  delete block;
}

void ep_cuda_pool_stats(EpCudaBuffer* buffer, int64_t stats[3]) {
  const ep::PoolAllocator& allocator = buffer->impl.pool()->allocator;
  stats[0] = allocator.num_live();
  stats[1] = allocator.used_bytes();
  stats[2] = allocator.peak_bytes();
}

int32_t ep_cuda_dispatch_fresh(EpCudaBuffer* buffer, const ep::HtDispatchArgs* args,
                               const EpCallOrder* order, EpReceive* receive, EpFreshCounts* counts,
                               int64_t* call, EpError* error) {
  return guarded(error, [&] {
    EpReceivedRows* const rows[] = {&receive->x, &receive->scales, &receive->topk_idx,
                                    &receive->topk_weights, &receive->chain};
    ep::cuda::Received received;
    ep::cuda::Block* const blocks[] = {&received.x, &received.scales, &received.topk_idx,
                                       &received.topk_weights, &received.chain};
    *call = buffer->impl.dispatch_fresh(*args, as_order(order), &received);
    for (int i = 0; i < 5; ++i) hand_out(buffer, *blocks[i], rows[i]);
    const ep::cuda::CallRecord& found = buffer->impl.record(*call);
    const int num_local = buffer->impl.num_local_experts();
    counts->num_rows = found.recv_sizes[0];
    std::copy_n(found.num_recv_tokens_per_expert, num_local, counts->num_recv_tokens_per_expert);
    std::copy_n(found.expert_offsets, num_local + 1, counts->expert_offsets);
  });
}

int32_t ep_cuda_dispatch(EpCudaBuffer* buffer, const ep::HtDispatchArgs* args,
                         const EpCallOrder* order, int64_t* call, EpError* error) {
  return guarded(error, [&] { *call = buffer->impl.dispatch(*args, as_order(order)); });
}

int32_t ep_cuda_combine(EpCudaBuffer* buffer, const ep::HtCombineArgs* args,
                        const EpCallOrder* order, int64_t* call, EpError* error) {
  return guarded(error, [&] { *call = buffer->impl.combine(*args, as_order(order)); });
}

int32_t ep_cuda_barrier(EpCudaBuffer* buffer, const EpCallOrder* order, int64_t* call,
                        EpError* error) {
  return guarded(error, [&] { *call = buffer->impl.barrier(as_order(order)); });
}

int32_t ep_cuda_refuse(EpCudaBuffer* buffer, const char* reason, const EpCallOrder* order,
                       int64_t* call, EpError* error) {
  return guarded(error, [&] { *call = buffer->impl.refuse(reason, as_order(order)); });
}

int32_t ep_cuda_copy_rate(EpCudaBuffer* buffer, int32_t num_blocks, int64_t num_bytes,
                          int64_t offset, const EpCallOrder* order, double* bytes_per_s,
                          EpError* error) {
  return guarded(error, [&] {
    *bytes_per_s = buffer->impl.copy_rate(num_blocks, num_bytes, offset, as_order(order));
  });
}

int32_t ep_cuda_is_finished(EpCudaBuffer* buffer, int64_t call) {
  return buffer->impl.is_finished(call);
}

int32_t ep_cuda_wait(EpCudaBuffer* buffer, int64_t call, EpError* error) {
  return guarded(error, [&] { buffer->impl.wait(call); });
}

int32_t ep_cuda_check(EpCudaBuffer* buffer, int64_t call, EpError* error) {
  return guarded(error, [&] { buffer->impl.check(call); });
}

int32_t ep_cuda_make_stream_wait(EpCudaBuffer* buffer, int64_t call, void* stream, EpError* error) {
  return guarded(error, [&] { buffer->impl.make_stream_wait(call, as_stream(stream)); });
}

void ep_cuda_stamps(EpCudaBuffer* buffer, int64_t call, uint64_t stamps[7]) {
  static_assert(ep::cuda::kNumStamps == 7);
  uint64_t found[ep::cuda::kNumStamps];
  buffer->impl.stamps(call, found);
  std::copy_n(found, ep::cuda::kNumStamps, stamps);
}

void* ep_cuda_end_event(EpCudaBuffer* buffer, int64_t call) { return buffer->impl.end_event(call); }

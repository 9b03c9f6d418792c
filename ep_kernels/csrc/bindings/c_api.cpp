#include "bindings/c_api.h"

#include <memory>
#include <string>

#include "bindings/handles.h"
#include "core/check.h"
#include "cpu/reduce.h"

struct EpBlock {
  std::shared_ptr<ep::cpu::Pool> pool;
  int64_t offset;
};

using ep::guarded;

namespace {

/// Hands out a call; one that has finished reports its error at once.
int32_t hand_out(const std::shared_ptr<ep::PendingOp>& op, bool is_async, EpOp** out) {
  if (!is_async) op->rethrow();
  *out = new EpOp{op};
  return kEpOk;
}

}  // namespace

void ep_abi_sizes(int32_t sizes[6]) {
  sizes[0] = sizeof(EpError);
  sizes[1] = sizeof(EpConfig);
  sizes[2] = sizeof(ep::HtSizes);
  sizes[3] = sizeof(ep::HtRouting);
  sizes[4] = sizeof(ep::HtDispatchArgs);
  sizes[5] = sizeof(ep::HtCombineArgs);
}

const char* ep_simd_name() { return ep::cpu::simd_name(); }

int32_t ep_buffer_create(const EpConfig* config, EpBuffer** buffer, int32_t* fd, EpError* error) {
  return guarded(error, [&] {
    ep::cpu::Buffer::Config created;
    created.exchange = {config->rank,       config->num_ranks,  config->num_experts,
                        config->pool_bytes, config->timeout_us, config->num_local_ranks};
    created.expert_rank.assign(config->expert_rank, config->expert_rank + config->num_experts);
    *buffer = new EpBuffer(created);
    *fd = (*buffer)->impl.exchange().fd();
  });
}

int32_t ep_buffer_attach(EpBuffer* buffer, const int64_t* pids, const int32_t* fds,
                         EpError* error) {
  return guarded(error, [&] { buffer->impl.exchange().attach(pids, fds); });
}

void ep_buffer_close_files(EpBuffer* buffer) { buffer->impl.exchange().close_files(); }

int32_t ep_buffer_destroy(EpBuffer* buffer, EpError* error) {
  return guarded(error, [&] { buffer->impl.destroy(); });
}

void ep_buffer_delete(EpBuffer* buffer) { delete buffer; }

int32_t ep_block_allocate(EpBuffer* buffer, int64_t num_bytes, EpBlock** block, void** address,
                          int64_t* offset, EpError* error) {
  return guarded(error, [&] {
    const auto& pool = buffer->impl.pool();
    *offset = pool->allocator.allocate(num_bytes);
    *block = new EpBlock{pool, *offset};
    *address = buffer->impl.pool_base() + *offset;
  });
}

void ep_block_free(EpBlock* block) {
  block->pool->allocator.free(block->offset);
  delete block;
}

void ep_pool_stats(EpBuffer* buffer, int64_t stats[3]) {
  const ep::PoolAllocator& allocator = buffer->impl.pool()->allocator;
  stats[0] = allocator.num_live();
  stats[1] = allocator.used_bytes();
  stats[2] = allocator.peak_bytes();
}

int32_t ep_count_rows(EpBuffer* buffer, const int64_t* topk_idx, int64_t num_tokens,
                      int32_t num_topk, int32_t* counts, uint8_t* is_token_in_rank,
                      EpError* error) {
  return guarded(error, [&] {
    ep::count_rows(buffer->impl.group(), topk_idx, num_tokens, num_topk, counts, is_token_in_rank);
  });
}

int32_t ep_notify(EpBuffer* buffer, const ep::HtDispatchArgs* args, uint64_t* seq, EpError* error) {
  return guarded(error, [&] { *seq = buffer->impl.notify(*args); });
}

int32_t ep_send(EpBuffer* buffer, uint64_t seq, const ep::HtDispatchArgs* args,
                const char* offer_error, int32_t is_async, EpOp** op, EpError* error) {
  const std::string no_memory = offer_error ? offer_error : "";
  return guarded(error, [&] {
    hand_out(buffer->impl.send(seq, *args, no_memory, is_async != 0), is_async != 0, op);
  });
}

int32_t ep_dispatch(EpBuffer* buffer, const ep::HtDispatchArgs* args, int32_t is_async,
                    uint64_t* seq, EpOp** op, EpError* error) {
  return guarded(error, [&] {
    hand_out(buffer->impl.dispatch(*args, is_async != 0, seq), is_async != 0, op);
  });
}

int32_t ep_combine(EpBuffer* buffer, const ep::HtCombineArgs* args, int32_t is_async, EpOp** op,
                   EpError* error) {
  return guarded(error,
                 [&] { hand_out(buffer->impl.combine(*args, is_async != 0), is_async != 0, op); });
}

int32_t ep_barrier(EpBuffer* buffer, EpError* error) {
  return guarded(error, [&] { buffer->impl.barrier()->rethrow(); });
}

int32_t ep_refuse(EpBuffer* buffer, const char* reason, EpError* error) {
  return guarded(error, [&] { buffer->impl.refuse(reason); });
}

int32_t ep_op_is_finished(const EpOp* op) { return op->impl->is_finished(); }

int32_t ep_op_wait(const EpOp* op, EpError* error) {
  return guarded(error, [&] {
    op->impl->wait();
    op->impl->rethrow();
  });
}

void ep_op_interval(const EpOp* op, int64_t interval_ns[2]) {
  const ep::PendingOp::Interval interval = op->impl->interval();
  interval_ns[0] = interval.begin_ns;
  interval_ns[1] = interval.end_ns;
}

void ep_op_release(EpOp* op) { delete op; }

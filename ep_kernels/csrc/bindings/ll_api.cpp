#include "bindings/ll_api.h"

#include "bindings/handles.h"
#include "core/check.h"
#include "core/ht_plan.h"
#include "core/ll_layout.h"
#include "core/ll_protocol.h"
#include "cpu/low_latency.h"

struct EpLowLatency {
  ep::cpu::LowLatency impl;
  int num_ranks;
};

using ep::guarded;
using ep::cpu::LowLatency;

namespace {

EpOp* hand_out(const LowLatency::Started& started, int32_t receive) {
  const bool is_async = static_cast<LowLatency::Receive>(receive) == LowLatency::Receive::kAsync;
  return is_async ? new EpOp{started.op} : nullptr;
}

}  // namespace

void ep_ll_abi_sizes(int32_t sizes[3]) {
  sizes[0] = sizeof(ep::LlSizes);
  sizes[1] = sizeof(ep::LlDispatchArgs);
  sizes[2] = sizeof(ep::LlCombineArgs);
}

int64_t ep_ll_region_bytes(const ep::LlSizes* sizes, int32_t num_ranks, int32_t num_experts,
                           int32_t num_local_experts) {
  return ep::ll_region_bytes(*sizes, num_ranks, num_experts, num_local_experts);
}

void ep_ll_half_offsets(const ep::LlSizes* sizes, int32_t num_ranks, int32_t num_local_experts,
                        int64_t offsets[3]) {
  const ep::LlHalfLayout half(*sizes, num_ranks, num_local_experts);
  offsets[0] = static_cast<int64_t>(half.x);
  offsets[1] = static_cast<int64_t>(half.scales);
  offsets[2] = static_cast<int64_t>(half.combine);
}

int32_t ep_ll_check_dispatch(const ep::LlDispatchArgs* args, int32_t num_experts, EpError* error) {
  return guarded(error, [&] {
    validate(*args);
    ep::check_choices(num_experts, args->topk_idx, args->sizes.num_tokens, args->sizes.num_topk);
  });
}

int32_t ep_ll_check_combine(const ep::LlCombineArgs* args, const ep::LlSizes* sizes,
                            EpError* error) {
  return guarded(error, [&] {
    validate(*args, *sizes);
    check_routing(*args, *sizes);
  });
}

int32_t ep_ll_check_agreed(int32_t field, int32_t rank, int64_t value, int32_t other,
                           int64_t other_value, EpError* error) {
  return guarded(error, [&] {
    EP_CHECK_AGREED(value == other_value,
                    ep::ll_disagreement(field, rank, value, other, other_value));
  });
}

int32_t ep_ll_create(EpBuffer* buffer, int64_t region, int64_t region_bytes,
                     int32_t mask_silent_ranks, EpLowLatency** low_latency, EpError* error) {
  return guarded(error, [&] {
    const LowLatency::Config config{{region, mask_silent_ranks != 0}, region_bytes};
    *low_latency = new EpLowLatency{{buffer->impl, config}, buffer->impl.group().num_ranks};
  });
}

void ep_ll_delete(EpLowLatency* low_latency) { delete low_latency; }

int32_t ep_ll_dispatch(EpLowLatency* low_latency, const ep::LlDispatchArgs* args, int32_t receive,
                       uint64_t* number, int64_t* window, EpOp** op, EpError* error) {
  return guarded(error, [&] {
    const LowLatency::Started started =
        low_latency->impl.dispatch(*args, static_cast<LowLatency::Receive>(receive));
    *number = started.number;
    *window = started.window;
    *op = hand_out(started, receive);
  });
}

int32_t ep_ll_combine(EpLowLatency* low_latency, const ep::LlCombineArgs* args, int32_t receive,
                      uint64_t* number, EpOp** op, EpError* error) {
  return guarded(error, [&] {
    const LowLatency::Started started =
        low_latency->impl.combine(*args, static_cast<LowLatency::Receive>(receive));
    *number = started.number;
    *op = hand_out(started, receive);
  });
}

int32_t ep_ll_receive(EpLowLatency* low_latency, uint64_t number, EpError* error) {
  return guarded(error, [&] { low_latency->impl.receive(number); });
}

void ep_ll_release(EpLowLatency* low_latency, uint64_t dispatch) {
  low_latency->impl.release(dispatch);
}

int32_t ep_ll_barrier(EpLowLatency* low_latency, EpError* error) {
  return guarded(error, [&] { low_latency->impl.barrier(); });
}

int32_t ep_ll_refuse(EpLowLatency* low_latency, const char* reason, EpError* error) {
  return guarded(error, [&] { low_latency->impl.refuse(reason); });
}

int32_t ep_ll_mask(EpLowLatency* low_latency, int32_t rank, EpError* error) {
  return guarded(error, [&] { low_latency->impl.mask(rank); });
}

int32_t ep_ll_unmask(EpLowLatency* low_latency, int32_t rank, EpError* error) {
  return guarded(error, [&] { low_latency->impl.unmask(rank); });
}

int32_t ep_ll_query_mask(EpLowLatency* low_latency, uint8_t* is_masked, EpError* error) {
  return guarded(error, [&] {
    const ep::RankSet masked = low_latency->impl.masked();
    for (int rank = 0; rank < low_latency->num_ranks; ++rank)
      is_masked[rank] = masked.has(rank) ? 1 : 0;
  });
}

#include "bindings/ll_cuda_api.h"

#include "bindings/ll_cuda_handles.h"

using ep::guarded;
using ep::cuda::LowLatency;

namespace {

cudaStream_t as_stream(void* stream) { return static_cast<cudaStream_t>(stream); }

}  // namespace

void ep_cuda_ll_abi_sizes(int32_t sizes[3]) {
  sizes[0] = sizeof(ep::LlSizes);
  sizes[1] = sizeof(ep::LlDispatchArgs);
  sizes[2] = sizeof(ep::LlCombineArgs);
}

void ep_cuda_ll_delete(EpCudaLowLatency* low_latency) { delete low_latency; }

int32_t ep_cuda_ll_dispatch(EpCudaLowLatency* low_latency, const ep::LlDispatchArgs* args,
                            int32_t receive, void* stream, int64_t* number, int64_t* window,
                            EpError* error) {
  return guarded(error, [&] {
    const LowLatency::Started started = low_latency->impl.dispatch(
        *args, static_cast<LowLatency::Receive>(receive), as_stream(stream));
    *number = started.number;
    *window = started.window;
  });
}

int32_t ep_cuda_ll_combine(EpCudaLowLatency* low_latency, const ep::LlCombineArgs* args,
                           int32_t receive, void* stream, int64_t* number, EpError* error) {
  return guarded(error, [&] {
    *number = low_latency->impl
                  .combine(*args, static_cast<LowLatency::Receive>(receive), as_stream(stream))
                  .number;
  });
}

int32_t ep_cuda_ll_receive(EpCudaLowLatency* low_latency, int64_t number, void* stream,
                           EpError* error) {
  return guarded(error, [&] { low_latency->impl.receive(number, as_stream(stream)); });
}

void ep_cuda_ll_release(EpCudaLowLatency* low_latency, int64_t dispatch) {
  low_latency->impl.release(dispatch);
}

int32_t ep_cuda_ll_barrier(EpCudaLowLatency* low_latency, void* stream, EpError* error) {
  return guarded(error, [&] { low_latency->impl.barrier(as_stream(stream)); });
}

int32_t ep_cuda_ll_refuse(EpCudaLowLatency* low_latency, const char* reason, void* stream,
                          EpError* error) {
  return guarded(error, [&] { low_latency->impl.refuse(reason, as_stream(stream)); });
}

int32_t ep_cuda_ll_mask(EpCudaLowLatency* low_latency, int32_t rank, void* stream, EpError* error) {
  return guarded(error, [&] { low_latency->impl.mask(rank, as_stream(stream)); });
}

int32_t ep_cuda_ll_unmask(EpCudaLowLatency* low_latency, int32_t rank, void* stream,
                          EpError* error) {
  return guarded(error, [&] { low_latency->impl.unmask(rank, as_stream(stream)); });
}

int32_t ep_cuda_ll_query_mask(EpCudaLowLatency* low_latency, uint8_t* is_masked, void* stream,
                              EpError* error) {
  return guarded(error, [&] {
    const ep::cuda::LlRanks masked = low_latency->impl.masked(as_stream(stream));
    for (int rank = 0; rank < low_latency->num_ranks; ++rank)
      is_masked[rank] = ep::cuda::ll_has(masked, rank) ? 1 : 0;
  });
}

int32_t ep_cuda_ll_stamps(EpCudaLowLatency* low_latency, uint64_t* stamps, void* stream,
                          EpError* error) {
  static_assert(ep::cuda::kNumLlStamped == 64 && ep::cuda::kNumLlStamps == 12);
  return guarded(error, [&] { low_latency->impl.stamps(stamps, as_stream(stream)); });
}

int32_t ep_cuda_ll_is_finished(EpCudaLowLatency* low_latency, int64_t number) {
  return low_latency->impl.is_finished(number);
}

int32_t ep_cuda_ll_wait(EpCudaLowLatency* low_latency, int64_t number, EpError* error) {
  return guarded(error, [&] { low_latency->impl.wait(number); });
}

int32_t ep_cuda_ll_check(EpCudaLowLatency* low_latency, int64_t number, EpError* error) {
  return guarded(error, [&] { low_latency->impl.check(number); });
}

int32_t ep_cuda_ll_make_stream_wait(EpCudaLowLatency* low_latency, int64_t number, void* stream,
                                    EpError* error) {
  return guarded(error, [&] { low_latency->impl.make_stream_wait(number, as_stream(stream)); });
}

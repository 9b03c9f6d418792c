#include "bindings/lane_cuda_api.h"

#include <memory>

#include "bindings/cuda_handles.h"
#include "cuda/lane.h"

using ep::guarded;

struct EpCudaLane {
  EpCudaLane(const ep::cuda::Buffer& buffer, const ep::cuda::Lane::Config& config)
      : impl(buffer, config) {}
  ep::cuda::Lane impl;
};

namespace {

cudaStream_t as_stream(void* stream) { return static_cast<cudaStream_t>(stream); }

}  // namespace

void ep_cuda_lane_abi_sizes(int32_t sizes[4]) {
  sizes[0] = sizeof(EpCudaLaneConfig);
  sizes[1] = sizeof(ep::LanePackArgs);
  sizes[2] = sizeof(ep::LaneSums);
  sizes[3] = sizeof(ep::LaneMergeArgs);
}

int32_t ep_cuda_lane_create(EpCudaBuffer* buffer, const EpCudaLaneConfig* config, EpCudaLane** lane,
                            EpError* error) {
  return guarded(error, [&] {
    ep::cuda::Lane::Config created{config->rank, config->num_local_ranks, {}};
    created.expert_rank.assign(config->expert_rank, config->expert_rank + config->num_experts);
    *lane = std::make_unique<EpCudaLane>(buffer->impl, created).release();
  });
}

void ep_cuda_lane_delete(EpCudaLane* lane) { delete lane; }

int32_t ep_cuda_lane_pack(EpCudaLane* lane, const ep::LanePackArgs* args, void* stream,
                          EpError* error) {
  return guarded(error, [&] { lane->impl.pack(*args, as_stream(stream)); });
}

int32_t ep_cuda_lane_send_rows(EpCudaLane* lane, const ep::HtDispatchArgs* args,
                               const ep::Offer* offers, void* stream, EpError* error) {
  return guarded(error, [&] { lane->impl.send_rows(*args, offers, as_stream(stream)); });
}

int32_t ep_cuda_lane_fill_padding(EpCudaLane* lane, const ep::HtDispatchArgs* args, void* stream,
                                  EpError* error) {
  return guarded(error, [&] { lane->impl.fill_padding(*args, as_stream(stream)); });
}

int32_t ep_cuda_lane_stage_rows(EpCudaLane* lane, const ep::HtCombineArgs* args, void* stream,
                                EpError* error) {
  return guarded(error, [&] { lane->impl.stage_rows(*args, as_stream(stream)); });
}

int32_t ep_cuda_lane_reduce_rows(EpCudaLane* lane, const ep::HtCombineArgs* args,
                                 const ep::Offer* offers, void* stream, EpError* error) {
  return guarded(error, [&] { lane->impl.reduce_rows(*args, offers, as_stream(stream)); });
}

int32_t ep_cuda_lane_merge(EpCudaLane* lane, const ep::LaneMergeArgs* args, void* stream,
                           EpError* error) {
  return guarded(error, [&] { lane->impl.merge(*args, as_stream(stream)); });
}

int32_t ep_cuda_lane_copy(EpCudaLane* lane, void* to, const void* of, int64_t num_bytes,
                          void* stream, EpError* error) {
  return guarded(error, [&] { lane->impl.copy(to, of, num_bytes, as_stream(stream)); });
}

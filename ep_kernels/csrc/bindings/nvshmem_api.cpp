#include "bindings/nvshmem_api.h"

#include <cstring>
#include <memory>

#include "nvshmem/lane.h"
#include "nvshmem/world.h"

using ep::guarded;

struct EpNvshmemLane {
  explicit EpNvshmemLane(const ep::nvshmem::Lane::Config& config) : impl(config) {}
  ep::nvshmem::Lane impl;
};

void ep_nvshmem_abi_sizes(int32_t sizes[4]) {
  sizes[0] = sizeof(EpNvshmemConfig);
  sizes[1] = sizeof(ep::nvshmem::LaneSection);
  sizes[2] = sizeof(ep::nvshmem::LaneCounts);
  sizes[3] = sizeof(ep::nvshmem::LaneExchangeArgs);
}

void ep_nvshmem_version(int32_t version[3]) {
  int found[3] = {};
  ep::nvshmem::find_version(found);
  for (int i = 0; i < 3; ++i) version[i] = found[i];
}

int32_t ep_nvshmem_unique_id(uint8_t id[128], EpError* error) {
  return guarded(error, [&] {
    uint8_t made[ep::nvshmem::kUniqueIdBytes];
    ep::nvshmem::make_unique_id(made);
    std::memcpy(id, made, sizeof(made));
  });
}

int32_t ep_nvshmem_join(int32_t device, int32_t pe, int32_t num_pes, const uint8_t* id,
                        EpError* error) {
  return guarded(error, [&] {
    uint8_t given[ep::nvshmem::kUniqueIdBytes];
    std::memcpy(given, id, sizeof(given));
    ep::nvshmem::join_world(device, pe, num_pes, given);
  });
}

int32_t ep_nvshmem_leave(EpError* error) {
  return guarded(error, [] { ep::nvshmem::leave_world(); });
}

int32_t ep_nvshmem_lane_create(const EpNvshmemConfig* config, EpNvshmemLane** lane,
                               int64_t* slot_bytes, EpError* error) {
  return guarded(error, [&] {
    ep::nvshmem::Lane::Config created{config->device,
                                      config->node,
                                      config->num_nodes,
                                      config->num_channels,
                                      config->num_slots,
                                      config->staging_bytes,
                                      config->timeout_us,
                                      config->is_direct != 0,
                                      {config->pes, config->pes + config->num_nodes},
                                      {config->ranks, config->ranks + config->num_nodes}};
    auto made = std::make_unique<EpNvshmemLane>(created);
    *slot_bytes = made->impl.slot_bytes();
    *lane = made.release();
  });
}

int32_t ep_nvshmem_lane_exchange(EpNvshmemLane* lane, const ep::nvshmem::LaneExchangeArgs* args,
                                 void* stream, EpError* error) {
  return guarded(error, [&] { lane->impl.exchange(*args, static_cast<cudaStream_t>(stream)); });
}

int32_t ep_nvshmem_lane_exchange_bytes(EpNvshmemLane* lane,
                                       const ep::nvshmem::LaneExchangeArgs* args, void* stream,
                                       EpError* error) {
  return guarded(error,
                 [&] { lane->impl.exchange_bytes(*args, static_cast<cudaStream_t>(stream)); });
}

int32_t ep_nvshmem_lane_check(EpNvshmemLane* lane, EpError* error) {
  return guarded(error, [&] { lane->impl.check(); });
}

int32_t ep_nvshmem_lane_destroy(EpNvshmemLane* lane, EpError* error) {
  return guarded(error, [&] { lane->impl.destroy(); });
}

void ep_nvshmem_lane_delete(EpNvshmemLane* lane) { delete lane; }

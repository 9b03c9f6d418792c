// The steps of a call that move no rows, one block each.
//
//   post     announce the call, wait for all ranks, compare               post_kernel
//   offer    say where this rank's memory is, wait until all ranks have   offer_kernel
//   finish   of calls that move no rows at all                            finish_kernel

#include "cuda/check_cuda.h"
#include "cuda/device/dependent_launch.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/protocol.cuh"

namespace ep::cuda {
namespace {

constexpr int kNumThreads = 128;

__global__ void __launch_bounds__(kNumThreads)
    post_kernel(const __grid_constant__ DeviceGroup group, const __grid_constant__ PostArgs post,
                CallRecord* record) {
  if (threadIdx.x == 0) stamp(group, kStampBegin);
  if (!is_running(group)) return;
  const uint64_t seq = group.state->num_calls;
  wait_slot(group, record, seq);
  send_post(group, seq, post, nullptr);
  wait_posts(group, record, seq);
  check_agreement(group, record, seq);
  if (threadIdx.x == 0) stamp(group, kStampAgreed);
  let_next_kernel_launch();
}

/// All threads.
__device__ void exchange_offers(const DeviceGroup& group, const Offer& offer, CallRecord* record) {
  const ControlLayout layout = group.layout();
  const uint64_t seq = group.state->num_calls;
  for (int peer = threadIdx.x; peer < group.num_ranks; peer += blockDim.x) {
    const size_t slot = layout.slot(seq, group.rank);
    word<OfferSlot>(group, peer, layout.offers)[slot].offer = offer;
    store_flag(word<uint64_t>(group, peer, layout.offer_flags) + slot, seq + 1);
  }
  for (int peer = threadIdx.x; peer < group.num_ranks; peer += blockDim.x) {
    const size_t slot = layout.slot(seq, peer);
    if (!wait_flag(group, record, word<uint64_t>(group, group.rank, layout.offer_flags) + slot,
                   seq + 1, peer, Phase::kOffer))
      continue;
    group.state->offers[peer] = word<OfferSlot>(group, group.rank, layout.offers)[slot].offer;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  stamp(group, kStampOffered);
  for (int peer = 0; peer < group.num_ranks; ++peer)
    if (group.state->offers[peer].failed && set_status(group, CallStatus::kNoMemory))
      record->rank = peer;
}

/// Runs while the rows are planned, which it has no part in.
__global__ void __launch_bounds__(kNumThreads)
    offer_kernel(const __grid_constant__ DeviceGroup group, const __grid_constant__ Offer offer,
                 CallRecord* record) {
  if (is_running(group)) exchange_offers(group, offer, record);
  wait_for_kernel_before();
  let_next_kernel_launch();
}

__global__ void __launch_bounds__(kNumThreads)
    finish_kernel(const __grid_constant__ DeviceGroup group, CallRecord* record) {
  finish(group, record);
}

}  // namespace

void launch_post(const DeviceGroup& group, const PostArgs& post, CallRecord* record,
                 cudaStream_t stream) {
  post_kernel<<<1, kNumThreads, 0, stream>>>(group, post, record);
  EP_CHECK_CUDA(cudaGetLastError());
}

void launch_offer(const DeviceGroup& group, const Offer& offer, CallRecord* record,
                  cudaStream_t stream) {
  launch_early(offer_kernel, {1, kNumThreads, 0}, stream, group, offer, record);
}

void launch_finish(const DeviceGroup& group, CallRecord* record, cudaStream_t stream) {
  finish_kernel<<<1, kNumThreads, 0, stream>>>(group, record);
  EP_CHECK_CUDA(cudaGetLastError());
}

}  // namespace ep::cuda

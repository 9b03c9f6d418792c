#include "cuda/check_cuda.h"
#include "nvshmem/rows.cuh"

// The exchanges that the host can start.

namespace ep::nvshmem {
namespace {

template <typename Producer, typename Consumer>
__global__ void __launch_bounds__(kExchangeThreads)
    exchange_kernel(const __grid_constant__ DeviceLane lane,
                    const __grid_constant__ LaneExchangeArgs args, int64_t tokens_per_piece) {
  extern __shared__ LaneStream streams[];
  exchange_channel(Channel{lane, streams, static_cast<int>(blockIdx.x)}, args, tokens_per_piece,
                   Producer{}, Consumer{});
}

}  // namespace

void launch_exchange(const DeviceLane& lane, const LaneExchangeArgs& args, int64_t tokens_per_piece,
                     bool is_bytes, cudaStream_t stream) {
  const size_t shared_bytes = size_t{2} * lane.layout.num_peers() * sizeof(LaneStream);
  const auto kernel = is_bytes ? exchange_kernel<PackBytes, UnpackBytes>  //
                               : exchange_kernel<Gather, CopyOut>;
  kernel<<<lane.layout.num_channels, kExchangeThreads, shared_bytes, stream>>>(lane, args,
                                                                               tokens_per_piece);
  EP_CHECK_CUDA(cudaGetLastError());
}

}  // namespace ep::nvshmem

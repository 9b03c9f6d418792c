#define EP_LL_WIRE "nvshmem/ll_wire.cuh"

#include "cuda/check_cuda.h"
#include "cuda/protocol.cuh"
#include "nvshmem/ll_memory.h"
#include "nvshmem/ll_wire.cuh"

namespace ep::nvshmem {
namespace {

__global__ void leave_kernel(const __grid_constant__ cuda::LlGroup g, bool tells_far) {
  // What earlier kernels have begun to put comes first: a post of the last call, for one.
  if (tells_far) cuda::ll_finish_puts();
  const int rank = g.group.rank;
  for (int peer = threadIdx.x; peer < g.group.num_ranks; peer += blockDim.x) {
    if (peer == rank) continue;
    PeerLine& line = cuda::peer_line(g.group, peer, rank);
    if (!cuda::ll_is_far(g, peer))
      cuda::store_word(&line.departed, 1u);
    else if (tells_far)
      nvshmem_uint32_p(&line.departed, 1u, g.far.pes[peer]);
  }
  if (tells_far) cuda::ll_finish_puts();
}

}  // namespace

void launch_ll_leave(const cuda::LlGroup& group, bool tells_far, cudaStream_t stream) {
  leave_kernel<<<1, 64, 0, stream>>>(group, tells_far);
  EP_CHECK_CUDA(cudaGetLastError());
}

}  // namespace ep::nvshmem

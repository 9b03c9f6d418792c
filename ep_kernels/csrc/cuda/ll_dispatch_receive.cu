// The receive half of a low-latency dispatch as a kernel of its own: ll_receive.cuh.

#include "cuda/check_cuda.h"
#include "cuda/ll_kernels.h"
#include "cuda/ll_receive.cuh"

namespace ep::cuda {
namespace {

constexpr int kNumThreads = 512;

__global__ void __launch_bounds__(kNumThreads)
    dispatch_receive_kernel(const __grid_constant__ LlGroup g,
                            const __grid_constant__ LlDispatchCall call) {
  __shared__ LlBoard board;
  ll_receive_rows(g, call, board);
}

}  // namespace

void launch_ll_dispatch_receive(const LlGroup& group, const LlDispatchCall& call,
                                cudaStream_t stream) {
  dispatch_receive_kernel<<<1, kNumThreads, 0, stream>>>(group, call);
  EP_CHECK_CUDA(cudaGetLastError());
}

}  // namespace ep::cuda

// The kernels of cuda/ll_dispatch_send.cu, with far ranks reached by NVSHMEM.

#define EP_LL_WIRE "nvshmem/ll_wire.cuh"
#include "cuda/ll_dispatch_send.cu"

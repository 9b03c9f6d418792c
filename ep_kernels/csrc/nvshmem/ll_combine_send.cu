// The kernels of cuda/ll_combine_send.cu, with far ranks reached by NVSHMEM.

#define EP_LL_WIRE "nvshmem/ll_wire.cuh"
#include "cuda/ll_combine_send.cu"

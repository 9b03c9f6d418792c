#pragma once

// One set of headers serves g++ (CPU backend, host code) and nvcc (kernels).
#if defined(__CUDACC__)
#define EP_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define EP_HOST_DEVICE inline
#endif

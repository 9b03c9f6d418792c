#include "cuda/device_guard.h"

#include "cuda/check_cuda.h"

namespace ep::cuda {

DeviceGuard::DeviceGuard(int device) : device_(device) {
  EP_CHECK_CUDA(cudaGetDevice(&previous_));
  if (previous_ != device) EP_CHECK_CUDA(cudaSetDevice(device));
}

DeviceGuard::~DeviceGuard() {
  if (previous_ != device_) cudaSetDevice(previous_);
}

unsigned long long capture_of(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  EP_CHECK_CUDA(cudaStreamGetCaptureInfo(stream, &status, &id));
  return status == cudaStreamCaptureStatusNone ? 0 : id;
}

}  // namespace ep::cuda

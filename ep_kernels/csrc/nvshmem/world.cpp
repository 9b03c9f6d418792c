#include "nvshmem/world.h"

#include <cuda_runtime_api.h>
#include <nvshmem_host.h>
#include <nvshmemx.h>

#include <cstring>

#include "core/check.h"
#include "cuda/check_cuda.h"

namespace ep::nvshmem {
namespace {

static_assert(sizeof(nvshmemx_uniqueid_t) == kUniqueIdBytes);

/// What NVSHMEM has begun with, which it also wants to end with: a thread begins with GPU 0.
int joined_device = 0;

void require_gpu() {
  int num_devices = 0;
  const cudaError_t status = cudaGetDeviceCount(&num_devices);
  if (status == cudaSuccess && num_devices > 0) return;
  (void)cudaGetLastError();
  throw DeviceError(
      concat("NVSHMEM needs a GPU, and this process sees none (", cudaGetErrorString(status), ")"));
}

}  // namespace

void make_unique_id(uint8_t (&id)[kUniqueIdBytes]) {
  require_gpu();
  nvshmemx_uniqueid_t made = NVSHMEMX_UNIQUEID_INITIALIZER;
  const int status = nvshmemx_get_uniqueid(&made);
  if (status != 0) throw DeviceError(concat("nvshmemx_get_uniqueid: status ", status));
  std::memcpy(id, &made, sizeof(made));
}

void join_world(int device, int pe, int num_pes, const uint8_t (&id)[kUniqueIdBytes]) {
  require_gpu();
  EP_CHECK_CUDA(cudaSetDevice(device));
  EP_CHECK_CUDA(cudaFree(nullptr));
  joined_device = device;
  EP_CHECK(nvshmemx_init_status() == NVSHMEM_STATUS_NOT_INITIALIZED,
           "NVSHMEM is already in use in this process, by other code (status ",
           nvshmemx_init_status(), ")");
  nvshmemx_uniqueid_t unique_id;
  std::memcpy(&unique_id, id, sizeof(unique_id));
  nvshmemx_init_attr_t attributes = NVSHMEMX_INIT_ATTR_INITIALIZER;
  int status = nvshmemx_set_attr_uniqueid_args(pe, num_pes, &unique_id, &attributes);
  if (status != 0) throw DeviceError(concat("nvshmemx_set_attr_uniqueid_args: status ", status));
  status = nvshmemx_init_attr(NVSHMEMX_INIT_WITH_UNIQUEID, &attributes);
  if (status != 0) throw DeviceError(concat("nvshmemx_init_attr: status ", status));
  if (nvshmem_my_pe() != pe || nvshmem_n_pes() != num_pes)
    throw DeviceError(concat("NVSHMEM made this process PE ", nvshmem_my_pe(), " of ",
                             nvshmem_n_pes(), " instead of ", pe, " of ", num_pes));
}

void leave_world() {
  EP_CHECK_CUDA(cudaSetDevice(joined_device));
  nvshmem_finalize();
}

void find_version(int (&version)[3]) {
  nvshmemx_vendor_get_version_info(&version[0], &version[1], &version[2]);
}

}  // namespace ep::nvshmem

#pragma once

#include <stddef.h>
#include <sys/types.h>

#include "bindings/cuda_api.h"

// The pool of a buffer as an allocator of torch (torch.cuda.CUDAPluggableAllocator). Torch says how
// much, on which device and for which stream, but not for which buffer: that is the one that the
// calling thread has chosen. Memory is found again by its address, so freeing needs no choice.

/// Has torch's allocations on this thread come from `buffer`; null: from none. Returns the choice
/// before.
EP_API EpCudaBuffer* ep_cuda_torch_choose(EpCudaBuffer* buffer);

/// Memory of the chosen buffer's pool that `stream` may write to; null if the pool is full, of
/// another device, or none is chosen, which torch reports as torch.OutOfMemoryError.
EP_API void* ep_cuda_torch_allocate(ssize_t num_bytes, int device, void* stream);
/// Torch has no use for the memory any more, but `stream` may still be at work on it. After the end
/// of its buffer, too.
EP_API void ep_cuda_torch_free(void* address, size_t num_bytes, void* stream);
/// A buffer was made, and can be chosen.
void ep_cuda_torch_know(EpCudaBuffer* buffer);
/// Before a buffer is deleted: memory that torch holds stays, but is no longer ordered with calls.
void ep_cuda_torch_forget(EpCudaBuffer* buffer);

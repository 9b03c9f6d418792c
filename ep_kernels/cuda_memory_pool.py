"""Torch's caching allocator on top of a buffer's pool.

A torch.cuda.MemPool for each thread, since torch lets a pool serve one thread at a time, takes its
segments from the compiled core (`csrc/bindings/pool_cuda_api.h`). The core is told by a choice of
the thread for which buffer torch asks. Torch keeps the segments and orders their use as it does for
all its memory: a block belongs to the stream that was current when it was allocated.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ep_kernels import _native_cuda
from ep_kernels.errors import EPDeviceError


@functools.cache
def _allocator() -> Any:
    """One for all pools, which use it until the process ends."""
    if not hasattr(torch._C, "_cuda_beginAllocateCurrentThreadToPool"):
        raise EPDeviceError(
            f"torch {torch.__version__} cannot have one thread allocate from a memory pool; "
            "use Buffer.empty(), or a newer torch"
        )
    return torch.cuda.memory.CUDAPluggableAllocator(
        str(_native_cuda.CUDA_LIBRARY), "ep_cuda_torch_allocate", "ep_cuda_torch_free"
    )


class _Block:
    """A `with` block that may be left for that of another buffer, and come back to."""

    def __init__(self, core: int, pool: Any, device: torch.device) -> None:
        self.core, self._pool, self._device = core, pool, device
        self._library = _native_cuda.cuda_library()
        self._context: Any = None

    def begin(self) -> None:
        self._library.ep_cuda_torch_choose(self.core)
        self._context = torch.cuda.use_mem_pool(self._pool, self._device)
        try:
            self._context.__enter__()
        except BaseException:
            self._library.ep_cuda_torch_choose(None)
            raise

    def end(self) -> None:
        self._library.ep_cuda_torch_choose(None)
        self._context.__exit__(None, None, None)


class _ThisThread(threading.local):
    block: _Block | None = None  # the innermost one that is open


_this_thread = _ThisThread()


class TorchPools:
    """The pools of one buffer, made when first used."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._of_thread = threading.local()

    @contextmanager
    def use(self, core: int) -> Iterator[None]:
        """Has torch allocate from the pool of the buffer `core` on this thread.

        Raises:
            EPDeviceError: this torch cannot.
        """
        outer = _this_thread.block
        if outer is not None and outer.core == core:  # torch refuses a pool that is in use
            yield
            return
        block = _Block(core, self._pool(), self._device)
        # NOTE: torch asks the pool that began first, so the outer one has to end for the while.
        if outer is not None:
            outer.end()
        try:
            block.begin()
            _this_thread.block = block
            try:
                yield
            finally:
                _this_thread.block = outer
                block.end()
        finally:
            if outer is not None:
                outer.begin()

    def _pool(self) -> Any:
        pool = getattr(self._of_thread, "pool", None)
        if pool is None:
            with torch.cuda.device(self._device):  # which the pool belongs to
                pool = torch.cuda.MemPool(_allocator().allocator())
            self._of_thread.pool = pool
        return pool

    def close(self) -> None:
        """Gives back what torch has cached. Segments with live tensors stay, until these are gone
        and torch empties its cache.
        """
        self._of_thread = threading.local()

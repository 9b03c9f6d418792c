"""Rows of low-latency calls over several nodes in the memory of a GPU (ll_memory.py)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch

from ep_kernels.cuda_backend import RawMemory
from ep_kernels.streams import CudaStream, device_errors


class CudaLlMemory:
    """Work runs on a stream of its own, for which the host waits at the end of each half.

    Attributes:
        stream: that one.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.stream = CudaStream(device)

    @contextlib.contextmanager
    def half(self, *, is_caller_waiting: bool = True) -> Iterator[None]:
        if is_caller_waiting:
            self.stream.wait(CudaStream(self._device, self._current_stream()).record())
        with torch.cuda.stream(self.stream.raw):
            yield
        self.stream.synchronize()

    def empty(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)

    def host_memory(self, num_bytes: int) -> torch.Tensor:
        return self.stream.host_memory(num_bytes)

    def at(self, address: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        num_bytes = math.prod(shape) * dtype.itemsize
        if num_bytes == 0:
            return torch.empty(shape, dtype=dtype, device=self._device)
        there = torch.as_tensor(RawMemory(address, num_bytes), device=self._device)
        return there.view(dtype).view(shape)

    def to_host(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        copies = []
        for tensor in tensors:
            copy = self.host_memory(tensor.nbytes).view(tensor.dtype).view(tensor.shape)
            self.stream.copy(copy, tensor)
            copies.append(copy)
        self.stream.synchronize()
        return copies

    def from_host(self, tensor: torch.Tensor) -> torch.Tensor:
        with device_errors():
            return tensor.to(self._device, non_blocking=True)

    def _current_stream(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._device)

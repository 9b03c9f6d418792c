"""Rows of low-latency calls over several nodes in the memory of a GPU (ll_memory.py)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ep_kernels.errors import EPConfigError
from ep_kernels.streams import CudaStream, device_errors


class CudaLlMemory:
    """Work runs on a stream of its own, for which the host waits at the end of each half.

    Attributes:
        stream: that one.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.stream = CudaStream(device)

    def check_callable(self) -> None:
        if torch.cuda.is_current_stream_capturing():
            raise EPConfigError(
                "a call over several nodes cannot be captured in a CUDA graph: the host has a part"
            )

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
        num_bytes = dtype.itemsize
        for size in shape:
            num_bytes *= size
        if num_bytes == 0:
            return torch.empty(shape, dtype=dtype, device=self._device)
        there = torch.as_tensor(_Memory(address, num_bytes), device=self._device)
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


class _Memory:
    """Memory of a GPU, as torch wants to be told of it."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }

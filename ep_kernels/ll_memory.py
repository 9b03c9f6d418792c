"""Where the rows of low-latency calls over several nodes are: LlMemory. Headers, counts and indices
are made on the host wherever that is."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Protocol

import torch

from ep_kernels.cpu_backend import tensor_at


class LlMemory(Protocol):
    """Memory, and the work of torch on it, which is in order within half()."""

    def half(self, *, is_caller_waiting: bool = True) -> contextlib.AbstractContextManager[None]:
        """Work of one half of a call. It comes after what the caller has enqueued by now, unless
        the caller does not wait; when the block is left, it is done.

        Raises:
            EPDeviceError: the device could not do it.
        """

    def empty(self, num_bytes: int) -> torch.Tensor:
        """[num_bytes] uint8."""

    def host_memory(self, num_bytes: int) -> torch.Tensor:
        """[num_bytes] uint8 that from_host() takes without a copy in between."""

    def at(self, address: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor over the caller's memory."""

    def to_host(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Copies, when the work that makes them is done; the same tensors if they are there."""

    def from_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy; the same tensor if rows are in host memory."""


class HostLlMemory:
    """Rows in host memory: all work is done when it is given."""

    def half(self, *, is_caller_waiting: bool = True) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def empty(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    host_memory = empty

    def at(self, address: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return tensor_at(address, shape, dtype)

    def to_host(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return list(tensors)

    def from_host(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

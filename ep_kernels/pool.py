"""Memory of a rank's pool on its way to becoming tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from ep_kernels._native import DispatchArgs


@dataclass(frozen=True, kw_only=True)
class Reservation:
    """A range of the pool for one tensor. It is returned when this object and the tensors that
    tensor() made are gone.

    A call is given the addresses and started first: making tensors takes longer than that.

    Attributes:
        offset: in the pool; 0 for an empty tensor, which nobody writes.
        address: of the first byte; 0 for an empty tensor.
        tensor: makes a tensor over the range.
    """

    offset: int
    address: int
    tensor: Callable[[], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class RowFormat:
    """A result that has a row for each received one.

    Attributes:
        shape: of a row.
        dtype: of its elements.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class ReceiveFormat:
    """What a dispatch is going to fill; None where there is no such result. chain: words for the
    call alone, of rows of which several are sent as one (`csrc/core/routing.h`).
    """

    x: RowFormat
    scales: RowFormat | None
    topk_idx: RowFormat | None
    topk_weights: RowFormat | None
    chain: RowFormat | None


@dataclass(frozen=True, kw_only=True)
class Received:
    """Memory for what a dispatch fills."""

    x: Reservation
    scales: Reservation | None
    topk_idx: Reservation | None
    topk_weights: Reservation | None
    chain: Reservation | None


def reserve_rows(
    reserve: Callable[[tuple[int, ...], torch.dtype], Reservation],
    formats: ReceiveFormat,
    num_rows: int,
) -> Received:
    """Reserves memory for `num_rows` rows. Raises EPDeviceError."""

    def rows(of: RowFormat) -> Reservation:
        return reserve((num_rows, *of.shape), of.dtype)

    def rows_if(of: RowFormat | None) -> Reservation | None:
        return None if of is None else rows(of)

    return Received(
        x=rows(formats.x),
        scales=rows_if(formats.scales),
        topk_idx=rows_if(formats.topk_idx),
        topk_weights=rows_if(formats.topk_weights),
        chain=rows_if(formats.chain),
    )


def point_to(args: DispatchArgs, received: Received) -> None:
    """Tells the core where the memory is: its offsets in the pool, -1 where there is none."""
    args.recv_x = received.x.offset
    args.recv_scales = _offset(received.scales)
    args.recv_topk_idx = _offset(received.topk_idx)
    args.recv_topk_weights = _offset(received.topk_weights)
    args.recv_chain = _offset(received.chain)


def _offset(memory: Reservation | None) -> int:
    return -1 if memory is None else memory.offset


def tensor_of(memory: Reservation | None) -> torch.Tensor | None:
    return None if memory is None else memory.tensor()

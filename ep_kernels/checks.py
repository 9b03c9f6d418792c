"""Checks of what callers pass to dispatch and combine, the same for every backend.

Symbols: T tokens, H hidden, K = num_topk, N rows after dispatch, S scales per token, R ranks,
L experts on this rank.
Every function raises EPConfigError that names the argument and its value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

from ep_kernels.config import Layout
from ep_kernels.errors import EPConfigError
from ep_kernels.event import Event


class _Handle(Protocol):
    """What handles of both modes have."""

    @property
    def owner(self) -> object: ...

    @property
    def seq(self) -> int: ...


ROW_TYPES: dict[torch.dtype, int] = {
    torch.bfloat16: 0,
    torch.float16: 1,
    torch.float32: 2,
    torch.float64: 3,
    torch.float8_e4m3fn: 4,
}
"""dtypes of rows and their codes in the compiled core (`csrc/core/types.h`)."""

SCALE_TYPES: dict[torch.dtype, int] = {torch.float32: 1, torch.int32: 2}
"""dtypes of scales and their codes there; 0 is none."""

H = TypeVar("H", bound=_Handle)

FP8 = torch.float8_e4m3fn
WEIGHT_DTYPES = (torch.float32, torch.float64)
RECV_STATS_DTYPES = (torch.int32, torch.int64)
ROW_ALIGNMENT_BYTES = 16


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows as the caller gave them.

    Attributes:
        x: [T, H].
        scales: [T, S] or None.
    """

    x: torch.Tensor
    scales: torch.Tensor | None

    @property
    def num_tokens(self) -> int:
        return self.x.shape[0]

    @property
    def hidden(self) -> int:
        return self.x.shape[1]

    @property
    def row_bytes(self) -> int:
        return self.hidden * self.x.element_size()

    @property
    def scale_bytes(self) -> int:
        return 0 if self.scales is None else self.scales.shape[1] * self.scales.element_size()

    @property
    def row_type(self) -> int:
        return ROW_TYPES[self.x.dtype]

    @property
    def scale_type(self) -> int:
        return 0 if self.scales is None else SCALE_TYPES[self.scales.dtype]


def _names(dtypes: Any) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def check_tensor(
    name: str, value: Any, *, dtypes: Any, shape: tuple[int | None, ...], device: torch.device
) -> torch.Tensor:
    """A contiguous tensor on `device` of one of `dtypes`; None in `shape` admits any size."""
    if not isinstance(value, torch.Tensor):
        raise EPConfigError(f"{name}={value!r} is a {type(value).__name__}, expected a tensor")
    if value.dtype not in dtypes:
        raise EPConfigError(f"{name} has dtype {value.dtype}, expected one of {_names(dtypes)}")
    if value.device != device:
        raise EPConfigError(f"{name} is on device {value.device}, the buffer is on {device}")
    matches = value.dim() == len(shape) and all(
        want is None or want == got for want, got in zip(shape, value.shape)
    )
    if not matches:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise EPConfigError(f"{name} has shape {tuple(value.shape)}, expected ({wanted})")
    if not value.is_contiguous():
        raise EPConfigError(
            f"{name} is not contiguous: strides {value.stride()} for shape {tuple(value.shape)}"
        )
    return value


def check_topk_idx(
    topk_idx: Any, *, num_tokens: int | None, num_experts: int, device: torch.device
) -> torch.Tensor:
    """[T, K] int64, 1 <= K <= E; None admits any T. The core checks the indices themselves."""
    check_tensor(
        "topk_idx", topk_idx, dtypes=[torch.int64], shape=(num_tokens, None), device=device
    )
    if not 1 <= topk_idx.shape[1] <= num_experts:
        raise EPConfigError(
            f"topk_idx has shape {tuple(topk_idx.shape)}: num_topk={topk_idx.shape[1]} is "
            f"outside [1, num_experts={num_experts}]"
        )
    return topk_idx


def check_handle(handle: Any, kind: type[H], owner: object) -> H:
    """A handle of the kind, made by `owner`."""
    if not isinstance(handle, kind):
        raise EPConfigError(f"handle={handle!r} is not a {kind.__name__}")
    if handle.owner is not owner:
        raise EPConfigError(f"handle (of dispatch {handle.seq}) was made by another buffer")
    return handle


def check_aligned(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """GPUs copy rows in pieces of 16 bytes."""
    if tensor.device.type != "cpu" and tensor.data_ptr() % ROW_ALIGNMENT_BYTES:
        raise EPConfigError(
            f"{name} starts at address {tensor.data_ptr():#x}, expected a multiple of "
            f"{ROW_ALIGNMENT_BYTES}"
        )
    return tensor


def check_rows(x: Any, *, num_rows: int | None, device: torch.device) -> Rows:
    """`x` of a dispatch: [T, H], or the pair ([T, H] float8_e4m3fn, [T, S] scales)."""
    scales = None
    if isinstance(x, (tuple, list)):
        if len(x) != 2:
            raise EPConfigError(f"x is a sequence of {len(x)}, expected a pair (rows, scales)")
        x, scales = x
    x = check_tensor("x", x, dtypes=ROW_TYPES, shape=(num_rows, None), device=device)
    check_aligned("x", x)
    if scales is not None:
        scales = check_tensor(
            "scales", scales, dtypes=SCALE_TYPES, shape=(x.shape[0], None), device=device
        )
        if x.dtype != FP8:
            raise EPConfigError(
                f"scales are given for x of dtype {x.dtype}, expected {_names([FP8])}"
            )
        if scales.shape[1] == 0:
            raise EPConfigError(f"scales has shape {tuple(scales.shape)}: no scales per row")
    rows = Rows(x=x, scales=scales)
    if rows.row_bytes == 0 or rows.row_bytes % ROW_ALIGNMENT_BYTES:
        raise EPConfigError(
            f"x has hidden={rows.hidden} of dtype {x.dtype}: a row of {rows.row_bytes} bytes, "
            f"expected a positive multiple of {ROW_ALIGNMENT_BYTES}"
        )
    return rows


def check_layout(layout: Any) -> Layout:
    if not isinstance(layout, Layout):
        raise EPConfigError(f"layout={layout!r} is not a Layout")
    return layout


def check_int(name: str, value: Any, *, low: int, high: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise EPConfigError(f"{name}={value!r} is a {type(value).__name__}, expected an int")
    if value < low or (high is not None and value > high):
        limit = f"at least {low}" if high is None else f"in [{low}, {high}]"
        raise EPConfigError(f"{name}={value} is out of range, expected {limit}")
    return value


def check_order(async_op: Any, previous_event: Any) -> None:
    """When a call runs."""
    if not isinstance(async_op, bool):
        raise EPConfigError(
            f"async_op={async_op!r} is a {type(async_op).__name__}, expected a bool"
        )
    if previous_event is not None and not isinstance(previous_event, Event):
        kind = type(previous_event).__name__
        raise EPConfigError(f"previous_event={previous_event!r} is a {kind}, expected an Event")


def check_recv_stats(stats: Any, num_local_experts: int, device: torch.device) -> None:
    """`cumulative_recv_stats` of a dispatch in either mode: None, or [L]."""
    if stats is not None:
        check_tensor(
            "cumulative_recv_stats",
            stats,
            dtypes=RECV_STATS_DTYPES,
            shape=(num_local_experts,),
            device=device,
        )


def check_wait_stats(stats: Any, num_ranks: int, device: torch.device) -> None:
    """`wait_recv_cost_stats` of a call in either mode: None, or [R]."""
    if stats is not None:
        check_tensor(
            "wait_recv_cost_stats",
            stats,
            dtypes=[torch.int64],
            shape=(num_ranks,),
            device=device,
        )


def check_biases(bias: Any, x: torch.Tensor, num_tokens: int) -> list[torch.Tensor]:
    """`bias` of a combine: None, [T, H], or a pair of them, of x's dtype."""
    if bias is None:
        return []
    biases = list(bias) if isinstance(bias, (tuple, list)) else [bias]
    if not 1 <= len(biases) <= 2:
        raise EPConfigError(f"bias is a sequence of {len(biases)}, expected one tensor or a pair")
    shape = (num_tokens, x.shape[1])
    for one in biases:
        check_tensor("bias", one, dtypes=[x.dtype], shape=shape, device=x.device)
        check_aligned("bias", one)
    return biases

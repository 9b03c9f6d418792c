"""The calls of Buffer that are timed on GPUs, and the check of their results."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ep_kernels import reference
from ep_kernels.bench.cuda_floors import RowCounts
from ep_kernels.bench.workload import Inputs, Workload, make_inputs
from ep_kernels.buffer import Buffer
from ep_kernels.config import Layout
from ep_kernels.handle import DispatchResult

FP8 = torch.float8_e4m3fn
SCALE_BLOCK = 128

CACHED, FRESH, CAPACITY = "cached", "fresh", "fresh, capacity"
"""Routing: from a handle; with the host waiting for the counts; with neither."""

CHECKED_TOKENS, CHECKED_HIDDEN = 64, 256


@dataclass(frozen=True, kw_only=True)
class Op:
    """Something to time.

    Attributes:
        op: "dispatch" or "combine".
        layout: "rank_major" or "expert_major".
        rows: dtype of the rows that travel.
        routing: how the call learns who gets what.
        by: who does it.
        clock: the one that tells most about it, "events" or "host".
        row_bytes: of a row, scales included.
        num_sms: of a rank; None if that is not ours to say.
        call: what is timed.
    """

    op: str
    layout: str
    rows: str
    routing: str
    by: str
    clock: str
    row_bytes: int
    num_sms: int | None
    call: Callable[[], Any]


def fp8_row_bytes(hidden: int) -> int:
    """An fp8 row and its fp32 scales."""
    return hidden + 4 * math.ceil(hidden / SCALE_BLOCK)


def as_fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """fp8 rows and scales of the right shapes; the scales are not those of the values."""
    num_tokens, hidden = x.shape
    scales = torch.arange(1.0, num_tokens + 1, device=x.device)
    return x.to(FP8), scales[:, None].repeat(1, math.ceil(hidden / SCALE_BLOCK))


def pool_bytes(workload: Workload, counts: RowCounts) -> int:
    """Memory for the results that are alive at once."""
    max_rows = max(counts.max_recv_rows(layout) for layout in counts.rows)
    return (5 * max_rows + 2 * workload.num_tokens) * workload.row_bytes + (256 << 20)


def device_barrier(buffer: Buffer, num_experts: int) -> Callable[[], object]:
    """Something to enqueue on every rank that ends on all devices at once: a dispatch of a row."""
    x = torch.zeros((1, 64), dtype=torch.bfloat16, device=buffer.device)
    topk_idx = torch.full((1, 1), dist.get_rank() % num_experts, device=buffer.device)
    handle = buffer.dispatch(x, topk_idx).handle
    return lambda: buffer.dispatch(x, handle=handle)


@dataclass(frozen=True, kw_only=True)
class BufferCalls:
    """The calls of a buffer, each with `num_sms`, on the tokens of one rank, on its device."""

    buffer: Buffer
    workload: Workload
    inputs: Inputs
    counts: RowCounts
    num_sms: int

    def ops(self) -> Iterator[Op]:
        """One layout after the other. Collective, and to be used up by every rank alike."""
        for layout in self.workload.layouts:
            yield from self._cached(layout)
            yield self._fresh(layout, FRESH, capacity=None)
            # As much as the busiest rank gets: nothing is dropped.
            yield self._fresh(layout, CAPACITY, capacity=self.counts.max_recv_rows(layout))

    def _cached(self, layout: str) -> Iterator[Op]:
        x, call = self.inputs.x, self.buffer.dispatch
        routed = call(x, self.inputs.topk_idx, layout=Layout(layout), num_sms=self.num_sms)
        handle, rows, fp8 = routed.handle, routed.recv_x, as_fp8(x)
        op = self._op("dispatch", layout, lambda: call(x, handle=handle, num_sms=self.num_sms))
        yield op
        yield dataclasses.replace(
            op,
            rows="fp8",
            row_bytes=fp8_row_bytes(self.workload.hidden),
            call=lambda: call(fp8, handle=handle, num_sms=self.num_sms),
        )
        # The rows lie in the pool, as those of experts that write there do.
        combine = self.buffer.combine
        yield self._op("combine", layout, lambda: combine(rows, handle, num_sms=self.num_sms))

    def _fresh(self, layout: str, routing: str, *, capacity: int | None) -> Op:
        def call() -> DispatchResult:
            return self.buffer.dispatch(
                self.inputs.x,
                self.inputs.topk_idx,
                self.inputs.topk_weights,
                layout=Layout(layout),
                capacity=capacity,
                num_sms=self.num_sms,
            )

        op = self._op("dispatch", layout, call)
        return dataclasses.replace(op, routing=routing, clock="host")

    def _op(self, op: str, layout: str, call: Callable[[], Any]) -> Op:
        return Op(
            op=op,
            layout=layout,
            rows=self.workload.dtype,
            routing=CACHED,
            by="ep_kernels",
            clock="events",
            row_bytes=self.workload.row_bytes,
            num_sms=self.num_sms,
            call=call,
        )


# ---- results ---------------------------------------------------------------------------------


def check(buffer: Buffer, workload: Workload, rank: int) -> None:
    """Compares every byte of a few tokens' dispatches and combines with ep_kernels.reference.

    Raises:
        ValueError: naming the operation.
    """
    small = dataclasses.replace(
        workload,
        num_tokens=min(CHECKED_TOKENS, workload.num_tokens),
        hidden=min(CHECKED_HIDDEN, workload.hidden),
    )
    inputs = make_inputs(small, rank)
    with reference.Buffer(num_experts=workload.num_experts) as specification:
        for layout in workload.layouts:
            for rows in (inputs.x, as_fp8(inputs.x)):
                _check_round(buffer, specification, inputs, rows, layout)


def _check_round(
    buffer: Buffer, specification: Any, inputs: Inputs, rows: Any, layout: str
) -> None:
    """`rows` is a tensor, or fp8 rows with scales, which are dispatched only."""
    want = specification.dispatch(rows, inputs.topk_idx, layout=Layout(layout))
    is_fp8 = isinstance(rows, tuple)
    device = buffer.device
    sent = tuple(one.to(device) for one in rows) if is_fp8 else rows.to(device)
    got = buffer.dispatch(sent, inputs.topk_idx.to(device), layout=Layout(layout))
    name = f"{layout} {'fp8' if is_fp8 else rows.dtype}"
    _check_equal(f"dispatch {name}", got.recv_x, want.recv_x)
    if is_fp8:
        _check_equal(f"dispatch {name} scales", got.recv_scales, want.recv_scales)
        return
    summed = buffer.combine(got.recv_x, got.handle).x
    _check_equal(f"combine {name}", summed, specification.combine(want.recv_x, want.handle).x)


def _check_equal(name: str, got: torch.Tensor | None, want: torch.Tensor) -> None:
    if got is None or got.shape != want.shape or not torch.equal(_bytes(got), _bytes(want)):
        raise ValueError(f"{name} differs from the reference")


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu().contiguous().view(torch.uint8)

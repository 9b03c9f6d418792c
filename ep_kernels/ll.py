"""Low-latency calls: from checked arguments to the compiled core and back to results.

Symbols as in buffer.py; M = num_max_tokens_per_rank. docs/low-latency.md has the protocol.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ep_kernels import checks, ll_checks
from ep_kernels._native import address
from ep_kernels._native_ll import (
    RECEIVE_LATER,
    LlCombineArgs,
    LlDispatchArgs,
    LlSizes,
    half_offsets,
    region_bytes,
)
from ep_kernels.errors import EPConfigError
from ep_kernels.event import Event
from ep_kernels.ll_checks import BF16, FP8_UE8M0, WIRE_FORMATS, GroupSizes
from ep_kernels.ll_handle import (
    Hook,
    LowLatencyCombineRequest,
    LowLatencyCombineResult,
    LowLatencyDispatchResult,
    LowLatencyHandle,
    LowLatencyRequest,
)

SCALE_GROUP = 128


class Region(Protocol):
    """The compiled calls of a backend, `cpu_ll.py` or `cuda_ll.py`."""

    def choose_num_sms(self, wanted: int | None, *, default: int) -> int: ...
    def view(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor: ...
    def dispatch(
        self, args: LlDispatchArgs, receive: int, *, keep: Any
    ) -> tuple[int, int, Event | None]: ...
    def combine(
        self, args: LlCombineArgs, receive: int, *, keep: Any
    ) -> tuple[int, Event | None]: ...
    def receive(self, number: int, *, keep: Any) -> None: ...
    def release(self, dispatch: int) -> None: ...
    def barrier(self) -> None: ...
    def refuse(self, reason: str) -> None: ...
    def mask(self, rank: int) -> None: ...
    def unmask(self, rank: int) -> None: ...
    def query_mask(self, num_ranks: int) -> torch.Tensor: ...


def make_sizes(*, num_max_tokens_per_rank: int, hidden: int, format: int = BF16) -> LlSizes:
    """The sizes that decide on memory."""
    return LlSizes(num_max_tokens_per_rank=num_max_tokens_per_rank, hidden=hidden, format=format)


def size_hint(
    *,
    num_max_tokens_per_rank: int,
    hidden: int,
    num_ranks: int,
    num_experts: int,
    num_local_experts: int | None,
) -> int:
    """See Buffer.low_latency_size_hint()."""
    for name, value, high in (
        ("num_max_tokens_per_rank", num_max_tokens_per_rank, ll_checks.MAX_TOKENS),
        ("hidden", hidden, ll_checks.MAX_HIDDEN),
        ("num_ranks", num_ranks, ll_checks.MAX_RANKS),
        ("num_experts", num_experts, ll_checks.MAX_EXPERTS),
    ):
        checks.check_int(name, value, low=1, high=high)
    if num_local_experts is None:
        num_local_experts = -(-num_experts // num_ranks)
    checks.check_int("num_local_experts", num_local_experts, low=1, high=num_experts)
    sizes = make_sizes(num_max_tokens_per_rank=num_max_tokens_per_rank, hidden=hidden)
    return region_bytes(sizes, num_ranks, num_experts, num_local_experts)


@dataclass(frozen=True, kw_only=True)
class _Window:
    """The tensors over one half, for one set of sizes."""

    recv_x: torch.Tensor
    recv_scales: torch.Tensor | None
    combine: torch.Tensor


class LowLatency:
    """The low-latency calls of one buffer."""

    def __init__(self, region: Region, group: GroupSizes, *, rank: int, num_sms: int) -> None:
        self._region, self._group = region, group
        self._identity = object()
        self._rank, self._num_sms = rank, num_sms
        self._windows: dict[tuple[int, int, int, int], _Window] = {}

    # Calls

    def dispatch(
        self, x: Any, topk_idx: Any, request: LowLatencyRequest
    ) -> LowLatencyDispatchResult:
        """See Buffer.low_latency_dispatch()."""
        with self._refusing():
            receive = ll_checks.receive_mode(request)
            row_format = ll_checks.row_format(request)
            ll_checks.check_dispatch(x, topk_idx, request, self._group)
        num_tokens, num_topk = topk_idx.shape
        num_local, num_ranks = self._group.num_local_experts, self._group.num_ranks
        num_choices = num_tokens * num_topk
        device = self._group.device
        num_words = 2 * num_choices + num_local * (1 + num_ranks)
        words = torch.empty(num_words, dtype=torch.int32, device=device)
        missing = torch.empty(num_ranks, dtype=torch.bool, device=device)
        base = words.data_ptr()
        stats = request.cumulative_recv_stats
        args = LlDispatchArgs(
            x=x.data_ptr(),
            topk_idx=topk_idx.data_ptr(),
            experts=base,
            rows=base + 4 * num_choices,
            recv_count=base + 8 * num_choices,
            recv_rank_counts=base + 8 * num_choices + 4 * num_local,
            missing=missing.data_ptr(),
            cumulative_recv_stats=address(stats),
            wait_recv_cost_stats=address(request.wait_recv_cost_stats),
            cumulative_stats_bytes=0 if stats is None else stats.element_size(),
            sizes=LlSizes(
                num_tokens=num_tokens,
                num_max_tokens_per_rank=request.num_max_tokens_per_rank,
                hidden=x.shape[1],
                num_topk=num_topk,
                format=row_format,
                num_threads=self._num_sms,
            ),
        )
        keep = (x, topk_idx, words, missing, request)
        number, at, event = self._region.dispatch(args, receive, keep=keep)
        window = self._window(at, args.sizes)
        handle = LowLatencyHandle(
            owner=self._identity,
            seq=number,
            num_max_tokens_per_rank=request.num_max_tokens_per_rank,
            hidden=x.shape[1],
            routing=words[: 2 * num_choices].view(2, num_tokens, num_topk),
            combine_buffer=window.combine,
        )
        weakref.finalize(handle, self._region.release, number).atexit = False
        counts = words[2 * num_choices :]
        return LowLatencyDispatchResult(
            recv_x=window.recv_x,
            recv_scales=window.recv_scales,
            recv_count=counts[:num_local],
            recv_rank_counts=counts[num_local:].view(num_local, num_ranks),
            missing_ranks=missing,
            handle=handle,
            event=event or Event(),
            hook=self._hook(number, receive, (keep, handle)),
        )

    def combine(
        self,
        x: Any,
        topk_idx: Any,
        topk_weights: Any,
        handle: Any,
        request: LowLatencyCombineRequest,
    ) -> LowLatencyCombineResult:
        """See Buffer.low_latency_combine()."""
        with self._refusing():
            receive = ll_checks.receive_mode(request)
            handle = self._check_handle(handle)
            inputs = ll_checks.CombineInputs(x=x, topk_idx=topk_idx, topk_weights=topk_weights)
            ll_checks.check_combine(inputs, handle, request, self._group)
        out = request.out
        if out is None:
            out = torch.empty(
                handle.num_tokens, handle.hidden, dtype=torch.bfloat16, device=self._group.device
            )
        missing = torch.empty(self._group.num_ranks, dtype=torch.bool, device=self._group.device)
        experts = handle.routing.data_ptr()
        args = LlCombineArgs(
            x=x.data_ptr(),
            topk_idx=topk_idx.data_ptr(),
            topk_weights=topk_weights.data_ptr(),
            experts=experts,
            rows=experts + 4 * handle.num_tokens * handle.num_topk,
            out=out.data_ptr(),
            missing=missing.data_ptr(),
            wait_recv_cost_stats=address(request.wait_recv_cost_stats),
            dispatch=handle.seq,
            wire=WIRE_FORMATS[request.wire_format],
            is_zero_copy=request.zero_copy,
        )
        keep = (x, topk_idx, topk_weights, handle, out, missing, request)
        number, event = self._region.combine(args, receive, keep=keep)
        return LowLatencyCombineResult(
            x=out,
            missing_ranks=missing,
            event=event or Event(),
            hook=self._hook(number, receive, keep),
        )

    def next_combine_buffer(self, handle: Any) -> torch.Tensor:
        """See Buffer.next_low_latency_combine_buffer()."""
        return self._check_handle(handle).combine_buffer

    def barrier(self) -> None:
        self._region.barrier()

    def mask_rank(self, rank: Any, *, masked: bool) -> None:
        """See Buffer.mask_rank()."""
        checks.check_int("rank", rank, low=0, high=self._group.num_ranks - 1)
        if rank == self._rank:
            raise EPConfigError(f"rank={rank} is this rank, which cannot mask itself")
        if masked:
            self._region.mask(rank)
        else:
            self._region.unmask(rank)

    def clear_masks(self) -> None:
        """See Buffer.clear_masks()."""
        self._region.unmask(-1)

    def query_mask(self) -> torch.Tensor:
        """See Buffer.query_mask()."""
        return self._region.query_mask(self._group.num_ranks)

    # Checks

    @contextlib.contextmanager
    def _refusing(self) -> Iterator[None]:
        """Tells the peers, who make the same call, why this rank does not."""
        try:
            yield
        except EPConfigError as error:
            self._region.refuse(str(error))
            raise

    def _check_handle(self, handle: Any) -> LowLatencyHandle:
        return checks.check_handle(handle, LowLatencyHandle, self._identity)

    # Results

    def _window(self, at: int, sizes: LlSizes) -> _Window:
        """The tensors over the half at an offset of the pool. Made once for a set of sizes."""
        key = (at, sizes.num_max_tokens_per_rank, sizes.hidden, sizes.format)
        if key not in self._windows:
            self._windows[key] = self._make_window(at, sizes)
        return self._windows[key]

    def _make_window(self, at: int, sizes: LlSizes) -> _Window:
        num_local, num_ranks = self._group.num_local_experts, self._group.num_ranks
        hidden, row_format = sizes.hidden, sizes.format
        num_rows = num_ranks * sizes.num_max_tokens_per_rank
        shape = (num_local, num_rows, hidden)
        x, scales, combine = half_offsets(sizes, num_ranks, num_local)
        recv_scales = None
        if row_format != BF16:
            num_scales = hidden // (SCALE_GROUP * (4 if row_format == FP8_UE8M0 else 1))
            dtype = torch.int32 if row_format == FP8_UE8M0 else torch.float32
            columns = self._region.view(at + scales, (num_local, num_scales, num_rows), dtype)
            recv_scales = columns.transpose(1, 2)
        row_dtype = torch.bfloat16 if row_format == BF16 else checks.FP8
        return _Window(
            recv_x=self._region.view(at + x, shape, row_dtype),
            recv_scales=recv_scales,
            combine=self._region.view(at + combine, shape, torch.bfloat16),
        )

    def _hook(self, number: int, receive: int, keep: Any) -> Hook | None:
        return _ReceiveHook(self._region, number, keep) if receive == RECEIVE_LATER else None


class _ReceiveHook:
    """Runs the receive half of a call; a second time does nothing."""

    def __init__(self, region: Region, number: int, keep: Any) -> None:
        self._region, self._number = region, number
        self._keep = keep  # what the receive half reads and writes

    def __call__(self) -> None:
        if self._keep is not None:
            self._region.receive(self._number, keep=self._keep)
            self._keep = None

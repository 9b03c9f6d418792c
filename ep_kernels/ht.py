"""High-throughput calls: from checked arguments to the compiled core and back to results.

Symbols as in buffer.py.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch

from ep_kernels import checks
from ep_kernels._native import CombineArgs, DispatchArgs, Routing, Sizes, address
from ep_kernels.backend import Backend, CallOptions
from ep_kernels.config import MAX_NUM_SMS, Layout
from ep_kernels.errors import EPConfigError, EPDeviceError
from ep_kernels.event import Event
from ep_kernels.handle import (
    NUM_CALL_FIELDS,
    CombineResult,
    DispatchHandle,
    DispatchLayout,
    DispatchResult,
    RoutingMemory,
    routing_sizes,
)
from ep_kernels.pool import (
    Received,
    ReceiveFormat,
    Reservation,
    RowFormat,
    point_to,
    reserve_rows,
    tensor_of,
)

_LAYOUT_CODES = {Layout.RANK_MAJOR: 0, Layout.EXPERT_MAJOR: 1}


@dataclass(frozen=True, kw_only=True)
class NewRouting:
    """What a dispatch without a handle is asked for; see Buffer.dispatch()."""

    topk_idx: Any
    layout: Layout
    expert_alignment: int
    capacity: int | None


_Stats = tuple[torch.Tensor | None, torch.Tensor | None]
"""cumulative_recv_stats and wait_recv_cost_stats of a call."""


@dataclass(frozen=True, kw_only=True)
class _Inputs:
    """What the call reads and the statistics that it adds to, kept until it is through: after an
    asynchronous call only we have it."""

    rows: checks.Rows
    weights: torch.Tensor | None
    topk_idx: torch.Tensor | None
    stats: _Stats


class HighThroughput:
    """The calls of one buffer. `num_sms` is the default number of worker threads."""

    def __init__(
        self,
        backend: Backend,
        *,
        num_ranks: int,
        num_experts: int,
        num_local_experts: int,
        num_sms: int,
    ) -> None:
        self._backend = backend
        self._identity = object()
        self._num_ranks, self._num_experts = num_ranks, num_experts
        self._num_local_experts = num_local_experts
        self._num_sms = num_sms

    def get_dispatch_layout(self, topk_idx: torch.Tensor) -> DispatchLayout:
        """See Buffer.get_dispatch_layout()."""
        topk_idx = self._check_topk_idx(topk_idx, None)
        counts, is_token_in_rank = self._backend.count_rows(topk_idx)
        return DispatchLayout(
            num_tokens_per_rank=counts[: self._num_ranks],
            num_tokens_per_expert=counts[self._num_ranks :],
            is_token_in_rank=is_token_in_rank,
        )

    def dispatch(
        self,
        x: Any,
        topk_weights: Any,
        *,
        routing: NewRouting | DispatchHandle,
        options: CallOptions,
    ) -> DispatchResult:
        """See Buffer.dispatch()."""
        self._backend.poll()
        with self._refusing():
            checks.check_order(options.async_op, options.previous_event)
            if isinstance(routing, NewRouting):
                rows = checks.check_rows(x, num_rows=None, device=self._backend.device)
                handle = self._new_handle(routing, rows.num_tokens, options)
            else:
                handle = self._check_handle(routing)
                rows = checks.check_rows(x, num_rows=handle.num_tokens, device=self._backend.device)
            inputs = _Inputs(
                rows=rows,
                weights=self._check_weights(topk_weights, (handle.num_tokens, handle.num_topk)),
                topk_idx=routing.topk_idx if isinstance(routing, NewRouting) else None,
                stats=self._check_stats(options),
            )
            recv_stats, wait_stats = inputs.stats
            args = DispatchArgs(
                x=rows.x.data_ptr(),
                scales=address(rows.scales),
                topk_weights=address(inputs.weights),
                routing=Routing(topk_idx=address(inputs.topk_idx), **handle.memory.addresses()),
                cumulative_recv_stats=address(recv_stats),
                wait_recv_cost_stats=address(wait_stats),
                cumulative_stats_bytes=0 if recv_stats is None else recv_stats.element_size(),
                sizes=self._sizes(rows, handle, inputs.weights, options.num_sms),
            )
            formats = functools.partial(
                _formats, inputs, handle, chains_rows=self._backend.chains_rows
            )
            received = None
            if handle.num_rows >= 0:
                received = reserve_rows(self._backend.reserve, formats(), handle.num_rows)
                point_to(args, received)
        keep = (inputs, handle, received)
        if received is None:
            fresh = self._backend.dispatch_fresh(
                args, handle.memory, formats=formats, keep=keep, options=options
            )
            host = fresh.host
            handle = replace(handle, seq=fresh.seq, num_rows=host.num_rows, host=host)
            return _dispatch_result(handle, fresh.received, fresh.event)
        seq, event = self._backend.dispatch(args, handle.memory, keep=keep, options=options)
        if handle.seq < 0:
            handle = replace(handle, seq=seq)
        return _dispatch_result(handle, received, event)

    def combine(
        self,
        x: Any,
        handle: Any,
        *,
        topk_weights: Any,
        bias: Any,
        options: CallOptions,
    ) -> CombineResult:
        """See Buffer.combine()."""
        self._backend.poll()
        with self._refusing():
            checks.check_order(options.async_op, options.previous_event)
            handle = self._check_handle(handle)
            rows = checks.check_rows(x, num_rows=handle.num_rows, device=self._backend.device)
            if rows.x.dtype == checks.FP8:
                raise EPConfigError(f"x has dtype {rows.x.dtype}, whose rows cannot be summed")
            biases = checks.check_biases(bias, rows.x, handle.num_tokens)
            _, wait_stats = self._check_stats(options)
            by_rank = handle.layout is Layout.RANK_MAJOR
            weights = self._check_weights(
                topk_weights, (handle.num_rows, *([handle.num_topk] if by_rank else []))
            )
            args = CombineArgs(
                x=rows.x.data_ptr(),
                topk_weights=address(weights),
                routing=Routing(**handle.memory.addresses()),
                wait_recv_cost_stats=address(wait_stats),
                num_rows=handle.num_rows,
                sizes=self._sizes(rows, handle, weights, options.num_sms),
            )
            for index, one in enumerate(biases):
                args.bias[index] = one.data_ptr()
            args.pool_x, args.stage_x, staged_x = self._in_pool(rows.x)
            args.pool_topk_weights, args.stage_topk_weights, staged_weights = self._in_pool(weights)
            out = self._backend.reserve((handle.num_tokens, rows.hidden), rows.x.dtype)
            out_weights = (
                None
                if weights is None
                else self._backend.reserve((handle.num_tokens, handle.num_topk), weights.dtype)
            )
        args.out = out.address
        args.out_topk_weights = 0 if out_weights is None else out_weights.address
        inputs = (rows, weights, biases, handle, staged_x, staged_weights, wait_stats)
        keep = (inputs, out, out_weights)
        event = self._backend.combine(args, handle.memory, keep=keep, options=options)
        return CombineResult(x=out.tensor(), topk_weights=tensor_of(out_weights), event=event)

    def refuse(self, reason: str) -> NoReturn:
        """Raises EPConfigError(reason) here and, naming this rank, on the peers."""
        self._backend.refuse(reason)
        raise EPConfigError(reason)

    @contextlib.contextmanager
    def _refusing(self) -> Iterator[None]:
        """Tells the peers, who make the same call, why this rank does not."""
        try:
            yield
        except (EPConfigError, EPDeviceError) as error:
            self._backend.refuse(str(error))
            raise

    def _check_topk_idx(self, topk_idx: Any, num_tokens: int | None) -> torch.Tensor:
        return checks.check_topk_idx(
            topk_idx,
            num_tokens=num_tokens,
            num_experts=self._num_experts,
            device=self._backend.device,
        )

    def _check_weights(self, weights: Any, shape: tuple[int, ...]) -> torch.Tensor | None:
        if weights is None:
            return None
        return checks.check_tensor(
            "topk_weights",
            weights,
            dtypes=checks.WEIGHT_DTYPES,
            shape=shape,
            device=self._backend.device,
        )

    def _check_stats(self, options: CallOptions) -> _Stats:
        recv, wait = options.cumulative_recv_stats, options.wait_recv_cost_stats
        checks.check_recv_stats(recv, self._num_local_experts, self._backend.device)
        checks.check_wait_stats(wait, self._num_ranks, self._backend.device)
        return recv, wait

    def _check_handle(self, handle: Any) -> DispatchHandle:
        return checks.check_handle(handle, DispatchHandle, self._identity)

    def _new_handle(
        self, routing: NewRouting, num_tokens: int, options: CallOptions
    ) -> DispatchHandle:
        """A handle whose routing the call will fill."""
        if routing.topk_idx is None:
            raise EPConfigError("topk_idx=None needs a handle")
        topk_idx = self._check_topk_idx(routing.topk_idx, num_tokens)
        layout, capacity = checks.check_layout(routing.layout), routing.capacity
        checks.check_int("expert_alignment", routing.expert_alignment, low=1, high=1 << 20)
        if capacity is not None:
            checks.check_int("capacity", capacity, low=0, high=(1 << 31) - 1)
        sizes = self._routing_sizes(layout, num_tokens, topk_idx.shape[1])
        words = self._backend.empty_words(RoutingMemory.num_words(**sizes), options=options)
        return DispatchHandle(
            owner=self._identity,
            seq=-1,
            layout=layout,
            expert_alignment=routing.expert_alignment,
            capacity=capacity,
            num_rows=-1 if capacity is None else capacity,
            memory=RoutingMemory(words=words, **sizes),
        )

    def restore_handle(self, words: torch.Tensor, call: torch.Tensor) -> DispatchHandle:
        """See Buffer.restore_handle()."""
        checks.check_tensor(
            "call",
            call,
            dtypes=[torch.int64],
            shape=(NUM_CALL_FIELDS,),
            device=torch.device("cpu"),
        )
        seq, is_by_expert, alignment, capacity, num_tokens, num_topk = call.tolist()
        layout = Layout.EXPERT_MAJOR if is_by_expert else Layout.RANK_MAJOR
        sizes = self._routing_sizes(layout, num_tokens, num_topk)
        checks.check_tensor(
            "words",
            words,
            dtypes=[torch.int64],
            shape=(RoutingMemory.num_words(**sizes),),
            device=self._backend.device,
        )
        return DispatchHandle(
            owner=self._identity,
            seq=seq,
            layout=layout,
            expert_alignment=alignment,
            capacity=capacity,
            num_rows=capacity,
            memory=RoutingMemory(words=words, **sizes),
        )

    def _routing_sizes(self, layout: Layout, num_tokens: int, num_topk: int) -> dict[str, int]:
        return routing_sizes(
            layout,
            num_ranks=self._num_ranks,
            num_local_experts=self._num_local_experts,
            num_tokens=num_tokens,
            num_topk=num_topk,
        )

    def _sizes(
        self,
        rows: checks.Rows,
        handle: DispatchHandle,
        weights: torch.Tensor | None,
        num_sms: int | None,
    ) -> Sizes:
        if num_sms is not None:
            checks.check_int("num_sms", num_sms, low=1, high=MAX_NUM_SMS)
        return Sizes(
            num_tokens=handle.num_tokens,
            row_bytes=rows.row_bytes,
            scale_bytes=rows.scale_bytes,
            capacity=-1 if handle.capacity is None else handle.capacity,
            handle_seq=handle.seq,
            num_topk=handle.num_topk,
            weight_bytes=0 if weights is None else weights.element_size(),
            layout=_LAYOUT_CODES[handle.layout],
            row_type=rows.row_type,
            expert_alignment=handle.expert_alignment,
            num_threads=num_sms or self._num_sms,
            scale_type=rows.scale_type,
        )

    def _in_pool(self, tensor: torch.Tensor | None) -> tuple[int, int, Reservation | None]:
        """Where peers read the tensor: (offset, whether it must be copied there first, memory)."""
        if tensor is None:
            return -1, 0, None
        offset = self._backend.pool_offset(tensor)
        if offset is not None:
            return offset, 0, None
        staging = self._backend.reserve(tuple(tensor.shape), tensor.dtype)
        return staging.offset, 1, staging


def _formats(inputs: _Inputs, handle: DispatchHandle, *, chains_rows: bool) -> ReceiveFormat:
    """What a dispatch fills: choices only if they are new, scales and weights if they are sent."""
    rows, weights = inputs.rows, inputs.weights
    by_rank = handle.layout is Layout.RANK_MAJOR
    choices = (handle.num_topk,) if by_rank else ()
    scales = rows.scales
    return ReceiveFormat(
        x=RowFormat(shape=(rows.hidden,), dtype=rows.x.dtype),
        scales=None if scales is None else RowFormat(shape=(scales.shape[1],), dtype=scales.dtype),
        topk_idx=RowFormat(shape=choices, dtype=torch.int64)
        if by_rank and handle.seq < 0
        else None,
        topk_weights=None if weights is None else RowFormat(shape=choices, dtype=weights.dtype),
        chain=RowFormat(shape=(), dtype=torch.int32) if chains_rows and not by_rank else None,
    )


def _dispatch_result(handle: DispatchHandle, memory: Received, event: Event) -> DispatchResult:
    by_expert = handle.layout is Layout.EXPERT_MAJOR
    counts = handle.host or handle.memory
    return DispatchResult(
        recv_x=memory.x.tensor(),
        recv_scales=tensor_of(memory.scales),
        recv_topk_idx=tensor_of(memory.topk_idx),
        recv_topk_weights=tensor_of(memory.topk_weights),
        num_recv_tokens_per_expert=counts.num_recv_tokens_per_expert,
        expert_offsets=counts.expert_offsets if by_expert else None,
        num_overflow=handle.memory.recv_sizes[2:3],
        handle=handle,
        event=event,
    )

"""ep_kernels.Buffer on top of collectives that gather everything everywhere."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from ep_kernels.bootstrap import make_bootstrap
from ep_kernels.config import Layout
from ep_kernels.errors import EPConfigError
from ep_kernels.handle import CombineResult, DispatchLayout, DispatchResult
from ep_kernels.reference import checks, spec
from ep_kernels.topology import Topology

Bias = torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Handle:
    """The routing of one dispatch, of all ranks.

    Attributes:
        buffer: the buffer that made it.
        number: how many dispatches the buffer had made before.
        layout, expert_alignment: of the dispatch.
        topk_idxs, capacities: of every rank.
        rows: what every rank received.
    """

    buffer: Buffer
    number: int
    layout: Layout
    expert_alignment: int
    topk_idxs: list[torch.Tensor]
    capacities: list[int | None]
    rows: list[spec.RecvRows]

    @property
    def expert_offsets(self) -> torch.Tensor | None:
        return self.rows[self.buffer.rank].expert_offsets

    @property
    def rank_counts(self) -> torch.Tensor:
        layouts = [spec.get_dispatch_layout(idx, self.buffer.placement) for idx in self.topk_idxs]
        return torch.stack([layout.num_tokens_per_rank for layout in layouts]).long()


@dataclass(frozen=True)
class _FreshRouting:
    """The arguments of a dispatch that are not given when a handle is."""

    topk_idx: torch.Tensor | None
    layout: Layout
    expert_alignment: int
    capacity: int | None


@dataclass(frozen=True)
class _Call:
    """What a rank announces about a call: properties that must agree, an error, its data, when."""

    fields: dict[str, Any]
    error: str | None
    data: Any
    time_ns: int


class Buffer:
    """Same constructor, methods, results and errors as ep_kernels.Buffer; see there.

    Every call gathers the arguments of all ranks as Python objects and evaluates the functions of
    `reference.spec`. There is no pool, no timeout and nothing asynchronous:
    `pool_bytes`, `timeout_s`, `num_sms` and `staging_bytes` are accepted and have no effect, events
    are complete. Nodes matter for the order of sums only; None for `num_local_ranks` is one node.
    """

    def __init__(
        self,
        group: Any = None,
        *,
        num_experts: int,
        expert_to_rank: torch.Tensor | Sequence[int] | str | None = None,
        device: str | torch.device = "cpu",
        pool_bytes: int | None = None,
        timeout_s: float | None = None,
        num_sms: int | None = None,
        num_local_ranks: int | None = None,
        staging_bytes: int | None = None,
    ) -> None:
        del pool_bytes, staging_bytes
        self._bootstrap = make_bootstrap(group)
        self.rank, self.num_ranks = self._bootstrap.rank, self._bootstrap.num_ranks
        self.num_experts = num_experts
        self.device = torch.device(device)
        self.timeout_s = 60.0 if timeout_s is None else timeout_s
        self.num_sms = 1 if num_sms is None else num_sms
        self._num_dispatches = 0
        self._is_destroyed = False
        fields: dict[str, Any] = {}
        with _Refusal() as refusal:
            checks.check_int("num_experts", num_experts, 1)
            checks.check_int("num_sms", self.num_sms, 1)
            checks.check(self.timeout_s > 0, f"timeout_s={timeout_s} is not positive")
            checks.check(self.device.type == "cpu", f"device={device}: only cpu is supported")
            self.placement = spec.make_placement(num_experts, self.num_ranks, expert_to_rank)
            num_local_ranks = self.num_ranks if num_local_ranks is None else num_local_ranks
            checks.check_int("num_local_ranks", num_local_ranks, 1)
            checks.check(
                self.num_ranks % num_local_ranks == 0,
                f"num_local_ranks={num_local_ranks} does not divide num_ranks={self.num_ranks}",
            )
            fields = {
                "num_experts": num_experts,
                "expert_to_rank": self.placement.rank_of.tolist(),
                "device": self.device.type,
                "num_local_ranks": num_local_ranks,
            }
            self.topology = Topology(
                rank=self.rank, num_ranks=self.num_ranks, num_local_ranks=num_local_ranks
            )
        self._exchange("Buffer", fields, refusal.message)

    @property
    def local_experts(self) -> list[int]:
        return self.placement.experts_of(self.rank)

    @property
    def num_local_experts(self) -> int:
        return len(self.local_experts)

    def get_dispatch_layout(self, topk_idx: torch.Tensor) -> DispatchLayout:
        self._check_alive()
        checks.check_topk_idx(topk_idx, None, self.num_experts)
        return spec.get_dispatch_layout(topk_idx, self.placement)

    def dispatch(
        self,
        x: spec.Rows,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        *,
        layout: Layout = Layout.RANK_MAJOR,
        expert_alignment: int = 1,
        capacity: int | None = None,
        handle: Handle | None = None,
        async_op: bool = False,
        previous_event: Any = None,
        num_sms: int | None = None,
        cumulative_recv_stats: torch.Tensor | None = None,
        wait_recv_cost_stats: torch.Tensor | None = None,
    ) -> DispatchResult:
        del async_op
        self._check_alive()
        routing = _FreshRouting(topk_idx, layout, expert_alignment, capacity)
        fields: dict[str, Any] = {}
        with _Refusal() as refusal:
            num_tokens, num_topk = self._check_routing(routing, handle)
            checks.check_dispatch_rows(x, num_tokens)
            checks.check_weights(topk_weights, (num_tokens, num_topk))
            if num_sms is not None:
                checks.check_int("num_sms", num_sms, 1)
            self._check_stats(cumulative_recv_stats, wait_recv_cost_stats)
            fields = _routing_fields(routing, handle) | _row_fields(x, topk_weights)
        _wait(previous_event)
        sent = None if refusal.message else (_packed(x), topk_weights, routing)
        calls = self._exchange("dispatch", fields, refusal.message, sent, wait_recv_cost_stats)
        xs, weights, routings = zip(*calls)
        is_cached = handle is not None
        if handle is None:
            handle = self._new_handle(routings)
        result = spec.dispatch(
            [_unpacked(x) for x in xs],
            handle.topk_idxs,
            None if topk_weights is None else weights,
            placement=self.placement,
            rank=self.rank,
            layout=handle.layout,
            expert_alignment=handle.expert_alignment,
            capacity=handle.capacities[self.rank],
        )
        if cumulative_recv_stats is not None:
            cumulative_recv_stats += result.num_recv_tokens_per_expert
        recv_topk_idx = None if is_cached else result.recv_topk_idx
        return replace(result, handle=handle, recv_topk_idx=recv_topk_idx)

    def combine(
        self,
        x: torch.Tensor,
        handle: Handle,
        *,
        topk_weights: torch.Tensor | None = None,
        bias: Bias = None,
        async_op: bool = False,
        previous_event: Any = None,
        num_sms: int | None = None,
        wait_recv_cost_stats: torch.Tensor | None = None,
    ) -> CombineResult:
        del async_op
        self._check_alive()
        fields: dict[str, Any] = {}
        with _Refusal() as refusal:
            self._check_handle(handle)
            num_rows = len(handle.rows[self.rank].src_rank)
            num_tokens, num_topk = handle.topk_idxs[self.rank].shape
            is_rank_major = handle.layout is Layout.RANK_MAJOR
            checks.check_tensor("x", x, dtypes=checks.ROW_DTYPES, shape=(num_rows, None))
            checks.check_row_bytes("x", x)
            checks.check_weights(
                topk_weights, (num_rows, num_topk) if is_rank_major else (num_rows,)
            )
            checks.check_bias(bias, x, num_tokens)
            if num_sms is not None:
                checks.check_int("num_sms", num_sms, 1)
            self._check_stats(None, wait_recv_cost_stats)
            fields = {"handle": handle.number} | _row_fields(x, topk_weights)
        _wait(previous_event)
        sent = (x, topk_weights)
        calls = self._exchange("combine", fields, refusal.message, sent, wait_recv_cost_stats)
        xs, weights = zip(*calls)
        return spec.combine(
            xs,
            handle.rows,
            handle.topk_idxs[self.rank],
            placement=self.placement,
            rank=self.rank,
            topk_weights=None if topk_weights is None else weights,
            bias=bias,
            num_local_ranks=self.topology.num_local_ranks,
        )

    def empty(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        self._check_alive()
        return torch.empty(*shape, dtype=dtype)

    @contextmanager
    def memory_pool(self) -> Iterator[None]:
        self._check_alive()
        yield

    def barrier(self) -> None:
        self._check_alive()
        self._exchange("barrier", {}, None)

    def destroy(self) -> None:
        self._is_destroyed = True

    def __enter__(self) -> Buffer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.destroy()

    def _exchange(
        self,
        operation: str,
        fields: dict[str, Any],
        error: str | None,
        data: Any = None,
        waited_us: torch.Tensor | None = None,
    ) -> list[Any]:
        """The data of all ranks, or the same refusal on all of them. Adds to `waited_us` how much
        later than this rank each one came."""
        now_ns = time.time_ns()
        announced = {"operation": operation, **fields}
        mine = _Call(announced, error, data if error is None else None, now_ns)
        calls: list[_Call] = self._bootstrap.all_gather(mine)
        if error is not None:
            raise EPConfigError(error)
        for rank, call in enumerate(calls):
            if call.error is not None:
                raise EPConfigError(f"rank {rank} refused its {operation}: {call.error}")
        for rank, call in enumerate(calls):
            for field in calls[0].fields:
                first, other = calls[0].fields[field], call.fields.get(field)
                if first != other:
                    raise EPConfigError(
                        f"ranks disagree on {field}: {first} on rank 0, {other} on rank {rank}"
                    )
        if waited_us is not None:
            waited_us += torch.tensor([max(0, call.time_ns - now_ns) // 1000 for call in calls])
        return [call.data for call in calls]

    def _new_handle(self, routings: Sequence[_FreshRouting]) -> Handle:
        """Same on every rank but for the buffer: the routing of all ranks."""
        layout, alignment = routings[0].layout, routings[0].expert_alignment
        topk_idxs = [cast(torch.Tensor, routing.topk_idx) for routing in routings]
        capacities = [routing.capacity for routing in routings]
        rows = [
            spec.recv_rows(
                topk_idxs,
                self.placement,
                rank,
                layout=layout,
                expert_alignment=alignment,
                capacity=capacity,
            )
            for rank, capacity in enumerate(capacities)
        ]
        self._num_dispatches += 1
        return Handle(
            buffer=self,
            number=self._num_dispatches - 1,
            layout=layout,
            expert_alignment=alignment,
            topk_idxs=topk_idxs,
            capacities=capacities,
            rows=rows,
        )

    def _check_stats(self, recv: Any, wait: Any) -> None:
        checks.check_stats(
            recv, wait, num_local_experts=self.num_local_experts, num_ranks=self.num_ranks
        )

    def _check_alive(self) -> None:
        checks.check(not self._is_destroyed, "the buffer was destroyed")

    def _check_routing(self, routing: _FreshRouting, handle: Any) -> tuple[int, int]:
        """Returns T and K."""
        topk_idx = routing.topk_idx
        if handle is not None:
            self._check_handle(handle)
            checks.check(topk_idx is None, "topk_idx: must be None when a handle is given")
            topk_idx = handle.topk_idxs[self.rank]
        else:
            checks.check_topk_idx(topk_idx, None, self.num_experts)
            checks.check_layout(routing.layout)
            checks.check_int("expert_alignment", routing.expert_alignment, 1)
            if routing.capacity is not None:
                checks.check_int("capacity", routing.capacity, 0)
        num_tokens, num_topk = cast(torch.Tensor, topk_idx).shape
        return num_tokens, num_topk

    def _check_handle(self, handle: Any) -> None:
        checks.check(
            isinstance(handle, Handle), f"handle: expected a dispatch handle, got {handle!r}"
        )
        checks.check(handle.buffer is self, "handle: was made by another buffer")


class _Refusal:
    """Turns an EPConfigError of its block into `message`, so that peers can be told first."""

    message: str | None = None

    def __enter__(self) -> _Refusal:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if not isinstance(error, EPConfigError):
            return False
        self.message = str(error)
        return True


def _routing_fields(routing: _FreshRouting, handle: Handle | None) -> dict[str, Any]:
    if handle is not None:
        return {"handle": handle.number}
    assert routing.topk_idx is not None
    return {
        "handle": None,
        "layout": routing.layout,
        # EXPERT_MAJOR rows serve one choice each, whatever the number of choices of their token.
        "num_topk": None if routing.layout is Layout.EXPERT_MAJOR else routing.topk_idx.shape[1],
        "expert_alignment": routing.expert_alignment,
        "capacity given": routing.capacity is not None,
    }


def _row_fields(x: spec.Rows, topk_weights: torch.Tensor | None) -> dict[str, Any]:
    data, scales = x if isinstance(x, tuple) else (x, None)
    return {
        "dtype": data.dtype,
        "hidden": data.shape[1],
        "scales": None if scales is None else (scales.dtype, scales.shape[1]),
        "topk_weights": None if topk_weights is None else topk_weights.dtype,
    }


def _packed(x: spec.Rows) -> spec.Rows:
    """Rows as they can be pickled: fp8 tensors cannot on every torch."""
    return (x[0].view(torch.uint8), x[1]) if isinstance(x, tuple) else x


def _unpacked(x: spec.Rows) -> spec.Rows:
    return (x[0].view(torch.float8_e4m3fn), x[1]) if isinstance(x, tuple) else x


def _wait(event: Any) -> None:
    if event is not None:
        event.wait()

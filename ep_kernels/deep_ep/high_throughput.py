"""High-throughput calls of DeepEP's Buffer.

Symbols: T tokens here, K choices per token, H hidden, E experts, R ranks, N received rows.
"""

from __future__ import annotations

from typing import Any

import torch

import ep_kernels
from ep_kernels.deep_ep.base import BufferBase, Rows, end_of, problem_of_order, wait_for
from ep_kernels.deep_ep.config import Config
from ep_kernels.deep_ep.handle import DispatchHandle
from ep_kernels.deep_ep.utils import EventHandle, EventOverlap
from ep_kernels.errors import EPConfigError


class HighThroughputCalls(BufferBase):
    """get_dispatch_layout(), dispatch() and combine()."""

    def get_dispatch_layout(
        self,
        topk_idx: torch.Tensor,
        num_experts: int,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, EventOverlap]:
        """Counts who would get how much.

        Args:
            topk_idx: [T, K] int64, -1 = none.
            num_experts: E.
            previous_event: the counting comes after it.
            async_finish: return an event; the counting is ordered on the current stream anyway.
            allocate_on_comm_stream: needs both.

        Returns:
            [R] int32 tokens for each rank, [nodes] int32 tokens for each node (None on one node),
            [E] int32 tokens for each expert, [T, R] bool whether the token goes to the rank, and
            the event.

        Raises:
            EPConfigError: shape or dtype; on the CPU also the range of the indices.
        """
        buffer = self._buffer(num_experts, topk_idx.device)
        if problem := problem_of_order(previous_event, async_finish, allocate_on_comm_stream):
            raise EPConfigError(problem)
        wait_for(previous_event)
        layout = buffer.get_dispatch_layout(topk_idx)
        return (
            layout.num_tokens_per_rank,
            _tokens_per_node(layout.is_token_in_rank, buffer),
            layout.num_tokens_per_expert,
            layout.is_token_in_rank,
            EventOverlap(EventHandle() if async_finish else None),
        )

    def dispatch(
        self,
        x: Rows,
        handle: DispatchHandle | None = None,
        num_tokens_per_rank: torch.Tensor | None = None,
        num_tokens_per_rdma_rank: torch.Tensor | None = None,
        is_token_in_rank: torch.Tensor | None = None,
        num_tokens_per_expert: torch.Tensor | None = None,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[
        Rows,
        torch.Tensor | None,
        torch.Tensor | None,
        list[int] | None,
        DispatchHandle | None,
        EventOverlap,
    ]:
        """Sends each token to the ranks of its experts, one row per (token, rank).

        Args:
            x: [T, H], or the pair ([T, H] float8_e4m3fn, [T, H / 128] scales of any strides).
            handle: the same routing again; topk_idx and topk_weights must be None.
            num_tokens_per_rank: [R] of the layout.
            num_tokens_per_rdma_rank: of the layout; has no effect.
            is_token_in_rank: [T, R] of the layout; it is the routing if topk_idx is None.
            num_tokens_per_expert: [E] of the layout.
            topk_idx: [T, K] int64, -1 = none.
            topk_weights: [T, K] float32.
            expert_alignment: the counts are rounded up to it.
            num_worst_tokens: rows of the results; the host then waits for nothing.
            config: SMs on a GPU.
            previous_event: the transfer starts after it, instead of after the current stream.
            async_finish: the current stream does not wait for the transfer.
            allocate_on_comm_stream: needs both.

        Returns:
            [N, H] rows by source rank, then token (or the pair), [N, K] local experts (-1 where a
            choice lives elsewhere, and in rows past the last one), [N, K] weights, counts per local
            expert (empty with num_worst_tokens), handle, event. With a handle the four between
            rows and event are None.

        Raises:
            EPConfigError, EPDeviceError, EPTimeoutError: as ep_kernels.Buffer.dispatch().
        """
        del num_tokens_per_rdma_rank
        problem = problem_of_order(previous_event, async_finish, allocate_on_comm_stream)
        rows = _contiguous_scales(x)
        options = self._options(rows, config, previous_event, async_finish)
        if handle is not None:
            if topk_idx is not None or topk_weights is not None:
                problem = "topk_idx and topk_weights must be None with a handle"
            if problem:
                handle.buffer.refuse(problem)
            again = handle.buffer.dispatch(rows, handle=handle.handle, **options)
            return _rows_of(again), None, None, None, None, end_of(again.event, async_finish)
        layout = "num_tokens_per_rank, is_token_in_rank and num_tokens_per_expert"
        if num_tokens_per_expert is None:  # which buffer would make the call is not known
            raise EPConfigError(f"{layout} are needed without a handle")
        buffer = self._buffer(num_tokens_per_expert.numel(), num_tokens_per_expert.device)
        if num_tokens_per_rank is None or is_token_in_rank is None:
            buffer.refuse(f"{layout} are needed without a handle")
        if num_worst_tokens and topk_idx is None:
            problem = f"num_worst_tokens={num_worst_tokens} needs topk_idx"
        if problem:
            buffer.refuse(problem)
        result = buffer.dispatch(
            rows,
            _one_expert_per_rank(is_token_in_rank, buffer) if topk_idx is None else topk_idx,
            topk_weights,
            capacity=num_worst_tokens or None,
            **options,
        )
        counts: list[int] = []
        if topk_idx is None:
            counts = self._received_counts(num_tokens_per_expert, buffer)
        elif not num_worst_tokens:
            counts = result.num_recv_tokens_per_expert.tolist()
        return (
            _rows_of(result),
            None if topk_idx is None else result.recv_topk_idx,
            result.recv_topk_weights,
            [-(-count // expert_alignment) * expert_alignment for count in counts],
            DispatchHandle(buffer, result.handle),
            end_of(result.event, async_finish),
        )

    def combine(
        self,
        x: torch.Tensor,
        handle: DispatchHandle,
        topk_weights: torch.Tensor | None = None,
        bias: torch.Tensor | tuple[torch.Tensor | None, torch.Tensor | None] | None = None,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, EventOverlap]:
        """Brings rows back and sums them per token over the ranks, unweighted, in fp32.

        Args:
            x: [N, H].
            handle: of the dispatch.
            topk_weights: [N, K] float32, brought back to their choices.
            bias: [T, H] or a pair of them, added before rounding.
            config: as in dispatch().
            previous_event: as in dispatch().
            async_finish: as in dispatch().
            allocate_on_comm_stream: as in dispatch().

        Returns:
            [T, H], [T, K] weights (None if none were given), and the event.

        Raises:
            EPConfigError, EPDeviceError, EPTimeoutError: as ep_kernels.Buffer.combine().
        """
        problem = problem_of_order(previous_event, async_finish, allocate_on_comm_stream)
        if problem:
            handle.buffer.refuse(problem)
        if isinstance(bias, tuple):
            given = tuple(one for one in bias if one is not None)
            bias = given if len(given) == 2 else given[0] if given else None
        result = handle.buffer.combine(
            x,
            handle.handle,
            topk_weights=topk_weights,
            bias=bias,
            **self._options(x, config, previous_event, async_finish),
        )
        return result.x, result.topk_weights, end_of(result.event, async_finish)

    def _options(
        self,
        x: Rows,
        config: Config | None,
        previous_event: EventOverlap | None,
        async_finish: bool,
    ) -> dict[str, Any]:
        """How the call runs. Threads of the CPU backend are not SMs: it keeps its own number."""
        data = x if isinstance(x, torch.Tensor) else x[0]
        config = config or self.get_dispatch_config(self.group_size)
        return dict(
            async_op=async_finish,
            num_sms=config.num_sms if data.is_cuda else None,
            previous_event=wait_for(previous_event),
        )

    def _received_counts(
        self, num_tokens_per_expert: torch.Tensor, buffer: ep_kernels.Buffer
    ) -> list[int]:
        """Tokens of all ranks for each local expert, by an exchange over the group."""
        of_ranks = self._bootstrap.all_gather(num_tokens_per_expert.tolist())
        return [sum(counts[expert] for counts in of_ranks) for expert in buffer.local_experts]


def _contiguous_scales(x: Rows) -> Rows:
    return x if isinstance(x, torch.Tensor) else (x[0], x[1].contiguous())


def _rows_of(result: ep_kernels.DispatchResult) -> Rows:
    return result.recv_x if result.recv_scales is None else (result.recv_x, result.recv_scales)


def _tokens_per_node(
    is_token_in_rank: torch.Tensor, buffer: ep_kernels.Buffer
) -> torch.Tensor | None:
    """[nodes] int32, tokens with a choice on the node; None on one node."""
    if buffer.topology.num_nodes == 1:
        return None
    by_node = is_token_in_rank.unflatten(1, (-1, buffer.topology.num_local_ranks))
    return by_node.any(dim=2).sum(dim=0).int()


def _one_expert_per_rank(is_token_in_rank: torch.Tensor, buffer: ep_kernels.Buffer) -> torch.Tensor:
    """[T, R] choices that lead to these ranks: their first experts.

    Example: 4 experts on 2 ranks, is_token_in_rank [[True, False], [True, True]] gives
    [[0, -1], [0, 2]].
    """
    first = torch.arange(buffer.num_ranks, device=is_token_in_rank.device)
    first *= buffer.num_experts // buffer.num_ranks
    return torch.where(is_token_in_rank, first, -1)

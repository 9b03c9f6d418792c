"""What low-latency dispatch and combine are asked for, and what they hand back.

Sizes used in the docstrings, besides those of handle.py:
    M  num_max_tokens_per_rank, the most tokens of a rank
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from ep_kernels.event import Event

Hook = Callable[[], None]


@dataclass(frozen=True, kw_only=True, eq=False)
class LowLatencyRequest:
    """The options of Buffer.low_latency_dispatch(); see there."""

    num_max_tokens_per_rank: int
    num_experts: int
    use_fp8: bool
    round_scale: bool
    use_ue8m0: bool
    async_op: bool
    return_recv_hook: bool
    cumulative_recv_stats: torch.Tensor | None
    wait_recv_cost_stats: torch.Tensor | None


@dataclass(frozen=True, kw_only=True, eq=False)
class LowLatencyCombineRequest:
    """The options of Buffer.low_latency_combine(); see there."""

    wire_format: str
    zero_copy: bool
    out: torch.Tensor | None
    async_op: bool
    return_recv_hook: bool
    wait_recv_cost_stats: torch.Tensor | None


@dataclass(frozen=True, kw_only=True, eq=False)
class LowLatencyHandle:
    """The routing of one low-latency dispatch; opaque. Holds its memory until combined or gone.

    Attributes:
        owner: the buffer's identity; a handle works only with the buffer that made it.
        seq: number of the call, the same on all ranks.
        num_max_tokens_per_rank, hidden: M and H.
        routing: [2, T, K] int32: expert of each choice, -1 = none; row of each choice in its
            expert's block, -1 = not sent.
        combine_buffer: [L, R * M, H] bfloat16, see Buffer.next_low_latency_combine_buffer().
    """

    owner: object
    seq: int
    num_max_tokens_per_rank: int
    hidden: int
    routing: torch.Tensor
    combine_buffer: torch.Tensor

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.routing.shape[1]

    @property
    def num_topk(self) -> int:
        """K."""
        return self.routing.shape[2]


@dataclass(frozen=True, kw_only=True)
class LowLatencyDispatchResult:
    """Rows that this rank received, in memory of the buffer.

    Valid once the hook has run or the event is complete, until the combine of the handle is made,
    or, without a combine, as long as the handle lives.

    Attributes:
        recv_x: [L, R * M, H] bfloat16 or float8_e4m3fn. Rows 0 to recv_count[l] - 1 of expert l are
            its tokens by source rank, then token; rows of a missing rank are zero; rows behind
            are unspecified.
        recv_scales: [L, R * M, H / 128] float32, or [L, R * M, H / 512] int32 of four exponents
            each (UE8M0), with strides (n * R * M, 1, R * M); None for bfloat16.
        recv_count: [L] int32, rows of each local expert.
        recv_rank_counts: [L, R] int32, rows of each local expert from each rank; they lie in this
            order.
        missing_ranks: [R] bool, ranks that are masked, or whose rows have not arrived.
        handle: pass to low_latency_combine().
        event: completes when the tensors above hold their contents.
        hook: with return_recv_hook: runs the receive half, once; None otherwise.
    """

    recv_x: torch.Tensor
    recv_scales: torch.Tensor | None
    recv_count: torch.Tensor
    recv_rank_counts: torch.Tensor
    missing_ranks: torch.Tensor
    handle: LowLatencyHandle | Any
    event: Event | Any
    hook: Hook | None


@dataclass(frozen=True, kw_only=True)
class LowLatencyCombineResult:
    """Sums back on the rank of their tokens.

    Attributes:
        x: [T, H] bfloat16.
        missing_ranks: [R] bool, ranks whose experts have added nothing.
        event: completes when the tensors above hold their contents.
        hook: with return_recv_hook: runs the receive half, once; None otherwise.
    """

    x: torch.Tensor
    missing_ranks: torch.Tensor
    event: Event | Any
    hook: Hook | None

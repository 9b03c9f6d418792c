"""What dispatch and combine hand back.

Sizes used in the docstrings:
    R  ranks of the group               E  experts in total       L  experts on this rank
    T  tokens on this rank, before      K  choices per token      H  hidden, elements per token
    N  rows on this rank, after dispatch                          S  scales per token (fp8 rows)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from ep_kernels.config import Layout
    from ep_kernels.event import Event


@dataclass(frozen=True, kw_only=True, eq=False)
class HostCounts:
    """What the host knows of a received batch.

    Attributes:
        num_rows: N.
        num_recv_tokens_per_expert, expert_offsets: as in DispatchResult, on the CPU.
    """

    num_rows: int
    num_recv_tokens_per_expert: torch.Tensor
    expert_offsets: torch.Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class DispatchHandle:
    """The routing of one dispatch; opaque. combine() needs it, and dispatch() may reuse it.

    Attributes:
        owner: the buffer's identity; a handle works only with the buffer that made it.
        seq: number of the dispatch, the same on all ranks.
        num_tokens: T.
        num_rows: N, rows of the received tensors.
        topk_idx: [T, K] int64, a copy.
        rows: [T, K] int32, row of each choice on its rank, -1 where there is none.
        routes: [T, K] int32, rank of each choice and whether it carries the row
            (`csrc/core/routing.h`), -1 where there is none.
        num_recv_tokens_per_expert, expert_offsets: as in DispatchResult, on the buffer's device.
        own_rows: [L, 2] or [1, 2] int64, ranges of received rows that this rank itself sent.
        recv_sizes: [3] int64, rows with padding, without, and dropped for capacity.
        host: what the host knows; None if it did not wait for the counts.
    """

    owner: object
    seq: int
    layout: Layout
    expert_alignment: int
    capacity: int | None
    num_tokens: int
    num_rows: int
    topk_idx: torch.Tensor
    rows: torch.Tensor
    routes: torch.Tensor
    num_recv_tokens_per_expert: torch.Tensor
    expert_offsets: torch.Tensor
    own_rows: torch.Tensor
    recv_sizes: torch.Tensor
    host: HostCounts | None = None

    @property
    def num_topk(self) -> int:
        """K."""
        return self.topk_idx.shape[1]


@dataclass(frozen=True, kw_only=True)
class DispatchLayout:
    """Who gets how much of this rank's tokens; computed without communication.

    Attributes:
        num_tokens_per_rank: [R] int32, tokens with at least one choice on each rank.
        num_tokens_per_expert: [E] int32, tokens that chose each expert.
        is_token_in_rank: [T, R] bool, whether the token has a choice on the rank.
    """

    num_tokens_per_rank: torch.Tensor
    num_tokens_per_expert: torch.Tensor
    is_token_in_rank: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class DispatchResult:
    """Rows that this rank received.

    Attributes:
        recv_x: [N, H], dtype of the rows sent.
        recv_scales: [N, S] scales of fp8 rows; None for other dtypes.
        recv_topk_idx: RANK_MAJOR: [N, K] int64, the choices as local expert ids, -1 where the
            choice is none or lives elsewhere. EXPERT_MAJOR, or routing from a cached handle: None.
        recv_topk_weights: RANK_MAJOR: [N, K], 0 where the choice is not on this rank.
            EXPERT_MAJOR: [N], 0 in padding rows. None when no weights were sent.
        num_recv_tokens_per_expert: [L] int64, rows per local expert without padding; the counts
            before `capacity` cuts anything off. On the CPU; with a capacity on the rows' device.
        expert_offsets: EXPERT_MAJOR: [L + 1] int64, first row of each local expert's group, then N;
            where num_recv_tokens_per_expert is. RANK_MAJOR: None.
        num_overflow: [1] int64, rows dropped here because of `capacity`.
        handle: pass to combine(), or to dispatch() to send other rows the same way.
        event: completes when the tensors above hold their contents.
    """

    recv_x: torch.Tensor
    recv_scales: torch.Tensor | None
    recv_topk_idx: torch.Tensor | None
    recv_topk_weights: torch.Tensor | None
    num_recv_tokens_per_expert: torch.Tensor
    expert_offsets: torch.Tensor | None
    num_overflow: torch.Tensor
    handle: DispatchHandle | Any
    event: Event | Any


@dataclass(frozen=True, kw_only=True)
class CombineResult:
    """Rows back on the rank of their tokens.

    Attributes:
        x: [T, H], for each token the sum of its rows, plus the bias.
        topk_weights: [T, K], for each choice the entry of the row that served it, 0 where the
            choice is none or its row was dropped; None when no weights were given.
        event: completes when the tensors above hold their contents.
    """

    x: torch.Tensor
    topk_weights: torch.Tensor | None
    event: Event | Any

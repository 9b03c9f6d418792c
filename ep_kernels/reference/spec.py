"""What dispatch and combine compute, as functions of the inputs of all ranks.

Lists are indexed by rank. Sizes: R ranks, E experts, L experts on a rank, T tokens on a rank, K
choices per token, H elements per token, S scales per token, N rows on a rank after dispatch.

The examples share one batch: two ranks, experts 0 and 1 on rank 0, 2 and 3 on rank 1; two tokens
on rank 0, one on rank 1.

    >>> placement = make_placement(num_experts=4, num_ranks=2)
    >>> topk_idxs = [torch.tensor([[0, 2], [2, 3]]), torch.tensor([[3, -1]])]
    >>> xs = [torch.tensor([[10.0], [11.0]]), torch.tensor([[20.0]])]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ep_kernels.config import Layout
from ep_kernels.errors import EPConfigError
from ep_kernels.event import Event
from ep_kernels.handle import CombineResult, DispatchLayout, DispatchResult
from ep_kernels.topology import place_experts

Rows = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
"""Rows to send: [T, H], or a pair of fp8 rows [T, H] and their scales [T, S]."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where every expert lives.

    Attributes:
        num_ranks: R.
        rank_of: [E] int64, the rank of each expert.
        local_of: [E] int64, its ordinal among the experts of that rank, ascending.
    """

    num_ranks: int
    rank_of: torch.Tensor
    local_of: torch.Tensor

    @property
    def num_experts(self) -> int:
        return self.rank_of.numel()

    def experts_of(self, rank: int) -> list[int]:
        """Global ids of a rank's experts, ascending."""
        return torch.nonzero(self.rank_of == rank).flatten().tolist()

    def ranks_of_choices(self, topk_idx: torch.Tensor) -> torch.Tensor:
        """[T, K]: the rank of each choice, -1 where there is none."""
        return torch.where(topk_idx >= 0, self.rank_of[topk_idx], -1)


def make_placement(
    num_experts: int,
    num_ranks: int,
    expert_to_rank: torch.Tensor | Sequence[int] | str | None = None,
) -> Placement:
    """Linear blocks of E / R experts ("linear" or None), expert e on rank e mod R ("round_robin"),
    or the explicit map `expert_to_rank` ([E] int64 or ints).

    Raises:
        EPConfigError: E is not divisible by R, or the map has a wrong shape, dtype or rank.

    Example:
        >>> make_placement(4, 2, torch.tensor([0, 1, 0, 1])).local_of
        tensor([0, 0, 1, 1])
    """
    if num_experts < 1:
        raise EPConfigError(f"num_experts={num_experts} is not positive")
    if expert_to_rank is None or isinstance(expert_to_rank, str):
        placement = expert_to_rank or "linear"
        rank_of = torch.tensor(place_experts(placement, num_experts, num_ranks))
    else:
        rank_of = torch.as_tensor(expert_to_rank).clone()
        _check_expert_to_rank(rank_of, num_experts, num_ranks)
    is_same_rank = rank_of[:, None] == rank_of[None, :]
    local_of = is_same_rank.tril(diagonal=-1).sum(dim=1)
    return Placement(num_ranks=num_ranks, rank_of=rank_of, local_of=local_of)


def _check_expert_to_rank(expert_to_rank: torch.Tensor, num_experts: int, num_ranks: int) -> None:
    if expert_to_rank.dtype != torch.int64 or expert_to_rank.shape != (num_experts,):
        raise EPConfigError(
            f"expert_to_rank: {expert_to_rank.dtype} {list(expert_to_rank.shape)}, "
            f"expected torch.int64 [num_experts={num_experts}]"
        )
    outside = torch.nonzero((expert_to_rank < 0) | (expert_to_rank >= num_ranks)).flatten()
    if outside.numel():
        expert = int(outside[0])
        raise EPConfigError(
            f"expert_to_rank[{expert}]={int(expert_to_rank[expert])} is outside "
            f"[0, num_ranks={num_ranks})"
        )


def get_dispatch_layout(topk_idx: torch.Tensor, placement: Placement) -> DispatchLayout:
    """Who gets how many of one rank's tokens.

    Example:
        >>> get_dispatch_layout(topk_idxs[0], placement).num_tokens_per_rank
        tensor([1, 2], dtype=torch.int32)
        >>> get_dispatch_layout(topk_idxs[0], placement).num_tokens_per_expert
        tensor([1, 0, 2, 1], dtype=torch.int32)
    """
    ranks = torch.arange(placement.num_ranks)
    experts = torch.arange(placement.num_experts)
    is_token_in_rank = (placement.ranks_of_choices(topk_idx)[:, :, None] == ranks).any(dim=1)
    is_chosen = (topk_idx[:, :, None] == experts).any(dim=1)
    return DispatchLayout(
        num_tokens_per_rank=is_token_in_rank.sum(dim=0).to(torch.int32),
        num_tokens_per_expert=is_chosen.sum(dim=0).to(torch.int32),
        is_token_in_rank=is_token_in_rank,
    )


@dataclass(frozen=True, kw_only=True)
class RecvRows:
    """Where each of the N rows of one rank comes from; the handle of `dispatch` below.

    Attributes:
        layout: order of the rows.
        src_rank: [N] int64; -1 in rows that nobody sends.
        src_token: [N] int64, token on its source rank; -1 in rows that nobody sends.
        src_k: [N] int64, EXPERT_MAJOR: position of the choice in its row of topk_idx;
            RANK_MAJOR: -1, as a row stands for all choices of its token on this rank.
        num_rows: rows that have specified contents; less than N if `capacity` is not used up.
        num_recv_tokens_per_expert, expert_offsets, num_overflow: as in DispatchResult.
    """

    layout: Layout
    src_rank: torch.Tensor
    src_token: torch.Tensor
    src_k: torch.Tensor
    num_rows: int
    num_recv_tokens_per_expert: torch.Tensor
    expert_offsets: torch.Tensor | None
    num_overflow: torch.Tensor


def recv_rows(
    topk_idxs: Sequence[torch.Tensor],
    placement: Placement,
    rank: int,
    *,
    layout: Layout = Layout.RANK_MAJOR,
    expert_alignment: int = 1,
    capacity: int | None = None,
) -> RecvRows:
    """The rows that `rank` receives.

    Examples, on rank 1. Token 1 of rank 0 chose both of its experts: one row in the rank-major
    layout, two in the expert-major one. With groups aligned to 3 rows, row 2 and row 5 are padding:
        >>> rows = recv_rows(topk_idxs, placement, 1)
        >>> rows.src_rank.tolist(), rows.src_token.tolist()
        ([0, 0, 1], [0, 1, 0])
        >>> by_expert = dict(layout=Layout.EXPERT_MAJOR, expert_alignment=3)
        >>> rows = recv_rows(topk_idxs, placement, 1, **by_expert)
        >>> rows.src_rank.tolist(), rows.src_token.tolist(), rows.expert_offsets.tolist()
        ([0, 0, -1, 0, 1, -1], [0, 1, -1, 1, 0, -1], [0, 3, 6])
    """
    groups = [
        torch.cat([_entries(src, idx == expert) for src, idx in enumerate(topk_idxs)])
        for expert in placement.experts_of(rank)
    ]
    if layout is Layout.EXPERT_MAJOR:
        padded = [_pad(group, -len(group) % expert_alignment) for group in groups]
        expert_offsets = torch.tensor([0] + [len(group) for group in padded]).cumsum(0)
        table = torch.cat([_no_entries(0), *padded])
    else:
        expert_offsets = None
        table = torch.cat([_tokens_for(rank, i, x, placement) for i, x in enumerate(topk_idxs)])
    kept = table if capacity is None else table[:capacity]
    num_padding = 0 if capacity is None else capacity - len(kept)
    src_rank, src_token, src_k = _pad(kept, num_padding).unbind(1)
    return RecvRows(
        layout=layout,
        src_rank=src_rank,
        src_token=src_token,
        src_k=src_k,
        num_rows=len(kept),
        num_recv_tokens_per_expert=torch.tensor([len(g) for g in groups], dtype=torch.int64),
        expert_offsets=expert_offsets,
        num_overflow=(table[len(kept) :, 0] >= 0).sum().reshape(1),
    )


def dispatch(
    xs: Sequence[Rows],
    topk_idxs: Sequence[torch.Tensor],
    topk_weights: Sequence[torch.Tensor] | None = None,
    *,
    placement: Placement,
    rank: int,
    layout: Layout = Layout.RANK_MAJOR,
    expert_alignment: int = 1,
    capacity: int | None = None,
) -> DispatchResult:
    """What `rank` receives. Rows without a sender are zero here; see `RecvRows.num_rows`.

    Examples, on rank 1:
        >>> result = dispatch(xs, topk_idxs, placement=placement, rank=1)
        >>> result.recv_x.tolist(), result.recv_topk_idx.tolist()
        ([[10.0], [11.0], [20.0]], [[-1, 0], [0, 1], [1, -1]])
        >>> result = dispatch(
        ...     xs, topk_idxs, placement=placement, rank=1, layout=Layout.EXPERT_MAJOR, capacity=3)
        >>> result.recv_x.tolist(), result.num_recv_tokens_per_expert, result.num_overflow
        ([[10.0], [11.0], [11.0]], tensor([2, 2]), tensor([1]))
    """
    rows = recv_rows(
        topk_idxs,
        placement,
        rank,
        layout=layout,
        expert_alignment=expert_alignment,
        capacity=capacity,
    )
    pairs = [x if isinstance(x, tuple) else (x, None) for x in xs]
    scales = [scale for _, scale in pairs if scale is not None]
    recv_topk_idx, recv_topk_weights = _recv_choices(topk_idxs, topk_weights, rows, placement, rank)
    return DispatchResult(
        recv_x=_gather([data for data, _ in pairs], rows),
        recv_scales=_gather(scales, rows) if scales else None,
        recv_topk_idx=recv_topk_idx,
        recv_topk_weights=recv_topk_weights,
        num_recv_tokens_per_expert=rows.num_recv_tokens_per_expert,
        expert_offsets=rows.expert_offsets,
        num_overflow=rows.num_overflow,
        handle=rows,
        event=Event(),
    )


def combine(
    xs: Sequence[torch.Tensor],
    rows: Sequence[RecvRows],
    topk_idx: torch.Tensor,
    *,
    placement: Placement,
    rank: int,
    topk_weights: Sequence[torch.Tensor] | None = None,
    bias: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
    num_local_ranks: int | None = None,
) -> CombineResult:
    """What `rank` gets back for its tokens: xs[d] holds one row for each of rows[d].

    The sum starts from +0.0, in fp32 (fp64 for fp64), and takes a token's rows by ascending
    destination rank (RANK_MAJOR) or by ascending position in topk_idx (EXPERT_MAJOR), then the
    bias; it is rounded to the dtype of x once, to nearest even. Every NaN becomes the canonical
    quiet NaN (bf16 0x7fc0, fp16 0x7e00, fp32 0x7fc00000).

    With several nodes of `num_local_ranks` ranks, the rows of each node are summed like that,
    without bias, and rounded; then these sums are added by ascending node, then the bias.

    Example, on rank 0, whose token 0 went to both ranks:
        >>> rows = [recv_rows(topk_idxs, placement, d) for d in range(2)]
        >>> back = [torch.tensor([[1.0]]), torch.tensor([[2.0], [3.0], [4.0]])]
        >>> combine(back, rows, topk_idxs[0], placement=placement, rank=0).x
        tensor([[3.],
                [3.]])
    """
    dtype = xs[0].dtype
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    total = torch.zeros(len(topk_idx), xs[0].shape[1], dtype=accumulator)
    num_local_ranks = num_local_ranks or len(rows)
    if num_local_ranks == len(rows):
        _add_rows(total, xs, rows, rank)
    else:
        for first in range(0, len(rows), num_local_ranks):
            node = slice(first, first + num_local_ranks)
            sums = torch.zeros_like(total)
            _add_rows(sums, xs[node], rows[node], rank)
            total += _rounded(sums, dtype).to(accumulator)
    for addend in bias if isinstance(bias, tuple) else [bias]:
        if addend is not None:
            total += addend.to(accumulator)
    weights = None
    if topk_weights is not None:
        weights = _returned_weights(topk_weights, rows, topk_idx, placement, rank)
    return CombineResult(x=_rounded(total, dtype), topk_weights=weights, event=Event())


def _add_rows(
    total: torch.Tensor, xs: Sequence[torch.Tensor], rows: Sequence[RecvRows], rank: int
) -> None:
    """Adds the rows of some ranks to the tokens of `rank`, in order."""
    is_ours = [part.src_rank == rank for part in rows]
    addends = torch.cat([x[ours] for x, ours in zip(xs, is_ours)])
    tokens = torch.cat([part.src_token[ours] for part, ours in zip(rows, is_ours)])
    for is_next in _steps(rows, is_ours):
        total[tokens[is_next]] += addends[is_next].to(total.dtype)


def _rounded(total: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    # NOTE: torch's own casts turn NaNs into different ones for different tensor sizes.
    return total.to(dtype).masked_fill_(total.isnan(), float("nan"))


def _entries(src_rank: int, is_chosen: torch.Tensor) -> torch.Tensor:
    """[n, 3] (source rank, token, k) of the True entries of [T, K], by token."""
    token_and_k = torch.nonzero(is_chosen)
    return torch.cat([torch.full((len(token_and_k), 1), src_rank), token_and_k], dim=1)


def _tokens_for(
    rank: int, src_rank: int, topk_idx: torch.Tensor, placement: Placement
) -> torch.Tensor:
    """[n, 3] (source rank, token, -1) of the tokens with a choice on `rank`."""
    is_token_here = (placement.ranks_of_choices(topk_idx) == rank).any(dim=1, keepdim=True)
    entries = _entries(src_rank, is_token_here)
    entries[:, 2] = -1
    return entries


def _no_entries(num_rows: int) -> torch.Tensor:
    return torch.full((num_rows, 3), -1, dtype=torch.int64)


def _pad(table: torch.Tensor, num_rows: int) -> torch.Tensor:
    return torch.cat([table, _no_entries(num_rows)])


def _gather(tensors: Sequence[torch.Tensor], rows: RecvRows) -> torch.Tensor:
    """[N, ...]: each row from the tensor of its source rank, byte by byte; 0 without a sender."""
    like = tensors[0]
    out = torch.zeros(len(rows.src_rank), *like.shape[1:], dtype=like.dtype)
    for src, tensor in enumerate(tensors):
        is_from_src = rows.src_rank == src
        out.view(torch.uint8)[is_from_src] = tensor.view(torch.uint8)[rows.src_token[is_from_src]]
    return out


def _recv_choices(
    topk_idxs: Sequence[torch.Tensor],
    topk_weights: Sequence[torch.Tensor] | None,
    rows: RecvRows,
    placement: Placement,
    rank: int,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """recv_topk_idx and recv_topk_weights."""
    weights = _gather(topk_weights, rows) if topk_weights is not None else None
    is_sent = (rows.src_rank >= 0)[:, None]
    if rows.layout is Layout.EXPERT_MAJOR:
        if weights is None:
            return None, None
        weights = weights.gather(1, rows.src_k.clamp(min=0)[:, None])
        return None, weights.masked_fill(~is_sent, 0).flatten()
    topk_idx = _gather(topk_idxs, rows)
    is_here = is_sent & (placement.ranks_of_choices(topk_idx) == rank)
    if weights is not None:
        weights = weights.masked_fill(~is_here, 0)
    return torch.where(is_here, placement.local_of[topk_idx], -1), weights


def _steps(rows: Sequence[RecvRows], is_ours: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Masks over one rank's rows, in the order of the sum; a step has a token at most once."""
    if rows[0].layout is Layout.EXPERT_MAJOR:
        key = torch.cat([part.src_k[ours] for part, ours in zip(rows, is_ours)])
    else:
        key = torch.cat([torch.full((int(n.sum()),), dst) for dst, n in enumerate(is_ours)])
    return [key == step for step in sorted(set(key.tolist()))]


def _returned_weights(
    topk_weights: Sequence[torch.Tensor],
    rows: Sequence[RecvRows],
    topk_idx: torch.Tensor,
    placement: Placement,
    rank: int,
) -> torch.Tensor:
    """[T, K]: for each choice the entry of the row that served it."""
    out = torch.zeros(topk_idx.shape, dtype=topk_weights[0].dtype)
    for dst, (weights, part) in enumerate(zip(topk_weights, rows)):
        row = torch.nonzero(part.src_rank == rank).flatten()
        token = part.src_token[row]
        if part.layout is Layout.EXPERT_MAJOR:
            out[token, part.src_k[row]] = weights[row]
        else:
            is_served = placement.ranks_of_choices(topk_idx[token]) == dst
            out[token] = torch.where(is_served, weights[row], out[token])
    return out

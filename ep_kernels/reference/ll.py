"""What low-latency dispatch and combine compute, as functions of the inputs of all ranks.

Lists are indexed by rank. Sizes as in spec.py; M = num_max_tokens_per_rank, T <= M.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ep_kernels.config import Layout
from ep_kernels.reference.spec import Placement, recv_rows

SCALE_GROUP = 128
E4M3_MAX = 448.0
MIN_AMAX = 1e-4


@dataclass(frozen=True, kw_only=True)
class LowLatencyRows:
    """What a rank receives; rows that nobody sends are zero here, and unspecified there.

    Attributes:
        recv_x, recv_scales, recv_count, recv_rank_counts: as in LowLatencyDispatchResult.
        src_rank, src_token: [L, R * M] int64, where each row comes from, -1 where from nobody.
    """

    recv_x: torch.Tensor
    recv_scales: torch.Tensor | None
    recv_count: torch.Tensor
    recv_rank_counts: torch.Tensor
    src_rank: torch.Tensor
    src_token: torch.Tensor


def fp8_cast(
    x: torch.Tensor, *, round_scale: bool = False, use_ue8m0: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 rows and the scales of their groups of 128 channels.

    Args:
        x: [N, H] bfloat16.
        round_scale: scales are the next powers of two.
        use_ue8m0: scales are returned as exponent bytes, four to an int32, lowest first.

    Returns:
        [N, H] float8_e4m3fn, and [N, H / 128] float32 or [N, H / 512] int32.

    Example:
        >>> rows, scales = fp8_cast(torch.full((1, 128), 7.0, dtype=torch.bfloat16))
        >>> rows[0, 0].item(), scales.tolist()
        (448.0, [[0.015625]])
    """
    groups = x.float().unflatten(1, (-1, SCALE_GROUP))
    amax = groups.abs().nan_to_num(nan=0.0, posinf=float("inf")).amax(2).clamp(min=MIN_AMAX)
    # NOTE: torch divides a number by a tensor as the number times the reciprocal.
    largest = torch.full_like(amax, E4M3_MAX)
    scales, inverse = amax / largest, largest / amax
    if round_scale:
        exponents = (scales.view(torch.int32) + 0x7FFFFF) >> 23
        scales = (exponents << 23).view(torch.float32)
        inverse = ((254 - exponents).clamp(min=0) << 23).view(torch.float32)
    scaled = (groups * inverse[:, :, None]).flatten(1)
    rows = scaled.to(torch.float8_e4m3fn)
    rows.view(torch.uint8)[scaled.isnan()] = 0x7F
    if not use_ue8m0:
        return rows, scales
    exponents = (scales.view(torch.int32) >> 23).to(torch.uint8)
    return rows, exponents.contiguous().view(torch.int32)


def low_latency_dispatch(
    xs: Sequence[torch.Tensor],
    topk_idxs: Sequence[torch.Tensor],
    *,
    placement: Placement,
    rank: int,
    num_max_tokens_per_rank: int,
    use_fp8: bool = False,
    round_scale: bool = False,
    use_ue8m0: bool = False,
) -> LowLatencyRows:
    """What `rank` receives.

    Example, two ranks with one expert each; tokens 10 and 11 of rank 0 choose expert 1, of rank 1
    token 20 chooses expert 0 and token 21 expert 1:
        >>> placement = make_placement(num_experts=2, num_ranks=2)
        >>> xs = [torch.tensor([[10.0], [11.0]]), torch.tensor([[20.0], [21.0]])]
        >>> topk_idxs = [torch.tensor([[1], [1]]), torch.tensor([[0], [1]])]
        >>> rows = low_latency_dispatch(
        ...     xs, topk_idxs, placement=placement, rank=1, num_max_tokens_per_rank=2)
        >>> rows.recv_count.tolist(), rows.recv_rank_counts.tolist(), rows.recv_x[0, :, 0].tolist()
        ([3], [[2, 1]], [10.0, 11.0, 21.0, 0.0])
    """
    num_ranks, experts = len(xs), placement.experts_of(rank)
    table = recv_rows(topk_idxs, placement, rank, layout=Layout.EXPERT_MAJOR)
    assert table.expert_offsets is not None
    shape = (len(experts), num_ranks * num_max_tokens_per_rank)
    src_rank, src_token = torch.full(shape, -1), torch.full(shape, -1)
    for local, begin in enumerate(table.expert_offsets[:-1].tolist()):
        count = int(table.num_recv_tokens_per_expert[local])
        src_rank[local, :count] = table.src_rank[begin : begin + count]
        src_token[local, :count] = table.src_token[begin : begin + count]
    rank_counts = torch.stack([(src_rank == src).sum(1) for src in range(num_ranks)], 1)
    sent, scales = list(xs), None
    if use_fp8:
        pairs = [fp8_cast(x, round_scale=round_scale, use_ue8m0=use_ue8m0) for x in xs]
        sent, scales = [rows for rows, _ in pairs], [scale for _, scale in pairs]
    return LowLatencyRows(
        recv_x=_take(sent, src_rank, src_token),
        recv_scales=None if scales is None else _take(scales, src_rank, src_token),
        recv_count=rank_counts.sum(1).int(),
        recv_rank_counts=rank_counts.int(),
        src_rank=src_rank,
        src_token=src_token,
    )


def low_latency_combine(
    xs: Sequence[torch.Tensor],
    rows: Sequence[LowLatencyRows],
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    *,
    placement: Placement,
    rank: int,
    wire_format: str = "bf16",
    missing_ranks: Sequence[int] = (),
) -> torch.Tensor:
    """[T, H] bfloat16: what `rank` gets back for its tokens.

    In fp32, from +0, in the order of topk_idx: the product of weight and element is rounded, then
    added; the sum is rounded to bfloat16 once, to nearest even. NaN becomes 0x7fc0.

    Args:
        xs: of all ranks, [L, R * M, H] bfloat16: a row for each row received.
        rows: what all ranks received.
        topk_idx: [T, K] int64, of this rank.
        topk_weights: [T, K] float32.
        placement: of the experts.
        rank: this one.
        wire_format: "bf16", or "fp8": rows are cast to e4m3 with scales before they are weighted.
        missing_ranks: whose experts add nothing.
    """
    num_tokens, hidden = len(topk_idx), xs[0].shape[2]
    total = torch.zeros(num_tokens, hidden)
    tables = [_rows_of_tokens(part, rank, num_tokens) for part in rows]
    owners = placement.ranks_of_choices(topk_idx)
    for k in range(topk_idx.shape[1]):
        for owner in set(range(len(xs))) - set(missing_ranks):
            tokens = torch.nonzero(owners[:, k] == owner).flatten()
            local = placement.local_of[topk_idx[tokens, k]]
            addends = _after_wire(xs[owner][local, tables[owner][local, tokens]], wire_format)
            total[tokens] += topk_weights[tokens, k, None] * addends
    return total.bfloat16().masked_fill_(total.isnan(), float("nan"))


def _take(
    tensors: Sequence[torch.Tensor], src_rank: torch.Tensor, src_token: torch.Tensor
) -> torch.Tensor:
    """[L, R * M, ...]: the token of each row, byte by byte; 0 from nobody."""
    like = tensors[0]
    out = torch.zeros(*src_rank.shape, like.shape[1], dtype=like.dtype)
    out_bytes = out.unsqueeze(-1).view(torch.uint8)
    for src, tensor in enumerate(tensors):
        is_from_src = src_rank == src
        out_bytes[is_from_src] = tensor.unsqueeze(-1).view(torch.uint8)[src_token[is_from_src]]
    return out


def _rows_of_tokens(rows: LowLatencyRows, rank: int, num_tokens: int) -> torch.Tensor:
    """[L, T]: the row of each token of `rank` in each expert's block, -1 where there is none."""
    table = torch.full((rows.src_rank.shape[0], num_tokens), -1)
    local, row = torch.nonzero(rows.src_rank == rank, as_tuple=True)
    table[local, rows.src_token[local, row]] = row
    return table


def _after_wire(rows: torch.Tensor, wire_format: str) -> torch.Tensor:
    """[N, H] float32."""
    if wire_format == "bf16":
        return rows.float()
    elements, scales = fp8_cast(rows)
    return (elements.float().unflatten(1, (-1, SCALE_GROUP)) * scales[:, :, None]).flatten(1)

"""Work on the rows of low-latency calls over several nodes, between a caller's tensors and what
travels: plain torch, wherever rows are (ll_memory.py).

What travels from one rank to another is its rows, one after the other, then their scales.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from ep_kernels._native_ll import LlCombineArgs, LlDispatchArgs, LlSizes, half_offsets, region_bytes
from ep_kernels.ll_carriers import ArrivingRows
from ep_kernels.ll_checks import BF16, FP8_ROUNDED, FP8_UE8M0
from ep_kernels.ll_memory import LlMemory
from ep_kernels.reference.ll import fp8_cast

SCALE_GROUP = 128
HALF_ALIGNMENT = 128

Take = Callable[[int], torch.Tensor]
"""What a rank has sent: [N] uint8."""


@dataclass(frozen=True, kw_only=True)
class Placed:
    """Where experts live: [E] int64 each."""

    rank_of: torch.Tensor
    local_of: torch.Tensor

    @staticmethod
    def of(expert_to_rank: Sequence[int]) -> Placed:
        rank_of = torch.tensor(expert_to_rank, dtype=torch.int64)
        seen: dict[int, int] = {}
        local_of = []
        for rank in expert_to_rank:
            local_of.append(seen.get(rank, 0))
            seen[rank] = seen.get(rank, 0) + 1
        return Placed(rank_of=rank_of, local_of=torch.tensor(local_of, dtype=torch.int64))

    def experts_of(self, rank: int) -> torch.Tensor:
        return torch.nonzero(self.rank_of == rank).flatten()

    def order_of(self, experts: torch.Tensor) -> torch.Tensor:
        """Numbers that ascend by rank, then by the rank's experts."""
        return self.rank_of[experts] * len(self.rank_of) + self.local_of[experts]

    @property
    def num_local_experts(self) -> int:
        """Of the rank that has most."""
        return int(self.rank_of.bincount().max())


@dataclass(kw_only=True)
class LlDispatch:
    """A dispatch whose rows may be alive. Tensors are on the host.

    Attributes:
        at: its half, an offset of the region.
        sizes: of the call.
        topk_idx: [T * K] int64.
        order: [C] the choices that are sent, by destination rank, expert and token; choice i is
            number i % K of token i // K.
        num_sent: [R] how many of them go to each rank.
        counts: [L, R] int32, rows of each local expert from each rank.
        own: what this rank sends to itself, while it is on its way.
        arriving: what the others send.
        is_combined: a combine has begun.
    """

    at: int
    sizes: LlSizes
    topk_idx: torch.Tensor
    order: torch.Tensor
    num_sent: torch.Tensor
    counts: torch.Tensor
    own: torch.Tensor | None = None
    arriving: ArrivingRows = field(default_factory=ArrivingRows)
    is_combined: bool = False

    @property
    def row_bytes(self) -> int:
        return int(self.sizes.hidden) * (2 if self.sizes.format == BF16 else 1)

    @property
    def scale_bytes(self) -> int:
        if self.sizes.format == BF16:
            return 0
        return int(self.sizes.hidden) // SCALE_GROUP * (1 if self.sizes.format == FP8_UE8M0 else 4)

    def recv_bytes(self) -> list[int]:
        """Of the dispatch, from each rank."""
        num_rows: list[int] = self.counts.sum(0).tolist()
        return [num * (self.row_bytes + self.scale_bytes) for num in num_rows]

    def rows_from(self, source: int) -> torch.Tensor:
        """Rows [N] in the blocks [L * R * M] of this rank's experts, those from `source`, in the
        order in which they travel."""
        most = self.counts.shape[1] * self.sizes.num_max_tokens_per_rank
        counts = self.counts.long()
        begins = counts.cumsum(1) - counts + torch.arange(len(counts))[:, None] * most
        return _ranges(begins[:, source], counts[:, source])


class LlRows:
    """The rows of one rank.

    Args:
        placed: the experts.
        rank, num_ranks: of the group.
        memory: where rows are.
        num_bytes: of the region.

    Attributes:
        region: [num_bytes] uint8.
        halves: offsets of the two.
    """

    def __init__(
        self, placed: Placed, rank: int, num_ranks: int, memory: LlMemory, num_bytes: int
    ) -> None:
        self._placed, self._rank, self._num_ranks = placed, rank, num_ranks
        self._memory = memory
        self._experts = placed.experts_of(rank)
        self.region = memory.empty(num_bytes)
        self.halves = (0, num_bytes // 2 // HALF_ALIGNMENT * HALF_ALIGNMENT)

    def needed_bytes(self, sizes: LlSizes) -> int:
        """Of a region for calls of these sizes; as on one node."""
        num_experts, num_local = len(self._placed.rank_of), self._placed.num_local_experts
        return region_bytes(sizes, self._num_ranks, num_experts, num_local)

    def view(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        num_bytes = math.prod(shape) * dtype.itemsize
        return self.region[offset : offset + num_bytes].view(dtype).view(shape)

    # Dispatch

    def choices_on_host(self, address: int, sizes: LlSizes) -> torch.Tensor:
        """[T * K] int64, when the work that makes them is done."""
        (topk_idx,) = self._memory.to_host([self._choices(address, sizes, torch.int64)])
        return topk_idx.flatten()

    def plan(self, sizes: LlSizes, topk_idx: torch.Tensor, at: int) -> LlDispatch:
        """Who gets what, of choices that have been checked, [T * K]."""
        chosen = torch.nonzero(topk_idx >= 0).flatten()
        experts = topk_idx[chosen]
        place = self._placed.order_of(experts)
        return LlDispatch(
            at=at,
            sizes=LlSizes.from_buffer_copy(sizes),
            topk_idx=topk_idx.clone(),  # the caller's may change
            order=chosen[place.argsort(stable=True)],
            num_sent=self._placed.rank_of[experts].bincount(minlength=self._num_ranks),
            counts=torch.zeros(len(self._experts), self._num_ranks, dtype=torch.int32),
        )

    def num_chosen(self, made: LlDispatch) -> torch.Tensor:
        """[E] int32, rows for each expert."""
        sent = made.topk_idx[made.order]
        return sent.bincount(minlength=len(self._placed.rank_of)).int()

    def place(self, args: LlDispatchArgs, made: LlDispatch, of_all: torch.Tensor) -> None:
        """Takes what all ranks have chosen, [R, E], and fills in the handle's routing: the row of
        each choice in its expert's block, behind those of lower ranks."""
        made.counts = of_all[:, self._experts].t().contiguous()
        before = of_all[: self._rank].sum(0)
        sent = made.topk_idx[made.order]
        place = self._placed.order_of(sent)  # ascending
        own_rows = torch.arange(len(sent)) - torch.searchsorted(place, place)
        rows = torch.full_like(made.topk_idx, -1, dtype=torch.int32)
        rows[made.order] = (before[sent] + own_rows).int()
        for address, values in ((args.experts, made.topk_idx.int()), (args.rows, rows)):
            to = self._choices(address, made.sizes, torch.int32).flatten()
            to.copy_(self._memory.from_host(values))

    def pack(self, args: LlDispatchArgs, made: LlDispatch) -> list[torch.Tensor]:
        """What each rank gets."""
        sizes = made.sizes
        x = self._memory.at(args.x, (sizes.num_tokens, sizes.hidden), torch.bfloat16)
        scales = None
        if sizes.format != BF16:
            x, scales = fp8_cast(
                x,
                round_scale=sizes.format in (FP8_ROUNDED, FP8_UE8M0),
                use_ue8m0=sizes.format == FP8_UE8M0,
            )
        tokens = self._memory.from_host(made.order // sizes.num_topk)
        return [
            _pack(x[sent], None if scales is None else scales[sent])
            for sent in tokens.split(made.num_sent.tolist())
        ]

    def unpack(self, args: LlDispatchArgs, made: LlDispatch, take: Take) -> None:
        """Rows of all ranks into the blocks of this one's experts, and what the result says."""
        sizes, num_local = made.sizes, len(self._experts)
        num_rows = self._num_ranks * sizes.num_max_tokens_per_rank
        x, scales, _ = half_offsets(sizes, self._num_ranks, num_local)
        recv_x = self.view(made.at + x, (num_local * num_rows, made.row_bytes), torch.uint8)
        num_scales = made.scale_bytes // 4
        recv_scales = self.view(
            made.at + scales, (num_local, num_scales, num_rows), torch.int32
        ).transpose(1, 2)
        for source in range(self._num_ranks):
            payload = take(source)
            to = self._memory.from_host(made.rows_from(source))
            rows = payload[: len(to) * made.row_bytes].view(len(to), made.row_bytes)
            recv_x[to] = rows
            if num_scales > 0:
                words = payload[rows.numel() :].view(torch.int32).view(len(to), num_scales)
                recv_scales[to // num_rows, to % num_rows] = words
        counts = made.counts
        self._fill(args.recv_rank_counts, counts)
        self._fill(args.recv_count, counts.sum(1).int())
        self._fill(args.missing, torch.zeros(self._num_ranks, dtype=torch.bool))
        if args.cumulative_recv_stats:
            dtype = torch.int64 if args.cumulative_stats_bytes == 8 else torch.int32
            self.add_to(args.cumulative_recv_stats, counts.sum(1).to(dtype))

    # Combine

    def pack_results(self, args: LlCombineArgs, made: LlDispatch) -> list[torch.Tensor]:
        """What each rank gets back."""
        sizes = made.sizes
        num_rows = len(self._experts) * self._num_ranks * sizes.num_max_tokens_per_rank
        x = self._memory.at(args.x, (num_rows, sizes.hidden), torch.bfloat16)
        payloads = []
        for source in range(self._num_ranks):
            rows = x[self._memory.from_host(made.rows_from(source))]
            payloads.append(_pack(*fp8_cast(rows)) if args.wire else _pack(rows, None))
        return payloads

    def result_bytes(self, args: LlCombineArgs, made: LlDispatch) -> list[int]:
        """Of a combine, from each rank."""
        hidden = int(made.sizes.hidden)
        row_bytes = hidden + hidden // SCALE_GROUP * 4 if args.wire else 2 * hidden
        return [int(num) * row_bytes for num in made.num_sent]

    def add(self, args: LlCombineArgs, made: LlDispatch, take: Take) -> None:
        """Sums of the rows that came back: fp32, from +0, in the order of choices; the product is
        rounded, then the sum."""
        sizes, memory = made.sizes, self._memory
        num_tokens, num_topk, hidden = sizes.num_tokens, sizes.num_topk, sizes.hidden
        weights = self._choices(args.topk_weights, sizes, torch.float32)
        row_bytes = (4 if args.wire else 2) * hidden
        rows = memory.empty(num_tokens * num_topk * row_bytes)
        rows = rows.view(torch.float32 if args.wire else torch.bfloat16).view(-1, hidden)
        for owner, sent in enumerate(made.order.split(made.num_sent.tolist())):
            came = _unpack(take(owner), len(sent), hidden, is_compressed=args.wire != 0)
            rows[memory.from_host(sent)] = came
        is_sent = torch.zeros(num_tokens * num_topk, dtype=torch.bool)
        is_sent[made.order] = True
        is_sent, rows = is_sent.view(num_tokens, num_topk), rows.view(num_tokens, num_topk, hidden)
        total = memory.empty(num_tokens * hidden * 4).view(torch.float32).view(num_tokens, hidden)
        total.zero_()
        for k in range(num_topk):
            # NOTE: two operations, or torch might make one rounding of them.
            if is_sent[:, k].all():
                total += weights[:, k, None] * rows[:, k].float()
            else:
                tokens = memory.from_host(torch.nonzero(is_sent[:, k]).flatten())
                total[tokens] += weights[tokens, k, None] * rows[tokens, k].float()
        out = memory.at(args.out, (num_tokens, hidden), torch.bfloat16)
        out.copy_(total.bfloat16().masked_fill_(total.isnan(), float("nan")))
        self._fill(args.missing, torch.zeros(self._num_ranks, dtype=torch.bool))

    # The caller's memory

    def add_to(self, address: int | None, values: torch.Tensor) -> None:
        """Adds values of the host to a tensor of the same shape and type, if there is one."""
        if address:
            to = self._memory.at(address, tuple(values.shape), values.dtype)
            to.add_(self._memory.from_host(values))

    def _fill(self, address: int, values: torch.Tensor) -> None:
        to = self._memory.at(address, tuple(values.shape), values.dtype)
        to.copy_(self._memory.from_host(values))

    def _choices(self, address: int, sizes: LlSizes, dtype: torch.dtype) -> torch.Tensor:
        """[T, K] at an address."""
        return self._memory.at(address, (sizes.num_tokens, sizes.num_topk), dtype)


def _ranges(begins: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """begins[0], begins[0] + 1, ... counts[0] of them, then those of the next.

    Example: begins 3, 10; counts 2, 1 -> 3, 4, 10.
    """
    before = counts.cumsum(0) - counts
    return torch.arange(int(counts.sum())) + (begins - before).repeat_interleave(counts)


def _pack(rows: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    """Rows, then their scales, as bytes."""
    parts = [rows.contiguous().view(torch.uint8).flatten()]
    if scales is not None:
        parts.append(scales.contiguous().view(torch.uint8).flatten())
    return torch.cat(parts)


def _unpack(
    payload: torch.Tensor, num_rows: int, hidden: int, *, is_compressed: bool
) -> torch.Tensor:
    """[N, H] of what _pack() made of the rows of a combine: bfloat16, or float32 if compressed."""
    if not is_compressed:
        return payload.view(torch.bfloat16).view(num_rows, hidden)
    elements, scales = payload.split([num_rows * hidden, len(payload) - num_rows * hidden])
    num_groups = hidden // SCALE_GROUP
    groups = elements.view(torch.float8_e4m3fn).view(num_rows, num_groups, SCALE_GROUP).float()
    return (groups * scales.view(torch.float32).view(num_rows, num_groups, 1)).flatten(1)

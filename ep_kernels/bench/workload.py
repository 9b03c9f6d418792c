"""Sizes, inputs, and the bytes that an operation has to move."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from ep_kernels.testing.routing import make_routing, zipf

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

DISPATCH = {"rank_major": "dispatch rank-major", "expert_major": "dispatch expert-major"}
COMBINE = {"rank_major": "combine rank-major", "expert_major": "combine expert-major"}
LAYER = "layer"
LL_DISPATCH, LL_COMBINE, LL_PAIR = "dispatch", "combine", "dispatch + combine"
MEMCPY = "memcpy"

MIN_MEMCPY_BYTES = 2 << 20


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What every rank does; the same on all of them.

    Attributes:
        num_ranks: R.
        num_tokens: T, on each rank.
        hidden: H.
        num_topk: K.
        num_experts: E, in linear blocks of E / R.
        dtype: a key of DTYPES.
        routing: a key of `ep_kernels.testing.routing.ROUTING_KINDS`.
        layouts: which of "rank_major", "expert_major" dispatch and combine are timed in.
        num_threads: threads of each rank.
        seed: of inputs and routing.
        zipf_exponent: of routing "zipf".
        low_latency: time the low-latency calls instead.
        zero_copy: low-latency combine reads its rows where the experts wrote them.
    """

    num_ranks: int
    num_tokens: int
    hidden: int
    num_topk: int
    num_experts: int
    dtype: str
    routing: str
    layouts: tuple[str, ...]
    num_threads: int
    seed: int
    zipf_exponent: float = 1.0
    low_latency: bool = False
    zero_copy: bool = False

    @property
    def num_local_experts(self) -> int:
        return self.num_experts // self.num_ranks

    @property
    def row_bytes(self) -> int:
        return self.hidden * DTYPES[self.dtype].itemsize

    @property
    def ops(self) -> tuple[str, ...]:
        """Operations in the order in which they are timed: combine takes what dispatch left."""
        if self.low_latency:
            return (LL_DISPATCH, LL_COMBINE, LL_PAIR)
        pairs = [op for layout in self.layouts for op in (DISPATCH[layout], COMBINE[layout])]
        return (*pairs, LAYER)

    def describe(self) -> str:
        mode = "low-latency: " if self.low_latency else ""
        return (
            f"{mode}{self.num_ranks} ranks x {self.num_threads} threads, each with "
            f"{self.num_tokens} tokens of hidden {self.hidden} {self.dtype}, "
            f"top-{self.num_topk} of {self.num_experts} experts, {self.routing} routing"
        )

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """One rank's tokens: x [T, H], topk_idx [T, K] int64, topk_weights [T, K] fp32."""

    x: torch.Tensor
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor


def make_inputs(workload: Workload, rank: int) -> Inputs:
    """The tokens of a rank; different on every rank."""
    topk_idx, topk_weights = make_topk(workload, rank)
    generator = torch.Generator().manual_seed(_seed(workload, rank))
    x = torch.randn(workload.num_tokens, workload.hidden, generator=generator)
    return Inputs(x=x.to(DTYPES[workload.dtype]), topk_idx=topk_idx, topk_weights=topk_weights)


def make_topk(workload: Workload, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """topk_idx and topk_weights of a rank, known to all of them."""
    sizes = (workload.num_tokens, workload.num_topk, workload.num_experts)
    seed = _seed(workload, rank)
    if workload.routing == "zipf":
        return zipf(*sizes, exponent=workload.zipf_exponent, seed=seed)
    return make_routing(workload.routing, *sizes, seed=seed)


def _seed(workload: Workload, rank: int) -> int:
    return workload.seed * 1000 + rank


def bytes_to_move(workload: Workload, topk_idx: torch.Tensor) -> dict[str, int]:
    """Bytes of rows that each operation must read and write for the tokens of one rank.

    Dispatch reads a token once and writes a row per destination; combine reads those rows and
    writes a token. Counts, indices and weights are left out.

    Example: 1 token for experts 0, 1 (rank 0) and 2 (rank 1), rows of 4 bytes. Rank-major: 1 read
    + 2 written = 12 bytes. Expert-major: 1 read + 3 written = 16 bytes.
    """
    chosen_rank = torch.where(topk_idx >= 0, topk_idx // workload.num_local_experts, -1)
    is_sent = torch.stack([(chosen_rank == rank).any(1) for rank in range(workload.num_ranks)])
    num_rows = {"rank_major": int(is_sent.sum()), "expert_major": int((topk_idx >= 0).sum())}
    num_sent_tokens, num_tokens = int(is_sent.any(0).sum()), topk_idx.shape[0]
    num_moved = {}
    for layout, rows in num_rows.items():
        num_moved[DISPATCH[layout]] = num_sent_tokens + rows
        num_moved[COMBINE[layout]] = rows + num_tokens
    num_moved[LAYER] = num_moved[DISPATCH["expert_major"]] + num_moved[COMBINE["expert_major"]]
    num_bytes = {op: rows * workload.row_bytes for op, rows in num_moved.items()}
    # As much as a dispatch, so that caches help the copies no more and no less.
    memcpy_bytes = max(MIN_MEMCPY_BYTES, num_bytes[DISPATCH["expert_major"]])
    if workload.low_latency:  # its rows are those of the expert-major layout
        ways = (DISPATCH["expert_major"], COMBINE["expert_major"], LAYER)
        num_bytes = {op: num_bytes[way] for op, way in zip(workload.ops, ways)}
    return num_bytes | {MEMCPY: memcpy_bytes}

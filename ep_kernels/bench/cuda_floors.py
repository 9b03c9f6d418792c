"""The least time that an operation on GPUs can take: its bytes at the rates of plain copies.

A GPU has to read and write the rows in its own memory, and to send and receive those that cross to
another GPU. Both go on at once, so the floor is the larger time, and that of the busiest GPU.

    dispatch   memory: a token that is sent is read once, a row is written for each destination; a
                       row that crossed once for several experts is read again to be copied
               link:   a row crosses once per (token, destination rank), in either layout
    combine    memory: those rows are read, and every token is written
               link:   every row of another GPU crosses: sums are made where the token is
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ep_kernels.bench.workload import Workload, make_topk

Matrix = list[list[int]]


@dataclass(frozen=True, kw_only=True)
class RowCounts:
    """What the routing of all ranks asks for.

    Attributes:
        num_tokens: of each rank.
        num_sent_tokens: those of each rank that have an expert.
        rows: by layout, then [source rank][destination rank].
        num_shared: [source rank][destination rank] tokens that several experts there want.
    """

    num_tokens: list[int]
    num_sent_tokens: list[int]
    rows: dict[str, Matrix]
    num_shared: Matrix

    def max_recv_rows(self, layout: str) -> int:
        """Rows of the rank that gets most."""
        return max(map(sum, zip(*self.rows[layout])))


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Bytes per second of one GPU while all of them copy.

    Attributes:
        memory: read plus written, in its own memory.
        link: to the other GPUs, which is also what it receives; None if there are none.
    """

    memory: float
    link: float | None


@dataclass(frozen=True, kw_only=True)
class Floor:
    """Seconds of the busiest GPU; link_bytes: what it sends or receives, the larger of the two."""

    memory_s: float
    link_s: float
    link_bytes: int

    @property
    def seconds(self) -> float:
        return max(self.memory_s, self.link_s)

    @property
    def limit(self) -> str:
        """ "memory" or "link", whichever takes longer."""
        return "link" if self.link_s > self.memory_s else "memory"


def count_rows(workload: Workload) -> RowCounts:
    """Example: 2 ranks, 4 experts; rank 0 has one token for experts 0, 1 and 2, rank 1 has one for
    expert 3. rows["rank_major"] is [[1, 1], [0, 1]], rows["expert_major"] is [[2, 1], [0, 1]].
    """
    ranks = range(workload.num_ranks)
    return _count_rows([make_topk(workload, rank)[0] for rank in ranks], workload.num_local_experts)


def _count_rows(topk_idxs: list[torch.Tensor], num_local_experts: int) -> RowCounts:
    by_rank, by_expert, num_shared, num_sent = [], [], [], []
    for topk_idx in topk_idxs:
        chosen = torch.where(topk_idx >= 0, topk_idx // num_local_experts, -1)
        choices = [chosen == rank for rank in range(len(topk_idxs))]
        by_rank.append([int(choice.any(1).sum()) for choice in choices])
        by_expert.append([int(choice.sum()) for choice in choices])
        num_shared.append([int((choice.sum(1) > 1).sum()) for choice in choices])
        num_sent.append(int((topk_idx >= 0).any(1).sum()))
    return RowCounts(
        num_tokens=[topk_idx.shape[0] for topk_idx in topk_idxs],
        num_sent_tokens=num_sent,
        rows={"rank_major": by_rank, "expert_major": by_expert},
        num_shared=num_shared,
    )


def floor_of(
    op: str, layout: str, counts: RowCounts, *, num_gpus: int, row_bytes: int, rates: Rates
) -> Floor:
    """The floor of "dispatch" or "combine" where rank r is on GPU r mod num_gpus."""
    is_dispatch = op == "dispatch"
    memory, sent, received = ([0] * num_gpus for _ in range(3))
    tokens = counts.num_sent_tokens if is_dispatch else counts.num_tokens
    crossing = counts.rows["rank_major" if is_dispatch else layout]
    for src, row in enumerate(counts.rows[layout]):
        memory[src % num_gpus] += tokens[src]
        for dst, num_rows in enumerate(row):
            memory[dst % num_gpus] += num_rows
            if src % num_gpus != dst % num_gpus:
                sent[src % num_gpus] += crossing[src][dst]
                received[dst % num_gpus] += crossing[src][dst]
                if is_dispatch and layout == "expert_major":
                    memory[dst % num_gpus] += counts.num_shared[src][dst]
    link_bytes = max(*sent, *received) * row_bytes
    return Floor(
        memory_s=max(memory) * row_bytes / rates.memory,
        link_s=link_bytes / rates.link if rates.link else 0.0,
        link_bytes=link_bytes,
    )

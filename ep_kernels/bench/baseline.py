"""Dispatch and combine as they are done without direct placement: permute, all-to-all, unpermute.

Two ways, the faster of which is timed:

    Deduplicated   a row travels once per (token, destination rank), the receiver copies it to its
                   experts; on the way back the receiver sums the rows of a token first
    Expanded       a row travels once per (token, expert)

Both leave the rows of EXPERT_MAJOR, in its order. Permutations are single vectorised calls into
memory that is allocated once, where the inputs are. Sums accumulate in fp32.
Symbols: R ranks, L experts per rank, T tokens, K choices, H hidden; M rows by expert, N by rank.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
import torch.nn.functional as F

from ep_kernels.bench.transports import Transport
from ep_kernels.bench.workload import Inputs, Workload


class Baseline(Protocol):
    """What a way of exchanging rows offers. Each call uses what the one before it left."""

    name: str

    def dispatch_expert_major(self) -> torch.Tensor:
        """Returns rows [M, H] grouped by local expert; routing and weights travel along."""

    def combine_expert_major(self, rows: torch.Tensor) -> torch.Tensor:
        """Returns [T, H], the sums of each token's rows."""


class Workspace:
    """Tensors that keep their memory from call to call."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = device
        self._memory: dict[str, torch.Tensor] = {}

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of that shape over the memory called `name`."""
        numel = math.prod(shape)
        memory = self._memory.get(name)
        if memory is None or memory.numel() < numel:
            memory = self._memory[name] = torch.empty(numel, dtype=dtype, device=self._device)
        return memory[:numel].view(shape)

    def select(self, name: str, rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """rows[index] in the memory called `name`."""
        out = self.get(name, (index.numel(), *rows.shape[1:]), rows.dtype)
        return torch.index_select(rows, 0, index, out=out)


class Deduplicated:
    """A row travels once per (token, destination rank)."""

    name = "deduplicated rows"

    def __init__(self, transport: Transport, workload: Workload, inputs: Inputs) -> None:
        self._transport = transport
        self._workload = workload
        self._inputs = inputs
        self._workspace = Workspace(inputs.x.device)

    def dispatch_rank_major(self) -> torch.Tensor:
        """Returns rows [N, H] by source rank, then token; `recv_choices` tells their experts."""
        inputs, workload = self._inputs, self._workload
        chosen_rank = _chosen_rank(inputs.topk_idx, workload)
        ranks = torch.arange(workload.num_ranks, device=chosen_rank.device)
        is_sent = (chosen_rank == ranks[:, None, None]).any(-1)
        dst_rank, self._token = is_sent.nonzero(as_tuple=True)
        num_sent = is_sent.sum(1)
        num_recv = self._transport.exchange_counts(num_sent[:, None])[:, 0]
        self._send, self._recv = num_sent.tolist(), num_recv.tolist()

        is_local = chosen_rank[self._token] == dst_rank[:, None]
        local_idx = inputs.topk_idx[self._token] - dst_rank[:, None] * workload.num_local_experts
        local_idx = torch.where(is_local, local_idx, -1).int()
        weights = inputs.topk_weights[self._token].view(torch.int32)
        self.recv_choices = self._all_to_all("choices", torch.cat([local_idx, weights], 1))
        return self._all_to_all("rows", self._workspace.select("send", inputs.x, self._token))

    def dispatch_expert_major(self) -> torch.Tensor:
        recv = self.dispatch_rank_major()
        num_topk = self._workload.num_topk
        local_idx, weights = self.recv_choices[:, :num_topk], self.recv_choices[:, num_topk:]
        self._recv_row, k = (local_idx >= 0).nonzero(as_tuple=True)
        self._order = local_idx[self._recv_row, k].argsort(stable=True)
        self.recv_topk_weights = weights[self._recv_row, k][self._order].view(torch.float32)
        return self._workspace.select("expert_rows", recv, self._recv_row[self._order])

    def combine_expert_major(self, rows: torch.Tensor) -> torch.Tensor:
        bags = self._recv_row.bincount(minlength=sum(self._recv))
        return self.combine_rank_major(_sum_bags(rows, _inverse(self._order), bags))

    def combine_rank_major(self, rows: torch.Tensor) -> torch.Tensor:
        """Sums rows [N, H] that came by dispatch_rank_major over their ranks: [T, H]."""
        back = self._workspace.get("back", (sum(self._send), *rows.shape[1:]), rows.dtype)
        self._transport.all_to_all(back, rows, recv=self._send, send=self._recv)
        bags = self._token.bincount(minlength=self._workload.num_tokens)
        return _sum_bags(back, self._token.argsort(stable=True), bags)

    def _all_to_all(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        out = self._workspace.get(name, (sum(self._recv), *rows.shape[1:]), rows.dtype)
        self._transport.all_to_all(out, rows, recv=self._recv, send=self._send)
        return out


class Expanded:
    """A row travels once per (token, expert)."""

    name = "expanded rows"

    def __init__(self, transport: Transport, workload: Workload, inputs: Inputs) -> None:
        self._transport = transport
        self._workload = workload
        self._inputs = inputs
        self._workspace = Workspace(inputs.x.device)

    def dispatch_expert_major(self) -> torch.Tensor:
        inputs, workload = self._inputs, self._workload
        self._token, k = (inputs.topk_idx >= 0).nonzero(as_tuple=True)
        expert = inputs.topk_idx[self._token, k]
        self._order = expert.argsort(stable=True)
        num_sent = expert.bincount(minlength=workload.num_experts).view(workload.num_ranks, -1)
        num_recv = self._transport.exchange_counts(num_sent)
        self._send, self._recv = num_sent.sum(1).tolist(), num_recv.sum(1).tolist()

        weights = inputs.topk_weights[self._token, k][self._order]
        recv_weights = self._all_to_all("weights", weights)
        send = self._workspace.select("send", inputs.x, self._token[self._order])
        recv = self._all_to_all("rows", send)
        self._regroup = _by_expert(num_recv)
        self.recv_topk_weights = recv_weights[self._regroup]
        return self._workspace.select("expert_rows", recv, self._regroup)

    def combine_expert_major(self, rows: torch.Tensor) -> torch.Tensor:
        by_source = self._workspace.select("by_source", rows, _inverse(self._regroup))
        back = self._workspace.get("back", (sum(self._send), *rows.shape[1:]), rows.dtype)
        self._transport.all_to_all(back, by_source, recv=self._send, send=self._recv)
        bags = self._token.bincount(minlength=self._workload.num_tokens)
        return _sum_bags(back, _inverse(self._order), bags)

    def _all_to_all(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        out = self._workspace.get(name, (sum(self._recv), *rows.shape[1:]), rows.dtype)
        self._transport.all_to_all(out, rows, recv=self._recv, send=self._send)
        return out


def _chosen_rank(topk_idx: torch.Tensor, workload: Workload) -> torch.Tensor:
    return torch.where(topk_idx >= 0, topk_idx // workload.num_local_experts, -1)


def _inverse(permutation: torch.Tensor) -> torch.Tensor:
    """[2, 0, 1] -> [1, 2, 0]."""
    inverse = torch.empty_like(permutation)
    inverse[permutation] = torch.arange(permutation.numel(), device=permutation.device)
    return inverse


def _by_expert(num_rows: torch.Tensor) -> torch.Tensor:
    """Where the rows of each expert are, in rows that lie by source rank, then expert.

    Args:
        num_rows: [R, L] int64, rows from each source for each expert.

    Example: [[1, 2], [1, 0]]: rows are s0e0, s0e1, s0e1, s1e0 -> [0, 3, 1, 2].
    """
    starts = (num_rows.flatten().cumsum(0) - num_rows.flatten()).view_as(num_rows)
    sizes, starts = num_rows.T.flatten(), starts.T.flatten()
    first_of_block = sizes.cumsum(0) - sizes
    shifts = torch.repeat_interleave(starts - first_of_block, sizes)
    return shifts + torch.arange(shifts.numel(), device=shifts.device)


def _sum_bags(rows: torch.Tensor, index: torch.Tensor, bag_sizes: torch.Tensor) -> torch.Tensor:
    """Sums rows[index] over consecutive bags; an empty bag gives 0."""
    offsets = bag_sizes.cumsum(0) - bag_sizes
    if rows.shape[0] == 0:
        return rows.new_zeros(bag_sizes.numel(), rows.shape[1])
    return F.embedding_bag(index, rows, offsets, mode="sum")

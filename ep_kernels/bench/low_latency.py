"""Low-latency calls, and bare all-to-alls of the same rows.

An all-to-all moves contiguous rows by rank, [N, H] bf16, from one buffer to another; its counts are
known and its result is not brought into any order, nor summed. So it is the part that a baseline
cannot do without.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ep_kernels import reference
from ep_kernels.bench.contenders import Contender
from ep_kernels.bench.transports import GroupTransport, MpiTransport, Transport
from ep_kernels.bench.workload import (
    LL_COMBINE,
    LL_DISPATCH,
    LL_PAIR,
    Inputs,
    Workload,
    make_inputs,
)
from ep_kernels.buffer import Buffer


def region_bytes(workload: Workload) -> int:
    return Buffer.low_latency_size_hint(
        num_max_tokens_per_rank=max(1, workload.num_tokens),
        hidden=workload.hidden,
        num_ranks=workload.num_ranks,
        num_experts=workload.num_experts,
    )


def low_latency_contenders(
    names: tuple[str, ...], buffer: Buffer | None, workload: Workload, inputs: Inputs, comm: Any
) -> list[Contender]:
    """Checked contenders; collective."""
    contenders: list[Contender] = []
    for name in names:
        if name == "ep_kernels":
            assert buffer is not None
            ours = LowLatency(buffer, workload, inputs)
            ours.check()
            contenders.append(ours)
        else:
            transport = GroupTransport("gloo") if name == "gloo" else MpiTransport(comm)
            contenders.append(AllToAll(transport, workload, inputs))
    return contenders


class LowLatency(Contender):
    """Buffer.low_latency_dispatch and low_latency_combine, received at once."""

    name = "ep_kernels"

    def __init__(self, buffer: Buffer, workload: Workload, inputs: Inputs) -> None:
        self._buffer, self._workload, self._inputs = buffer, workload, inputs
        self.results = {}
        detail = "zero-copy" if workload.zero_copy else "rows copied"
        self.details = {LL_DISPATCH: "bf16", LL_COMBINE: detail, LL_PAIR: detail}
        self.ops = {LL_DISPATCH: self._dispatch, LL_COMBINE: self._combine, LL_PAIR: self._pair}
        self._out = torch.empty_like(inputs.x)

    def _dispatch(self) -> None:
        self.results[LL_DISPATCH] = self._buffer.low_latency_dispatch(
            self._inputs.x,
            self._inputs.topk_idx,
            num_max_tokens_per_rank=max(1, self._workload.num_tokens),
            num_experts=self._workload.num_experts,
        )

    def _combine(self) -> None:
        rows, inputs = self.results.pop(LL_DISPATCH), self._inputs
        x, zero_copy = rows.recv_x, self._workload.zero_copy
        if zero_copy:  # as it is after experts that write there; the time is the same
            x = self._buffer.next_low_latency_combine_buffer(rows.handle)
        self._buffer.low_latency_combine(
            x,
            inputs.topk_idx,
            inputs.topk_weights,
            rows.handle,
            zero_copy=zero_copy,
            out=self._out,
        )

    def _pair(self) -> None:
        self._dispatch()
        self._combine()

    def check(self) -> None:
        """Compares a round with the reference. Raises ValueError if a byte differs."""
        workload, rank = self._workload, self._buffer.rank
        every = [make_inputs(workload, src) for src in range(workload.num_ranks)]
        placement = reference.make_placement(workload.num_experts, workload.num_ranks)
        rows = [
            reference.low_latency_dispatch(
                [inputs.x for inputs in every],
                [inputs.topk_idx for inputs in every],
                placement=placement,
                rank=dst,
                num_max_tokens_per_rank=max(1, workload.num_tokens),
            )
            for dst in range(workload.num_ranks)
        ]
        expected = reference.low_latency_combine(
            [part.recv_x for part in rows],
            rows,
            self._inputs.topk_idx,
            self._inputs.topk_weights,
            placement=placement,
            rank=rank,
        )
        self._dispatch()
        result, is_sent = self.results[LL_DISPATCH], rows[rank].src_rank >= 0
        if not torch.equal(result.recv_x[is_sent], rows[rank].recv_x[is_sent]):
            raise ValueError("ep_kernels: low-latency dispatch differs from the reference")
        self._buffer.next_low_latency_combine_buffer(result.handle).copy_(result.recv_x)
        self._combine()
        if not torch.equal(self._out, expected):
            raise ValueError("ep_kernels: low-latency combine differs from the reference")


class AllToAll(Contender):
    """The same rows through a communication library."""

    def __init__(self, transport: Transport, workload: Workload, inputs: Inputs) -> None:
        self.name = transport.name
        self._transport = transport
        self.results = {}
        chosen = inputs.topk_idx[inputs.topk_idx >= 0] // workload.num_local_experts
        num_sent = chosen.bincount(minlength=workload.num_ranks)
        num_recv = transport.exchange_counts(num_sent[:, None])[:, 0]
        self._send, self._recv = num_sent.tolist(), num_recv.tolist()
        shape = (workload.hidden,)
        self._here = torch.ones(sum(self._send), *shape, dtype=inputs.x.dtype)
        self._there = torch.ones(sum(self._recv), *shape, dtype=inputs.x.dtype)
        functions: dict[str, Callable[[], Any]] = {
            LL_DISPATCH: self._dispatch,
            LL_COMBINE: self._combine,
            LL_PAIR: self._pair,
        }
        self.ops = functions
        self.details = dict.fromkeys(functions, "all-to-all only")

    def _dispatch(self) -> None:
        self._transport.all_to_all(self._there, self._here, recv=self._recv, send=self._send)

    def _combine(self) -> None:
        self._transport.all_to_all(self._here, self._there, recv=self._send, send=self._recv)

    def _pair(self) -> None:
        self._dispatch()
        self._combine()

"""The transfer of a call over several nodes, in chunks: docs/multi-node.md, "Chunks".

Symbols: T tokens of this rank, K choices per token, C tokens of a chunk.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Protocol

import torch

from ep_kernels._native import CombineArgs, DispatchArgs
from ep_kernels._native_lane import LaneMergeArgs, LanePackArgs, LanePlanArgs, LaneSums
from ep_kernels.lanes import Lane, Message, Transfer
from ep_kernels.routes import WINDOW, Routes, Source, num_in_chunk
from ep_kernels.topology import Topology

CHUNK = 3  # a kind of messages; hierarchical.py and routes.py have the others
CHUNK_PHASE = 4

Step = Callable[..., None]
"""Calls a function of the C interface by its name, without ep_lane_."""


class Leg(Protocol):
    """What a call sends, and what it does with what arrives. Both ends know the sizes."""

    num_steps: int

    def send_bytes(self, node: int, chunk: int) -> int:
        """Of a chunk for a node, 0 if it is not sent."""

    def recv_bytes(self, node: int, chunk: int) -> int:
        """Of a chunk from a node, 0 if none comes."""

    def prepare(self, node: int, chunk: int, memory: torch.Tensor) -> None:
        """Fills a chunk that will be sent."""

    def work_meanwhile(self) -> None:
        """Does what needs no network, while the first chunks travel."""

    def finish(self, chunk: int, arrived: dict[int, torch.Tensor]) -> None:
        """Takes what came from each node."""


class Window:
    """Memory for WINDOW chunks per peer and direction, and the order in which chunks move."""

    def __init__(self, lane: Lane, topology: Topology) -> None:
        self._lane, self._nodes = lane, topology.other_nodes
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._slot_bytes = 0

    def run(self, seq: int, leg: Leg) -> None:
        """Sends and receives all chunks of call `seq`."""
        message = Message(seq=seq, kind=CHUNK, phase=CHUNK_PHASE, is_chunk=True)
        self._reserve(leg)
        sends: dict[int, list[Transfer]] = {}
        recvs: dict[int, list[Transfer]] = {}

        def start_recvs(chunk: int) -> None:
            recvs[chunk] = [
                self._lane.irecv(node, self._slot(0, node, chunk, num_bytes), message)
                for node in self._nodes
                if (num_bytes := leg.recv_bytes(node, chunk))
            ]

        def start_sends(chunk: int) -> None:
            sends[chunk] = []
            for node in self._nodes:
                if num_bytes := leg.send_bytes(node, chunk):
                    memory = self._slot(1, node, chunk, num_bytes)
                    leg.prepare(node, chunk, memory)
                    sends[chunk].append(self._lane.isend(node, memory, message))

        first = range(min(WINDOW, leg.num_steps))
        for chunk in first:
            start_recvs(chunk)
        for chunk in first:
            start_sends(chunk)
        leg.work_meanwhile()
        for chunk in range(leg.num_steps):
            arrived = recvs.pop(chunk)
            for transfer in arrived:
                self._lane.wait(transfer)
            leg.finish(chunk, {transfer.node: transfer.tensor for transfer in arrived})
            for transfer in sends.pop(chunk):
                self._lane.wait(transfer)
            if chunk + WINDOW < leg.num_steps:
                start_recvs(chunk + WINDOW)
                start_sends(chunk + WINDOW)

    def _reserve(self, leg: Leg) -> None:
        largest = max(
            (
                num_bytes(node, chunk)
                for num_bytes in (leg.send_bytes, leg.recv_bytes)
                for node in self._nodes
                for chunk in range(leg.num_steps)
            ),
            default=0,
        )
        self._slot_bytes = -(-largest // 64) * 64
        needed = 2 * len(self._nodes) * WINDOW * self._slot_bytes
        if len(self._memory) < needed:
            self._memory = torch.empty(needed, dtype=torch.uint8)

    def _slot(self, direction: int, node: int, chunk: int, num_bytes: int) -> torch.Tensor:
        peer = direction * len(self._nodes) + self._nodes.index(node)
        begin = (peer * WINDOW + chunk % WINDOW) * self._slot_bytes
        return self._memory[begin : begin + num_bytes]


class DispatchLeg:
    """Rows to the forwarders of their nodes, which write them to their ranks."""

    def __init__(
        self, step: Step, seq: int, args: DispatchArgs, routes: Routes, offers: torch.Tensor
    ) -> None:
        self._step, self._seq, self._args, self._routes = step, seq, args, routes
        self._offers = offers.data_ptr()
        self._is_fresh = args.sizes.handle_seq < 0
        self.num_steps = routes.num_steps(args.sizes.num_tokens)

    def send_bytes(self, node: int, chunk: int) -> int:
        if node not in self._routes.outgoing:
            return 0
        count = num_in_chunk(self._routes.outgoing[node].bounds, chunk)
        return count * self._token_bytes(self._args.sizes.num_topk)

    def recv_bytes(self, node: int, chunk: int) -> int:
        if node not in self._routes.sources:
            return 0
        source = self._routes.sources[node]
        return num_in_chunk(source.bounds, chunk) * self._token_bytes(source.num_topk)

    def _token_bytes(self, num_topk: int) -> int:
        sizes = self._args.sizes
        choice_bytes = (4 if self._is_fresh else 0) + sizes.weight_bytes
        return int(sizes.row_bytes + sizes.scale_bytes + num_topk * choice_bytes)

    def prepare(self, node: int, chunk: int, memory: torch.Tensor) -> None:
        args, sizes = self._args, self._args.sizes
        outgoing = self._routes.outgoing[node]
        pack = LanePackArgs(
            x=args.x,
            scales=args.scales,
            topk_weights=args.topk_weights,
            topk_idx=args.routing.topk_idx if self._is_fresh else None,
            tokens=outgoing.tokens.data_ptr() + 4 * outgoing.bounds[chunk],
            message=memory.data_ptr(),
            num_tokens=num_in_chunk(outgoing.bounds, chunk),
            row_bytes=sizes.row_bytes,
            scale_bytes=sizes.scale_bytes,
            weight_bytes=sizes.weight_bytes,
            num_topk=sizes.num_topk,
            node=node,
            num_threads=sizes.num_threads,
        )
        self._step("pack", ctypes.byref(pack))

    def work_meanwhile(self) -> None:
        self._step("send_rows", ctypes.byref(self._args), self._offers)
        self._step("fill_padding", ctypes.byref(self._args))

    def finish(self, chunk: int, arrived: dict[int, torch.Tensor]) -> None:
        for node, memory in arrived.items():
            self._forward(self._routes.sources[node], chunk, memory.data_ptr())

    def _forward(self, source: Source, chunk: int, message: int) -> None:
        """Plans a chunk that arrived, and writes it to the ranks of this node."""
        sizes = self._args.sizes
        count, num_topk = num_in_chunk(source.bounds, chunk), source.num_topk
        scales = message + count * sizes.row_bytes
        choices = scales + count * sizes.scale_bytes
        weights = choices + (4 * count * num_topk if self._is_fresh else 0)
        args = DispatchArgs.from_buffer_copy(self._args)
        args.x, args.scales, args.topk_weights = message, scales, weights
        args.sizes.num_tokens, args.sizes.num_topk = count, num_topk
        offset = 4 * num_topk * source.bounds[chunk]
        args.routing.rows = source.rows.data_ptr() + offset
        args.routing.routes = source.routes.data_ptr() + offset
        if self._is_fresh:
            topk_idx = torch.empty((count, num_topk), dtype=torch.int64)
            args.routing.topk_idx = topk_idx.data_ptr()
            plan = LanePlanArgs(
                choices=choices,
                topk_idx=topk_idx.data_ptr(),
                rows=args.routing.rows,
                routes=args.routing.routes,
                next=source.next.data_ptr(),
                num_tokens=count,
                num_topk=num_topk,
                layout=sizes.layout,
            )
            self._step("plan_tokens", self._seq, ctypes.byref(plan))
        self._step("send_rows", ctypes.byref(args), self._offers)


class CombineLeg:
    """Sums of a node's rows back to the ranks of their tokens, which add the nodes' sums."""

    def __init__(
        self,
        step: Step,
        topology: Topology,
        args: CombineArgs,
        routes: Routes,
        offers: torch.Tensor,
    ) -> None:
        self._step, self._topology, self._args, self._routes = step, topology, args, routes
        self._offers = offers.data_ptr()
        sizes = args.sizes
        self.num_steps = routes.num_steps(sizes.num_tokens)
        own_tokens = min(routes.chunk_tokens, sizes.num_tokens)
        self._own_sums = torch.empty(own_tokens * sizes.row_bytes, dtype=torch.uint8)

    def send_bytes(self, node: int, chunk: int) -> int:
        if node not in self._routes.sources:
            return 0
        source = self._routes.sources[node]
        return num_in_chunk(source.bounds, chunk) * self._token_bytes(source.num_topk)

    def recv_bytes(self, node: int, chunk: int) -> int:
        if node not in self._routes.outgoing:
            return 0
        count = num_in_chunk(self._routes.outgoing[node].bounds, chunk)
        return count * self._token_bytes(self._args.sizes.num_topk)

    def _token_bytes(self, num_topk: int) -> int:
        sizes = self._args.sizes
        return int(sizes.row_bytes + num_topk * sizes.weight_bytes)

    def prepare(self, node: int, chunk: int, memory: torch.Tensor) -> None:
        source = self._routes.sources[node]
        count = num_in_chunk(source.bounds, chunk)
        offset = 4 * source.num_topk * source.bounds[chunk]
        args = CombineArgs.from_buffer_copy(self._args)
        args.sizes.num_tokens, args.sizes.num_topk = count, source.num_topk
        args.routing.rows = source.rows.data_ptr() + offset
        args.routing.routes = source.routes.data_ptr() + offset
        args.out = memory.data_ptr()
        if args.sizes.weight_bytes:
            args.out_topk_weights = memory.data_ptr() + count * args.sizes.row_bytes
        self._sum(args)

    def work_meanwhile(self) -> None:
        """Nothing: the own rows are summed chunk by chunk."""

    def finish(self, chunk: int, arrived: dict[int, torch.Tensor]) -> None:
        sizes, first = self._args.sizes, chunk * self._routes.chunk_tokens
        count = min(self._routes.chunk_tokens, sizes.num_tokens - first)
        if count <= 0:
            return
        args = CombineArgs.from_buffer_copy(self._args)
        args.sizes.num_tokens = count
        offset = first * sizes.num_topk
        args.routing.rows += 4 * offset
        args.routing.routes += 4 * offset
        args.out = self._own_sums.data_ptr()
        if sizes.weight_bytes:
            args.out_topk_weights += offset * sizes.weight_bytes
        self._sum(args)
        self._merge(chunk, count, arrived)

    def _sum(self, args: CombineArgs) -> None:
        args.bias[0] = args.bias[1] = None
        self._step("reduce_rows", ctypes.byref(args), self._offers)

    def _merge(self, chunk: int, count: int, arrived: dict[int, torch.Tensor]) -> None:
        sizes = self._args.sizes
        nodes = (LaneSums * self._topology.num_nodes)()
        for node, memory in arrived.items():
            outgoing = self._routes.outgoing[node]
            num_tokens = num_in_chunk(outgoing.bounds, chunk)
            nodes[node].tokens = outgoing.tokens.data_ptr() + 4 * outgoing.bounds[chunk]
            nodes[node].rows = memory.data_ptr()
            if sizes.weight_bytes:
                nodes[node].topk_weights = memory.data_ptr() + num_tokens * sizes.row_bytes
            nodes[node].num_tokens = num_tokens
        merge = LaneMergeArgs(
            nodes=nodes,
            own_sums=self._own_sums.data_ptr(),
            bias=self._args.bias,
            out=self._args.out,
            out_topk_weights=self._args.out_topk_weights,
            first_token=chunk * self._routes.chunk_tokens,
            num_tokens=count,
            row_bytes=sizes.row_bytes,
            weight_bytes=sizes.weight_bytes,
            num_topk=sizes.num_topk,
            own_node=self._topology.node,
            num_nodes=self._topology.num_nodes,
            row_type=sizes.row_type,
            num_threads=sizes.num_threads,
        )
        self._step("merge", ctypes.byref(merge))

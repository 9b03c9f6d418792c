"""The transfer of a call over several nodes, in chunks: docs/multi-node.md, "Chunks".

Symbols: T tokens of this rank, K choices per token, C tokens of a chunk.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Protocol

import torch

from ep_kernels._native import CombineArgs, DispatchArgs
from ep_kernels._native_lane import LaneMergeArgs, LanePackArgs, LaneSums
from ep_kernels.node_rows import NodeRows
from ep_kernels.routes import WINDOW, RouteEntry, Routes, num_in_chunk
from ep_kernels.topology import Topology
from ep_kernels.transport import Transport

Step = Callable[..., None]
"""Works on rows where they are: calls a function of the C interface by its name, without its
prefix."""


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


def move_chunks(transport: Transport, nodes: list[int], seq: int, leg: Leg) -> None:
    """Sends and receives all chunks of call `seq`."""

    def sizes(num_bytes: Callable[[int, int], int], step: int) -> dict[int, int]:
        return {node: size for node in nodes if (size := num_bytes(node, step))}

    def send(step: int) -> None:
        chunks = sizes(leg.send_bytes, step)
        for node, num_bytes in chunks.items():
            leg.prepare(node, step, transport.memory(node, step, num_bytes))
        transport.send(step, chunks)

    transport.begin(seq, _largest_chunk(nodes, leg))
    first = range(min(WINDOW, leg.num_steps))
    for step in first:
        transport.expect(step, sizes(leg.recv_bytes, step))
    for step in first:
        send(step)
    leg.work_meanwhile()
    for step in range(leg.num_steps):
        leg.finish(step, transport.receive(step))
        transport.release(step)
        transport.wait_sent(step)
        if step + WINDOW < leg.num_steps:
            transport.expect(step + WINDOW, sizes(leg.recv_bytes, step + WINDOW))
            send(step + WINDOW)


def _largest_chunk(nodes: list[int], leg: Leg) -> int:
    return max(
        (
            num_bytes(node, step)
            for num_bytes in (leg.send_bytes, leg.recv_bytes)
            for node in nodes
            for step in range(leg.num_steps)
        ),
        default=0,
    )


class DispatchLeg:
    """Rows to the forwarders of their nodes, which write them to their ranks.

    Args:
        step: see Step.
        args: of the dispatch.
        entry: its routes; with the choices of each source if it is fresh.
        offers: [R, OFFER_WORDS], those of the own node.
    """

    def __init__(
        self, step: Step, args: DispatchArgs, entry: RouteEntry, offers: torch.Tensor
    ) -> None:
        self._step, self._args, self._routes = step, args, entry.routes
        self._choices, self._offers = entry.choices, offers.data_ptr()
        self.num_steps = self._routes.num_steps(args.sizes.num_tokens)

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
        return int(sizes.row_bytes + sizes.scale_bytes + num_topk * sizes.weight_bytes)

    def prepare(self, node: int, chunk: int, memory: torch.Tensor) -> None:
        args, sizes = self._args, self._args.sizes
        outgoing = self._routes.outgoing[node]
        pack = LanePackArgs(
            x=args.x,
            scales=args.scales,
            topk_weights=args.topk_weights,
            tokens=outgoing.tokens.data_ptr() + 4 * outgoing.bounds[chunk],
            message=memory.data_ptr(),
            num_tokens=num_in_chunk(outgoing.bounds, chunk),
            row_bytes=sizes.row_bytes,
            scale_bytes=sizes.scale_bytes,
            weight_bytes=sizes.weight_bytes,
            num_topk=sizes.num_topk,
            num_threads=sizes.num_threads,
        )
        self._step("pack", ctypes.byref(pack))

    def work_meanwhile(self) -> None:
        self._step("send_rows", ctypes.byref(self._args), self._offers)
        self._step("fill_padding", ctypes.byref(self._args))

    def finish(self, chunk: int, arrived: dict[int, torch.Tensor]) -> None:
        for node, memory in arrived.items():
            self._forward(node, chunk, memory.data_ptr())

    def _forward(self, node: int, chunk: int, message: int) -> None:
        """Writes a chunk that arrived to the ranks of this node."""
        source, sizes = self._routes.sources[node], self._args.sizes
        count, num_topk = num_in_chunk(source.bounds, chunk), source.num_topk
        first_choice = num_topk * source.bounds[chunk]
        args = DispatchArgs.from_buffer_copy(self._args)
        args.x = message
        args.scales = message + count * sizes.row_bytes
        args.topk_weights = args.scales + count * sizes.scale_bytes
        args.sizes.num_tokens, args.sizes.num_topk = count, num_topk
        args.routing.rows = source.rows.data_ptr() + 4 * first_choice
        args.routing.routes = source.routes.data_ptr() + 4 * first_choice
        if node in self._choices:
            args.routing.topk_idx = self._choices[node].data_ptr() + 8 * first_choice
        self._step("send_rows", ctypes.byref(args), self._offers)


class CombineLeg:
    """Sums of a node's rows back to the ranks of their tokens, which add the nodes' sums."""

    def __init__(
        self,
        rows: NodeRows,
        topology: Topology,
        args: CombineArgs,
        routes: Routes,
        offers: torch.Tensor,
    ) -> None:
        self._step, self._topology, self._args, self._routes = rows.step, topology, args, routes
        self._offers = offers.data_ptr()
        sizes = args.sizes
        self.num_steps = routes.num_steps(sizes.num_tokens)
        own_tokens = min(routes.chunk_tokens, sizes.num_tokens)
        self._own_sums = rows.new_memory(own_tokens * sizes.row_bytes)

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

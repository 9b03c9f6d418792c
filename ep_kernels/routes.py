"""What crosses the network along a routing: which tokens go to which node, in which chunks.

Symbols: T tokens of this rank, K choices per token, C tokens of a chunk, F tokens of another rank
that this rank forwards to its node.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ep_kernels._native import DispatchArgs, Sizes
from ep_kernels._native_lane import LanePlanArgs, LanePost, LaneTokensArgs
from ep_kernels.errors import EPConfigError
from ep_kernels.handle import RoutingMemory
from ep_kernels.lanes import Lane, Message, Transfer
from ep_kernels.topology import Topology

WINDOW = 4
"""Chunks per peer and direction that are under way at a time."""

MIN_CHUNK_BYTES = 256 << 10
NUM_CHUNKS = 8  # as many, if they are not smaller than that
SIZES, CHOICES = 1, 4  # kinds of messages; node_control.py and transport.py have the others
SIZES_PHASE = 3


@dataclass(frozen=True, kw_only=True)
class Outgoing:
    """This rank's tokens for one node.

    Attributes:
        tokens: int32, ascending; where rows are.
        bounds: of each chunk among them, one more than chunks.
    """

    tokens: torch.Tensor
    bounds: list[int]


@dataclass(frozen=True, kw_only=True)
class Source:
    """A rank of another node whose tokens this rank forwards to its node.

    Attributes:
        num_topk: its K.
        bounds: of each chunk among its F tokens.
        rows, routes: [F, K] int32 as in RoutingMemory, on the ranks of this node; -1 elsewhere.
            Where rows are.
    """

    num_topk: int
    bounds: list[int]
    rows: torch.Tensor
    routes: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Routes:
    """What crosses the network along a routing, by node; nothing by default."""

    chunk_tokens: int = 1 << 30
    outgoing: dict[int, Outgoing] = field(default_factory=dict)
    sources: dict[int, Source] = field(default_factory=dict)

    def num_steps(self, num_tokens: int) -> int:
        """Chunks of this rank, or of a peer that has more."""
        own = -(-num_tokens // self.chunk_tokens)
        return max([own, *(len(source.bounds) - 1 for source in self.sources.values())])


@dataclass
class RouteEntry:
    """Where a dispatch that may still be queued leaves its routes: nothing travels before, or if
    it fails.

    Attributes:
        routes: see there.
        choices: by node, [F, K] int64 experts that the source chose on this node, -1 elsewhere;
            where rows are. Only while the rows of the dispatch itself travel.
    """

    routes: Routes = field(default_factory=Routes)
    choices: dict[int, torch.Tensor] = field(default_factory=dict)


class RouteBook:
    """Routes by the number of their dispatch, which a handle keeps that becomes tensors and is
    restored. They live as long as the memory of the routing, whichever tensors share it."""

    def __init__(self) -> None:
        self._entries: dict[int, tuple[StorageWeakRef, RouteEntry]] = {}

    def add(self, seq: int, memory: RoutingMemory) -> RouteEntry:
        """Starts an entry, and drops those that nobody can ask for any more."""
        self._entries = {
            number: kept for number, kept in self._entries.items() if not kept[0].expired()
        }
        entry = RouteEntry()
        self._entries[seq] = StorageWeakRef(memory.words.untyped_storage()), entry
        return entry

    def find(self, seq: int) -> RouteEntry:
        """Raises EPConfigError, if only copies of the memory are left."""
        if seq not in self._entries:
            raise EPConfigError(
                f"handle (of dispatch {seq}): over several nodes the tensor that to_tensors() gave "
                "has to stay, and a copy does not replace it"
            )
        return self._entries[seq][1]


def num_in_chunk(bounds: list[int], chunk: int) -> int:
    return bounds[chunk + 1] - bounds[chunk] if chunk + 1 < len(bounds) else 0


def choose_chunk_tokens(sizes: Sizes, staging_bytes: int, topology: Topology) -> int:
    """C: chunks of all peers fit into `staging_bytes`, and there are several if it is worth it."""
    token_bytes = sizes.row_bytes + sizes.scale_bytes + sizes.num_topk * (4 + sizes.weight_bytes)
    num_slots = 2 * WINDOW * len(topology.other_nodes) + 1
    most = staging_bytes // (num_slots * token_bytes)
    wished = max(-(-sizes.num_tokens // NUM_CHUNKS), MIN_CHUNK_BYTES // token_bytes)
    return int(max(1, min(most, wished)))


class RouteExchange:
    """Makes the routes of fresh dispatches, in host memory.

    Args:
        step: calls a function of the C interface of the host by its name.
        put: gives a tensor to where rows are.
        lane: to the other nodes.
        topology: of the group.
        num_experts: E.
    """

    def __init__(
        self,
        step: Callable[..., None],
        put: Callable[[torch.Tensor], torch.Tensor],
        lane: Lane,
        topology: Topology,
        num_experts: int,
    ) -> None:
        self._step, self._put, self._lane, self._topology = step, put, lane, topology
        self._num_columns = max(num_experts, topology.num_ranks)

    def make_routes(
        self, seq: int, args: DispatchArgs, own: LanePost, posts: dict[int, LanePost]
    ) -> RouteEntry:
        """Lists what goes to each node, and learns from each what comes, and on which rows."""
        sizes = Message(seq=seq, kind=SIZES, phase=SIZES_PHASE)
        # Counted with the rows: once per token.
        choices = Message(seq=seq, kind=CHOICES, phase=SIZES_PHASE, is_chunk=True)
        chunk_tokens = max(1, own.chunk_tokens)
        entry = RouteEntry(Routes(chunk_tokens=chunk_tokens))
        bounds, recvs, sends = {}, {}, []
        for node, post in posts.items():
            num_chunks = -(-post.num_tokens // max(1, post.chunk_tokens))
            bounds[node] = torch.zeros(num_chunks + 1, dtype=torch.int64)
            recvs[node] = self._receive(node, bounds[node][1:], sizes)
        for node in posts:
            outgoing, its_choices, its_bounds = self._list_tokens(args, node, chunk_tokens)
            entry.routes.outgoing[node] = outgoing
            sends += self._send(node, its_bounds[1:], sizes)
            sends += self._send(node, its_choices, choices)
        chosen = {}
        for node, post in posts.items():
            self._wait(recvs[node])
            chosen[node] = torch.empty((int(bounds[node][-1]), post.num_topk), dtype=torch.int32)
            recvs[node] = self._receive(node, chosen[node], choices)
        for node in posts:
            self._wait(recvs[node])
            self._add_source(entry, seq, node, args, bounds[node].tolist(), chosen[node])
        self._wait(sends)
        return entry

    def _receive(self, node: int, words: torch.Tensor, message: Message) -> list[Transfer]:
        if words.numel() == 0:
            return []
        return [self._lane.irecv(node, words.view(torch.uint8).flatten(), message)]

    def _send(self, node: int, words: torch.Tensor, message: Message) -> list[Transfer]:
        if words.numel() == 0:
            return []
        return [self._lane.isend(node, words.view(torch.uint8).flatten(), message)]

    def _wait(self, transfers: list[Transfer]) -> None:
        for transfer in transfers:
            self._lane.wait(transfer)

    def _list_tokens(
        self, args: DispatchArgs, node: int, chunk_tokens: int
    ) -> tuple[Outgoing, torch.Tensor, torch.Tensor]:
        """This rank's tokens for a node, their choices there, the bounds of chunks."""
        sizes = args.sizes
        tokens = torch.empty(sizes.num_tokens, dtype=torch.int32)
        choices = torch.empty((sizes.num_tokens, sizes.num_topk), dtype=torch.int32)
        bounds = torch.empty(-(-sizes.num_tokens // chunk_tokens) + 1, dtype=torch.int64)
        tokens_args = LaneTokensArgs(
            topk_idx=args.routing.topk_idx,
            tokens=tokens.data_ptr(),
            choices=choices.data_ptr(),
            bounds=bounds.data_ptr(),
            num_tokens=sizes.num_tokens,
            chunk_tokens=chunk_tokens,
            num_topk=sizes.num_topk,
            node=node,
        )
        self._step("tokens", ctypes.byref(tokens_args))
        count = int(bounds[-1])
        outgoing = Outgoing(tokens=self._put(tokens[:count].clone()), bounds=bounds.tolist())
        return outgoing, choices[:count], bounds

    def _add_source(
        self,
        entry: RouteEntry,
        seq: int,
        node: int,
        args: DispatchArgs,
        bounds: list[int],
        choices: torch.Tensor,
    ) -> None:
        """Finds the rows of a source's tokens on this node."""
        next_rows = torch.empty(self._num_columns, dtype=torch.int64)
        src = self._topology.lane_rank(node)
        self._step("first_rows", seq, src, ctypes.byref(args.sizes), next_rows.data_ptr())
        topk_idx = torch.empty(choices.shape, dtype=torch.int64)
        rows, routes = torch.empty_like(choices), torch.empty_like(choices)
        plan = LanePlanArgs(
            choices=choices.data_ptr(),
            topk_idx=topk_idx.data_ptr(),
            rows=rows.data_ptr(),
            routes=routes.data_ptr(),
            next=next_rows.data_ptr(),
            num_tokens=choices.shape[0],
            num_topk=choices.shape[1],
            layout=args.sizes.layout,
        )
        self._step("plan_tokens", seq, ctypes.byref(plan))
        entry.choices[node] = self._put(topk_idx)
        entry.routes.sources[node] = Source(
            num_topk=choices.shape[1],
            bounds=bounds,
            rows=self._put(rows),
            routes=self._put(routes),
        )

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
from ep_kernels._native_lane import LanePost, LaneTokensArgs
from ep_kernels.errors import EPConfigError
from ep_kernels.handle import RoutingMemory
from ep_kernels.lanes import Lane, Message, Transfer
from ep_kernels.topology import Topology

WINDOW = 4
"""Chunks per peer and direction that are under way at a time."""

MIN_CHUNK_BYTES = 256 << 10
NUM_CHUNKS = 8  # as many, if they are not smaller than that
SIZES = 1  # a kind of messages; hierarchical.py and chunks.py have the others
SIZES_PHASE = 3


@dataclass(frozen=True, kw_only=True)
class Outgoing:
    """This rank's tokens for one node.

    Attributes:
        tokens: int32, ascending.
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
        next: rows that its next tokens get, while the routing is fresh.
    """

    num_topk: int
    bounds: list[int]
    rows: torch.Tensor
    routes: torch.Tensor
    next: torch.Tensor


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
    it fails."""

    routes: Routes = field(default_factory=Routes)


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
    """Makes the routes of fresh dispatches.

    Args:
        step: calls a function of the C interface by its name.
        lane: to the other nodes.
        topology: of the group.
        num_experts: E.
    """

    def __init__(
        self, step: Callable[..., None], lane: Lane, topology: Topology, num_experts: int
    ) -> None:
        self._step, self._lane, self._topology = step, lane, topology
        self._num_columns = max(num_experts, topology.num_ranks)

    def make_routes(
        self, seq: int, args: DispatchArgs, own: LanePost, posts: dict[int, LanePost]
    ) -> Routes:
        """Lists what goes to each node, and learns what comes from each. Rows come later."""
        message = Message(seq=seq, kind=SIZES, phase=SIZES_PHASE)
        chunk_tokens = max(1, own.chunk_tokens)
        outgoing, received, transfers = {}, {}, []
        for node, post in posts.items():
            num_chunks = -(-post.num_tokens // max(1, post.chunk_tokens))
            received[node] = torch.zeros(num_chunks + 1, dtype=torch.int64)
            transfers += self._exchange(node, received[node][1:], message, is_sent=False)
        for node in posts:
            tokens, bounds = self._list_tokens(args, node, chunk_tokens)
            outgoing[node] = Outgoing(tokens=tokens, bounds=bounds.tolist())
            transfers += self._exchange(node, bounds[1:], message, is_sent=True)
        for transfer in transfers:
            self._lane.wait(transfer)
        sources = {
            node: self._new_source(seq, node, args, post, received[node].tolist())
            for node, post in posts.items()
        }
        return Routes(chunk_tokens=chunk_tokens, outgoing=outgoing, sources=sources)

    def _exchange(
        self, node: int, words: torch.Tensor, message: Message, *, is_sent: bool
    ) -> list[Transfer]:
        if len(words) == 0:
            return []
        start = self._lane.isend if is_sent else self._lane.irecv
        return [start(node, words.view(torch.uint8), message)]

    def _list_tokens(
        self, args: DispatchArgs, node: int, chunk_tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        sizes = args.sizes
        tokens = torch.empty(sizes.num_tokens, dtype=torch.int32)
        bounds = torch.empty(-(-sizes.num_tokens // chunk_tokens) + 1, dtype=torch.int64)
        tokens_args = LaneTokensArgs(
            topk_idx=args.routing.topk_idx,
            tokens=tokens.data_ptr(),
            bounds=bounds.data_ptr(),
            num_tokens=sizes.num_tokens,
            chunk_tokens=chunk_tokens,
            num_topk=sizes.num_topk,
            node=node,
        )
        self._step("tokens", ctypes.byref(tokens_args))
        return tokens[: int(bounds[-1])].clone(), bounds

    def _new_source(
        self, seq: int, node: int, args: DispatchArgs, post: LanePost, bounds: list[int]
    ) -> Source:
        shape = bounds[-1], post.num_topk
        next_rows = torch.empty(self._num_columns, dtype=torch.int64)
        src = self._topology.lane_rank(node)
        self._step("first_rows", seq, src, ctypes.byref(args.sizes), next_rows.data_ptr())
        return Source(
            num_topk=post.num_topk,
            bounds=bounds,
            rows=torch.empty(shape, dtype=torch.int32),
            routes=torch.empty(shape, dtype=torch.int32),
            next=next_rows,
        )

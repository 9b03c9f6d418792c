"""The CPU backend over several nodes: which step of a call comes after which.

    fresh dispatch    notify:  post to lane and node, wait for all posts, plan rows, chunk sizes
                      send:    offer to lane and node, wait for all offers, chunks, done
    with capacity or  post with memory, wait for all posts, (plan, chunk sizes), chunks, done
    cached handle
    combine           stage rows, post with memory, wait for all posts, chunks, done

docs/multi-node.md explains the protocol; the transfer is in chunks.py, the network in lanes.py,
and what happens inside the node in the compiled core.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ep_kernels import _native
from ep_kernels._native import CombineArgs, DispatchArgs
from ep_kernels._native_lane import OFFER_WORDS, LanePost, OfferSlot, lane_library
from ep_kernels.backend import CallOptions
from ep_kernels.bootstrap import Bootstrap
from ep_kernels.call_queue import CallQueue
from ep_kernels.chunks import CombineLeg, DispatchLeg, Window
from ep_kernels.config import Settings
from ep_kernels.cpu_backend import CpuBackend, order_after
from ep_kernels.errors import EPConfigError, EPDeviceError, EPError, EPTimeoutError
from ep_kernels.event import Event
from ep_kernels.handle import HostCounts, RoutingMemory
from ep_kernels.lanes import Lane, Message, ScaleoutStats, make_lane
from ep_kernels.routes import RouteBook, RouteEntry, RouteExchange, choose_chunk_tokens
from ep_kernels.topology import Topology

POST, OFFER = 0, 2  # kinds of messages; routes.py and chunks.py have the others
POST_PHASE, OFFER_PHASE, TRANSFER_PHASE = 2, 3, 4


@dataclass(frozen=True)
class _Announced:
    """What came with the posts of a call.

    Attributes:
        offers: [R, OFFER_WORDS] int64; only the own node's have a meaning here.
        posts: of the lane's peers by node, a LanePost and counts each.
    """

    offers: torch.Tensor
    posts: dict[int, torch.Tensor]


class HierarchicalBackend(CpuBackend):
    """Memory and results are those of the CPU backend; calls go over the lane, too.

    Calls run one after the other: on the caller's thread, or behind an asynchronous one on the
    queue's.

    Raises:
        EPDeviceError: as CpuBackend, or other nodes cannot be reached.
    """

    _lane: Lane | None = None
    _wait: tuple[int, int]
    """The rank of another node that this one waits for, and since when."""
    _waited_us: torch.Tensor
    """[R] int64, for each rank in the call under way."""

    def __init__(self, bootstrap: Bootstrap, settings: Settings, topology: Topology) -> None:
        self._steps = lane_library()
        self._topology, self._staging_bytes = topology, settings.staging_bytes
        self._queue = CallQueue()
        self._routes = RouteBook()
        self._waited_us = torch.zeros(topology.num_ranks, dtype=torch.int64)
        super().__init__(bootstrap, settings, topology)
        try:
            self._lane = make_lane(bootstrap, topology, settings.timeout_s, self._waiting_for)
        except EPError:
            self.destroy()
            raise
        self._window = Window(self._lane, topology)
        self._route_exchange = RouteExchange(self._step, self._lane, topology, settings.num_experts)

    def scaleout_stats(self) -> ScaleoutStats:
        return self._usable_lane.stats()

    # Calls

    def notify(
        self, args: DispatchArgs, memory: RoutingMemory, *, options: CallOptions
    ) -> tuple[int, HostCounts]:
        order_after(options)
        post = self._dispatch_post(args)
        seq = self._begin()
        entry = self._routes.add(seq, memory)

        def body() -> None:
            with self._call(seq, options):
                self._plan(seq, args, entry, post)

        self._queue.run(body)
        return seq, HostCounts.of(memory)

    def send(
        self,
        seq: int,
        args: DispatchArgs,
        memory: RoutingMemory,
        *,
        keep: Any,
        error: str,
        options: CallOptions,
    ) -> Event:
        entry = self._routes.find(seq)

        def body() -> None:
            with self._call(seq, options):
                offers, no_memory = self._exchange_offers(seq, args, error)
                if no_memory is None:
                    self._move_rows(seq, args, entry, offers)
                    options.add_tokens(memory.num_recv_tokens_per_expert)
                else:
                    self._step("done", seq)
            if no_memory is not None:
                raise no_memory

        return self._start(body, keep, options)

    def dispatch(
        self, args: DispatchArgs, memory: RoutingMemory, *, keep: Any, options: CallOptions
    ) -> tuple[int, Event]:
        order_after(options)
        is_fresh = args.sizes.handle_seq < 0
        known = None if is_fresh else self._known_routes(args.sizes.handle_seq)
        post = self._dispatch_post(args)
        seq = self._begin()
        entry = known or self._routes.add(seq, memory)

        def body() -> None:
            with self._call(seq, options):
                if is_fresh:
                    offers = self._plan(seq, args, entry, post)
                else:
                    offers = self._announce(seq, post).offers
                self._move_rows(seq, args, entry, offers)
                options.add_tokens(memory.num_recv_tokens_per_expert)

        return seq, self._start(body, keep, options)

    def combine(
        self, args: CombineArgs, memory: RoutingMemory, *, keep: Any, options: CallOptions
    ) -> Event:
        order_after(options)
        entry = self._known_routes(args.sizes.handle_seq)
        post = self._checked_post(self._steps.ep_lane_combine_post, ctypes.byref(args))
        seq = self._begin()

        def body() -> None:
            with self._call(seq, options):
                self._step("wait_slot", seq, self._waited_us.data_ptr())
                self._step("stage_rows", ctypes.byref(args))
                offers = self._announce(seq, post).offers
                leg = CombineLeg(self._step, self._topology, args, entry.routes, offers)
                self._window.run(seq, leg)
                self._finish(seq)

        return self._start(body, keep, options)

    def barrier(self) -> None:
        post = self._new_post()
        self._step("barrier_post", post.data_ptr())
        seq = self._begin()

        def body() -> None:
            with self._call(seq):
                self._announce(seq, post)
                self._finish(seq)

        self._queue.run(body)

    def refuse(self, reason: str) -> None:
        post = self._new_post()
        self._step("refusal", reason.encode(), post.data_ptr())
        seq = self._begin()

        def body() -> None:
            with self._call(seq), contextlib.suppress(EPConfigError):
                self._announce(seq, post)  # raises what this rank refuses
            self._step("done", seq)

        self._queue.run(body)

    def destroy(self) -> None:
        if self._buffer is None or self._pid != os.getpid():
            return
        self._queue.drain()
        if self._lane is not None:
            self._lane.close()
        super().destroy()

    # Steps

    def _step(self, name: str, *arguments: Any) -> None:
        """Calls ep_lane_<name>(buffer, ...)."""
        _native.call(getattr(self._steps, f"ep_lane_{name}"), self._buffer, *arguments)

    @property
    def _usable_lane(self) -> Lane:
        assert self._lane is not None
        return self._lane

    def _waiting_for(self, rank: int) -> None:
        self._step("waiting_for", rank)
        now_ns = time.monotonic_ns()
        if rank < 0:
            awaited, begin_ns = self._wait
            self._waited_us[awaited] += (now_ns - begin_ns) // 1000
        self._wait = rank, now_ns

    def _begin(self) -> int:
        seq = ctypes.c_uint64()
        self._step("begin", ctypes.byref(seq))
        return seq.value

    @contextlib.contextmanager
    def _call(self, seq: int, options: CallOptions | None = None) -> Iterator[None]:
        """Tells the peers that this rank is through with a call that all of them refuse, or whom it
        lost, or that it failed itself: then they need not wait for what it still owed them."""
        self._step("check_usable")
        self._waited_us.zero_()
        rank = self._topology.rank
        try:
            yield
            if options is not None:
                options.add_waits(self._waited_us)
        except EPTimeoutError as error:
            phases = {name: number for number, name in _native.PHASES.items()}
            culprit = rank if error.peer is None else error.peer
            self._fail(culprit, phases[error.phase or "transfer"], str(error))
            raise
        except EPConfigError:
            self._step("done", seq)
            raise
        except BaseException as error:
            self._fail(rank, TRANSFER_PHASE, f"rank {rank}: {type(error).__name__}: {error}")
            raise

    def _fail(self, culprit: int, phase: int, reason: str) -> None:
        self._step("fail", culprit, phase, reason.encode())
        self._usable_lane.close(culprit)

    def _start(self, body: Callable[[], None], keep: Any, options: CallOptions) -> Event:
        if not options.async_op:
            self._queue.run(body)
            return Event()

        def body_with_memory() -> None:
            body()
            del keep_alive[:]

        keep_alive = [keep]
        return Event(self._queue.submit(body_with_memory))

    def _move_rows(
        self, seq: int, args: DispatchArgs, entry: RouteEntry, offers: torch.Tensor
    ) -> None:
        leg = DispatchLeg(self._step, seq, args, entry.routes, offers)
        self._window.run(seq, leg)
        self._finish(seq)

    def _finish(self, seq: int) -> None:
        self._step("done", seq)
        self._step("wait_done", seq, self._waited_us.data_ptr())

    # Posts and offers

    def _known_routes(self, handle_seq: int) -> RouteEntry:
        try:
            return self._routes.find(handle_seq)
        except EPConfigError as error:
            self.refuse(str(error))
            raise

    def _new_post(self) -> torch.Tensor:
        return torch.empty(self._steps.ep_lane_post_bytes(self._buffer), dtype=torch.uint8)

    def _dispatch_post(self, args: DispatchArgs) -> torch.Tensor:
        chunk_tokens = choose_chunk_tokens(args.sizes, self._staging_bytes, self._topology)
        return self._checked_post(
            self._steps.ep_lane_dispatch_post, ctypes.byref(args), chunk_tokens
        )

    def _checked_post(self, make: Any, *arguments: Any) -> torch.Tensor:
        post = self._new_post()
        try:
            _native.call(make, self._buffer, *arguments, post.data_ptr())
        except EPConfigError as error:
            self.refuse(str(error))
            raise
        return post

    def _announce(self, seq: int, post: torch.Tensor) -> _Announced:
        """Posts to all ranks and waits for theirs."""
        self._step("wait_slot", seq, self._waited_us.data_ptr())
        offers = self._new_offers()
        posts = self._relay(seq, post, Message(seq=seq, kind=POST, phase=POST_PHASE))
        self._step("wait_posts", seq, offers.data_ptr(), self._waited_us.data_ptr())
        return _Announced(offers, posts)

    def _new_offers(self) -> torch.Tensor:
        return torch.empty((self._topology.num_ranks, OFFER_WORDS), dtype=torch.int64)

    def _exchange_offers(
        self, seq: int, args: DispatchArgs, error: str
    ) -> tuple[torch.Tensor, EPDeviceError | None]:
        """Offers of all ranks, or the error that all of them get if one has no memory."""
        offer = torch.empty(ctypes.sizeof(OfferSlot), dtype=torch.uint8)
        _native.call(
            self._steps.ep_lane_offer, ctypes.byref(args), error.encode(), offer.data_ptr()
        )
        offers = self._new_offers()
        self._relay(seq, offer, Message(seq=seq, kind=OFFER, phase=OFFER_PHASE))
        try:
            self._step("wait_offers", seq, offers.data_ptr(), self._waited_us.data_ptr())
        except EPDeviceError as no_memory:
            return offers, no_memory.with_traceback(None)
        return offers, None

    def _relay(self, seq: int, own: torch.Tensor, message: Message) -> dict[int, torch.Tensor]:
        """Gives a post or an offer to the lane and the node, and the lane's to the node."""
        lane, step = self._usable_lane, {POST: "send_post", OFFER: "send_offer"}[message.kind]
        nodes = self._topology.other_nodes
        received = {node: torch.empty_like(own) for node in nodes}
        recvs = {node: lane.irecv(node, received[node], message) for node in nodes}
        sends = [lane.isend(node, own, message) for node in nodes]
        self._step(step, seq, self._topology.rank, own.data_ptr())
        for node in nodes:
            lane.wait(recvs[node])
            self._step(step, seq, self._topology.lane_rank(node), received[node].data_ptr())
        for send in sends:
            lane.wait(send)
        return received

    def _plan(
        self, seq: int, args: DispatchArgs, entry: RouteEntry, post: torch.Tensor
    ) -> torch.Tensor:
        """Posts of all ranks, own rows, and what will cross the network."""
        self._step("clear_routing", ctypes.byref(args))
        announced = self._announce(seq, post)
        self._step("plan", seq, ctypes.byref(args))
        posts = {
            node: LanePost.from_address(peer_post.data_ptr())
            for node, peer_post in announced.posts.items()
        }
        own = LanePost.from_address(post.data_ptr())
        entry.routes = self._route_exchange.make_routes(seq, args, own, posts)
        return announced.offers

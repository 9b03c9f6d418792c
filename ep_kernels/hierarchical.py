"""Calls over several nodes: which step comes after which, wherever rows are.

    fresh dispatch    notify:  post to lane and node, wait for all posts, plan rows, what crosses
                      send:    offer to lane and node, wait for all offers, chunks, done
    with capacity or  post with memory, wait for all posts, (plan, what crosses), chunks, done
    cached handle
    combine           stage rows, post with memory, wait for all posts, chunks, done

docs/multi-node.md explains the protocol. Announcements are in node_control.py, what crosses the
network in routes.py, the transfer in chunks.py and transport.py, work on rows behind node_rows.py.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ep_kernels import _native
from ep_kernels._native import CombineArgs, DispatchArgs
from ep_kernels._native_lane import LanePost
from ep_kernels.backend import CallOptions, FreshDispatch
from ep_kernels.bootstrap import Bootstrap
from ep_kernels.call_queue import CallQueue
from ep_kernels.chunks import CombineLeg, DispatchLeg, Leg, move_chunks
from ep_kernels.config import Settings
from ep_kernels.cpu_backend import CpuBackend, order_after
from ep_kernels.errors import EPConfigError, EPDeviceError, EPError, EPTimeoutError
from ep_kernels.event import Event
from ep_kernels.handle import HostCounts, RoutingMemory
from ep_kernels.lanes import ScaleoutStats
from ep_kernels.node_control import NodeControl
from ep_kernels.node_rows import Caller, HostRows, NodeRows
from ep_kernels.pool import ReceiveFormat, Reservation, point_to, reserve_rows
from ep_kernels.routes import RouteBook, RouteEntry, RouteExchange, choose_chunk_tokens
from ep_kernels.topology import Topology
from ep_kernels.transport import Transport

TRANSFER_PHASE = 4


@dataclass(frozen=True)
class _Plan:
    """A fresh dispatch on the host, where it is planned.

    Attributes:
        args, memory: with choices and routing in host memory.
        post: its announcement.
    """

    args: DispatchArgs
    memory: RoutingMemory
    post: torch.Tensor


class HierarchicalBackend:
    """Calls run one after the other: on the caller's thread, or behind an asynchronous one on the
    queue's.

    Args:
        core: what the ranks of the node share in host memory.
        rows: where rows are. Both are this object's from now on.
        bootstrap, settings, topology: of the group.

    Raises:
        EPConfigError, EPDeviceError: other nodes cannot be reached; on all ranks.
    """

    _control: NodeControl | None = None
    _transport: Transport | None = None

    def __init__(
        self,
        core: CpuBackend,
        rows: NodeRows,
        bootstrap: Bootstrap,
        settings: Settings,
        topology: Topology,
    ) -> None:
        self._core, self._rows, self._pid = core, rows, os.getpid()
        self._memory, self.device = rows.memory, rows.memory.device
        self._topology, self._staging_bytes = topology, settings.staging_bytes
        self._queue = CallQueue()
        self._routes = RouteBook()
        try:
            self._control = NodeControl(core, bootstrap, topology, settings.timeout_s)
            self._transport = rows.make_transport(self._control.lane, bootstrap)
        except EPError:
            self.destroy()
            raise
        self._route_exchange = RouteExchange(
            self._control.step, rows.put, self._control.lane, topology, settings.num_experts
        )

    # Memory

    def choose_num_sms(self, bootstrap: Bootstrap, wanted: int | None) -> int:
        return self._memory.choose_num_sms(bootstrap, wanted)

    def reserve(self, shape: tuple[int, ...], dtype: torch.dtype) -> Reservation:
        return self._memory.reserve(shape, dtype)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return self._memory.empty(shape, dtype)

    def empty_words(self, num_words: int, *, options: CallOptions) -> torch.Tensor:
        return self._memory.empty_words(num_words, options=options)

    def pool_offset(self, tensor: torch.Tensor) -> int | None:
        return self._memory.pool_offset(tensor)

    def pool_stats(self) -> dict[str, int]:
        return self._memory.pool_stats()

    def scaleout_stats(self) -> ScaleoutStats:
        assert self._transport is not None
        return self._transport.stats()

    # Calls

    def poll(self) -> None:
        """Calls keep nothing when they are over, and errors are their events' to raise."""
        try:
            self._rows.check_callable()
        except EPConfigError as error:
            self.refuse(str(error))
            raise

    def count_rows(self, topk_idx: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As Backend; on the host, which checks the indices, too."""
        counts, is_token_in_rank = self._core.count_rows(topk_idx.cpu())
        return counts.to(self.device), is_token_in_rank.to(self.device)

    def dispatch_fresh(
        self,
        args: DispatchArgs,
        memory: RoutingMemory,
        *,
        formats: ReceiveFormat,
        keep: Any,
        options: CallOptions,
    ) -> FreshDispatch:
        """Exchanges the counts, takes the memory they ask for, sends the rows."""
        caller = self._follow(options)
        plan = self._plan_on_host(caller, args, memory)
        seq = self._usable.begin()
        entry = self._routes.add(seq, memory)

        def notify() -> None:
            with self._call(seq):
                self._rows.begin(caller)
                self._announce_plan(seq, plan, memory, entry)

        self._queue.run(notify)
        host = HostCounts.of(plan.memory)
        received, error = None, ""
        try:
            received = reserve_rows(self.reserve, formats, host.num_rows)
            point_to(args, received)
        except EPDeviceError as problem:  # every rank has to learn of it
            error = str(problem)

        def send() -> None:
            with self._call(seq):
                self._rows.begin(caller)
                self._rows.finish()  # peers write to the memory that is offered
                offers, no_memory = self._usable.exchange_offers(seq, args, error)
                if no_memory is None:
                    self._move_chunks(seq, DispatchLeg(self._rows.step, args, entry, offers))
                else:
                    self._usable.step("done", seq)
            entry.choices.clear()
            if no_memory is not None:
                raise no_memory

        event = self._start(send, caller, (keep, received), options)
        if received is None:
            event.wait()
            raise EPDeviceError(error)
        return FreshDispatch(seq=seq, host=host, received=received, event=event)

    def dispatch(
        self, args: DispatchArgs, memory: RoutingMemory, *, keep: Any, options: CallOptions
    ) -> tuple[int, Event]:
        """A dispatch whose memory is known beforehand; returns its number and its event."""
        caller = self._follow(options)
        is_fresh = args.sizes.handle_seq < 0
        known = None if is_fresh else self._known_routes(args.sizes.handle_seq)
        plan = self._plan_on_host(caller, args, memory) if is_fresh else None
        post = plan.post if plan else self._dispatch_post(args)
        seq = self._usable.begin()
        entry = known or self._routes.add(seq, memory)

        def body() -> None:
            with self._call(seq):
                self._rows.begin(caller)
                self._rows.finish()
                if plan is not None:
                    offers = self._announce_plan(seq, plan, memory, entry)
                else:
                    offers = self._usable.announce(seq, post).offers
                self._move_chunks(seq, DispatchLeg(self._rows.step, args, entry, offers))
            entry.choices.clear()

        return seq, self._start(body, caller, keep, options)

    def combine(
        self, args: CombineArgs, memory: RoutingMemory, *, keep: Any, options: CallOptions
    ) -> Event:
        """Sums rows, inside the nodes first."""
        caller = self._follow(options)
        entry = self._known_routes(args.sizes.handle_seq)
        post = self._checked_post("combine_post", ctypes.byref(args))
        seq = self._usable.begin()

        def body() -> None:
            with self._call(seq):
                self._rows.begin(caller)
                self._usable.step("wait_slot", seq)
                self._rows.step("stage_rows", ctypes.byref(args))
                self._rows.finish()
                offers = self._usable.announce(seq, post).offers
                leg = CombineLeg(self._rows, self._topology, args, entry.routes, offers)
                self._move_chunks(seq, leg)

        return self._start(body, caller, keep, options)

    def barrier(self) -> None:
        """Waits for all ranks, on the host."""
        control = self._usable
        post = control.make_post("barrier_post")
        seq = control.begin()

        def body() -> None:
            with self._call(seq):
                control.announce(seq, post)
                control.finish(seq)

        self._queue.run(body)

    def refuse(self, reason: str) -> None:
        """Takes part in a call that this rank rejects."""
        control = self._usable
        post = control.make_post("refusal", reason.encode())
        seq = control.begin()

        def body() -> None:
            with self._call(seq), contextlib.suppress(EPConfigError):
                control.announce(seq, post)  # raises what this rank refuses
            control.step("done", seq)

        self._queue.run(body)

    def destroy(self) -> None:
        """Waits for calls and leaves the group; results stay valid. Idempotent."""
        if self._core.core is None or self._pid != os.getpid():
            return
        self._queue.drain()
        if self._control is not None:
            self._control.lane.close()
        if self._transport is not None:
            self._transport.close()
        self._rows.close()
        self._memory.destroy()
        self._core.destroy()

    # Parts of calls

    @property
    def _usable(self) -> NodeControl:
        assert self._control is not None
        return self._control

    def _follow(self, options: CallOptions) -> Caller:
        order_after(options)
        return self._rows.caller(options)

    @contextlib.contextmanager
    def _call(self, seq: int) -> Iterator[None]:
        """Tells the peers that this rank is through with a call that all of them refuse, or whom it
        lost, or that it failed itself: then they need not wait for what it still owed them."""
        self._usable.step("check_usable")
        rank = self._topology.rank
        try:
            yield
        except EPTimeoutError as error:
            phases = {name: number for number, name in _native.PHASES.items()}
            culprit = rank if error.peer is None else error.peer
            self._fail(culprit, phases[error.phase or "transfer"], str(error))
            raise
        except EPConfigError:
            self._rows.finish()
            self._usable.step("done", seq)
            raise
        except BaseException as error:
            self._fail(rank, TRANSFER_PHASE, f"rank {rank}: {type(error).__name__}: {error}")
            raise

    def _fail(self, culprit: int, phase: int, reason: str) -> None:
        self._usable.step("fail", culprit, phase, reason.encode())
        self._usable.lane.close(culprit)
        if self._transport is not None:
            self._transport.close()
        with contextlib.suppress(EPError):
            self._rows.finish()  # what the call uses may go

    def _start(
        self, body: Callable[[], None], caller: Caller, keep: Any, options: CallOptions
    ) -> Event:
        if not options.async_op:
            self._queue.run(body)
            return Event()

        def body_with_memory() -> None:
            try:
                body()
            finally:
                with caller.as_current():
                    del keep_alive[:]

        keep_alive = [keep]
        return Event(self._queue.submit(body_with_memory))

    def _known_routes(self, handle_seq: int) -> RouteEntry:
        try:
            return self._routes.find(handle_seq)
        except EPConfigError as error:
            self.refuse(str(error))
            raise

    def _plan_on_host(self, caller: Caller, args: DispatchArgs, memory: RoutingMemory) -> _Plan:
        on_host, host_memory = self._rows.on_host(caller, args, memory)
        return _Plan(on_host, host_memory, self._dispatch_post(on_host))

    def _dispatch_post(self, args: DispatchArgs) -> torch.Tensor:
        chunk_tokens = choose_chunk_tokens(args.sizes, self._staging_bytes, self._topology)
        return self._checked_post("dispatch_post", ctypes.byref(args), chunk_tokens)

    def _checked_post(self, kind: str, *arguments: Any) -> torch.Tensor:
        try:
            return self._usable.make_post(kind, *arguments)
        except EPConfigError as error:
            self.refuse(str(error))
            raise

    def _announce_plan(
        self, seq: int, plan: _Plan, memory: RoutingMemory, entry: RouteEntry
    ) -> torch.Tensor:
        """Posts of all ranks, own rows, and what will cross the network. Returns the offers."""
        control = self._usable
        control.step("clear_routing", ctypes.byref(plan.args))
        try:
            announced = control.announce(seq, plan.post)
            control.step("plan", seq, ctypes.byref(plan.args))
        finally:
            self._rows.put_routing(memory, plan.memory)
        posts = {
            node: LanePost.from_address(peer_post.data_ptr())
            for node, peer_post in announced.posts.items()
        }
        own = LanePost.from_address(plan.post.data_ptr())
        made = self._route_exchange.make_routes(seq, plan.args, own, posts)
        entry.routes, entry.choices = made.routes, made.choices
        return announced.offers

    def _move_chunks(self, seq: int, leg: Leg) -> None:
        assert self._transport is not None
        move_chunks(self._transport, self._topology.other_nodes, seq, leg)
        self._rows.finish()
        self._usable.finish(seq)


def make_cpu_backend(
    bootstrap: Bootstrap, settings: Settings, topology: Topology
) -> HierarchicalBackend:
    """Rows and announcements in the memory that the ranks of a node share."""
    memory = CpuBackend(bootstrap, settings, topology)
    return HierarchicalBackend(memory, HostRows(memory), bootstrap, settings, topology)

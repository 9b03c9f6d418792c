"""Calls over several nodes: which step comes after which, wherever rows are.

    fresh dispatch    notify:  post to lane and node, wait for all posts, plan rows, what crosses
                      send:    offer to lane and node, wait for all offers, chunks, done
    with capacity or  post with memory, wait for all posts, (plan, what crosses), chunks, done
    cached handle
    combine           stage rows, post with memory, wait for all posts, chunks, done

docs/multi-node.md explains the protocol. Announcements are in node_control.py, what crosses the
network in routes.py, the transfer in chunks.py and transport.py, work on rows behind node_rows.py.
How calls run is in node_calls.py.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ep_kernels._native import CombineArgs, DispatchArgs
from ep_kernels._native_lane import LanePost
from ep_kernels.backend import CallOptions, FreshDispatch
from ep_kernels.bootstrap import Bootstrap
from ep_kernels.chunks import CombineLeg, DispatchLeg, Leg, move_chunks
from ep_kernels.config import Settings
from ep_kernels.cpu_backend import CpuBackend
from ep_kernels.errors import EPConfigError, EPDeviceError
from ep_kernels.event import Event
from ep_kernels.handle import HostCounts, RoutingMemory
from ep_kernels.node_calls import NodeCalls
from ep_kernels.node_rows import Caller, HostRows, NodeRows
from ep_kernels.pool import ReceiveFormat, point_to, reserve_rows
from ep_kernels.routes import RouteBook, RouteEntry, RouteExchange, choose_chunk_tokens
from ep_kernels.topology import Topology


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


class HierarchicalBackend(NodeCalls):
    """See NodeCalls for arguments and exceptions of the constructor."""

    def __init__(
        self,
        core: CpuBackend,
        rows: NodeRows,
        bootstrap: Bootstrap,
        settings: Settings,
        topology: Topology,
    ) -> None:
        super().__init__(core, rows, bootstrap, settings, topology)
        self._staging_bytes = settings.staging_bytes
        self._routes = RouteBook()
        self._route_exchange = RouteExchange(
            self._usable.step, rows.put, self._usable.lane, topology, settings.num_experts
        )

    def dispatch_fresh(
        self,
        args: DispatchArgs,
        memory: RoutingMemory,
        *,
        formats: Callable[[], ReceiveFormat],
        keep: Any,
        options: CallOptions,
    ) -> FreshDispatch:
        """Exchanges the counts, takes the memory they ask for, sends the rows."""
        caller = self._follow(options)
        plan = self._plan_on_host(caller, args, memory)
        seq = self._usable.begin()
        entry = self._routes.add(seq, memory)

        def notify() -> None:
            with self._call(seq, options):
                self._rows.begin(caller)
                self._announce_plan(seq, plan, memory, entry)

        self._queue.run(notify)
        host = HostCounts.of(plan.memory)
        received, error = None, ""
        try:
            received = reserve_rows(self.reserve, formats(), host.num_rows)
            point_to(args, received)
        except RuntimeError as problem:  # every rank has to learn of it
            error = str(problem)

        def send() -> None:
            with self._call(seq, options):
                self._rows.begin(caller)
                self._rows.finish()  # peers write to the memory that is offered
                offers, no_memory = self._usable.exchange_offers(seq, args, error)
                if no_memory is None:
                    self._move_chunks(seq, DispatchLeg(self._rows.step, args, entry, offers))
                    self._add(options.cumulative_recv_stats, memory.num_recv_tokens_per_expert)
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
            with self._call(seq, options):
                self._rows.begin(caller)
                self._rows.finish()
                if plan is not None:
                    offers = self._announce_plan(seq, plan, memory, entry)
                else:
                    offers = self._usable.announce(seq, post).offers
                self._move_chunks(seq, DispatchLeg(self._rows.step, args, entry, offers))
                self._add(options.cumulative_recv_stats, memory.num_recv_tokens_per_expert)
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
            with self._call(seq, options):
                self._rows.begin(caller)
                self._usable.wait("slot", seq)
                self._rows.step("stage_rows", ctypes.byref(args))
                self._rows.finish()
                offers = self._usable.announce(seq, post).offers
                leg = CombineLeg(self._rows, self._topology, args, entry.routes, offers)
                self._move_chunks(seq, leg)

        return self._start(body, caller, keep, options)

    # Parts of calls

    def _known_routes(self, handle_seq: int) -> RouteEntry:
        try:
            return self._routes.find(handle_seq)
        except EPConfigError as error:
            self.refuse(str(error))
            raise

    def _plan_on_host(self, caller: Caller, args: DispatchArgs, memory: RoutingMemory) -> _Plan:
        try:
            on_host, host_memory = self._rows.on_host(caller, args, memory)
        except RuntimeError as error:  # no memory for them
            self.refuse(str(error))
            raise EPDeviceError(str(error)) from None
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

"""What ranks tell each other over several nodes, in host memory wherever rows are: posts, offers,
and who is done with a call. Inside the node through the compiled core, to other nodes by the lane,
whose messages each rank hands on to its node as the proxy of their senders.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from dataclasses import dataclass
from typing import Any

import torch

from ep_kernels import _native
from ep_kernels._native import DispatchArgs
from ep_kernels._native_lane import OFFER_WORDS, OfferSlot, lane_library
from ep_kernels.bootstrap import Bootstrap
from ep_kernels.cpu_backend import CpuBackend
from ep_kernels.errors import EPDeviceError
from ep_kernels.lanes import Lane, Message, make_lane
from ep_kernels.topology import Topology

POST, OFFER = 0, 2  # kinds of messages; routes.py and transport.py have the others
POST_PHASE, OFFER_PHASE = 2, 3


@dataclass(frozen=True)
class Announced:
    """What came with the posts of a call.

    Attributes:
        offers: [R, OFFER_WORDS] int64; only the own node's have a meaning here.
        posts: of the lane's peers by node, a LanePost and counts each.
    """

    offers: torch.Tensor
    posts: dict[int, torch.Tensor]


class NodeControl:
    """One rank's words of calls, its own and its lane's.

    Attributes:
        core: the memory that the ranks of the node share.
        lane: to the other nodes.
        waited_us: [R] int64, for each rank in the call under way; whoever begins it sets it to 0.

    Raises:
        EPConfigError, EPDeviceError: as make_lane().
    """

    def __init__(
        self, core: CpuBackend, bootstrap: Bootstrap, topology: Topology, timeout_s: float
    ) -> None:
        self.core, self._topology = core, topology
        self.functions = lane_library()
        # NOTE: no method of self, which would make a cycle with the lane. A cycle is freed at any
        # time, also while a CUDA graph is captured, and freeing what GPUs use ends the capture.
        waiting_for = functools.partial(_tell_waiting_for, weakref.ref(self))
        self.lane: Lane = make_lane(bootstrap, topology, timeout_s, waiting_for)
        self.waited_us = self.lane.waited_us

    def step(self, name: str, *arguments: Any) -> None:
        """Calls ep_lane_<name>(buffer, ...) of the host."""
        _native.call(getattr(self.functions, f"ep_lane_{name}"), self.core.core, *arguments)

    def wait(self, what: str, seq: int, *results: Any) -> None:
        """Calls ep_lane_wait_<what>(buffer, seq, ...), which counts whom it waits for."""
        self.step(f"wait_{what}", seq, *results, self.waited_us.data_ptr())

    def begin(self) -> int:
        """The number of the next call."""
        seq = ctypes.c_uint64()
        self.step("begin", ctypes.byref(seq))
        return seq.value

    def finish(self, seq: int) -> None:
        """This rank is through with a call; waits until the node is."""
        self.step("done", seq)
        self.wait("done", seq)

    def make_post(self, kind: str, *arguments: Any) -> torch.Tensor:
        """The post that ep_lane_<kind>(buffer, ..., post) makes. Raises EPConfigError."""
        num_bytes = self.functions.ep_lane_post_bytes(self.core.core)
        post = torch.empty(num_bytes, dtype=torch.uint8)
        self.step(kind, *arguments, post.data_ptr())
        return post

    def announce(self, seq: int, post: torch.Tensor) -> Announced:
        """Posts to all ranks and waits for theirs. Raises EPConfigError, EPTimeoutError."""
        self.wait("slot", seq)
        offers = self._new_offers()
        posts = self._relay(seq, post, Message(seq=seq, kind=POST, phase=POST_PHASE))
        self.wait("posts", seq, offers.data_ptr())
        return Announced(offers, posts)

    def exchange_offers(
        self, seq: int, args: DispatchArgs, error: str
    ) -> tuple[torch.Tensor, EPDeviceError | None]:
        """Offers of all ranks, or the error that all of them get if one has no memory."""
        offer = torch.empty(ctypes.sizeof(OfferSlot), dtype=torch.uint8)
        make = self.functions.ep_lane_offer
        _native.call(make, ctypes.byref(args), error.encode(), offer.data_ptr())
        offers = self._new_offers()
        self._relay(seq, offer, Message(seq=seq, kind=OFFER, phase=OFFER_PHASE))
        try:
            self.wait("offers", seq, offers.data_ptr())
        except EPDeviceError as no_memory:
            return offers, no_memory.with_traceback(None)
        return offers, None

    def _new_offers(self) -> torch.Tensor:
        return torch.empty((self._topology.num_ranks, OFFER_WORDS), dtype=torch.int64)

    def _relay(self, seq: int, own: torch.Tensor, message: Message) -> dict[int, torch.Tensor]:
        """Gives a post or an offer to the lane and the node, and the lane's to the node."""
        lane, step = self.lane, {POST: "send_post", OFFER: "send_offer"}[message.kind]
        nodes = self._topology.other_nodes
        received = {node: torch.empty_like(own) for node in nodes}
        recvs = {node: lane.irecv(node, received[node], message) for node in nodes}
        sends = [lane.isend(node, own, message) for node in nodes]
        self.step(step, seq, self._topology.rank, own.data_ptr())
        for node in nodes:
            lane.wait(recvs[node])
            self.step(step, seq, self._topology.lane_rank(node), received[node].data_ptr())
        for send in sends:
            lane.wait(send)
        return received


def _tell_waiting_for(control: weakref.ref[NodeControl], rank: int) -> None:
    """The lane waits for a rank from now on, or for none: -1."""
    alive = control()
    if alive is not None:
        alive.step("waiting_for", rank)

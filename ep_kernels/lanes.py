"""Messages between nodes: a rank and the ranks of the other nodes with the same place in them.

    GlooLane   gloo_lane.py: over gloo contexts of its own
    MpiLane    mpi_lane.py: over a communicator split from the user's

A lane carries messages whose sizes both ends know. Messages of one tag between two ranks arrive in
order. Every wait ends: with the message, with the deadline, or because the peer is gone or gave up.
"""

from __future__ import annotations

import abc
import contextlib
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ep_kernels._native import PHASES
from ep_kernels.bootstrap import Bootstrap, MpiBootstrap, make_on_all
from ep_kernels.errors import EPTimeoutError
from ep_kernels.topology import Topology

FAREWELL_S = 0.5
"""How long a peer's farewell may take: after its connection or a wait for it has ended, or before
our own connections end."""

TAGS_PER_CALL = 8
FAREWELL_TAG, CLOSE_TAG, FIRST_TAG = 0, 1, TAGS_PER_CALL
DEPARTED = -1  # culprit of a farewell without failure


@dataclass(frozen=True, kw_only=True)
class ScaleoutStats:
    """Bytes that one rank exchanged with other nodes since its buffer was made.

    Attributes:
        chunk_bytes_sent, chunk_bytes_received: rows and what travels beside them.
        control_bytes_sent, control_bytes_received: announcements, counts and sizes.
    """

    chunk_bytes_sent: int = 0
    chunk_bytes_received: int = 0
    control_bytes_sent: int = 0
    control_bytes_received: int = 0


@dataclass(frozen=True, kw_only=True)
class Message:
    """What a message is: call and kind give its tag.

    Attributes:
        seq: number of the call.
        kind: below TAGS_PER_CALL; messages of the same kind of a call arrive in order.
        phase: what a rank that waits for it is doing, for errors: a key of _native.PHASES.
        is_chunk: for the statistics.
    """

    seq: int
    kind: int
    phase: int
    is_chunk: bool = False

    @property
    def tag(self) -> int:
        """NOTE: MPI promises tags up to 32767 only; a handful of calls are under way at once."""
        return FIRST_TAG + self.seq % 4000 * TAGS_PER_CALL + self.kind


@dataclass(frozen=True)
class Transfer:
    """A message under way, with its memory."""

    node: int
    message: Message
    work: Any
    tensor: torch.Tensor


@dataclass(frozen=True)
class Lost:
    """A peer that will not send any more.

    Attributes:
        culprit: the rank that is to blame.
        text: what happened.
    """

    culprit: int
    text: str


class Lane(abc.ABC):
    """This rank's connections to the ranks on its lane, by node.

    Attributes:
        on_wait: is told the rank that a wait is for, and -1 after it.
        waited_us: [R] int64, microseconds that wait() has taken for each rank.
        deadline_s: of each wait.
        places: where ranks are, for errors; that of the group if the lane connects all its ranks.
    """

    def __init__(self, topology: Topology, timeout_s: float) -> None:
        self.topology = self.places = topology
        self.on_wait: Callable[[int], None] = lambda rank: None
        self.waited_us = torch.zeros(topology.num_ranks, dtype=torch.int64)
        # Local waits for the same culprit end first, and know more.
        self.deadline_s = 1.1 * timeout_s
        self._is_closed = self._has_said = False
        self._counts = dict.fromkeys(vars(ScaleoutStats()), 0)

    def stats(self) -> ScaleoutStats:
        return ScaleoutStats(**self._counts)

    def isend(self, node: int, tensor: torch.Tensor, message: Message) -> Transfer:
        """Starts to send a contiguous uint8 tensor, which must not change before wait()."""
        self._count("sent", tensor, message)
        return self._start(self._isend, node, tensor, message)

    def irecv(self, node: int, tensor: torch.Tensor, message: Message) -> Transfer:
        """Starts to receive into a contiguous uint8 tensor."""
        self._count("received", tensor, message)
        return self._start(self._irecv, node, tensor, message)

    def wait(self, transfer: Transfer) -> None:
        """Ends a transfer.

        Raises:
            EPTimeoutError: naming the rank to blame, and its node.
        """
        begin_ns = time.monotonic_ns()
        with self.waiting_for(transfer.node):
            lost = self._wait(transfer)
        waited_us = (time.monotonic_ns() - begin_ns) // 1000
        self.waited_us[self.topology.lane_rank(transfer.node)] += waited_us
        if lost is not None:
            raise self._error(transfer.node, transfer.message, lost)

    @contextlib.contextmanager
    def waiting_for(self, node: int) -> Iterator[None]:
        """Tells on_wait that this rank waits for that node, by whatever means."""
        self.on_wait(self.topology.lane_rank(node))
        try:
            yield
        finally:
            self.on_wait(-1)

    def silence(self, transfer: Transfer, why: str) -> EPTimeoutError:
        """The error for a peer from which something did not come by other means, though the
        transfer has ended."""
        peer = self.topology.lane_rank(transfer.node)
        lost = self._follow(Lost(peer, f"nothing came from rank {peer}: {why}"))
        return self._error(transfer.node, transfer.message, lost)

    def close(self, culprit: int = DEPARTED) -> None:
        """Says goodbye to the peers, naming whom this rank gave up on (itself, if it failed), and
        ends all transfers. The first farewell counts."""
        if not self._is_closed:
            self._is_closed = True
            self._say(culprit)
            self._close()

    def _start(self, start: Any, node: int, tensor: torch.Tensor, message: Message) -> Transfer:
        try:
            work = start(node, tensor, message.tag)
        except RuntimeError as error:  # the connection has ended
            raise self._error(node, message, self._why(node, str(error))) from None
        return Transfer(node, message, work, tensor)

    def _count(self, direction: str, tensor: torch.Tensor, message: Message) -> None:
        kind = "chunk" if message.is_chunk else "control"
        self._counts[f"{kind}_bytes_{direction}"] += tensor.numel()

    def _error(self, node: int, message: Message, lost: Lost) -> EPTimeoutError:
        rank, peer, places = self.topology.rank, self.topology.lane_rank(node), self.places
        text = (
            f"{lost.text}; rank {rank} was exchanging messages with rank {peer} of node "
            f"{places.node_of(peer)}; to blame is rank {lost.culprit} of node "
            f"{places.node_of(lost.culprit)}"
        )
        return EPTimeoutError(text, rank=rank, phase=PHASES[message.phase], peer=lost.culprit)

    def _expired(self, node: int) -> Lost:
        peer = self.topology.lane_rank(node)
        node = self.places.node_of(peer)
        text = f"nothing came from rank {peer} of node {node} within {self.deadline_s:g} s"
        return Lost(peer, text)

    def _said_farewell(self, node: int, culprit: int) -> Lost:
        peer = self.topology.lane_rank(node)
        if culprit == DEPARTED:
            return Lost(peer, f"rank {peer} has destroyed its buffer")
        if culprit == peer:
            return Lost(peer, f"rank {peer} failed during a call")
        return Lost(culprit, f"rank {peer} gave up on rank {culprit}")

    def _follow(self, lost: Lost) -> Lost:
        """Whom the rank to blame has itself given up on, and so on: the waits of ranks that wait
        for each other in a row run out at about the same time. So a rank says first whom it
        blames, for the one that waits for it, and asks then."""
        self._say(lost.culprit)
        asked = {self.topology.node}
        while (node := self.topology.node_of(lost.culprit)) not in asked:
            asked.add(node)
            if self.topology.lane_rank(node) != lost.culprit:
                break  # on another lane
            said = self._farewell_from(node)
            if said is None or said.culprit == lost.culprit:
                break
            lost = Lost(said.culprit, f"{lost.text}, and {said.text}")
        return lost

    def _say(self, culprit: int) -> None:
        if not self._has_said:
            self._has_said = True
            self._send_farewells(culprit)

    @abc.abstractmethod
    def _isend(self, node: int, tensor: torch.Tensor, tag: int) -> Any: ...

    @abc.abstractmethod
    def _irecv(self, node: int, tensor: torch.Tensor, tag: int) -> Any: ...

    @abc.abstractmethod
    def _wait(self, transfer: Transfer) -> Lost | None: ...

    @abc.abstractmethod
    def _why(self, node: int, error: str) -> Lost: ...

    @abc.abstractmethod
    def _send_farewells(self, culprit: int) -> None:
        """To all peers that are not known to be gone."""

    @abc.abstractmethod
    def _farewell_from(self, node: int) -> Lost | None:
        """What the peer has said, or says within FAREWELL_S."""

    @abc.abstractmethod
    def _close(self) -> None: ...


def make_lane(
    bootstrap: Bootstrap,
    topology: Topology,
    timeout_s: float,
    on_wait: Callable[[int], None] = lambda rank: None,
) -> Lane:
    """Connects this rank with its lane; `on_wait` as in Lane. Collective.

    Raises:
        EPConfigError: on all ranks, if MPI of one does not allow calls from several threads.
        EPDeviceError: on all ranks, if one cannot be connected.
    """
    from ep_kernels.gloo_lane import GlooLane
    from ep_kernels.mpi_lane import MpiLane

    name = f"ep_kernels/{bootstrap.all_gather(uuid.uuid4().hex)[0]}"

    def connect() -> Lane:
        if isinstance(bootstrap, MpiBootstrap):
            return MpiLane(topology, timeout_s, bootstrap.comm)
        return GlooLane(topology, timeout_s, name)

    lane = make_on_all(bootstrap, connect, Lane.close)
    lane.on_wait = on_wait
    return lane

"""Chunks of rows from device memory to device memory, by a library that moves groups of them.

    NcclGroup      nccl_group.py: NCCL
    NvshmemGroup   nvshmem_group.py: NVSHMEM

The chunks of a step, of all peers and both directions, are one group: it is over when every peer of
the step has started its own. Each rank tells those peers over the lane when it has, and the host
waits for these messages first. So a rank that is dead or silent is named as always, and what is
left to wait for then is the network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn, Protocol

import torch

from ep_kernels.errors import EPDeviceError
from ep_kernels.lanes import Lane, Message, ScaleoutStats, Transfer
from ep_kernels.streams import Stream, wait_until
from ep_kernels.transport import CHUNK_PHASE, ChunkBytes, Slots, Transport

STARTED, STUCK = 5, 6  # kinds of messages; node_control.py, routes.py and transport.py have others

Tensors = Mapping[int, torch.Tensor]
"""By node."""


class PeerGroup(Protocol):
    """The ranks of a lane, by node, as the library sees them. Groups run one after the other."""

    def exchange(self, sends: Tensors, recvs: Tensors) -> Any:
        """Starts a group of transfers, at most one to and from each node, after the work on rows
        that was enqueued before."""

    def is_over(self, work: Any) -> bool:
        """Raises EPDeviceError if the group has failed."""

    def make_rows_wait(self, work: Any) -> None:
        """Work on rows that is enqueued from now on comes after the group. Raises as is_over()."""

    def abort(self) -> None:
        """Ends what is under way. Idempotent."""


@dataclass(frozen=True)
class GroupUnderWay:
    """Transfers that were started together.

    Attributes:
        started: what the peers say when they have started theirs, and what they are told.
        received: what comes, by node.
    """

    work: Any
    started: list[Transfer]
    received: Tensors


class PeerGroups:
    """Groups of transfers between the ends of a lane, and what their hosts say about them.

    Args:
        lane: to the other nodes.
        group: of the same ranks.
        rows: the stream of the work that makes and reads what travels.
    """

    def __init__(self, lane: Lane, group: PeerGroup, rows: Stream) -> None:
        self._lane, self._group, self._rows = lane, group, rows

    def start(self, seq: int, sends: Tensors, recvs: Tensors) -> GroupUnderWay:
        """Of call `seq`; at least one transfer."""
        work = self._group.exchange(sends, recvs)
        message = Message(seq=seq, kind=STARTED, phase=CHUNK_PHASE)
        return GroupUnderWay(work, self._tell(sorted({*sends, *recvs}), message), recvs)

    def is_over(self, group: GroupUnderWay) -> bool:
        """Raises EPDeviceError if it has failed."""
        return self._group.is_over(group.work)

    def wait(self, group: GroupUnderWay) -> None:
        """Blocks the host until it is over; work on rows comes after it from then on.

        Raises:
            EPTimeoutError: naming the rank to blame.
        """
        for transfer in group.started:
            self._lane.wait(transfer)
        try:
            with self._lane.waiting_for(group.started[0].node):
                is_over = wait_until(lambda: self.is_over(group), self._lane.deadline_s)
            if not is_over:
                self._blame(group, "the group of chunks is not over")
            self._group.make_rows_wait(group.work)
        except EPDeviceError as error:
            self._rows.synchronize()  # raises if the device is to blame
            self._blame(group, str(error))

    def abort(self) -> None:
        self._group.abort()

    def _blame(self, group: GroupUnderWay, why: str) -> NoReturn:
        """A group does not say who of several broke it: those that are there say so over the lane.

        Raises:
            EPTimeoutError: naming one that does not, or any of them if all do.
        """
        message = replace(group.started[0].message, kind=STUCK)
        for transfer in self._tell(sorted({each.node for each in group.started}), message):
            self._lane.wait(transfer)
        raise self._lane.silence(group.started[0], why)

    def _tell(self, nodes: list[int], message: Message) -> list[Transfer]:
        """Starts to exchange a message without content with each node."""
        return [
            start(node, torch.zeros(1, dtype=torch.uint8), message)
            for node in nodes
            for start in (self._lane.irecv, self._lane.isend)
        ]


class GroupTransport(Transport):
    """The chunks of a step are a group.

    Args:
        lane, group, rows: as in PeerGroups.
        new_memory: makes memory on the device, of so many bytes.
    """

    def __init__(
        self,
        lane: Lane,
        group: PeerGroup,
        rows: Stream,
        new_memory: Callable[[int], torch.Tensor],
    ) -> None:
        self._lane, self._groups = lane, PeerGroups(lane, group, rows)
        self._slots = Slots(lane.topology.other_nodes, new_memory)
        self._seq = 0
        self._expected: dict[int, ChunkBytes] = {}
        self._under_way: dict[int, GroupUnderWay] = {}
        self._bytes_sent = self._bytes_received = 0

    def begin(self, seq: int, num_bytes: int) -> None:
        self._seq = seq
        self._expected, self._under_way = {}, {}
        self._slots.reserve(num_bytes)

    def expect(self, step: int, chunks: ChunkBytes) -> None:
        """Nothing can come before the group of the step, which begins in send()."""
        self._expected[step] = chunks

    def memory(self, node: int, step: int, num_bytes: int) -> torch.Tensor:
        return self._slots.sent(node, step, num_bytes)

    def send(self, step: int, chunks: ChunkBytes) -> None:
        expected = self._expected.pop(step)
        sends = {node: self._slots.sent(node, step, size) for node, size in chunks.items()}
        recvs = {node: self._slots.received(node, step, size) for node, size in expected.items()}
        if not sends and not recvs:
            return
        self._under_way[step] = self._groups.start(self._seq, sends, recvs)
        self._bytes_sent += sum(chunks.values())
        self._bytes_received += sum(expected.values())

    def receive(self, step: int) -> dict[int, torch.Tensor]:
        group = self._under_way.pop(step, None)
        if group is None:
            return {}
        self._groups.wait(group)
        return dict(group.received)

    def release(self, step: int) -> None:
        """The group that writes there next comes after the work that reads it."""

    def wait_sent(self, step: int) -> None:
        """The group of the step is over."""

    def stats(self) -> ScaleoutStats:
        carried = self._lane.stats()
        return replace(
            carried,
            chunk_bytes_sent=carried.chunk_bytes_sent + self._bytes_sent,
            chunk_bytes_received=carried.chunk_bytes_received + self._bytes_received,
        )

    def close(self) -> None:
        self._groups.abort()

"""How rows of low-latency calls over several nodes travel, from every rank to every other one.

LaneCarrier    messages of a lane (lanes.py), from host memory to host memory; rows in device
               memory are copied there and from there
GroupCarrier   a library that moves groups of rows between devices (group_transport.py)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch

from ep_kernels.group_transport import GroupUnderWay, PeerGroups
from ep_kernels.lanes import Lane, Message, Transfer

if TYPE_CHECKING:
    from ep_kernels.bootstrap import Bootstrap
    from ep_kernels.ll_memory import LlMemory

ROWS = 1  # a kind of messages
ROWS_PHASE = 5

Rows = Mapping[int, torch.Tensor]
"""[N] uint8, N > 0, by the rank at the other end."""


@dataclass(kw_only=True)
class ArrivingRows:
    """Rows of a call on their way to this rank.

    Attributes:
        transfers: by peer; of a LaneCarrier.
        group: of a GroupCarrier; None if nothing travels.
        is_over: the group was waited for.
    """

    transfers: dict[int, Transfer] = field(default_factory=dict)
    group: GroupUnderWay | None = None
    is_over: bool = False


class RowCarrier(Protocol):
    """Calls have ascending numbers; their rows may arrive in any order. Waits raise EPTimeoutError,
    naming the rank to blame."""

    def start(self, seq: int, sends: Rows, recv_bytes: Mapping[int, int]) -> ArrivingRows:
        """Sends rows as they are now, and receives."""

    def take(self, arriving: ArrivingRows, peer: int) -> torch.Tensor | None:
        """Waits for a peer's rows: work from now on may read them. None if it sends none."""

    def settle(self) -> None:
        """Waits until what was sent has gone, if peers have to wait for that."""

    def abandon(self, arriving: ArrivingRows) -> None:
        """The rows are not wanted; their memory stays until they have come."""

    def close(self) -> None:
        """The lane is closed. Idempotent."""


MakeCarrier = Callable[[Lane, "Bootstrap"], RowCarrier]
"""For a lane of all ranks. Collective; raises EPConfigError, EPDeviceError on all of them."""


class LaneCarrier:
    """See above.

    Args:
        lane: of all ranks.
        memory: where rows are.
    """

    def __init__(self, lane: Lane, memory: LlMemory) -> None:
        self._lane, self._memory = lane, memory
        self._under_way: list[Transfer] = []  # nobody waits for their memory

    def start(self, seq: int, sends: Rows, recv_bytes: Mapping[int, int]) -> ArrivingRows:
        message = Message(seq=seq, kind=ROWS, phase=ROWS_PHASE, is_chunk=True)
        lane, memory = self._lane, self._memory
        arriving = {
            peer: lane.irecv(peer, memory.host_memory(num_bytes), message)
            for peer, num_bytes in recv_bytes.items()
        }
        on_host = memory.to_host(list(sends.values()))
        for peer, rows in zip(sends, on_host, strict=True):
            self._under_way.append(lane.isend(peer, rows, message))
        return ArrivingRows(transfers=arriving)

    def take(self, arriving: ArrivingRows, peer: int) -> torch.Tensor | None:
        transfer = arriving.transfers.pop(peer, None)
        if transfer is None:
            return None
        self._lane.wait(transfer)
        return self._memory.from_host(transfer.tensor)

    def settle(self) -> None:
        while self._under_way:
            self._lane.wait(self._under_way.pop())

    def abandon(self, arriving: ArrivingRows) -> None:
        self._under_way += arriving.transfers.values()

    def close(self) -> None:
        """The lane ends its messages."""


class GroupCarrier:
    """The rows of a call are one group.

    Args:
        groups: of all ranks.
        memory: where rows are.
    """

    def __init__(self, groups: PeerGroups, memory: LlMemory) -> None:
        self._groups, self._memory = groups, memory
        self._under_way: deque[tuple[GroupUnderWay, Rows]] = deque()  # keeps their memory

    def start(self, seq: int, sends: Rows, recv_bytes: Mapping[int, int]) -> ArrivingRows:
        self._let_go()
        if not sends and not recv_bytes:
            return ArrivingRows()
        recvs = {peer: self._memory.empty(size) for peer, size in recv_bytes.items()}
        group = self._groups.start(seq, sends, recvs)
        self._under_way.append((group, sends))
        return ArrivingRows(group=group)

    def take(self, arriving: ArrivingRows, peer: int) -> torch.Tensor | None:
        if arriving.group is None:
            return None
        if not arriving.is_over:
            self._groups.wait(arriving.group)
            arriving.is_over = True
        return arriving.group.received.get(peer)

    def settle(self) -> None:
        """A group takes what it sends from where it is."""

    def abandon(self, arriving: ArrivingRows) -> None:
        """Its memory is kept anyway."""

    def close(self) -> None:
        self._groups.abort()
        self._under_way.clear()

    def _let_go(self) -> None:
        """Of the memory of groups that are over; they end in order."""
        while self._under_way and self._groups.is_over(self._under_way[0][0]):
            self._under_way.popleft()

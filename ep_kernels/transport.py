"""How chunks of rows travel between the two ends of a lane.

    LaneTransport   rows in host memory: messages of the lane (lanes.py)
    HostTransport   rows in device memory: through pinned host memory and the lane
    GroupTransport  group_transport.py: rows in device memory, sent from there by a library

Chunks move in steps, which both ends number alike; chunk c of every peer belongs to step c. WINDOW
steps are under way at a time. Of a step, in this order:

    expect       memory for what comes may be written
    send         memory() of each chunk that goes has been filled by work enqueued before
    receive      waits; work enqueued from now on may read what came
    release      the work that reads it has been enqueued
    wait_sent    waits; memory() may be filled again, for step c + WINDOW

Each of them comes in ascending order of steps; before receive(c), all steps below c + WINDOW that
there are have been handed to send(). So whom the rank that is furthest behind waits for has sent.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping

import torch

from ep_kernels.lanes import Lane, Message, ScaleoutStats, Transfer
from ep_kernels.routes import WINDOW
from ep_kernels.streams import Moment, Stream

CHUNK = 3  # a kind of messages; node_control.py and routes.py have the others
CHUNK_PHASE = 4

ChunkBytes = Mapping[int, int]
"""Of the chunks of a step, by node; none of them is empty."""


class Slots:
    """Memory for WINDOW chunks per peer and direction."""

    def __init__(self, nodes: list[int], make: Callable[[int], torch.Tensor]) -> None:
        self._nodes, self._make = nodes, make
        self._memory = make(0)
        self._slot_bytes = 0

    def reserve(self, num_bytes: int) -> None:
        """Makes slots of at least that size; nothing may be under way."""
        self._slot_bytes = -(-num_bytes // 64) * 64
        needed = 2 * len(self._nodes) * WINDOW * self._slot_bytes
        if len(self._memory) < needed:
            self._memory = self._make(needed)

    def received(self, node: int, step: int, num_bytes: int) -> torch.Tensor:
        return self._slot(0, node, step, num_bytes)

    def sent(self, node: int, step: int, num_bytes: int) -> torch.Tensor:
        return self._slot(1, node, step, num_bytes)

    def _slot(self, direction: int, node: int, step: int, num_bytes: int) -> torch.Tensor:
        peer = direction * len(self._nodes) + self._nodes.index(node)
        begin = (peer * WINDOW + step % WINDOW) * self._slot_bytes
        return self._memory[begin : begin + num_bytes]


class Transport(abc.ABC):
    """See above. Waits raise EPTimeoutError, naming the rank to blame."""

    @abc.abstractmethod
    def begin(self, seq: int, num_bytes: int) -> None:
        """Chunks of call `seq` follow, of at most that size; those of the call before are over."""

    @abc.abstractmethod
    def expect(self, step: int, chunks: ChunkBytes) -> None: ...

    @abc.abstractmethod
    def memory(self, node: int, step: int, num_bytes: int) -> torch.Tensor:
        """Where a chunk is to be packed."""

    @abc.abstractmethod
    def send(self, step: int, chunks: ChunkBytes) -> None: ...

    @abc.abstractmethod
    def receive(self, step: int) -> dict[int, torch.Tensor]:
        """What came, by node."""

    @abc.abstractmethod
    def release(self, step: int) -> None: ...

    @abc.abstractmethod
    def wait_sent(self, step: int) -> None: ...

    @abc.abstractmethod
    def stats(self) -> ScaleoutStats:
        """Bytes of finished calls, what the lane carries included."""

    @abc.abstractmethod
    def close(self) -> None:
        """Ends what is under way: the lane is closed, or this rank leaves. Idempotent."""


def _pageable_memory(num_bytes: int) -> torch.Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8)


class LaneTransport(Transport):
    """Receives straight into the memory that the rows are read from."""

    def __init__(
        self, lane: Lane, new_memory: Callable[[int], torch.Tensor] = _pageable_memory
    ) -> None:
        self._lane = lane
        self._slots = Slots(lane.topology.other_nodes, new_memory)
        self._message = Message(seq=0, kind=CHUNK, phase=CHUNK_PHASE)
        self._recvs: dict[int, list[Transfer]] = {}
        self._sends: dict[int, list[Transfer]] = {}

    def begin(self, seq: int, num_bytes: int) -> None:
        self._message = Message(seq=seq, kind=CHUNK, phase=CHUNK_PHASE, is_chunk=True)
        self._recvs, self._sends = {}, {}
        self._slots.reserve(num_bytes)

    def expect(self, step: int, chunks: ChunkBytes) -> None:
        self._recvs[step] = [
            self._lane.irecv(node, self._slots.received(node, step, num_bytes), self._message)
            for node, num_bytes in chunks.items()
        ]

    def memory(self, node: int, step: int, num_bytes: int) -> torch.Tensor:
        return self._slots.sent(node, step, num_bytes)

    def send(self, step: int, chunks: ChunkBytes) -> None:
        self._sends[step] = [
            self._lane.isend(node, self._slots.sent(node, step, num_bytes), self._message)
            for node, num_bytes in chunks.items()
        ]

    def receive(self, step: int) -> dict[int, torch.Tensor]:
        transfers = self._recvs.pop(step)
        for transfer in transfers:
            self._lane.wait(transfer)
        return {transfer.node: transfer.tensor for transfer in transfers}

    def release(self, step: int) -> None:
        """What reads it has run."""

    def wait_sent(self, step: int) -> None:
        for transfer in self._sends.pop(step):
            self._lane.wait(transfer)

    def stats(self) -> ScaleoutStats:
        return self._lane.stats()

    def close(self) -> None:
        """The lane ends its messages."""


class HostTransport(LaneTransport):
    """Chunks are packed and read in device memory; copies to and from pinned host memory run on two
    streams of their own, beside the work on rows.

    Args:
        lane: to the other nodes.
        rows: the stream of the work that packs and reads chunks.
        new_stream: makes another one of the device.
        new_memory: makes memory on the device, of so many bytes.
    """

    def __init__(
        self,
        lane: Lane,
        rows: Stream,
        new_stream: Callable[[], Stream],
        new_memory: Callable[[int], torch.Tensor],
    ) -> None:
        self._rows = rows
        super().__init__(lane, rows.host_memory)
        self._on_device = Slots(lane.topology.other_nodes, new_memory)
        self._outward, self._inward = new_stream(), new_stream()
        self._packed: list[tuple[int, ChunkBytes, Moment]] = []  # steps not yet given to the lane
        self._read: dict[int, Moment] = {}  # by slot: nobody reads the device's memory after it
        self._copied: dict[int, Moment] = {}  # by slot: nor the host's

    def begin(self, seq: int, num_bytes: int) -> None:
        super().begin(seq, num_bytes)
        self._on_device.reserve(num_bytes)
        # Neither is memory in use any more, nor is it the memory that may have been replaced.
        moment = self._rows.record()
        self._outward.wait(moment)
        self._inward.wait(moment)
        self._packed, self._read, self._copied = [], {}, {}

    def expect(self, step: int, chunks: ChunkBytes) -> None:
        if copied := self._copied.pop(step % WINDOW, None):
            copied.synchronize()
        super().expect(step, chunks)

    def memory(self, node: int, step: int, num_bytes: int) -> torch.Tensor:
        return self._on_device.sent(node, step, num_bytes)

    def send(self, step: int, chunks: ChunkBytes) -> None:
        """Copies to the host; the lane gets it in receive() or wait_sent(), when it is there."""
        self._outward.wait(self._rows.record())
        for node, num_bytes in chunks.items():
            there = self._slots.sent(node, step, num_bytes)
            self._outward.copy(there, self._on_device.sent(node, step, num_bytes))
        self._packed.append((step, chunks, self._outward.record()))

    def _send_packed(self) -> None:
        for step, chunks, is_there in self._packed:
            is_there.synchronize()
            super().send(step, chunks)
        self._packed.clear()

    def receive(self, step: int) -> dict[int, torch.Tensor]:
        self._send_packed()  # peers must not wait for us while we wait for them
        on_host = super().receive(step)
        if read := self._read.pop(step % WINDOW, None):
            self._inward.wait(read)
        received = {
            node: self._on_device.received(node, step, len(chunk))
            for node, chunk in on_host.items()
        }
        for node, chunk in on_host.items():
            self._inward.copy(received[node], chunk)
        self._copied[step % WINDOW] = self._inward.record()
        self._rows.wait(self._copied[step % WINDOW])
        return received

    def release(self, step: int) -> None:
        self._read[step % WINDOW] = self._rows.record()

    def wait_sent(self, step: int) -> None:
        self._send_packed()
        super().wait_sent(step)

"""Chunks of rows by NCCL, from device memory to device memory.

The chunks of a step, of all peers and both directions, are one group of NCCL: its kernel ends when
every peer of the step has launched its own. Each rank tells those peers over the lane when it has,
and the host waits for these messages first. So a rank that is dead or silent is named as always,
and what is left to wait for then is the network.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ep_kernels.bootstrap import MpiBootstrap
from ep_kernels.errors import EPConfigError, EPDeviceError, EPError
from ep_kernels.lanes import Lane, Message, ScaleoutStats, Transfer
from ep_kernels.streams import device_errors
from ep_kernels.transport import CHUNK_PHASE, ChunkBytes, Slots, Transport

if TYPE_CHECKING:
    from ep_kernels.bootstrap import Bootstrap
    from ep_kernels.streams import CudaStream

LAUNCHED, STUCK = 5, 6  # kinds of messages; node_control.py, routes.py and transport.py have others

Tensors = Mapping[int, torch.Tensor]
"""By node."""


class PeerGroup(Protocol):
    """The ranks of a lane, by node, as NCCL sees them."""

    def exchange(self, sends: Tensors, recvs: Tensors) -> Any:
        """Starts a group of transfers, after the work on rows that was enqueued before."""

    def is_over(self, work: Any) -> bool:
        """Raises EPDeviceError if the group has failed."""

    def make_rows_wait(self, work: Any) -> None:
        """Work on rows that is enqueued from now on comes after the group."""

    def abort(self) -> None:
        """Ends what is under way. Idempotent."""


@dataclass(frozen=True)
class _Group:
    """The chunks of a step, under way."""

    work: Any
    launched: list[Transfer]  # what the peers of the step say, and what they are told
    received: dict[int, torch.Tensor]


class NcclTransport(Transport):
    """See above. `new_memory` makes memory on the device, of so many bytes."""

    def __init__(
        self, lane: Lane, group: PeerGroup, new_memory: Callable[[int], torch.Tensor]
    ) -> None:
        self._lane, self._group = lane, group
        self._slots = Slots(lane.topology.other_nodes, new_memory)
        self._message = Message(seq=0, kind=LAUNCHED, phase=CHUNK_PHASE)
        self._expected: dict[int, ChunkBytes] = {}
        self._groups: dict[int, _Group] = {}
        self._bytes_sent = self._bytes_received = 0

    def begin(self, seq: int, num_bytes: int) -> None:
        self._message = Message(seq=seq, kind=LAUNCHED, phase=CHUNK_PHASE)
        self._expected, self._groups = {}, {}
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
        work = self._group.exchange(sends, recvs)
        launched = self._tell(sorted({*sends, *recvs}), self._message)
        self._groups[step] = _Group(work, launched, recvs)
        self._bytes_sent += sum(chunks.values())
        self._bytes_received += sum(expected.values())

    def receive(self, step: int) -> dict[int, torch.Tensor]:
        group = self._groups.pop(step, None)
        if group is None:
            return {}
        for transfer in group.launched:
            self._lane.wait(transfer)
        try:
            is_over = _wait_until(lambda: self._group.is_over(group.work), self._lane.deadline_s)
        except EPDeviceError:
            is_over = False
        if not is_over:
            self._find_lost(group)
            raise self._lane.silence(group.launched[0])
        self._group.make_rows_wait(group.work)
        return group.received

    def _find_lost(self, group: _Group) -> None:
        """A group does not say who of several broke it: those that are there say so over the lane.

        Raises:
            EPTimeoutError: naming one that does not.
        """
        message = replace(self._message, kind=STUCK)
        for transfer in self._tell(sorted({each.node for each in group.launched}), message):
            self._lane.wait(transfer)

    def _tell(self, nodes: list[int], message: Message) -> list[Transfer]:
        """Starts to exchange a message without content with each node."""
        return [
            start(node, torch.zeros(1, dtype=torch.uint8), message)
            for node in nodes
            for start in (self._lane.irecv, self._lane.isend)
        ]

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
        self._group.abort()


def _wait_until(is_over: Callable[[], bool], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not is_over():
        if time.monotonic() > deadline:
            return False
        time.sleep(20e-6)
    return True


class NcclGroup:
    """A communicator of NCCL over the ranks of a lane, made at once.

    NOTE: torch's watchdog ends the process when a group is late. Ours comes first: its deadline is
    far beyond that of the lane.

    Raises:
        EPDeviceError: NCCL cannot connect the ranks.
    """

    def __init__(self, lane: Lane, name: str, rows: CudaStream) -> None:
        import torch.distributed as dist
        from torch.distributed.distributed_c10d import _get_default_store

        topology, self._rows = lane.topology, rows
        self._is_aborted = False
        store = dist.PrefixStore(f"{name}/nccl/{topology.local_rank}", _get_default_store())
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=10 * lane.deadline_s + 60)
        with device_errors(), torch.cuda.device(rows.raw.device):
            self._group: Any = dist.ProcessGroupNCCL(
                store, topology.node, topology.num_nodes, options
            )
        words = torch.zeros(2 * topology.num_nodes, dtype=torch.uint8, device=rows.raw.device)
        torch.cuda.synchronize(rows.raw.device)
        sends = {node: words[2 * node : 2 * node + 1] for node in topology.other_nodes}
        recvs = {node: words[2 * node + 1 : 2 * node + 2] for node in topology.other_nodes}
        work = self.exchange(sends, recvs)
        if not _wait_until(lambda: self.is_over(work), lane.deadline_s):
            self.abort()
            raise EPDeviceError(f"NCCL: no connection within {lane.deadline_s:g} s")

    def exchange(self, sends: Tensors, recvs: Tensors) -> Any:
        with device_errors(), torch.cuda.stream(self._rows.raw):
            self._group._start_coalescing()
            for node, tensor in sends.items():
                self._group.send([tensor], node, 0)
            for node, tensor in recvs.items():
                self._group.recv([tensor], node, 0)
            return self._group._end_coalescing()

    def is_over(self, work: Any) -> bool:
        with device_errors():
            return bool(work.is_completed())

    def make_rows_wait(self, work: Any) -> None:
        with device_errors(), torch.cuda.stream(self._rows.raw):
            work.wait()

    def abort(self) -> None:
        if not self._is_aborted:
            self._is_aborted = True
            with contextlib.suppress(RuntimeError):
                self._group.abort()


def make_nccl_transport(
    lane: Lane,
    bootstrap: Bootstrap,
    rows: CudaStream,
    new_memory: Callable[[int], torch.Tensor],
) -> NcclTransport:
    """Collective.

    Raises:
        EPConfigError: on all ranks; the buffer was made from an MPI communicator, or torch has no
            NCCL.
        EPDeviceError: on all ranks; NCCL cannot connect those of a lane.
    """
    import torch.distributed as dist

    if isinstance(bootstrap, MpiBootstrap):
        raise EPConfigError("EP_KERNELS_SCALEOUT=nccl needs a group of torch.distributed, not MPI")
    name = f"ep_kernels/{bootstrap.all_gather(uuid.uuid4().hex)[0]}"
    group: NcclGroup | None = None
    problem: EPError | None = None
    try:
        if not dist.is_nccl_available():
            raise EPConfigError("EP_KERNELS_SCALEOUT=nccl, but torch was built without NCCL")
        group = NcclGroup(lane, name, rows)
    except EPError as error:
        problem = error.with_traceback(None)
    for rank, found in enumerate(bootstrap.all_gather(problem)):
        if found is not None:
            if group is not None:
                group.abort()
            raise type(found)(f"rank {rank}: {found}")
    assert group is not None
    return NcclTransport(lane, group, new_memory)

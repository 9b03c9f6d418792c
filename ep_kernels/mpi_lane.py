"""A lane over MPI, for buffers that are made from an mpi4py communicator."""

from __future__ import annotations

import itertools
import time
from typing import Any

import torch

from ep_kernels.errors import EPConfigError
from ep_kernels.lanes import FAREWELL_S, FAREWELL_TAG, Lane, Lost, Transfer
from ep_kernels.topology import Topology


class MpiLane(Lane):
    """MPI polls; a peer that has died ends the whole run, as MPI does it.

    Raises:
        EPConfigError: MPI does not allow calls from several threads.
    """

    # Requests with their memory, which MPI may use until they complete: those of a call that failed
    # and farewells stay here for good.
    _under_way: dict[int, tuple[Any, torch.Tensor]] = {}
    _farewells: list[tuple[Any, torch.Tensor]] = []

    def __init__(self, topology: Topology, timeout_s: float, comm: Any) -> None:
        super().__init__(topology, timeout_s)
        self._comm = comm.Split(topology.local_rank, topology.node)
        self._said: dict[int, int] = {}  # node -> culprit
        _check_thread_level()

    def _isend(self, node: int, tensor: torch.Tensor, tag: int) -> Any:
        return self._keep(self._comm.Isend(tensor.numpy(), node, tag), tensor)

    def _irecv(self, node: int, tensor: torch.Tensor, tag: int) -> Any:
        return self._keep(self._comm.Irecv(tensor.numpy(), node, tag), tensor)

    def _keep(self, request: Any, tensor: torch.Tensor) -> Any:
        self._under_way[id(request)] = request, tensor
        return request

    def _wait(self, transfer: Transfer) -> Lost | None:
        deadline = time.monotonic() + self.deadline_s
        for attempt in itertools.count():
            if transfer.work.Test():
                del self._under_way[id(transfer.work)]
                return None
            if attempt % 256 == 255:
                self._receive_farewells()
            if transfer.node in self._said:
                said = self._said_farewell(transfer.node, self._said[transfer.node])
                return self._follow(said)
            if time.monotonic() > deadline:
                return self._follow(self._expired(transfer.node))
            time.sleep(0 if attempt < 100 else 50e-6)
        raise AssertionError

    def _receive_farewells(self) -> None:
        while self._comm.Iprobe(tag=FAREWELL_TAG):
            words = torch.zeros(2, dtype=torch.int32)
            self._comm.Recv(words.numpy(), tag=FAREWELL_TAG)
            self._said[int(words[0])] = int(words[1])

    def _why(self, node: int, error: str) -> Lost:
        return Lost(self.topology.lane_rank(node), error)

    def _farewell_from(self, node: int) -> Lost | None:
        deadline = time.monotonic() + FAREWELL_S
        while node not in self._said:
            if time.monotonic() > deadline:
                return None
            time.sleep(1e-3)
            self._receive_farewells()
        return self._said_farewell(node, self._said[node])

    def _send_farewells(self, culprit: int) -> None:
        words = torch.tensor([self.topology.node, culprit], dtype=torch.int32)
        for node in self.topology.other_nodes:
            request = self._comm.Isend(words.numpy(), node, FAREWELL_TAG)
            self._farewells.append((request, words))

    def _close(self) -> None:
        """MPI keeps its connections."""


def _check_thread_level() -> None:
    """Asynchronous calls are made from a thread of the buffer, beside the user's own MPI calls."""
    from mpi4py import MPI

    level = MPI.Query_thread()
    if level != MPI.THREAD_MULTIPLE:
        names = ("THREAD_SINGLE", "THREAD_FUNNELED", "THREAD_SERIALIZED")
        name = next((name for name in names if getattr(MPI, name) == level), str(level))
        raise EPConfigError(
            f"MPI was initialised with {name}; a buffer over several nodes needs THREAD_MULTIPLE"
        )

"""A lane over gloo, the CPU backend of torch.distributed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch

from ep_kernels.errors import EPDeviceError
from ep_kernels.lanes import CLOSE_TAG, FAREWELL_S, FAREWELL_TAG, Lane, Lost, Transfer
from ep_kernels.topology import Topology


class GlooLane(Lane):
    """Two gloo contexts: one for messages, which a wait that runs out of time breaks altogether,
    and one for farewells, for which a receive from each peer is posted from the beginning.

    Raises:
        EPDeviceError: a peer cannot be reached.
    """

    def __init__(self, topology: Topology, timeout_s: float, name: str) -> None:
        super().__init__(topology, timeout_s)
        self._messages = self._connect(f"{name}/messages", timeout_s)
        self._farewells = self._connect(f"{name}/farewells", timeout_s)
        self._lost: dict[int, Lost] = {}
        self._said: dict[int, Lost | None] = {}
        self._expected = {}
        for node in topology.other_nodes:
            culprit = torch.zeros(1, dtype=torch.int32)
            work = self._farewells.recv([culprit], node, FAREWELL_TAG)
            self._expected[node] = culprit, work

    def _connect(self, name: str, timeout_s: float) -> Any:
        """NOTE: not by new_group(): every rank of the world would have to take part, and a name may
        come again while the store still has the addresses of the group that had it before."""
        import torch.distributed as dist
        from torch.distributed.distributed_c10d import _get_default_store

        store = dist.PrefixStore(f"{name}/{self.topology.local_rank}", _get_default_store())
        try:
            return dist.ProcessGroupGloo(
                store,
                self.topology.node,
                self.topology.num_nodes,
                timedelta(seconds=timeout_s),
            )
        except RuntimeError as error:
            raise EPDeviceError(f"no connection to the other nodes: {error}") from None

    def _isend(self, node: int, tensor: torch.Tensor, tag: int) -> Any:
        return self._messages.send([tensor], node, tag)

    def _irecv(self, node: int, tensor: torch.Tensor, tag: int) -> Any:
        return self._messages.recv([tensor], node, tag)

    def _wait(self, transfer: Transfer) -> Lost | None:
        begin = time.monotonic()
        try:
            transfer.work.wait(timedelta(seconds=self.deadline_s))
        except RuntimeError as error:
            if time.monotonic() - begin >= self.deadline_s:
                return self._follow(self._expired(transfer.node))
            return self._why(transfer.node, str(error))
        return None

    def _why(self, node: int, error: str) -> Lost:
        if node not in self._lost:
            said = self._farewell_from(node)
            if said is None:
                peer = self.topology.lane_rank(node)
                text = f"the connection to rank {peer} of node {node} has ended ({error})"
                self._lost[node] = Lost(peer, text)
            else:
                self._lost[node] = self._follow(said)
        return self._lost[node]

    def _farewell_from(self, node: int) -> Lost | None:
        """NOTE: farewells are sent before connections are closed, and a peer that died closes both.
        The wait runs out for a silent peer only, and breaks the connections for farewells."""
        if node not in self._said:
            culprit, work = self._expected[node]
            self._said[node] = None
            with _ended_connections():
                work.wait(timedelta(seconds=FAREWELL_S))
                self._said[node] = self._said_farewell(node, int(culprit))
        return self._said[node]

    def _send_farewells(self, culprit: int) -> None:
        word = torch.tensor([culprit], dtype=torch.int32)
        gone = {*self._lost, self.topology.node_of(culprit) if culprit >= 0 else -1}
        works = []
        for node in self.topology.other_nodes:
            if node not in gone:
                with _ended_connections():
                    works.append(self._farewells.send([word], node, FAREWELL_TAG))
        for work in works:
            with _ended_connections():
                work.wait(timedelta(seconds=FAREWELL_S))

    def _close(self) -> None:
        self._break(self._messages)
        self._break(self._farewells)

    def _break(self, context: Any) -> None:
        """Closes all connections: what gloo does when a wait runs out of time. One for a peer that
        is gone does not, hence a wait for each."""
        for node in self.topology.other_nodes:
            with _ended_connections():
                work = context.recv([torch.zeros(1)], node, CLOSE_TAG)
                work.wait(timedelta(milliseconds=1))


@contextlib.contextmanager
def _ended_connections() -> Iterator[None]:
    """Ignores that a connection has ended."""
    with contextlib.suppress(RuntimeError):
        yield

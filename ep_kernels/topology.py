"""Which ranks share a node, and which experts live where."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ep_kernels import env
from ep_kernels.errors import EPConfigError

if TYPE_CHECKING:
    from ep_kernels.bootstrap import Bootstrap


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Nodes of equal size, their ranks numbered node by node.

    Example: 6 ranks, num_local_ranks=2: node 1 has ranks 2 and 3; the lane of rank 2 connects it
    with ranks 0 and 4.

    Attributes:
        rank, num_ranks: this rank, and R.
        num_local_ranks: ranks of a node.
    """

    rank: int
    num_ranks: int
    num_local_ranks: int

    @property
    def num_nodes(self) -> int:
        return self.num_ranks // self.num_local_ranks

    @property
    def node(self) -> int:
        """This rank's node."""
        return self.node_of(self.rank)

    @property
    def local_rank(self) -> int:
        """This rank's place in its node."""
        return self.rank % self.num_local_ranks

    def node_of(self, rank: int) -> int:
        return rank // self.num_local_ranks

    def lane_rank(self, node: int) -> int:
        """The rank of `node` on this rank's lane: the one with the same place in it."""
        return node * self.num_local_ranks + self.local_rank

    @property
    def local_ranks(self) -> range:
        """Ranks of this rank's node."""
        begin = self.node * self.num_local_ranks
        return range(begin, begin + self.num_local_ranks)

    @property
    def other_nodes(self) -> list[int]:
        return [node for node in range(self.num_nodes) if node != self.node]


@dataclass(frozen=True)
class _Home:
    """Where a process runs.

    Attributes:
        memory: processes share memory if this is equal: boot of a machine, PID namespace.
        host: its name; containers of one machine have different ones.
        launched: (variable, value) if the launch says how many ranks a node has.
    """

    memory: str
    host: str
    launched: tuple[str, int] | None


def _home(num_ranks: int) -> _Home:
    with open("/proc/sys/kernel/random/boot_id") as boot_id:
        memory = f"{boot_id.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    return _Home(memory, socket.gethostname(), env.launched_local_ranks(num_ranks))


def find_topology(bootstrap: Bootstrap, num_local_ranks: int | None) -> Topology:
    """Exchanges where ranks run, and groups them by node. Collective.

    Args:
        bootstrap: of the group.
        num_local_ranks: ranks of a node, agreed on; None to find out.

    Raises:
        EPConfigError: on all ranks; nodes are uneven, their ranks are not consecutive, the launch
            contradicts, or ranks that should share a node cannot share memory.
    """
    homes: list[_Home] = bootstrap.all_gather(_home(bootstrap.num_ranks))
    if num_local_ranks is None:
        num_local_ranks = _find_num_local_ranks(homes)
    for first in range(0, len(homes), num_local_ranks):
        for rank in range(first + 1, first + num_local_ranks):
            if homes[rank].memory != homes[first].memory:
                raise EPConfigError(
                    f"num_local_ranks={num_local_ranks} puts ranks {first} and {rank} on one node, "
                    f"but they are on different machines or in different PID namespaces "
                    f"({homes[first].memory} and {homes[rank].memory})"
                )
    return Topology(
        rank=bootstrap.rank, num_ranks=bootstrap.num_ranks, num_local_ranks=num_local_ranks
    )


def _find_num_local_ranks(homes: Sequence[_Home]) -> int:
    ranks_of: dict[tuple[str, str], list[int]] = {}
    for rank, home in enumerate(homes):
        ranks_of.setdefault((home.memory, home.host), []).append(rank)
    nodes = [(host, ranks) for (_, host), ranks in ranks_of.items()]
    described = ", ".join(f"{host}: {len(ranks)} (ranks {ranks})" for host, ranks in nodes)
    size = len(nodes[0][1])
    if any(len(ranks) != size for _, ranks in nodes):
        raise EPConfigError(f"group: nodes have different numbers of ranks: {described}")
    for host, ranks in nodes:
        if ranks != list(range(ranks[0], ranks[0] + size)):
            raise EPConfigError(f"group: ranks of node {host} are not consecutive: {described}")
    for rank, home in enumerate(homes):
        if home.launched is not None and home.launched[1] > size:
            name, value = home.launched
            raise EPConfigError(
                f"group: {name}={value} on rank {rank}, but only {size} ranks share host name, PID "
                f"namespace and boot: {described}; give num_local_ranks if that is right"
            )
    return size


PLACEMENTS = ("linear", "round_robin")


def place_experts(placement: str, num_experts: int, num_ranks: int) -> tuple[int, ...]:
    """[E] rank of each expert.

    Args:
        placement: "linear": blocks of E / R experts in order. "round_robin": expert e on rank
            e mod R, which puts neighbours on different ranks.
        num_experts: E.
        num_ranks: R.

    Example:
        >>> place_experts("linear", 4, 2), place_experts("round_robin", 4, 2)
        ((0, 0, 1, 1), (0, 1, 0, 1))

    Raises:
        EPConfigError: E is not divisible by R, or the placement is unknown.
    """
    if placement not in PLACEMENTS:
        raise EPConfigError(
            f"expert_to_rank={placement!r} is unknown; give {' or '.join(PLACEMENTS)}, or the rank "
            "of each expert"
        )
    if num_experts % num_ranks:
        raise EPConfigError(
            f"num_experts={num_experts} is not divisible by num_ranks={num_ranks}; give "
            "expert_to_rank as the rank of each expert"
        )
    if placement == "linear":
        return tuple(expert // (num_experts // num_ranks) for expert in range(num_experts))
    return tuple(expert % num_ranks for expert in range(num_experts))

"""Where experts should live, from how many tokens they get.

place_experts()   a placement of experts, and of replicas of the busy ones, on ranks
Placement         who lives where; routing to replicas
measure()         how uneven a placement is
python -m ep_kernels.placement --help

E experts, R ranks, S slots: a slot holds the weights of one expert, a rank has S / R of them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ep_kernels.errors import EPConfigError
from ep_kernels.placement.packing import pack_balanced, replicate

__all__ = ["Imbalance", "Placement", "linear_placement", "measure", "place_experts"]


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Experts in slots. Slots of a rank are consecutive, as the experts of a Buffer are that has
    num_experts=S and no expert_to_rank.

    Attributes:
        expert_of_slot: S entries.
        num_experts: E.
        num_ranks: R.
    """

    expert_of_slot: tuple[int, ...]
    num_experts: int
    num_ranks: int

    @property
    def num_slots(self) -> int:
        """S."""
        return len(self.expert_of_slot)

    @property
    def slots_per_rank(self) -> int:
        """S / R."""
        return self.num_slots // self.num_ranks

    @functools.cached_property
    def slots_of_expert(self) -> list[list[int]]:
        """Slots of each expert, ascending."""
        slots: list[list[int]] = [[] for _ in range(self.num_experts)]
        for slot, expert in enumerate(self.expert_of_slot):
            slots[expert].append(slot)
        return slots

    @property
    def expert_to_rank(self) -> list[int]:
        """[E] for Buffer(expert_to_rank=): a placement without replicas needs no other routing.

        Raises:
            EPConfigError: an expert has replicas.
        """
        if self.num_slots != self.num_experts:
            raise EPConfigError(
                f"num_slots={self.num_slots} for num_experts={self.num_experts}: an expert with "
                "replicas has no single rank; use to_slots()"
            )
        return [slots[0] // self.slots_per_rank for slots in self.slots_of_expert]

    def to_slots(self, topk_idx: torch.Tensor) -> torch.Tensor:
        """The same choices among slots, for a Buffer with num_experts=S: the replicas of an expert
        take turns, from token to token.

        Args:
            topk_idx: [T, K] int64, -1 = none.

        Example:
            With expert_of_slot = (0, 1, 0, 2), tokens 0 and 1 that both chose expert 0 go to slots
            0 and 2.
        """
        table, counts = self._tables(topk_idx.device)
        experts = topk_idx.clamp(min=0)
        turns = torch.arange(len(topk_idx), device=topk_idx.device)[:, None] % counts[experts]
        return torch.where(topk_idx < 0, topk_idx, table[experts, turns])

    def _tables(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """[E, most replicas] slots of each expert, and [E] how many there are."""
        counts = [len(slots) for slots in self.slots_of_expert]
        rows = [slots + [-1] * (max(counts) - len(slots)) for slots in self.slots_of_expert]
        return torch.tensor(rows, device=device), torch.tensor(counts, device=device)


@dataclass(frozen=True, kw_only=True)
class Imbalance:
    """Largest load over mean load; 1 is perfect balance. A step takes as long as its busiest rank.

    Attributes:
        ranks: over the ranks.
        nodes: over the nodes.
        slots: over the slots.
    """

    ranks: float
    nodes: float
    slots: float


def linear_placement(num_experts: int, num_ranks: int) -> Placement:
    """Blocks of E / R experts in order, as a Buffer places them by itself."""
    _check_divides("num_ranks", num_ranks, "num_experts", num_experts)
    return Placement(
        expert_of_slot=tuple(range(num_experts)), num_experts=num_experts, num_ranks=num_ranks
    )


def place_experts(
    loads: Sequence[float],
    *,
    num_ranks: int,
    num_nodes: int = 1,
    num_slots: int | None = None,
    num_groups: int | None = None,
) -> Placement:
    """Spreads the loads over nodes first, then over the ranks of each node.

    Groups of experts are packed onto nodes; each node replicates its busiest experts into its spare
    slots; the replicas are packed onto its ranks. A replica takes an equal part of its expert's
    load. Without spare slots the result is never worse for the ranks than linear_placement().

    Args:
        loads: [E] tokens of each expert, or any other measure of its work.
        num_ranks: R.
        num_nodes: nodes with R / num_nodes consecutive ranks each.
        num_slots: S; more than E for replicas. None: E.
        num_groups: consecutive blocks of experts that stay on one node, as group-limited routing
            has them. None: every expert by itself.

    Raises:
        EPConfigError: sizes do not divide each other, a load is negative or not finite, or there
            are more slots than replicas can use.

    Example:
        >>> place_experts([6, 6, 1, 1], num_ranks=2).expert_to_rank
        [0, 1, 0, 1]
    """
    num_experts = len(loads)
    num_slots = num_experts if num_slots is None else num_slots
    num_groups = num_experts if num_groups is None else num_groups
    _check_loads(loads)
    _check_divides("num_nodes", num_nodes, "num_ranks", num_ranks)
    _check_divides("num_ranks", num_ranks, "num_slots", num_slots)
    _check_divides("num_groups", num_groups, "num_experts", num_experts)
    _check_divides("num_nodes", num_nodes, "num_groups", num_groups)
    if not num_experts <= num_slots <= num_experts * num_ranks // num_nodes:
        raise EPConfigError(
            f"num_slots={num_slots} is outside [num_experts={num_experts}, num_experts times the "
            f"{num_ranks // num_nodes} ranks of a node]"
        )
    expert_of_slot: list[int] = []
    for experts in _experts_of_nodes(loads, num_nodes, num_groups):
        expert_of_slot += _place_on_node(
            loads, experts, num_ranks=num_ranks // num_nodes, num_slots=num_slots // num_nodes
        )
    placement = Placement(
        expert_of_slot=tuple(expert_of_slot), num_experts=num_experts, num_ranks=num_ranks
    )
    if num_slots > num_experts:
        return placement
    linear = linear_placement(num_experts, num_ranks)
    is_better = measure(placement, loads).ranks <= measure(linear, loads).ranks
    return placement if is_better else linear


def measure(placement: Placement, loads: Sequence[float], *, num_nodes: int = 1) -> Imbalance:
    """How uneven the loads are with this placement; all 1 if there is no load."""
    if len(loads) != placement.num_experts:
        raise EPConfigError(
            f"loads has {len(loads)} entries for num_experts={placement.num_experts}"
        )
    _check_divides("num_nodes", num_nodes, "num_ranks", placement.num_ranks)
    slots = [
        loads[expert] / len(placement.slots_of_expert[expert])
        for expert in placement.expert_of_slot
    ]
    return Imbalance(
        ranks=_max_over_mean(slots, placement.num_ranks),
        nodes=_max_over_mean(slots, num_nodes),
        slots=_max_over_mean(slots, placement.num_slots),
    )


def _max_over_mean(slots: list[float], num_parts: int) -> float:
    size = len(slots) // num_parts
    totals = [sum(slots[part * size : (part + 1) * size]) for part in range(num_parts)]
    mean = sum(totals) / num_parts
    return max(totals) / mean if mean else 1.0


def _experts_of_nodes(loads: Sequence[float], num_nodes: int, num_groups: int) -> list[list[int]]:
    """Experts of each node, whole groups."""
    size = len(loads) // num_groups
    groups = [list(range(group * size, (group + 1) * size)) for group in range(num_groups)]
    group_loads = [sum(loads[expert] for expert in group) for group in groups]
    packs = pack_balanced(group_loads, num_nodes, labels=range(num_groups))
    return [[expert for group in pack for expert in groups[group]] for pack in packs]


def _place_on_node(
    loads: Sequence[float], experts: list[int], *, num_ranks: int, num_slots: int
) -> list[int]:
    """Experts of the slots of a node, rank by rank, ascending on each rank."""
    replicas = replicate([loads[expert] for expert in experts], num_slots, max_replicas=num_ranks)
    copies = [
        (expert, loads[expert] / count)
        for expert, count in zip(experts, replicas)
        for _ in range(count)
    ]
    packs = pack_balanced(
        [load for _, load in copies], num_ranks, labels=[expert for expert, _ in copies]
    )
    return [expert for pack in packs for expert in sorted(copies[item][0] for item in pack)]


def _check_loads(loads: Sequence[float]) -> None:
    if not len(loads):
        raise EPConfigError("loads is empty")
    for expert, load in enumerate(loads):
        if not 0 <= load < float("inf"):
            raise EPConfigError(f"loads[{expert}]={load} is negative or not finite")


def _check_divides(name: str, divisor: int, of_name: str, value: int) -> None:
    if divisor < 1 or value < 1 or value % divisor:
        raise EPConfigError(f"{name}={divisor} does not divide {of_name}={value}")

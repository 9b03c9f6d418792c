"""Balanced packing and replication: the two steps that a placement of experts is made of.

The scheme is that of DeepSeek's EPLB (https://github.com/deepseek-ai/EPLB): heaviest item first
into the lightest pack with room, and one more replica for whichever expert has the most load per
replica. Two things are added: packs exchange items afterwards while that helps, and replicas of
an expert keep apart.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

Packs = list[list[int]]


def pack_balanced(weights: Sequence[float], num_packs: int, labels: Sequence[int]) -> Packs:
    """Packs of equally many items, with total weights as equal as a greedy search finds them.

    Args:
        weights: of the items, not negative.
        num_packs: divides the number of items.
        labels: of the items; two of the same label share a pack only if there is no other way.

    Returns:
        The items of each pack, ascending.

    Example:
        >>> pack_balanced([9, 1, 5, 5], 2, labels=[0, 1, 2, 3])
        [[0, 1], [2, 3]]
    """
    room = len(weights) // num_packs
    packs: Packs = [[] for _ in range(num_packs)]
    totals = [0.0] * num_packs
    for item in sorted(range(len(weights)), key=lambda i: (-weights[i], labels[i], i)):
        open_packs = [pack for pack in range(num_packs) if len(packs[pack]) < room]
        apart = [
            pack
            for pack in open_packs
            if all(labels[other] != labels[item] for other in packs[pack])
        ]
        chosen = min(apart or open_packs, key=lambda pack: (totals[pack], pack))
        packs[chosen].append(item)
        totals[chosen] += weights[item]
    _exchange(packs, totals, weights, labels)
    return [sorted(pack) for pack in packs]


def _exchange(
    packs: Packs, totals: list[float], weights: Sequence[float], labels: Sequence[int]
) -> None:
    """Exchanges an item of the heaviest pack for a lighter one of another, while that helps.

    Each exchange makes the heaviest pack lighter and no other as heavy as it was, so it ends; the
    limit is for weights of which many are nearly equal.
    """
    for _ in range(4 * len(weights)):
        heavy = max(range(len(packs)), key=lambda pack: (totals[pack], -pack))
        best_peak, best = totals[heavy], None
        for light in range(len(packs)):
            gap = totals[heavy] - totals[light]
            for mine in packs[heavy]:
                for other in packs[light]:
                    moved = weights[mine] - weights[other]
                    if not 0 < moved < gap:
                        continue
                    peak = max(totals[heavy] - moved, totals[light] + moved)
                    if peak < best_peak and _keep_apart(
                        packs, labels, (heavy, mine), (light, other)
                    ):
                        best_peak, best = peak, (light, mine, other, moved)
        if best is None:
            return
        light, mine, other, moved = best
        packs[heavy][packs[heavy].index(mine)] = other
        packs[light][packs[light].index(other)] = mine
        totals[heavy] -= moved
        totals[light] += moved


def _keep_apart(
    packs: Packs, labels: Sequence[int], one: tuple[int, int], two: tuple[int, int]
) -> bool:
    """Whether items of (pack, item) `one` and `two` meet nobody of their label if exchanged."""
    for (pack, leaving), (_, coming) in ((one, two), (two, one)):
        if any(labels[i] == labels[coming] for i in packs[pack] if i != leaving):
            return False
    return True


def replicate(loads: Sequence[float], num_slots: int, max_replicas: int) -> list[int]:
    """How many replicas each expert gets, so that the largest load per replica is smallest.

    Args:
        loads: of the experts.
        num_slots: replicas of all experts together.
        max_replicas: of one expert.

    Example:
        >>> replicate([8.0, 2.0, 2.0], 5, max_replicas=4)
        [3, 1, 1]
    """
    replicas = [1] * len(loads)
    heap = [(-load, expert) for expert, load in enumerate(loads)]
    heapq.heapify(heap)
    for _ in range(num_slots - len(loads)):
        _, expert = heapq.heappop(heap)
        replicas[expert] += 1
        if replicas[expert] < max_replicas:
            heapq.heappush(heap, (-loads[expert] / replicas[expert], expert))
    return replicas

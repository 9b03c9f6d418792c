"""What two layers computed differently, and how much of that is forgiven."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from moe_layers import Case

MIN_TENSORS = 5
"""Output, gradients of the input, the router and one expert's two weights."""

GPU_ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Of a tensor's largest element: on a GPU, alltoall adds in an order that changes."""


@dataclass(frozen=True)
class Difference:
    """Of one tensor on one rank.

    Attributes:
        scale: the largest element that was expected; 0 on the CPU, where nothing is forgiven.
    """

    rank: int
    name: str
    max_abs: float
    is_bitwise: bool
    scale: float


def compare(
    rank: int, expected: dict[str, torch.Tensor | None], actual: dict[str, torch.Tensor | None]
) -> list[Difference]:
    """Every tensor's largest difference; a missing tensor or another shape is infinitely far."""
    differences = []
    for name in sorted(expected.keys() | actual.keys()):
        one, other = expected.get(name), actual.get(name)
        if one is None or other is None or one.shape != other.shape or one.dtype != other.dtype:
            both_missing = one is None and other is None
            distance = 0.0 if both_missing else float("inf")
        else:
            distance = (one.double() - other.double()).abs().max().item() if one.numel() else 0.0
        is_on_gpu = one is not None and one.is_cuda and one.numel() > 0
        scale = one.abs().max().item() if is_on_gpu else 0.0
        differences.append(Difference(rank, name, distance, distance == 0.0, scale))
    return differences


def assert_close(
    by_rank: list[list[list[Difference]]], cases: list[Case], *, atol: float, bitwise: bool = False
) -> float:
    """All tensors of all cases on all ranks; returns the largest difference.

    `by_rank[rank][case]` is what compare_dispatchers() returned.
    """
    assert all(len(of_rank) == len(cases) for of_rank in by_rank)
    problems, largest = [], 0.0
    for of_rank in by_rank:
        for case, differences in zip(cases, of_rank):
            assert len(differences) >= MIN_TENSORS
            largest = max(largest, *(d.max_abs for d in differences))
            problems += [
                f"{case}: {d}"
                for d in differences
                if not d.max_abs <= max(atol, d.scale * _gpu_rounding(case))
                or (bitwise and not d.is_bitwise and not d.scale)
            ]
    assert not problems, "\n".join(problems)
    return largest


def _gpu_rounding(case: Case) -> float:
    routes_in_fp32 = case.options.get("moe_router_dtype") == "fp32"
    dtype = torch.float32 if routes_in_fp32 and case.dtype is torch.float64 else case.dtype
    return GPU_ROUNDING[dtype]

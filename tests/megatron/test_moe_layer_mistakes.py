"""The comparison with alltoall notices when something is wrong: mistakes are planted one by one."""

import math

import mistakes
import moe_layers as layers
import pytest
import torch
from moe_layers import Case, Grid

from ep_kernels.testing import RankError

OUTPUT = {"output"}
ROUTER = {"router.weight.grad"}
EXPERTS = {f"experts.local_experts.{i}.linear_fc{n}.weight.grad" for i in (0, 1) for n in (1, 2)}
INPUT = {"input.grad"}
ALL = OUTPUT | ROUTER | EXPERTS | INPUT

MISTAKES = {
    mistakes.WrongRank: ALL,
    mistakes.OneRowToWrongRank: OUTPUT | ROUTER | INPUT,
    mistakes.SwappedLocalExperts: ALL,
    mistakes.DroppedRow: OUTPUT | ROUTER | INPUT,
    mistakes.DroppedOutputRow: OUTPUT,
    mistakes.DroppedGradientRow: INPUT,
    mistakes.NoGradientToProbs: ROUTER | INPUT,
    mistakes.HalfGradientToProbs: ROUTER | INPUT,
    mistakes.SwappedGradientsToProbs: ROUTER | INPUT,
    mistakes.ScaledGradientToTokens: INPUT,
    mistakes.ScaledGradientToExperts: ROUTER | EXPERTS | INPUT,
}
"""Mistake -> the tensors that have to show it on some rank."""

GRIDS = [(2, Grid(ep=2)), (4, Grid(ep=4))]

CASES = [Case(num_experts=8, topk=2), Case(num_experts=8, topk=4)]


def compare(ranks, grid, buffer_class):
    return ranks.run(layers.compare_dispatchers, grid, CASES, {"buffer_class": buffer_class})


@pytest.mark.parametrize(("num_ranks", "grid"), GRIDS, ids=str)
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_comparison_fails_for(ranks, num_ranks, grid, mistake):
    by_rank = compare(ranks, grid, mistake)
    with pytest.raises(AssertionError):
        layers.assert_close(by_rank, CASES, atol=1e-12)
    for index in range(len(CASES)):
        differences = [d for of_rank in by_rank for d in of_rank[index]]
        assert all(math.isfinite(d.max_abs) for d in differences)
        noticed = {d.name for d in differences if d.max_abs > 1e-6}
        assert noticed >= MISTAKES[mistake] & {d.name for d in differences}


@pytest.mark.parametrize(("num_ranks", "grid"), GRIDS, ids=str)
def test_comparison_passes_without_a_mistake(ranks, num_ranks, grid):
    by_rank = compare(ranks, grid, mistakes.NoMistake)
    layers.assert_close(by_rank, CASES, atol=1e-12, bitwise=True)


def test_comparison_refuses_the_same_experts_on_every_rank(ranks):
    """Rows on the wrong rank would go unnoticed."""
    case = Case(options=dict(use_cpu_initialization=True))
    with pytest.raises(RankError, match="no two experts"):
        ranks.run(layers.compare_dispatchers, Grid(ep=2), [case])


def test_a_missing_tensor_or_another_shape_counts_as_wrong():
    expected = {"a": torch.ones(2), "b": torch.ones(2), "c": None}
    actual = {"a": None, "b": torch.ones(3), "c": None}
    differences = layers.compare(0, expected, actual)
    assert [d.max_abs for d in differences] == [math.inf, math.inf, 0.0]

"""Megatron's flex dispatcher with backend deepep computes, on ep_kernels.deep_ep, what alltoall
computes.

DeepEP carries probabilities in fp32, so the router and its gradient have that precision.
"""

import flex_cases
import moe_layers as layers
import pytest
import torch
from moe_layers import Case, Grid

GRIDS = [(2, Grid(ep=2)), (2, Grid(tp=2, ep=2)), (4, Grid(ep=4))]


@pytest.mark.parametrize(("num_ranks", "grid"), GRIDS, ids=[f"R{n}-{grid}" for n, grid in GRIDS])
def test_flex_layer_agrees_with_alltoall(launch, num_ranks, grid):
    cases = [
        Case(num_experts=experts, topk=topk, dtype=dtype)
        for dtype in (torch.float64, torch.float32)
        for experts in (4, 8)
        for topk in (1, 2, 4)
    ]
    result = launch(flex_cases.compare_with_alltoall, grid, cases, num_ranks=num_ranks)
    layers.assert_close(result.values, cases, atol=1e-4)


def test_flex_layer_agrees_when_tokens_are_dropped(launch):
    cases = [Case(topk=2, options=dict(moe_expert_capacity_factor=factor)) for factor in (0.5, 2.0)]
    result = launch(flex_cases.compare_with_alltoall, Grid(ep=2), cases, num_ranks=2)
    layers.assert_close(result.values, cases, atol=1e-4)


def test_training_losses_are_those_of_alltoall(launch):
    flex, alltoall = (
        launch(flex_cases.train_losses, name, 29, num_ranks=2).values
        for name in ("flex", "alltoall")
    )
    for one, other in zip(flex, alltoall):  # the first and the last step have the same input
        assert one == pytest.approx(other, rel=1e-6)
        assert one[-1] < one[0]

"""The token dispatcher by itself: routing maps that no router makes, memory, placement, buffers."""

import doctest

import dispatcher_cases as cases
import pytest
import torch
from moe_layers import Grid

from megatron_ep import Options, configure, routing
from megatron_ep.routing import place_slices, slice_experts, to_topk_idx

GRIDS = [
    (2, Grid(ep=2)),
    (2, Grid(tp=2, etp=2)),
    (4, Grid(ep=4)),
    (4, Grid(tp=2, ep=2, etp=2)),
]

over_grids = pytest.mark.parametrize(
    ("num_ranks", "grid"), GRIDS, ids=[f"R{n}-{grid}" for n, grid in GRIDS]
)

KINDS = ["none", "all", "sparse", "dense", "unequal"]


@over_grids
def test_any_routing_map_is_honoured(ranks, num_ranks, grid):
    ranks.run(cases.compare_on_maps, grid, KINDS, (12, 12, 12, 12))


@pytest.mark.parametrize("num_tokens", [(9, 0), (0, 9), (1, 30)], ids=str)
def test_ranks_may_have_few_or_no_tokens(ranks, num_tokens):
    ranks.run(cases.compare_on_maps, Grid(ep=2), KINDS, num_tokens)


@over_grids
def test_preprocessed_tensors_own_their_memory(ranks, num_ranks, grid):
    ranks.run(cases.check_outputs_own_their_memory, grid)


@over_grids
@pytest.mark.parametrize("alignment", [4, 16])
def test_groups_are_padded_for_quantisation(ranks, num_ranks, grid, alignment):
    ranks.run(cases.check_padding, grid, alignment)


def test_probs_keep_their_dtype(ranks):
    ranks.run(cases.check_dtypes_of_probs, Grid(ep=2))


@over_grids
def test_all_layers_of_a_group_share_one_buffer(ranks, num_ranks, grid):
    ranks.run(cases.check_one_buffer_for_all_layers, grid)


@pytest.mark.parametrize("num_ranks", [4])
def test_another_order_of_experts_or_ranks_is_refused(ranks, num_ranks):
    ranks.run(cases.check_refused_placement)


@pytest.mark.parametrize("num_ranks", [1])
def test_a_cuda_graph_may_contain_preprocessing_only(ranks, num_ranks):
    ranks.run(cases.check_cuda_graph_parts)


def test_examples_in_the_docstrings_are_right():
    assert doctest.testmod(routing, extraglobs={"torch": torch}).failed == 0


def test_topk_idx_lists_experts_in_ascending_order():
    routing_map = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0], [0, 0, 1, 0], [1, 1, 1, 0]]).bool()
    expected = [[1, 3, -1], [-1, -1, -1], [2, -1, -1], [0, 1, 2]]
    assert to_topk_idx(routing_map).tolist() == expected
    assert to_topk_idx(routing_map, num_topk=4).tolist() == [[*row, -1] for row in expected]
    assert to_topk_idx(routing_map[:0]).shape == (0, 1)
    assert to_topk_idx(routing_map[1:2]).tolist() == [[-1]]


@pytest.mark.parametrize("num_experts", [3, 4])
def test_more_experts_than_expected_are_an_error(num_experts):
    routing_map = torch.tensor(
        [[1, 1, 0, 0, 0], [1] * num_experts + [0] * (5 - num_experts)]
    ).bool()
    with pytest.raises(RuntimeError, match="out of bounds"):
        to_topk_idx(routing_map, num_topk=2)


def test_slices_of_an_expert_are_neighbours_in_number_and_rank():
    topk_idx, weights = slice_experts(
        torch.tensor([[0, 3, -1]]), torch.tensor([[0.5, 0.2, 0.0]]), 2
    )
    assert topk_idx.tolist() == [[0, 1, 6, 7, -1, -1]]
    assert torch.equal(weights, torch.tensor([[0.5, 0.5, 0.2, 0.2, 0.0, 0.0]]))
    placement = place_slices(num_experts=4, expert_tp=2, ep_size=2)
    assert placement.tolist() == [0, 1, 0, 1, 2, 3, 2, 3]


def test_configure_returns_the_options_before_and_names_unknown_ones():
    before = configure(num_sms=3, timeout_s=5.0)
    try:
        assert configure() == Options(num_sms=3, timeout_s=5.0)
        with pytest.raises(TypeError, match="'num_sm'.*num_sms"):
            configure(num_sm=3)
    finally:
        configure(**vars(before))
    assert configure() == before

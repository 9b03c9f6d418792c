"""The routing generators: shapes, distinct experts, seeds, and the distribution each promises."""

import pytest
import torch

from ep_kernels.testing import ROUTING_KINDS, assert_bitwise_equal, make_routing, routing

KINDS = pytest.mark.parametrize("kind", list(ROUTING_KINDS))
SIZES = pytest.mark.parametrize(
    ("num_tokens", "num_topk", "num_experts"),
    [(0, 2, 4), (1, 1, 1), (257, 1, 3), (33, 8, 64), (17, 6, 6)],
    ids=["no-tokens", "one-of-one", "top-1", "top-8", "all-experts"],
)


@KINDS
@SIZES
def test_rows_hold_distinct_experts_or_none(kind, num_tokens, num_topk, num_experts):
    topk_idx, topk_weights = make_routing(kind, num_tokens, num_topk, num_experts, seed=3)
    assert topk_idx.shape == topk_weights.shape == (num_tokens, num_topk)
    assert topk_idx.dtype == torch.int64
    assert topk_weights.dtype == torch.float32
    assert topk_idx.is_contiguous()
    assert topk_weights.is_contiguous()
    assert ((topk_idx >= -1) & (topk_idx < num_experts)).all()
    for row in topk_idx.tolist():
        chosen = [expert for expert in row if expert >= 0]
        assert len(chosen) == len(set(chosen))


@KINDS
@SIZES
def test_weights_are_positive_and_sum_to_one_over_the_chosen(
    kind, num_tokens, num_topk, num_experts
):
    topk_idx, topk_weights = make_routing(kind, num_tokens, num_topk, num_experts, seed=3)
    is_chosen = topk_idx >= 0
    assert (topk_weights[is_chosen] > 0).all()
    assert (topk_weights[~is_chosen] == 0).all()
    torch.testing.assert_close(topk_weights.sum(1), is_chosen.any(1).to(torch.float32))


@KINDS
def test_seed_decides(kind):
    first, again = (make_routing(kind, 50, 4, 16, seed=7) for _ in range(2))
    for got, want in zip(again, first):
        assert_bitwise_equal(got, want)
    if kind != "empty":
        assert not torch.equal(make_routing(kind, 50, 4, 16, seed=8)[0], first[0])


def test_uniform_uses_all_experts_equally():
    topk_idx, _ = routing.uniform(4000, 2, 8, seed=0)
    counts = topk_idx.flatten().bincount(minlength=8)
    assert ((counts - 1000).abs() < 120).all(), counts


def test_zipf_prefers_low_experts():
    topk_idx, _ = routing.zipf(4000, 1, 8, exponent=1.0, seed=0)
    counts = topk_idx.flatten().bincount(minlength=8).double()
    expected = 1 / torch.arange(1, 9, dtype=torch.float64)
    expected *= 4000 / expected.sum()
    torch.testing.assert_close(counts, expected, rtol=0.15, atol=15)


def test_group_limited_uses_at_most_topk_group_groups():
    topk_idx, _ = routing.group_limited(500, 8, 64, num_groups=8, topk_group=3, seed=1)
    groups = topk_idx // 8
    num_groups = [len(set(row)) for row in groups.tolist()]
    assert max(num_groups) == 3
    assert set(groups.flatten().tolist()) == set(range(8))


def test_group_limited_refuses_groups_with_too_few_experts():
    with pytest.raises(ValueError, match="num_topk=8 exceeds topk_group=1"):
        routing.group_limited(4, 8, 32, num_groups=8, topk_group=1, seed=0)
    with pytest.raises(ValueError, match="num_experts=10 is not divisible by num_groups=4"):
        routing.group_limited(4, 2, 10, num_groups=4, topk_group=1, seed=0)


def test_masked_drops_each_choice_with_its_probability():
    topk_idx, _ = routing.masked(2000, 4, 16, probability=0.3, seed=2)
    fraction = (topk_idx < 0).double().mean(dim=0)
    torch.testing.assert_close(fraction, torch.full((4,), 0.3).double(), rtol=0, atol=0.05)


@pytest.mark.parametrize(("probability", "expected"), [(0.0, False), (1.0, True)])
def test_masked_goes_from_none_to_all(probability, expected):
    topk_idx, _ = routing.masked(20, 4, 16, probability=probability, seed=2)
    assert ((topk_idx < 0) == expected).all()


def test_one_expert_chooses_it_once_in_every_row():
    topk_idx, _ = routing.one_expert(100, 4, 16, expert=5, seed=0)
    assert ((topk_idx == 5).sum(1) == 1).all()
    assert ((topk_idx == -1).sum(1) == 3).all()


def test_top_k_beyond_the_experts_is_refused():
    with pytest.raises(ValueError, match="num_topk=5 exceeds num_experts=4"):
        routing.uniform(1, 5, 4, seed=0)

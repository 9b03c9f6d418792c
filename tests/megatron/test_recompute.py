"""A layer that is recomputed in the backward does not communicate again, unless asked to.

Whoever recomputes, output and all gradients have the bits of the layer that is not recomputed
(on a GPU up to the rounding of Megatron's own sums, whose order changes).
"""

import pytest
import recompute_cases as cases
import torch
from differences import GPU_ROUNDING
from moe_layers import Case, assert_close
from recompute_cases import SHARED

pytestmark = pytest.mark.over_devices


def check(ranks, *, options, num_calls, num_chunks, again=False):
    """`num_calls` of dispatch and of combine; 3 micro-batches go through 2 layers."""
    by_rank = ranks.run(cases.compare_ways, options, num_chunks, again, deadline_s=120)
    check_results(by_rank, num_calls)


def check_results(by_rank, num_calls):
    for results, counts, without in by_rank:
        assert without["dispatch"] == without["combine"] == num_calls["plain"]
        for name, counted in counts.items():
            calls = num_calls.get(name, num_calls["recomputed"])
            assert counted["dispatch"] == counted["combine"] == calls, name
        for name, differences in zip(counts, results, strict=True):
            assert len(differences) >= 5
            wrong = [
                d for d in differences if not d.max_abs <= d.scale * GPU_ROUNDING[torch.float64]
            ]
            assert not wrong, f"{name}: {wrong}"


@pytest.mark.parametrize("options", [{}, SHARED], ids=["plain", "shared_overlap"])
@pytest.mark.parametrize("num_chunks", [1, 3])
def test_what_travelled_in_the_forward_does_not_travel_again(ranks, num_chunks, options):
    calls = 3 * 2 * 2 * num_chunks
    num_calls = {"plain": calls, "recomputed": calls}
    check(ranks, options=options, num_calls=num_calls, num_chunks=num_chunks)


@pytest.mark.parametrize("num_chunks", [1, 3])
def test_it_travels_again_if_asked_to(ranks, num_chunks):
    calls = 3 * 2 * num_chunks
    num_calls = {"plain": 2 * calls, "recomputed": 3 * calls, "nested": 4 * calls}
    check(ranks, options={}, num_calls=num_calls, num_chunks=num_chunks, again=True)


def test_a_checkpoint_of_torch_that_is_not_reentrant_keeps_too(ranks):
    by_rank = ranks.run(cases.compare_non_reentrant, deadline_s=120)
    check_results(by_rank, {"plain": 12, "recomputed": 12})


@pytest.mark.parametrize("num_ranks", [2])
def test_experts_may_be_sliced(ranks, num_ranks):
    assert_close(ranks.run(cases.compare_sliced), [Case(options=cases.MOE)], atol=0)


@pytest.mark.parametrize("name", ["moe", "nested"])
@pytest.mark.parametrize("num_chunks", [1, 3])
def test_memory_of_the_pool_comes_back(ranks, num_chunks, name):
    for before, forward, backward, dropped in ranks.run(
        cases.bytes_in_pool, num_chunks, name, False
    ):
        assert before == backward == dropped
        assert forward > before


def test_without_keeping_the_pool_holds_nothing_between(ranks):
    for seen in ranks.run(cases.bytes_in_pool, 3, "moe", True):
        assert len(set(seen)) == 1


def test_nothing_is_kept_without_gradients(ranks):
    for counts, before, after in ranks.run(cases.counts_without_grad):
        assert counts == {"dispatch": 1, "combine": 1}
        assert before == after


def test_a_second_backward_communicates(ranks):
    for (first, second), ((difference,),) in ranks.run(cases.run_backward_twice):
        assert first == {"dispatch": 1, "combine": 1}
        assert second == {"dispatch": 2, "combine": 2}
        assert difference.max_abs <= difference.scale * GPU_ROUNDING[torch.float64]


def test_the_checkpoint_of_transformer_engine_is_reached(ranks):
    ranks.run(cases.run_te_checkpoint)

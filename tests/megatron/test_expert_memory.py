"""Experts that write their results into the pool: combine of the forward copies nothing."""

import expert_memory_cases as cases
import pytest
import torch
from differences import GPU_ROUNDING

pytestmark = pytest.mark.over_devices


def check_same(differences, dtype=torch.float64):
    assert len(differences) >= 5
    bound = GPU_ROUNDING[dtype]
    assert not [d for d in differences if not d.max_abs <= d.scale * bound]


@pytest.mark.parametrize("num_chunks", [1, 2])
def test_results_of_an_only_local_expert_lie_in_the_pool(ranks, num_chunks):
    for differences, seen in ranks.run(cases.compare_results_in_pool, 2, num_chunks):
        check_same(differences)
        forward, backward = seen[:num_chunks], seen[num_chunks:]
        assert forward == [True] * num_chunks
        assert backward == [False] * num_chunks, "gradients are ordinary memory"


def test_results_of_torchs_experts_lie_in_the_pool(ranks, device):
    dtype = torch.bfloat16 if device == "cuda" else torch.float64
    for differences, seen in ranks.run(cases.compare_results_in_pool, 4, 2, "torch"):
        check_same(differences, dtype)
        assert seen == [True, True, False, False]


def test_results_that_are_joined_are_copied_as_ever(ranks):
    for differences, seen in ranks.run(cases.compare_results_in_pool, 4, 1):
        check_same(differences)
        assert seen == [False, False]

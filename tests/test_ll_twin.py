"""Low-latency calls of GPUs over several nodes, without a GPU (twin.py): what is on the device and
what on the host, both ways for rows to travel, refusals, lost ranks. `--backend twin` and
`--backend cuda_nodes` run the other low-latency suites on these backends.
"""

from dataclasses import replace
from unittest import mock

import ll_cases
import pytest
import test_ll_faults
import test_ll_nodes
import torch
import twin
from ll_cases import Case, World
from test_faults import error_of
from test_twin import TRANSPORTS, over

from ep_kernels.errors import EPConfigError, EPTimeoutError

CASE = Case(num_ranks=4, num_tokens=(40, 0, 50, 7), num_topk=3, num_experts=12)
CASES = [
    CASE,
    replace(CASE, format="fp8 ue8m0", hidden=512, wire="fp8"),
    replace(CASE, format="fp8", num_experts=6, placement=(0, 2, 1, 3, 0, 2)),
]


def on_rank_with(rank, transport, function, *args):
    with over(transport):
        ll_cases.run_on(rank, "twin", function, *args)


@TRANSPORTS
@pytest.mark.parametrize("num_ranks", [4])
def test_rows_arrive_wherever_they_are(ranks, transport, num_ranks):
    ranks.run(on_rank_with, transport, ll_cases.run_cases, CASES)


@TRANSPORTS
@pytest.mark.parametrize(
    "function", [test_ll_nodes.on_rank_forgotten_hooks, test_ll_nodes.on_rank_both_modes]
)
def test_calls_that_are_under_way_together(rank_pool, transport, function):
    num_ranks = 3 if function is test_ll_nodes.on_rank_forgotten_hooks else 4
    rank_pool.get(num_ranks).run(on_rank_with, transport, function)


@TRANSPORTS
def test_a_dead_rank_is_named_at_once(launch, transport):
    function = test_ll_faults.on_rank_killed
    launch(on_rank_with, transport, function, False, num_ranks=3, lost=[test_ll_faults.VICTIM])


@TRANSPORTS
def test_a_stopped_rank_is_named_after_the_timeout(launch, transport):
    function = test_ll_faults.on_rank_stopped
    launch(on_rank_with, transport, function, num_ranks=3, lost=[test_ll_faults.VICTIM])


def on_rank_captures(rank):
    """A call that is captured is refused on all ranks, and the buffer works on."""
    case = replace(CASE, num_ranks=3)
    world = World(case, rank)
    with ll_cases.make_ll_buffer(case) as buffer:
        captures = mock.patch.object(twin.HostDevice, "is_capturing", return_value=True)
        with captures if rank == 1 else mock.MagicMock():
            error = error_of(ll_cases.dispatch, buffer, world)
        assert isinstance(error, EPConfigError)
        assert "cannot be captured" in str(error)
        ll_cases.check_round(buffer, world)


def test_a_call_in_a_graph_is_refused(rank_pool):
    rank_pool.get(3).run(on_rank_with, "host", on_rank_captures)


def on_rank_fails(rank):
    """A rank whose device fails in the middle of a call is named by the others at once."""
    case = replace(CASE, num_ranks=3)
    world = World(case, rank)
    buffer = ll_cases.make_ll_buffer(case, timeout_s=30.0)
    ll_cases.check_round(buffer, world)

    def fail(memory, tensor):
        raise RuntimeError("out of memory")

    with mock.patch.object(twin.TwinLlMemory, "from_host", fail) if rank == 2 else mock.MagicMock():
        error = error_of(ll_cases.dispatch, buffer, world)
    if rank == 2:
        assert "out of memory" in str(error)
    else:
        assert isinstance(error, EPTimeoutError), repr(error)
        assert error.peer == 2
    assert "rank 2" in str(error_of(buffer.dispatch, world.xs[rank], world.topk_idxs[rank]))


def test_a_rank_that_fails_by_itself_is_named(launch):
    launch(on_rank_with, "host", on_rank_fails, num_ranks=3)


def test_device_and_host_are_apart_in_these_tests():
    with pytest.raises(AssertionError, match="a tensor of the host"):
        torch.zeros(2).as_subclass(twin.OnDevice).add(torch.zeros(2))

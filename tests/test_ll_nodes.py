"""Low-latency calls over several nodes, beyond what they share with one (the suites of
low-latency mode run on logical nodes, too: `nodes`). With EP_KERNELS_SCALEOUT=nvshmem, on GPUs.

Functions named `on_rank_...` run on every rank; each belongs to the test below it.
"""

import gc
import math
import os
from dataclasses import replace

import ll_cases
import pytest
import test_ll_faults
import torch
from ll_cases import Case, World
from test_faults import error_of

from ep_kernels.errors import EPConfigError, EPTimeoutError

CASE = Case(num_tokens=(40, 23, 50, 7, 0, 31), num_topk=3, num_experts=12)


BACKEND = "cuda_nodes" if os.environ.get("EP_KERNELS_SCALEOUT") == "nvshmem" else "nodes"


def run_on_nodes(function, *args):
    """Arguments of launch() or Ranks.run() for a function of a rank over nodes."""
    return ll_cases.run_on, BACKEND, function, *args


def on_rank_shapes(rank, num_ranks, num_local_ranks):
    case = replace(CASE, num_ranks=num_ranks)
    world = World(case, rank)
    with ll_cases.make_ll_buffer(case, num_local_ranks=num_local_ranks) as buffer:
        for zero_copy in (False, True):
            ll_cases.check_round(buffer, world, zero_copy=zero_copy)


@pytest.mark.parametrize(
    ("num_ranks", "num_local_ranks"), [(3, 1), (4, 2), (6, 2), (6, 3)], ids=str
)
def test_nodes_of_any_number_and_size(rank_pool, num_ranks, num_local_ranks):
    function = run_on_nodes(on_rank_shapes, num_ranks, num_local_ranks)
    rank_pool.get(num_ranks).run(*function)


def on_rank_forgotten_hooks(rank):
    """Hooks that nobody runs, results that nobody keeps, and calls that go on."""
    case = replace(CASE, num_ranks=3)
    world = World(case, rank)
    with ll_cases.make_ll_buffer(case) as buffer:
        for _ in range(3):
            ll_cases.dispatch(buffer, world, return_recv_hook=True)
            gc.collect()
        kept = ll_cases.dispatch(buffer, world, return_recv_hook=True)
        kept.hook()
        ll_cases.check_dispatch(kept, world)
        out = torch.empty(len(world.xs[rank]), case.hidden, dtype=torch.bfloat16)
        late = ll_cases.combine(buffer, world, kept.handle, return_recv_hook=True, out=out)
        for _ in range(3):
            ll_cases.check_round(buffer, world)
        late.hook()
        ll_cases.check_combine(late, world)


def test_hooks_that_nobody_runs_hold_nobody_up(rank_pool):
    rank_pool.get(3).run(*run_on_nodes(on_rank_forgotten_hooks))


def on_rank_both_modes(rank):
    """Low-latency calls between asynchronous high-throughput ones of the same buffer."""
    case = replace(CASE, num_ranks=4)
    world = World(case, rank)
    x, idx = world.xs[rank], world.topk_idxs[rank]
    with ll_cases.make_ll_buffer(case) as buffer:
        for _ in range(3):
            rows = buffer.dispatch(x, idx, async_op=True)
            result = ll_cases.dispatch(buffer, world, async_op=True)
            rows.event.wait()
            sums = buffer.combine(rows.recv_x, rows.handle, async_op=True)
            result.event.wait()
            ll_cases.check_dispatch(result, world)
            ll_cases.check_combine(ll_cases.combine(buffer, world, result.handle), world)
            sums.event.wait()
        buffer.barrier()


def test_both_modes_of_a_buffer_work_at_the_same_time(rank_pool):
    rank_pool.get(4).run(*run_on_nodes(on_rank_both_modes))


@pytest.mark.skipif(BACKEND != "nodes", reason="on GPUs a dead rank is found by its silence")
@pytest.mark.parametrize("inside", [False, True], ids=["before", "inside"])
def test_a_dead_rank_is_named_at_once(launch, inside):
    function = run_on_nodes(test_ll_faults.on_rank_killed, inside)
    launch(*function, num_ranks=3, lost=[test_ll_faults.VICTIM])


def test_a_stopped_rank_is_named_after_the_timeout(launch):
    function = run_on_nodes(test_ll_faults.on_rank_stopped)
    launch(*function, num_ranks=3, lost=[test_ll_faults.VICTIM])


def on_rank_leaver(rank):
    """A rank that destroys its buffer is named, with its node; so is it in the other mode."""
    case = replace(CASE, num_ranks=4)
    world = World(case, rank)
    buffer = ll_cases.make_ll_buffer(case, timeout_s=20.0)
    ll_cases.check_round(buffer, world)
    if rank == 2:
        buffer.destroy()
        return
    error = error_of(ll_cases.dispatch, buffer, world)
    assert isinstance(error, EPTimeoutError), repr(error)
    assert error.peer == 2, str(error)
    assert "rank 2 of node 1" in str(error)
    assert "rank 2" in str(error_of(buffer.dispatch, world.xs[rank], world.topk_idxs[rank]))
    buffer.destroy()


def test_a_rank_that_leaves_is_named_with_its_node(launch):
    launch(*run_on_nodes(on_rank_leaver), num_ranks=4)


def on_rank_size_hint(rank):
    """The region takes what the hint says, and a byte less does not do."""
    case = replace(CASE, num_ranks=3)
    world = World(case, rank)
    with (
        ll_cases.make_ll_buffer(case, low_latency_bytes=case.hint - 1) as buffer,
        pytest.raises(EPConfigError, match=f"need {case.hint}"),
    ):
        ll_cases.dispatch(buffer, world)
    with ll_cases.make_ll_buffer(case) as buffer:
        result = ll_cases.dispatch(buffer, world)
        assert math.prod(result.recv_x.shape[1:]) == 3 * case.most * case.hidden
        other = ll_cases.dispatch(buffer, world)
        assert result.recv_x.data_ptr() != other.recv_x.data_ptr()


def test_the_size_hint_fits_exactly(rank_pool):
    rank_pool.get(3).run(*run_on_nodes(on_rank_size_hint))

"""GPUs over several nodes, without a GPU (twin.py): the order of work on streams, both transports,
lost ranks, refusals. `--backend twin` and `--backend cuda_nodes` run the other suites on these
backends.
"""

import os
import signal
import time
from dataclasses import replace
from unittest import mock

import cases
import pytest
import torch
import torch.distributed as dist
import twin
from cases import Case, World
from test_stats import make_case, on_rank_slowest, on_rank_tokens

from ep_kernels import env
from ep_kernels.config import Layout
from ep_kernels.errors import EPConfigError, EPDeviceError, EPTimeoutError
from ep_kernels.testing import assert_bitwise_equal

CASE = Case(num_ranks=4, num_experts=8, num_topk=3, num_tokens=(90, 0, 150, 33), hidden=512)
CASES = [
    CASE,
    replace(CASE, layout=Layout.EXPERT_MAJOR, expert_alignment=4, num_biases=2),
    replace(CASE, dtype="fp8_int32_scales", hidden=384, weights=torch.float64),
    replace(CASE, dtype="fp64", hidden=66, weights=None, num_biases=0),
    replace(CASE, capacity=(20, 0, 500, 61), layout=Layout.EXPERT_MAJOR, dtype="fp8"),
]
TRANSPORTS = pytest.mark.parametrize("transport", ["host", "nccl"])


def over(transport):
    return mock.patch.dict(os.environ, EP_KERNELS_SCALEOUT=transport)


def on_rank_cases(rank, transport, copies_early):
    with over(transport), mock.patch.object(twin.HostDevice, "copies_early", copies_early):
        cases.run_cases(rank, "twin", CASES)


@pytest.mark.parametrize(
    ("transport", "copies_early"), [("host", False), ("host", True), ("nccl", False)]
)
@pytest.mark.parametrize("num_ranks", [4])
def test_rows_arrive_in_spite_of_lazy_streams(ranks, transport, copies_early, num_ranks):
    ranks.run(on_rank_cases, transport, copies_early)


def on_rank_async_calls(rank, transport):
    world = World(CASE, rank)
    weights = world.topk_weights[rank]
    with over(transport), cases.make_buffer("twin", case=CASE) as buffer:
        first = buffer.dispatch(world.xs()[rank], world.topk_idxs[rank], weights, async_op=True)
        second = buffer.dispatch(
            world.xs(1)[rank], topk_weights=weights, handle=first.handle, async_op=True
        )
        back = buffer.combine(
            world.ys()[rank], first.handle, async_op=True, previous_event=second.event
        )
        back.event.wait()
        cases.check_dispatch_result(first, world, world.xs())
        cases.check_dispatch_result(second, world, world.xs(1), is_cached=True)
        assert_bitwise_equal(back.x, world.combine_result(world.ys(), buffer=buffer).x)


@TRANSPORTS
@pytest.mark.parametrize("num_ranks", [4])
def test_asynchronous_calls_run_in_their_order(ranks, transport, num_ranks):
    ranks.run(on_rank_async_calls, transport)


def on_rank_counts(rank, transport, body, *arguments):
    with over(transport):
        body(rank, "twin", *arguments)


@TRANSPORTS
@pytest.mark.parametrize("num_ranks", [4])
def test_statistics_are_added_behind_the_work_on_rows(ranks, transport, num_ranks):
    ranks.run(on_rank_counts, transport, on_rank_tokens, make_case(), torch.int32)


@TRANSPORTS
@pytest.mark.parametrize("num_ranks", [4])
def test_a_slow_rank_shows_in_the_statistics(ranks, transport, num_ranks):
    ranks.run(on_rank_counts, transport, on_rank_slowest)


def on_rank_killed(rank, transport, victim):
    world = World(CASE, rank)
    with over(transport):
        buffer = cases.make_buffer("twin", case=CASE, timeout_s=30.0)
    result = cases.check_round_trip(buffer, world)
    dist.barrier()
    if rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(EPTimeoutError) as raised:
        buffer.combine(world.ys()[rank], result.handle)
    assert raised.value.peer == victim
    assert time.monotonic() - start < 5.0
    with pytest.raises(EPDeviceError, match=f"rank {victim}"):
        buffer.barrier()


@TRANSPORTS
def test_a_dead_rank_is_named_on_all_nodes(launch, transport):
    launch(on_rank_killed, transport, 2, num_ranks=4, lost=[2])


def on_rank_dies_among_chunks(rank, step):
    """One rank ends itself when it is about to pack or sum a chunk, with others under way."""
    case = replace(CASE, hidden=4096)
    world = World(case, rank)
    with over("nccl"):
        buffer = cases.make_buffer("twin", case=case, timeout_s=30.0)
    result = cases.check_round_trip(buffer, world)
    numbers = iter(range(100))
    step_of = twin.HostDevice.step

    def deadly_step(device, name, *arguments):
        if rank == 2 and name == step and next(numbers) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        step_of(device, name, *arguments)

    twin.HostDevice.step = deadly_step
    dist.barrier()

    def call():
        if step == "pack":
            return cases.dispatch(buffer, world, world.xs())
        return buffer.combine(world.ys()[rank], result.handle)

    with pytest.raises(EPTimeoutError) as raised:
        call()
    assert raised.value.peer == 2


@pytest.mark.parametrize("step", ["pack", "reduce_rows"])
def test_a_rank_that_dies_among_chunks_is_named(launch, step):
    launch(on_rank_dies_among_chunks, step, num_ranks=4, lost=[2])


def on_rank_captures(rank):
    world = World(CASE, rank)
    with cases.make_buffer("twin", case=CASE) as buffer:
        with (
            mock.patch.object(twin.HostDevice, "is_capturing", return_value=True),
            pytest.raises(EPConfigError, match="cannot be captured in a CUDA graph"),
        ):
            cases.dispatch(buffer, world, world.xs())
        cases.check_round_trip(buffer, world)


@pytest.mark.parametrize("num_ranks", [4])
def test_a_call_in_a_graph_is_refused_and_the_buffer_works_on(ranks, num_ranks):
    ranks.run(on_rank_captures)


def on_rank_disagrees(rank):
    for of_rank, message in (
        ({1: "nccl"}, "disagree on EP_KERNELS_SCALEOUT: rank 0 has host, rank 1 has nccl"),
        ({3: "ib"}, "rank 3: .*'ib' is not host, nccl, nvshmem or auto"),
    ):
        with over(of_rank.get(rank, "auto")), pytest.raises(EPConfigError, match=message):
            cases.make_buffer("twin", case=CASE)


@pytest.mark.parametrize("num_ranks", [4])
def test_ranks_agree_on_the_transport(ranks, num_ranks):
    ranks.run(on_rank_disagrees)


def test_rows_go_through_host_memory_unless_told_otherwise():
    with mock.patch.dict(os.environ):
        os.environ.pop("EP_KERNELS_SCALEOUT", None)
        assert env.scaleout_transport() == "host"
    with over("nccl"):
        assert env.scaleout_transport() == "nccl"

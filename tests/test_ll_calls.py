"""Halves, hooks, two results at a time, statistics and sizes of low-latency calls."""

import gc
import time
from dataclasses import replace

import cases
import ll_cases
import pytest
import torch
import torch.distributed as dist
from ll_cases import Case, World

from ep_kernels import Buffer, Layout
from ep_kernels.errors import EPConfigError
from ep_kernels.testing import assert_bitwise_equal

pytestmark = pytest.mark.usefixtures("ll_backend")

CASE = Case(num_tokens=(40, 23, 50, 7), num_topk=3)
OTHER = replace(CASE, seed=5, routing="zipf", num_tokens=(3, 60, 0, 64))


def on_rank_hooks(rank, order):
    """Both halves of two dispatches and two combines, with other work between."""
    worlds = [World(CASE, rank), World(OTHER, rank)]
    with ll_cases.make_ll_buffer(CASE) as buffer:
        for _ in range(20):
            results = [ll_cases.dispatch(buffer, w, return_recv_hook=True) for w in worlds]
            assert torch.ones(8, 8).matmul(torch.ones(8, 8)).sum() == 512
            for i in order:
                results[i].hook()
            for result, world in zip(results, worlds):
                ll_cases.check_dispatch(result, world)
            sums = [
                ll_cases.combine(buffer, w, r.handle, return_recv_hook=True, zero_copy=i == 0)
                for i, (r, w) in enumerate(zip(results, worlds))
            ]
            for i in order:
                sums[i].hook()
                sums[i].hook()  # once more does nothing
            for result, world in zip(sums, worlds):
                ll_cases.check_combine(result, world)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["in order", "reversed"])
def test_hooks_run_the_receive_halves(ranks, order):
    ranks.run(on_rank_hooks, order)


def on_rank_the_send_half_waits_for_no_rows(rank):
    """Rank 0 goes through its send half while rank 1 has not run its own hook."""
    world = World(CASE, rank)
    with ll_cases.make_ll_buffer(CASE) as buffer:
        result = ll_cases.dispatch(buffer, world, return_recv_hook=True)
        assert result.event.query()
        dist.barrier()  # every send half is over, no receive half has begun
        result.hook()
        ll_cases.check_dispatch(result, world)
        combined = ll_cases.combine(buffer, world, result.handle, return_recv_hook=True)
        dist.barrier()
        combined.hook()
        ll_cases.check_combine(combined, world)


def test_the_send_half_ends_before_the_receive_half_begins(ranks):
    ranks.run(on_rank_the_send_half_waits_for_no_rows)


def on_rank_overlapped(rank):
    """Two micro-batches in turn: one is received while the other is sent."""
    worlds = [World(CASE, rank), World(OTHER, rank)]
    with ll_cases.make_ll_buffer(CASE) as buffer:
        received = None
        for step in range(30):
            world = worlds[step % 2]
            result = ll_cases.dispatch(buffer, world, return_recv_hook=True)
            if received is not None:
                old, old_world = received
                combined = ll_cases.combine(buffer, old_world, old.handle, return_recv_hook=True)
                result.hook()
                combined.hook()
                ll_cases.check_combine(combined, old_world)
            else:
                result.hook()
            ll_cases.check_dispatch(result, world)
            received = result, world


def test_two_micro_batches_overlap(ranks):
    ranks.run(on_rank_overlapped)


def on_rank_async(rank):
    worlds = [World(CASE, rank), World(OTHER, rank)]
    with ll_cases.make_ll_buffer(CASE) as buffer:
        for _ in range(10):
            results = [ll_cases.dispatch(buffer, w, async_op=True) for w in worlds]
            for result, world in zip(results, worlds):
                result.event.wait()
                ll_cases.check_dispatch(result, world)
            sums = [
                ll_cases.combine(buffer, w, r.handle, async_op=True)
                for w, r in zip(worlds, results)
            ]
            for result, world in zip(sums, worlds):
                result.event.wait()
                ll_cases.check_combine(result, world)


def test_events_complete_with_the_results(ranks):
    ranks.run(on_rank_async)


def on_rank_third(rank):
    worlds = [World(CASE, rank), World(OTHER, rank)]
    with ll_cases.make_ll_buffer(CASE) as buffer:
        first, second = (ll_cases.dispatch(buffer, world) for world in worlds)
        for _ in range(3):
            with pytest.raises(EPConfigError, match="two low-latency results are alive"):
                ll_cases.dispatch(buffer, worlds[0])
        ll_cases.check_dispatch(first, worlds[0])
        ll_cases.check_dispatch(second, worlds[1])
        ll_cases.check_combine(ll_cases.combine(buffer, worlds[0], first.handle), worlds[0])
        for _ in range(5):  # a free half can be used again and again
            third = ll_cases.dispatch(buffer, worlds[0])
            ll_cases.check_dispatch(third, worlds[0])
            ll_cases.check_dispatch(second, worlds[1])
            ll_cases.check_combine(ll_cases.combine(buffer, worlds[0], third.handle), worlds[0])
        ll_cases.check_combine(ll_cases.combine(buffer, worlds[1], second.handle), worlds[1])
        ll_cases.check_round(buffer, worlds[0])


def test_a_third_result_is_refused(ranks):
    ranks.run(on_rank_third)


def on_rank_dropped(rank):
    """Without a combine a result ends with its handle, also if its hook was never run."""
    world = World(CASE, rank)
    with ll_cases.make_ll_buffer(CASE) as buffer:
        for i in range(20):
            result = ll_cases.dispatch(buffer, world, return_recv_hook=i % 3 == 0)
            if i % 3:
                ll_cases.check_dispatch(result, world)
            del result
            gc.collect()
        ll_cases.check_round(buffer, world)


def test_a_result_ends_with_its_handle(ranks):
    ranks.run(on_rank_dropped)


def on_rank_stats(rank, dtype):
    world = World(CASE, rank)
    num_ranks = dist.get_world_size()
    cumulative = torch.full((CASE.num_experts // num_ranks,), 100, dtype=dtype)
    waited, waited_back = (torch.zeros(num_ranks, dtype=torch.int64) for _ in range(2))
    slowest, delay_s = num_ranks - 1, 0.1
    with ll_cases.make_ll_buffer(CASE) as buffer:
        for _ in range(3):
            result = ll_cases.dispatch(
                buffer,
                world,
                return_recv_hook=True,
                cumulative_recv_stats=cumulative,
                wait_recv_cost_stats=waited,
            )
            result.hook()
            if rank == slowest:
                time.sleep(delay_s)
            ll_cases.combine(buffer, world, result.handle, wait_recv_cost_stats=waited_back)
    want = 100 + 3 * world.rows[rank].recv_count
    assert_bitwise_equal(cumulative, want.to(dtype), name="cumulative")
    assert (waited >= 0).all()
    assert waited[rank] < 10_000
    if rank != slowest:
        assert 3 * delay_s * 0.8e6 < waited_back[slowest] < 3e6, waited_back


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_statistics_are_added_up(ranks, dtype):
    ranks.run(on_rank_stats, dtype)


def on_rank_sizes_change(rank):
    """The region is as large as the largest call; M, H and format change from call to call."""
    largest = Case(num_tokens=(64, 64), most=64, hidden=1024)
    changes = [
        dict(most=64, hidden=1024),
        dict(most=100, hidden=512, format="fp8"),
        dict(most=64, hidden=8),
        dict(most=64, hidden=1024, format="fp8 ue8m0", wire="fp8"),
    ]
    worlds = [World(replace(largest, num_tokens=(50, 20), **c), rank) for c in changes]
    with ll_cases.make_ll_buffer(largest) as buffer:
        for _ in range(3):
            for first, second in zip(worlds, worlds[1:]):
                results = [ll_cases.dispatch(buffer, world) for world in (first, second)]
                for world, result in zip((first, second), results):
                    ll_cases.check_dispatch(result, world)
                    out = ll_cases.combine(buffer, world, result.handle)
                    ll_cases.check_combine(out, world)


def test_sizes_may_change_from_call_to_call(ranks):
    ranks.run(on_rank_sizes_change)


def on_rank_exact_size(rank, case):
    world = World(case, rank)
    with ll_cases.make_ll_buffer(case) as buffer:
        ll_cases.check_round(buffer, world)
    with ll_cases.make_ll_buffer(case, low_latency_bytes=case.hint - 1) as buffer:
        with pytest.raises(EPConfigError) as error:
            ll_cases.dispatch(buffer, world)
        assert f"low_latency_bytes={case.hint - 1}" in str(error.value)
        assert str(case.hint) in str(error.value)


@pytest.mark.parametrize(
    "case",
    [
        CASE,
        replace(CASE, hidden=7168, num_experts=2, num_topk=1),
        replace(CASE, most=77, num_experts=256),
        replace(CASE, num_experts=3, placement=(1, 1, 0)),
    ],
    ids=str,
)
def test_the_size_hint_is_what_calls_need_and_no_byte_more(ranks, case):
    ranks.run(on_rank_exact_size, case)


def test_the_size_hint_counts_every_part():
    """Two halves of bf16 rows received and rows for combine; the rest are control words."""
    sizes = dict(num_max_tokens_per_rank=128, num_ranks=8, num_experts=256)
    small = Buffer.low_latency_size_hint(hidden=4096, **sizes)
    large = Buffer.low_latency_size_hint(hidden=8192, **sizes)
    rows = 32 * 8 * 128
    assert large - small == 2 * 2 * rows * 4096 * 2
    assert 0 < small - 2 * 2 * rows * 4096 * 2 < 256 << 10


def on_rank_mixed(rank):
    """High-throughput calls and barriers between; asynchronous ones under way."""
    ht = cases.World(cases.Case(num_experts=8, layout=Layout.EXPERT_MAJOR), rank)
    world = World(CASE, rank)
    xs = ht.xs()
    with ll_cases.make_ll_buffer(CASE) as buffer:
        handle = cases.check_round_trip(buffer, ht).handle
        for _ in range(10):
            pending = buffer.dispatch(
                xs[rank], topk_weights=ht.topk_weights[rank], handle=handle, async_op=True
            )
            result = ll_cases.dispatch(buffer, world, return_recv_hook=True)
            buffer.barrier()
            cases.check_combine(buffer, ht, handle)
            result.hook()
            ll_cases.check_dispatch(result, world)
            ll_cases.check_combine(ll_cases.combine(buffer, world, result.handle), world)
            pending.event.wait()
            cases.check_dispatch_result(pending, ht, xs, is_cached=True)


def test_both_modes_work_in_one_buffer(ranks):
    ranks.run(on_rank_mixed)


def on_rank_out(rank):
    world = World(CASE, rank)
    out = torch.empty(CASE.num_tokens[rank], CASE.hidden, dtype=torch.bfloat16)
    with ll_cases.make_ll_buffer(CASE) as buffer:
        result = ll_cases.dispatch(buffer, world)
        combined = ll_cases.combine(buffer, world, result.handle, out=out)
        assert combined.x is out
        ll_cases.check_combine(combined, world)


def test_the_sums_go_where_they_are_wanted(ranks):
    ranks.run(on_rank_out)


def on_rank_results_outlive(rank):
    world = World(CASE, rank)
    buffer = ll_cases.make_ll_buffer(CASE)
    result = ll_cases.dispatch(buffer, world)
    dist.barrier()
    buffer.destroy()
    del buffer
    gc.collect()
    ll_cases.check_dispatch(result, world)


def test_results_stay_valid_after_destroy(ranks):
    ranks.run(on_rank_results_outlive)

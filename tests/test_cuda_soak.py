"""Thousands of random calls on a GPU: every result is right, and no device memory is lost.

Functions named `on_rank_...` run on every rank, on one GPU; each belongs to the test below it.
"""

import gc
import random
from dataclasses import replace

import cases
import pytest
import torch
import torch.distributed as dist
from cases import World
from host_view import on_host
from test_conformance import capacities, random_case

from ep_kernels.testing import assert_bitwise_equal

pytestmark = pytest.mark.gpu(1)

CALLS_PER_BUFFER = 40
MIB = 2**20
MAX_GROWTH_BYTES = 8 * MIB
"""Less than one buffer, more than what the driver rounds to."""


def free_bytes():
    """Of the GPU, when no rank is using it."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    dist.barrier()
    free, _ = torch.cuda.mem_get_info()
    dist.barrier()
    return free


def batches(rng, num_ranks, count):
    """Random cases that one buffer can serve."""
    first = random_case(rng, num_ranks)
    for _ in range(count):
        case = random_case(rng, num_ranks)
        case = replace(
            case,
            num_experts=first.num_experts,
            placement=first.placement,
            num_topk=min(case.num_topk, first.num_experts),
            capacity=None,
        )
        if rng.random() < 0.5:
            case = replace(case, capacity=capacities(case, rng.choice(["small", "uneven", "zero"])))
        yield case


def check_calls(buffer, case, rank, is_async):
    """As cases.check_round_trip(); or started before anything is looked at."""
    world = World(case, rank)
    if not is_async:
        cases.check_round_trip(buffer, world)
        return
    on_device = cases.device_results(buffer)
    xs, ys = world.xs(), world.ys()
    weights = None if world.topk_weights is None else world.topk_weights[rank]
    first = on_device.dispatch(
        xs[rank],
        world.topk_idxs[rank],
        weights,
        capacity=case.capacity_of(rank),
        num_sms=case.num_sms,
        async_op=True,
        **case.dispatch_options,
    )
    again = on_device.dispatch(xs[rank], topk_weights=weights, handle=first.handle, async_op=True)
    combined = on_device.combine(ys[rank], first.handle, bias=world.bias(), async_op=True)
    for result in (combined, first, again):
        result.event.wait()
    cases.check_dispatch_result(on_host(first), world, xs)
    cases.check_dispatch_result(on_host(again), world, xs, is_cached=True)
    want = world.combine_result(ys, bias=world.bias())
    assert_bitwise_equal(on_host(combined.x), want.x, name="combine")


def check_one_buffer(rank, rng, num_ranks, count):
    cases_of_buffer = list(batches(rng, num_ranks, count))
    with cases.make_buffer("cuda", case=cases_of_buffer[0], pool_bytes=512 * MIB) as buffer:
        torch.cuda.set_device(buffer.device)
        for case in cases_of_buffer:
            try:
                check_calls(buffer, case, rank, is_async=rng.random() < 0.5)
            except Exception as error:
                raise AssertionError(f"{case}: {error}") from error
        gc.collect()
        stats = buffer.pool_stats()
        assert (stats["num_live"], stats["used_bytes"]) == (0, 0), stats


def on_rank_soak(rank, num_ranks, num_iterations):
    rng = random.Random(f"soak {num_ranks}")
    check_one_buffer(rank, rng, num_ranks, CALLS_PER_BUFFER)  # loads every kernel
    before, allocated = free_bytes(), torch.cuda.memory_allocated()
    for _ in range(num_iterations // CALLS_PER_BUFFER):
        check_one_buffer(rank, rng, num_ranks, CALLS_PER_BUFFER)
    lost = before - free_bytes()
    assert lost < MAX_GROWTH_BYTES, f"{lost} bytes of the GPU are gone"
    assert torch.cuda.memory_allocated() == allocated


@pytest.mark.parametrize("num_ranks", [1, 2, 4], ids="R{}".format)
def test_random_calls_are_right_and_lose_no_memory(ranks, num_ranks, is_exhaustive):
    num_iterations = 2000 if is_exhaustive else 200
    ranks.run(on_rank_soak, num_ranks, num_iterations, deadline_s=60.0 + 1.0 * num_iterations)


def on_rank_one_buffer(rank, num_calls):
    """The same call again and again in one buffer: nothing grows at all."""
    case = cases.Case(num_tokens=(64, 64), hidden=1024, num_topk=3, capacity=(300, 300))
    world = World(case, rank)
    with cases.make_buffer("cuda", case=case, pool_bytes=64 * MIB) as made:
        torch.cuda.set_device(made.device)
        buffer, used, free = made.unwrapped, [], []
        x, topk_idx = world.xs()[rank].to(made.device), world.topk_idxs[rank].to(made.device)
        for i in range(num_calls + 1):
            result = buffer.dispatch(x, topk_idx, capacity=300, async_op=i % 2 == 0)
            result.event.current_stream_wait()
            result = buffer.dispatch(x, handle=result.handle)
            combined = buffer.combine(result.recv_x, result.handle, async_op=i % 3 == 0)
            combined.event.current_stream_wait()
            if i % num_calls == 0:
                combined.event.wait()
                del result, combined
                buffer.dispatch(x, topk_idx, capacity=300).event.wait()  # lets go of the others
                gc.collect()
                free.append(free_bytes())
                used.append((torch.cuda.memory_allocated(), buffer.pool_stats()["num_live"]))
        assert used[0] == used[1], f"(bytes of torch, blocks of the pool): {used}"
        assert used[1][1] == 0, used
        assert free[0] - free[1] <= 2 * MIB, f"{free[0] - free[1]} bytes of the GPU are gone"


def test_calls_of_one_buffer_lose_no_memory(ranks):
    ranks.run(on_rank_one_buffer, 2000)

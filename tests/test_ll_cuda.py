"""What low-latency mode promises on GPUs alone: graphs that replay, streams, and endurance.

Over NVSHMEM, ranks as several nodes: EP_KERNELS_SCALEOUT=nvshmem scripts/with_mps.sh pytest ...
"""

import os

import ll_cases
import pytest
import torch
import torch.distributed as dist
from ll_cases import Case, World

from ep_kernels import Buffer
from ep_kernels.testing import assert_bitwise_equal

pytestmark = pytest.mark.gpu(1)

CASE = Case(num_tokens=(40, 23, 50, 7, 64, 0, 1, 12), num_topk=3, hidden=512)


@pytest.fixture
def ranks(session_pool, num_ranks):
    backend = "cuda_nodes" if os.environ.get("EP_KERNELS_SCALEOUT") == "nvshmem" else "cuda"
    return ll_cases.PoolOn(backend, session_pool).get(num_ranks)


class OnDevice:
    """A world's inputs on the GPU, in memory that graphs may fix."""

    def __init__(self, world, device):
        self.world, self.device = world, device
        rank = world.rank
        self.x, self.idx = world.xs[rank].to(device), world.topk_idxs[rank].to(device)
        self.weights, self.y = world.topk_weights[rank].to(device), world.ys[rank].to(device)

    def update(self, world):
        fresh = OnDevice(world, self.device)
        for name in ("x", "idx", "weights", "y"):
            getattr(self, name).copy_(getattr(fresh, name))

    def dispatch(self, buffer, **options):
        case = self.world.case
        return buffer.low_latency_dispatch(
            self.x,
            self.idx,
            num_max_tokens_per_rank=case.most,
            num_experts=case.num_experts,
            **case.dispatch_options,
            **options,
        )

    def combine(self, buffer, handle, **options):
        rows = buffer.next_low_latency_combine_buffer(handle)
        rows.copy_(self.y)
        return buffer.low_latency_combine(
            rows, self.idx, self.weights, handle, zero_copy=True, **options
        )


def make_buffer(case, **options) -> Buffer:
    """Without the view for tests on host tensors."""
    return ll_cases.make_ll_buffer(case, **options).unwrapped


def check(result, combined, world):
    torch.cuda.synchronize()
    want = world.rows[world.rank]
    is_sent = want.src_rank >= 0
    assert_bitwise_equal(result.recv_count.cpu(), want.recv_count, name="recv_count")
    assert_bitwise_equal(result.recv_x.cpu()[is_sent], want.recv_x[is_sent], name="recv_x")
    if want.recv_scales is not None:
        scales = result.recv_scales.contiguous().cpu()
        assert_bitwise_equal(scales[is_sent], want.recv_scales[is_sent], name="recv_scales")
    assert_bitwise_equal(combined.x.cpu(), world.sums(), name="combine")
    assert not result.missing_ranks.any()
    assert not combined.missing_ranks.any()


def on_rank_graph(rank, num_ranks, format, hooks):
    """One graph of two pairs, replayed with other inputs each time, with eager calls between."""
    case = Case(**vars(CASE) | dict(num_ranks=num_ranks, format=format))
    worlds = [World(Case(**vars(case) | dict(seed=seed)), rank) for seed in range(4)]
    with make_buffer(case) as buffer:
        inputs = [OnDevice(worlds[0], buffer.device) for _ in range(2)]
        options = {"return_recv_hook": hooks}

        def pair(one):
            result = one.dispatch(buffer, **options)
            if hooks:
                result.hook()
            combined = one.combine(buffer, result.handle, **options)
            if hooks:
                combined.hook()
            return result, combined

        pair(inputs[0])[1].event.wait()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            outcomes = [pair(one) for one in inputs]
        for step in range(12):
            chosen = [worlds[(step + i) % len(worlds)] for i in range(2)]
            for one, world in zip(inputs, chosen):
                one.update(world)
            graph.replay()
            for (result, combined), world in zip(outcomes, chosen):
                check(result, combined, world)
            if step % 3 == 0:
                result, combined = pair(inputs[1])
                combined.event.wait()
                check(result, combined, chosen[1])
            if step % 4 == 0:
                buffer.barrier()


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("format", ["bf16", "fp8"])
@pytest.mark.parametrize("hooks", [False, True], ids=["at once", "hooks"])
def test_a_graph_replays_with_new_inputs(ranks, num_ranks, format, hooks):
    ranks.run(on_rank_graph, num_ranks, format, hooks, deadline_s=110.0)


def on_rank_streams(rank):
    """Each half on a stream of its own."""
    world = World(CASE, rank)
    streams = [torch.cuda.Stream() for _ in range(4)]
    with make_buffer(CASE) as buffer:
        one = OnDevice(world, buffer.device)
        torch.cuda.synchronize()
        for _ in range(50):
            with torch.cuda.stream(streams[0]):
                result = one.dispatch(buffer, return_recv_hook=True)
            with torch.cuda.stream(streams[1]):
                result.hook()
            with torch.cuda.stream(streams[2]):
                streams[2].wait_stream(streams[1])
                combined = one.combine(buffer, result.handle, return_recv_hook=True)
            with torch.cuda.stream(streams[3]):
                combined.hook()
            check(result, combined, world)


def test_halves_may_be_on_any_stream(ranks):
    ranks.run(on_rank_streams)


def on_rank_endurance(rank, num_ranks, repetitions):
    """Nothing but the GPU orders the calls; every result goes into a sum that must not change."""
    case = Case(**vars(CASE) | dict(num_ranks=num_ranks, format="fp8", hidden=1024, num_topk=4))
    world = World(case, rank)
    with make_buffer(case) as buffer:
        one = OnDevice(world, buffer.device)
        wrong = torch.zeros((), dtype=torch.int64, device=buffer.device)
        first = None
        for _ in range(repetitions):
            result = one.dispatch(buffer)
            combined = one.combine(buffer, result.handle)
            if first is None:
                check(result, combined, world)
                first = combined.x.view(torch.int16).clone()
            wrong += (combined.x.view(torch.int16) != first).sum()
        assert wrong.item() == 0
        check(result, combined, world)


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_a_thousand_pairs_give_the_same_bytes(ranks, num_ranks):
    ranks.run(on_rank_endurance, num_ranks, 1000, deadline_s=110.0)


def on_rank_no_sync(rank):
    """Calls return while their kernels wait for a rank that is late."""
    world = World(CASE, rank)
    with make_buffer(CASE, timeout_s=20.0) as buffer:
        one = OnDevice(world, buffer.device)
        one.combine(buffer, one.dispatch(buffer).handle).event.wait()
        torch.cuda.synchronize()
        dist.barrier()
        if rank == 1:
            dist.barrier()  # rank 0 has returned from its calls
        result = one.dispatch(buffer)
        combined = one.combine(buffer, result.handle)
        if rank == 0:
            assert not combined.event.query()
            dist.barrier()
        check(result, combined, world)


def test_the_host_waits_for_nothing(ranks):
    ranks.run(on_rank_no_sync)

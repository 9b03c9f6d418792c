"""What calls of the high-throughput mode count: tokens per expert, microseconds per awaited rank.

test_ll_calls.py has the same for the low-latency mode. Functions named `on_rank_...` run on every
rank; each belongs to the test below it.
"""

import time

import cases
import pytest
import torch
import torch.distributed as dist
from backends import backends
from cases import Case, World
from host_view import move

from ep_kernels.config import Layout
from ep_kernels.testing import assert_bitwise_equal

FOUR_RANKS = pytest.mark.parametrize("num_ranks", [4])
LAYOUTS = pytest.mark.parametrize("layout", list(Layout), ids=lambda layout: layout.name)
NUM_TOKENS = (37, 0, 64, 5)
SLOWEST, DELAY_S = 2, 0.25


def make_case(**options):
    return Case(num_ranks=4, num_tokens=NUM_TOKENS, num_topk=3, num_experts=8, **options)


def num_choices(world):
    """[L] choices of this rank's experts by all ranks, counted one by one."""
    counts = torch.zeros(world.case.num_experts, dtype=torch.int64)
    for topk_idx in world.topk_idxs:
        for expert in topk_idx.flatten().tolist():
            counts[expert] += expert >= 0
    return counts[world.placement.rank_of == world.rank]


class Statistics:
    """Of one rank; begun at 100, so that what is added can be told from what is set."""

    def __init__(self, world, dtype=torch.int64, device="cpu"):
        num_local = int((world.placement.rank_of == world.rank).sum())
        self.tokens = torch.full((num_local,), 100, dtype=dtype, device=device)
        self.waits = torch.zeros(world.case.num_ranks, dtype=torch.int64, device=device)

    @property
    def of_dispatch(self):
        return dict(cumulative_recv_stats=self.tokens, wait_recv_cost_stats=self.waits)

    @property
    def of_combine(self):
        return dict(wait_recv_cost_stats=self.waits)

    def check_tokens(self, world, num_dispatches):
        want = 100 + num_dispatches * num_choices(world)
        assert_bitwise_equal(self.tokens.cpu(), want.to(self.tokens.dtype), name="tokens")


def dispatch(buffer, world, xs, **options):
    return buffer.dispatch(
        xs[world.rank],
        world.topk_idxs[world.rank],
        world.topk_weights[world.rank],
        capacity=world.case.capacity_of(world.rank),
        **world.case.dispatch_options,
        **options,
    )


def on_rank_tokens(rank, backend, case, dtype):
    """Fresh and cached; the results are those of calls that count nothing."""
    world = World(case, rank)
    statistics, xs, others, ys = Statistics(world, dtype), world.xs(), world.xs(1), world.ys()
    with cases.make_buffer(backend, case=case) as buffer:
        result = dispatch(buffer, world, xs, **statistics.of_dispatch)
        cases.check_dispatch_result(result, world, xs)
        statistics.check_tokens(world, 1)
        for i in range(2):
            cached = buffer.dispatch(
                others[rank],
                topk_weights=world.topk_weights[rank],
                handle=result.handle,
                **statistics.of_dispatch,
            )
            cases.check_dispatch_result(cached, world, others, is_cached=True)
            statistics.check_tokens(world, 2 + i)
        combined = buffer.combine(ys[rank], result.handle, **statistics.of_combine)
        assert_bitwise_equal(combined, world.combine_result(ys, buffer=buffer), name="combine")
        cases.check_round_trip(buffer, world)
    statistics.check_tokens(world, 3)
    assert (statistics.waits >= 0).all()


@FOUR_RANKS
@LAYOUTS
@pytest.mark.parametrize("capacity", [None, (300,) * 4, (9,) * 4], ids=["none", "enough", "tight"])
def test_choices_of_each_expert_are_added_in_both_layouts(
    ranks, backend, num_ranks, layout, capacity
):
    """Also those past the capacity, and in RANK_MAJOR, where two of them may share a row."""
    alignment = 4 if layout is Layout.EXPERT_MAJOR else 1
    case = make_case(layout=layout, expert_alignment=alignment, capacity=capacity)
    ranks.run(on_rank_tokens, backend, case, torch.int64 if capacity else torch.int32)


def on_rank_slowest(rank, backend):
    """Each kind of call; before it the ranks meet, and one of them sleeps."""
    world, roomy = World(make_case(), rank), World(make_case(capacity=(300,) * 4), rank)
    xs, ys = world.xs(), world.ys()
    with cases.make_buffer(backend, case=world.case) as buffer:
        handle = dispatch(buffer, world, xs).handle
        calls = {
            "dispatch": lambda **options: dispatch(buffer, world, xs, **options),
            "capacity": lambda **options: dispatch(buffer, roomy, xs, **options),
            "cached": lambda **options: buffer.dispatch(xs[rank], handle=handle, **options),
            "combine": lambda **options: buffer.combine(ys[rank], handle, **options),
        }
        for name, call in calls.items():
            rounds = []
            for _ in range(3):
                waits = torch.zeros(4, dtype=torch.int64)
                dist.barrier()
                if rank == SLOWEST:
                    time.sleep(DELAY_S)
                call(wait_recv_cost_stats=waits)
                rounds.append(waits)
            check_waits(name, torch.stack(rounds), rank)


def check_waits(name, rounds, rank):
    """[rounds, R]. The median, as anybody may be held up on a busy machine."""
    assert (rounds >= 0).all(), (name, rounds)
    waited_s = rounds.median(dim=0).values / 1e6
    is_long = waited_s > 0.5 * DELAY_S
    assert is_long.tolist() == [rank != SLOWEST == of for of in range(4)], (name, rounds)


@FOUR_RANKS
def test_a_slow_rank_shows_in_its_column_and_only_there(ranks, backend, num_ranks):
    """Over nodes, too, for a rank of this node or of another, whoever speaks for whom."""
    ranks.run(on_rank_slowest, backend)


def on_rank_asynchronous(rank, backend):
    """Calls under way add to the same tensors, while the caller waits for the counts of others."""
    world = World(make_case(), rank)
    roomy = World(make_case(capacity=(300,) * 4), rank)
    xs, ys = world.xs(), world.ys()
    with cases.make_buffer(backend, case=world.case) as buffer:
        device = buffer.device
        buffer = cases.device_results(buffer)
        statistics = Statistics(world, device=device)
        on_device = [move(one, device) for one in (xs[rank], ys[rank])]
        handle = dispatch(buffer, world, xs).handle
        events = []
        for _ in range(10):
            options = dict(async_op=True, **statistics.of_dispatch)
            events.append(dispatch(buffer, roomy, xs, **options).event)
            events.append(buffer.dispatch(on_device[0], handle=handle, **options).event)
            events.append(dispatch(buffer, world, xs, **options).event)
            events.append(
                buffer.combine(on_device[1], handle, async_op=True, **statistics.of_combine).event
            )
        for event in events:
            event.wait()
        statistics.check_tokens(world, 30)
        assert (statistics.waits >= 0).all()


@FOUR_RANKS
def test_asynchronous_calls_count_without_losing_any(ranks, backend, num_ranks):
    ranks.run(on_rank_asynchronous, backend)


def on_rank_refused(rank, backend):
    world = World(make_case(), rank)
    statistics, xs = Statistics(world), world.xs()
    with cases.make_buffer(backend, case=world.case) as buffer:
        bad = dict(expert_alignment=0) if rank == 1 else {}
        with pytest.raises(ValueError, match="expert_alignment=0"):
            buffer.dispatch(xs[rank], world.topk_idxs[rank], **bad, **statistics.of_dispatch)
        statistics.check_tokens(world, 0)
        dispatch(buffer, world, xs, **statistics.of_dispatch)
        statistics.check_tokens(world, 1)


@FOUR_RANKS
def test_a_refused_call_counts_no_tokens(ranks, backend, num_ranks):
    ranks.run(on_rank_refused, backend)


def on_rank_graph(rank, case):
    world = World(case, rank)
    xs = world.xs()
    with cases.make_buffer("cuda", case=case) as view:
        buffer = view.unwrapped
        torch.cuda.set_device(buffer.device)
        statistics = Statistics(world, device=buffer.device)
        x, topk_idx = move(xs[rank], buffer.device), move(world.topk_idxs[rank], buffer.device)

        def layer():
            sent = buffer.dispatch(
                x,
                topk_idx,
                capacity=case.capacity_of(rank),
                **case.dispatch_options,
                **statistics.of_dispatch,
            )
            cached = buffer.dispatch(x, handle=sent.handle, **statistics.of_dispatch)
            return buffer.combine(cached.recv_x, sent.handle, **statistics.of_combine)

        layer().event.wait()
        statistics.check_tokens(world, 2)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            layer()
        statistics.check_tokens(world, 2)  # a capture runs nothing
        statistics.waits.zero_()
        for _ in range(3):
            torch.cuda.synchronize()
            dist.barrier()
            if rank == 1:
                time.sleep(DELAY_S)
            graph.replay()
        torch.cuda.synchronize()
        statistics.check_tokens(world, 8)
        waited_s = statistics.waits.cpu() / 1e6
        assert (waited_s[1] > 2 * DELAY_S) == (rank == 0), waited_s
        del graph


@backends("cuda")
@LAYOUTS
def test_replays_of_a_graph_count(ranks, backend, layout):
    case = Case(num_tokens=(37, 64), capacity=(70, 90), num_topk=3, layout=layout)
    ranks.run(on_rank_graph, case, deadline_s=120)

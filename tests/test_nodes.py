"""Several nodes: which ranks form one, what crosses between them, what happens when one is lost.

Nodes are logical here, all on this machine (`num_local_ranks`). That results are right is tested
by the other suites, for the backend "nodes"; tests/multi_node has hosts with networks of their own.
"""

import gc
import os
import signal
import time
from dataclasses import replace
from unittest import mock

import cases
import pytest
import torch
import torch.distributed as dist
from backends import backends
from cases import Case, World

import ep_kernels
from ep_kernels import reference
from ep_kernels._native import PHASES
from ep_kernels.bootstrap import make_bootstrap
from ep_kernels.config import Layout, make_expert_to_rank
from ep_kernels.errors import EPConfigError, EPTimeoutError
from ep_kernels.lanes import Lane, Message, make_lane
from ep_kernels.node_control import NodeControl
from ep_kernels.testing import assert_bitwise_equal
from ep_kernels.testing.leaks import shm_mappings
from ep_kernels.topology import Topology, _Home, find_topology

LAYOUTS = pytest.mark.parametrize("layout", list(Layout), ids=lambda layout: layout.name)
CASE = Case(num_ranks=4, num_experts=8, num_topk=3, num_tokens=(40, 30, 50, 20), hidden=64)
LONG_S, SOON_S = 30.0, 5.0


# Topology


class Homes:
    """A bootstrap of ranks that run on the hosts given."""

    rank = 0

    def __init__(self, *hosts, memory=None, launched=None):
        self.num_ranks = len(hosts)
        self.homes = [_Home(memory or host, host, launched) for host in hosts]

    def all_gather(self, value):
        return self.homes


@pytest.mark.parametrize(
    ("hosts", "shape"),
    [("a", (1, 1)), ("aaa", (1, 3)), ("aabb", (2, 2)), ("abc", (3, 1)), ("aabbcc", (3, 2))],
)
def test_ranks_of_one_place_form_a_node(hosts, shape):
    topology = find_topology(Homes(*hosts), None)
    assert (topology.num_nodes, topology.num_local_ranks) == shape


@pytest.mark.parametrize(
    ("hosts", "message"),
    [
        ("aab", r"different numbers of ranks: a: 2 \(ranks \[0, 1\]\), b: 1 \(ranks \[2\]\)"),
        ("abab", r"node a are not consecutive: a: 2 \(ranks \[0, 2\]\), b: 2"),
    ],
)
def test_uneven_or_mixed_nodes_are_refused_with_their_ranks(hosts, message):
    with pytest.raises(EPConfigError, match=message):
        find_topology(Homes(*hosts), None)


def test_containers_of_one_machine_are_nodes_unless_told_otherwise():
    homes = Homes("a", "a", "b", "b", memory="one machine")
    assert find_topology(homes, None).num_nodes == 2
    assert find_topology(homes, 4).num_nodes == 1


def test_ranks_that_share_no_memory_cannot_form_a_node():
    with pytest.raises(EPConfigError, match="num_local_ranks=4 puts ranks 0 and 2 on one node"):
        find_topology(Homes(*"aabb"), 4)


def test_a_launch_that_says_otherwise_is_contradicted():
    homes = Homes(*"abcd", launched=("LOCAL_WORLD_SIZE", 2))
    with pytest.raises(EPConfigError, match="LOCAL_WORLD_SIZE=2 on rank 0, but only 1 ranks share"):
        find_topology(homes, None)
    assert find_topology(homes, 1).num_nodes == 4


def test_ranks_are_numbered_node_by_node():
    topology = Topology(rank=3, num_ranks=6, num_local_ranks=2)
    assert (topology.node, topology.local_rank, list(topology.local_ranks)) == (1, 1, [2, 3])
    assert [topology.lane_rank(node) for node in topology.other_nodes] == [1, 5]


def test_experts_are_placed_by_name_or_one_by_one():
    assert make_expert_to_rank(4, "linear", 2) == make_expert_to_rank(4, None, 2) == (0, 0, 1, 1)
    assert make_expert_to_rank(4, "round_robin", 2) == (0, 1, 0, 1)
    assert reference.make_placement(4, 2, "round_robin").rank_of.tolist() == [0, 1, 0, 1]
    for make in (make_expert_to_rank, lambda e, p, r: reference.make_placement(e, r, p)):
        with pytest.raises(EPConfigError, match="expert_to_rank='random'"):
            make(4, "random", 2)


def on_rank_bad_nodes(rank):
    for bad, message in (
        (dict(num_local_ranks=3), "num_local_ranks=3 does not divide num_ranks=4"),
        (dict(num_local_ranks=0), "num_local_ranks=0"),
        (dict(num_local_ranks="2"), "num_local_ranks='2'"),
        (dict(staging_bytes=0), "staging_bytes=0"),
    ):
        options = bad if rank == 1 else {}
        with pytest.raises(EPConfigError, match=message):
            ep_kernels.Buffer(num_experts=8, **options)
    with pytest.raises(EPConfigError, match=r"disagree on num_local_ranks: rank 0 has 2, rank 1"):
        ep_kernels.Buffer(num_experts=8, num_local_ranks=2 if rank != 1 else 1)


@pytest.mark.parametrize("num_ranks", [4])
def test_bad_nodes_are_named_on_all_ranks(ranks, num_ranks):
    ranks.run(on_rank_bad_nodes)


# What crosses the network


def tokens_for_nodes(topk_idx, placement, num_local_ranks):
    """[T, N]: whether a token has a choice on each node."""
    node_of = placement.rank_of // num_local_ranks
    nodes = torch.arange(placement.num_ranks // num_local_ranks)
    chosen = torch.where(topk_idx >= 0, node_of[topk_idx], -1)
    return (chosen[:, :, None] == nodes).any(dim=1)


def expected_bytes(world, rank, num_local_ranks, token_bytes):
    """Chunk bytes that `rank` sends in a dispatch: one copy per token and other node."""
    is_sent = tokens_for_nodes(world.topk_idxs[rank], world.placement, num_local_ranks)
    is_sent[:, rank // num_local_ranks] = False
    return int(is_sent.sum()) * token_bytes


def on_rank_bytes(rank, backend, case, num_local_ranks):
    world = World(case, rank)
    peers = [
        peer for peer in range(case.num_ranks) if peer % num_local_ranks == rank % num_local_ranks
    ]
    row = case.hidden * 2
    with cases.make_buffer(backend, case=case, num_local_ranks=num_local_ranks) as buffer:

        def counted(call):
            before = buffer.scaleout_stats()
            result = call()
            after = buffer.scaleout_stats()
            return result, [
                after_ - before_
                for after_, before_ in zip(vars(after).values(), vars(before).values())
            ]

        def sent_by(rank, token_bytes):
            return expected_bytes(world, rank, num_local_ranks, token_bytes)

        def received(token_bytes):
            """From each peer: what it has for this node."""
            total = 0
            for peer in peers:
                is_sent = tokens_for_nodes(world.topk_idxs[peer], world.placement, num_local_ranks)
                if peer != rank:
                    total += int(is_sent[:, rank // num_local_ranks].sum()) * token_bytes
            return total

        result, (sent, got, control_sent, _) = counted(
            lambda: cases.dispatch(buffer, world, world.xs())
        )
        fresh = row + case.num_topk * 8
        assert (sent, got) == (sent_by(rank, fresh), received(fresh))
        assert control_sent < 4000 * (len(peers) - 1)
        weights = world.topk_weights[rank]
        _, (sent, got, *_) = counted(
            lambda: buffer.dispatch(world.xs()[rank], topk_weights=weights, handle=result.handle)
        )
        cached = row + case.num_topk * 4
        assert (sent, got) == (sent_by(rank, cached), received(cached))
        _, (sent, got, *_) = counted(lambda: buffer.combine(world.ys()[rank], result.handle))
        assert (sent, got) == (received(row), sent_by(rank, row))
        return sent_by(rank, fresh)


@LAYOUTS
@pytest.mark.parametrize(("num_ranks", "num_local_ranks"), [(4, 2), (6, 2), (4, 1)])
def test_a_token_crosses_once_per_node_and_fewer_nodes_mean_fewer_bytes(
    ranks, over_nodes, num_ranks, num_local_ranks, layout
):
    case = Case(
        num_ranks=num_ranks, num_experts=8 * num_ranks, num_topk=4, hidden=512, layout=layout
    )
    case = replace(case, num_tokens=(200, 64, 0, 130, 33, 70))
    totals = {}
    for routing in ("uniform", "group_limited"):
        values = ranks.run(
            on_rank_bytes, over_nodes, replace(case, routing=routing), num_local_ranks
        )
        totals[routing] = sum(values)
    if num_ranks // num_local_ranks > 2:
        assert totals["group_limited"] < 0.8 * totals["uniform"]


def on_rank_one_node(rank, backend, case):
    """The same bytes as without nodes."""
    world = World(case, rank)
    with (
        cases.make_buffer("cpu", case=case, num_local_ranks=4) as one,
        cases.make_buffer(backend, case=case, num_local_ranks=2) as two,
    ):
        assert (one.topology.num_nodes, two.topology.num_nodes) == (1, 2)
        results = [cases.dispatch(buffer, world, world.xs()) for buffer in (one, two)]
        assert_bitwise_equal(results[1], results[0])
        assert set(vars(one.scaleout_stats()).values()) == {0}


@LAYOUTS
@pytest.mark.parametrize("num_ranks", [4])
def test_dispatch_over_nodes_gives_the_bytes_of_one_node(ranks, over_nodes, num_ranks, layout):
    ranks.run(on_rank_one_node, over_nodes, replace(CASE, layout=layout))


def on_rank_staging(rank, backend, case):
    """Chunks of one token at the least, of all at the most."""
    world = World(case, rank)
    for staging_bytes in (1, 5000, 1 << 30):
        with cases.make_buffer(backend, case=case, staging_bytes=staging_bytes) as buffer:
            cases.check_round_trip(buffer, world)


@LAYOUTS
@pytest.mark.parametrize("num_ranks", [4])
def test_chunks_of_any_size_give_the_same_bits(ranks, over_nodes, num_ranks, layout):
    ranks.run(on_rank_staging, over_nodes, replace(CASE, layout=layout, num_tokens=(9, 70, 0, 33)))


def on_rank_different_num_topk(rank, backend, num_topks):
    case = Case(num_ranks=4, num_experts=8, layout=Layout.EXPERT_MAJOR)
    worlds = [World(replace(case, num_topk=k), rank) for k in num_topks]
    topk_idxs = [worlds[src].topk_idxs[src] for src in range(4)]
    rows = [
        reference.recv_rows(topk_idxs, worlds[0].placement, dst, layout=case.layout)
        for dst in range(4)
    ]
    xs = worlds[0].xs()
    with cases.make_buffer(backend, case=case) as buffer:
        result = buffer.dispatch(xs[rank], topk_idxs[rank], layout=case.layout)
        want = reference.dispatch(
            xs, topk_idxs, placement=worlds[0].placement, rank=rank, layout=case.layout
        )
        assert_bitwise_equal(result.recv_x, want.recv_x)
        combined = buffer.combine(result.recv_x, result.handle)
        recv = [
            reference.dispatch(
                xs, topk_idxs, placement=worlds[0].placement, rank=dst, layout=case.layout
            ).recv_x
            for dst in range(4)
        ]
        want = reference.combine(
            recv,
            rows,
            topk_idxs[rank],
            placement=worlds[0].placement,
            rank=rank,
            num_local_ranks=buffer.topology.num_local_ranks,
        )
        assert_bitwise_equal(combined, want, any_nan=True)


@pytest.mark.parametrize("num_ranks", [4])
@backends("reference", "cpu", "nodes")
def test_in_expert_major_num_topk_may_differ_between_ranks(ranks, backend, num_ranks):
    ranks.run(on_rank_different_num_topk, backend, (2, 5, 1, 8))


# Lost nodes


class Group:
    def __init__(self, rank, backend, *, case=CASE, **options):
        self.rank, self.world = rank, World(case, rank)
        self.buffer = cases.make_buffer(backend, case=case, **options)
        self.result = cases.check_round_trip(self.buffer, self.world)

    def call(self, operation):
        if operation == "barrier":
            return self.buffer.barrier()
        if operation == "combine":
            return self.buffer.combine(self.world.ys()[self.rank], self.result.handle)
        return cases.dispatch(self.buffer, self.world, self.world.xs())

    def check_lost(self, operation, culprits, *, within_s):
        start = time.monotonic()
        with pytest.raises(EPTimeoutError) as raised:
            self.call(operation)
        assert time.monotonic() - start < within_s
        error = raised.value
        assert error.peer in culprits, str(error)
        assert error.rank == self.rank
        assert f"rank {error.peer}" in str(error)
        with pytest.raises(ep_kernels.EPDeviceError, match=f"rank {error.peer}"):
            self.call(operation)
        cases.check_dispatch_result(self.result, self.world, self.world.xs())
        self.buffer.destroy()
        del self.result, raised, error
        gc.collect()  # tracebacks know tensors of the pool
        assert not shm_mappings()


def on_rank_killed(rank, backend, operation, victims, num_local_ranks):
    group = Group(rank, backend, timeout_s=LONG_S, num_local_ranks=num_local_ranks)
    dist.barrier()
    if rank in victims:
        os.kill(os.getpid(), signal.SIGKILL)
    group.check_lost(operation, victims, within_s=SOON_S)


@pytest.mark.parametrize("operation", ["dispatch", "combine", "barrier"])
@pytest.mark.parametrize(("victims", "num_local_ranks"), [((2, 3), 2), ((1,), 2), ((2,), 1)])
def test_a_dead_node_or_rank_is_named_at_once_everywhere(
    launch, over_nodes, operation, victims, num_local_ranks
):
    launch(
        on_rank_killed, over_nodes, operation, victims, num_local_ranks, num_ranks=4, lost=victims
    )


def on_rank_stopped(rank, backend, victim):
    group = Group(rank, backend, timeout_s=2.0)
    dist.barrier()
    if rank == victim:
        os.kill(os.getpid(), signal.SIGSTOP)
    group.check_lost("dispatch", [victim], within_s=2.0 + SOON_S)


@pytest.mark.parametrize("victim", [0, 3])
def test_a_silent_rank_is_named_at_the_deadline_everywhere(launch, over_nodes, victim):
    launch(on_rank_stopped, over_nodes, victim, num_ranks=4, lost=[victim])


def stop_at(name, *arguments, after):
    """This process stops before a word of a call, when its messages have gone out, or after it."""
    step_of = NodeControl.step

    def stopping_step(control, step, *given):
        is_due = (step, given[: len(arguments)]) == (name, arguments)
        if is_due and not after:
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGSTOP)
        step_of(control, step, *given)
        if is_due:
            os.kill(os.getpid(), signal.SIGSTOP)

    NodeControl.step = stopping_step


def on_rank_stopped_waiting(rank, backend, case, operation, victim):
    """The victim says that it waits for rank 1 and stops; its neighbour, for which it should pass
    on what 1 has sent, gives up first."""
    group = Group(rank, backend, case=case, timeout_s=2.0)
    dist.barrier()
    if rank == victim:
        stop_at("waiting_for", 1, after=True)
    group.check_lost(operation, [victim], within_s=2.0 + SOON_S)


@pytest.mark.parametrize(("num_ranks", "operation"), [(4, "dispatch"), (6, "combine")])
def test_a_rank_that_was_stopped_while_it_waited_for_another_node_is_named_itself(
    launch, over_nodes, num_ranks, operation
):
    case = replace(CASE, num_ranks=num_ranks, num_experts=12, num_tokens=(40, 30, 50, 20, 0, 10))
    victim = num_ranks - 1
    args = (over_nodes, case, operation, victim)
    launch(on_rank_stopped_waiting, *args, num_ranks=num_ranks, lost=[victim])


def on_rank_waits_behind_its_neighbour(rank, backend):
    """2 stops when only node 0 has its offer: 3 waits for it, 1 for the rows of 3, and 0, whose
    rows cross no network, for 1. The wait of 0 runs out first."""
    world = World(CASE, rank)
    topk_idx = torch.arange(CASE.num_topk).expand(CASE.num_tokens[rank], -1)
    is_at_home = rank in (0, 2)
    topk_idx = topk_idx + (4 if (rank >= 2) == is_at_home else 0)
    buffer = cases.make_buffer(backend, case=CASE, timeout_s=2.15 if rank == 3 else 2.0)
    dist.barrier()
    if rank == 2:
        stop_at("send_offer", 0, 2, after=False)
    start = time.monotonic()
    with pytest.raises(EPTimeoutError) as raised:
        buffer.dispatch(world.xs()[rank], topk_idx.contiguous())
    assert time.monotonic() - start < 2.0 + SOON_S
    assert raised.value.peer == 2, str(raised.value)
    buffer.destroy()


def test_a_rank_whose_neighbour_waits_for_a_waiting_rank_names_the_silent_one(launch, over_nodes):
    """Also if its own wait runs out first."""
    launch(on_rank_waits_behind_its_neighbour, over_nodes, num_ranks=4, lost=[2])


def on_rank_destroys_early(rank, backend):
    group = Group(rank, backend, timeout_s=LONG_S)
    if rank == 2:
        group.buffer.destroy()
    else:
        group.check_lost("combine", [2], within_s=SOON_S)
    dist.barrier()


def test_a_rank_that_destroyed_its_buffer_is_named_at_once_on_all_nodes(launch, over_nodes):
    launch(on_rank_destroys_early, over_nodes, num_ranks=4)


def on_rank_fails_by_itself(rank, backend, operation, step, error):
    """One rank raises in the middle of a call, when the others have its post."""
    group = Group(rank, backend, timeout_s=LONG_S)
    if rank == 2:
        steps = []

        def failing(step_of):
            def failing_step(self, name, *arguments):
                if name == step:
                    steps.append(name)
                    raise error
                step_of(self, name, *arguments)

            return failing_step

        for where in (NodeControl, type(group.buffer._backend._rows)):
            where.step = failing(where.step)
        with pytest.raises(type(error), match="broken"):
            group.call(operation)
        assert steps
        with pytest.raises(ep_kernels.EPDeviceError, match="cannot be used any more.*broken"):
            group.call(operation)
    else:
        group.check_lost(operation, [2], within_s=SOON_S)
    dist.barrier()


@pytest.mark.parametrize(
    ("operation", "step"),
    [
        ("dispatch", "plan"),
        ("dispatch", "pack"),
        ("combine", "stage_rows"),
        ("combine", "reduce_rows"),
    ],
)
@pytest.mark.parametrize(
    "error", [MemoryError("broken"), ep_kernels.EPDeviceError("broken")], ids=["memory", "device"]
)
def test_a_rank_that_fails_by_itself_is_named_at_once_everywhere(
    launch, over_nodes, operation, step, error
):
    launch(on_rank_fails_by_itself, over_nodes, operation, step, error, num_ranks=4)


def on_rank_has_no_memory_for_choices(rank, backend):
    group = Group(rank, backend, timeout_s=LONG_S)
    if rank == 2:
        rows = type(group.buffer._backend._rows)
        failing = mock.patch.object(rows, "on_host", side_effect=RuntimeError("out of memory"))
        with failing, pytest.raises(ep_kernels.EPDeviceError, match="out of memory"):
            group.call("dispatch")
    else:
        with pytest.raises(ep_kernels.EPConfigError, match="rank 2.*out of memory"):
            group.call("dispatch")
    group.call("dispatch")


def test_a_rank_without_memory_for_its_choices_refuses_the_call(launch, over_nodes):
    launch(on_rank_has_no_memory_for_choices, over_nodes, num_ranks=4)


def on_rank_killed_meanwhile(rank, backend, delay_s):
    """Large rows, in many chunks."""
    case = replace(CASE, hidden=7168, num_tokens=(150,) * 4)
    world = World(case, rank)
    buffer = cases.make_buffer(backend, case=case, timeout_s=LONG_S, staging_bytes=1 << 20)
    xs, topk_idx = world.xs()[rank], world.topk_idxs[rank]
    dist.barrier()
    end = time.monotonic() + delay_s

    def dispatch_until_killed():
        for _ in range(1000):
            buffer.dispatch(xs, topk_idx)
            if rank == 3 and time.monotonic() > end:
                buffer.dispatch(xs, topk_idx, async_op=True)
                os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(EPTimeoutError) as raised:
        dispatch_until_killed()
    assert time.monotonic() - end < SOON_S
    assert raised.value.peer == 3


@pytest.mark.parametrize("number", range(3))
def test_a_rank_that_dies_at_any_moment_is_named(launch, over_nodes, number):
    launch(on_rank_killed_meanwhile, over_nodes, 0.05 * number, num_ranks=4, lost=[3])


class FarewellLane(Lane):
    """Remembers its farewells."""

    def __init__(self):
        super().__init__(Topology(rank=0, num_ranks=2, num_local_ranks=1), timeout_s=1.0)
        self.said = []

    def _isend(self, node, tensor, tag):
        raise NotImplementedError

    _irecv = _wait = _why = _farewell_from = _isend

    def _send_farewells(self, culprit):
        self.said.append(culprit)

    def _close(self):
        pass


def test_a_lane_says_farewell_once_naming_the_culprit():
    lane = FarewellLane()
    lane.close(1)
    lane.close()  # as destroy() does after a failure
    assert lane.said == [1]


def on_rank_waits_in_a_row(rank):
    """0 waits for 1 for 1.1 s, 1 for 2 a little longer, 2 is silent, 3 waits for 0."""
    timeout_s = (1.0, 1.2, 1.0, 10.0)[rank]
    topology = Topology(rank=rank, num_ranks=4, num_local_ranks=1)
    lane = make_lane(make_bootstrap(None), topology, timeout_s, lambda waiting_for: None)
    awaited = (1, 2, None, 0)[rank]
    if awaited is not None:
        message = Message(seq=0, kind=0, phase=next(iter(PHASES)))
        with pytest.raises(EPTimeoutError) as raised:
            lane.wait(lane.irecv(awaited, torch.zeros(8, dtype=torch.uint8), message))
        assert raised.value.peer == 2, raised.value
        lane.close(2)
    dist.barrier()
    if awaited is None:
        lane.close()


def test_ranks_that_wait_for_each_other_in_a_row_all_name_the_silent_one(launch):
    """Also those whose wait runs out before the one behind it."""
    launch(on_rank_waits_in_a_row, num_ranks=4)

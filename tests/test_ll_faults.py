"""Ranks that die, stop and come back in low-latency mode.

Without masking the others raise EPTimeoutError naming the rank. With masking they go on without it:
what is said to be missing is missing, everything else is exact, in every call.

Functions named `on_rank_...` run on every rank; each belongs to the tests below it.
"""

import contextlib
import os
import random
import signal
import threading
import time
from dataclasses import replace

import cases
import ll_cases
import pytest
import torch
import torch.distributed as dist
from ll_cases import Case, World
from test_faults import LONG_S, SOON_S, die, die_after, error_of, timed_error_of

from ep_kernels import Buffer
from ep_kernels.errors import EPConfigError, EPDeviceError, EPTimeoutError
from ep_kernels.testing import assert_bitwise_equal

pytestmark = [
    pytest.mark.usefixtures("ll_backend"),
    pytest.mark.one_node("most are about masks; test_ll_nodes.py has those that are not"),
]

KILLS = pytest.mark.cpu_only(
    "kills a process that others share a GPU with; a kernel sees a dead rank as a silent one"
)
COPIES = pytest.mark.cpu_only("a kernel goes on when its process is stopped")
WINDOWS = pytest.mark.cpu_only("windows stay where they are, graphs have their addresses")

VICTIM = 1
CASE = Case(num_ranks=3, num_tokens=(40, 30, 50), num_topk=3, num_experts=6)
LARGE = replace(CASE, hidden=7168, num_tokens=(60, 64, 50))
STOP_S = 1.5  # timeout of the tests that wait for it; shorter ones fail on a busy machine


class Group:
    """A buffer, and rounds of dispatch, experts and combine whose results can be checked with any
    ranks missing: the experts give back what they get."""

    def __init__(self, rank, case=CASE, **options):
        self.rank, self.world = rank, World(case, rank)
        self.buffer = ll_cases.make_ll_buffer(case, **options)
        self.num_rounds = 0

    def round(self):
        """Returns the ranks that were missing."""
        self.num_rounds += 1
        result = ll_cases.dispatch(self.buffer, self.world)
        self.check_dispatch(result)
        world, rank = self.world, self.rank
        combined = self.buffer.low_latency_combine(
            result.recv_x, world.topk_idxs[rank], world.topk_weights[rank], result.handle
        )
        self.check_combine(combined)
        return (result.missing_ranks | combined.missing_ranks).nonzero().flatten().tolist()

    def check_dispatch(self, result):
        world, counts = self.world, result.recv_rank_counts
        assert not result.missing_ranks[self.rank]
        assert_bitwise_equal(result.recv_count, counts.sum(1).int(), name="recv_count")
        want = world.rows[self.rank]
        for local in range(len(counts)):
            begin = 0
            for src, count in enumerate(counts[local].tolist()):
                rows = result.recv_x[local, begin : begin + count]
                if not result.missing_ranks[src]:
                    sent = want.src_token[local][want.src_rank[local] == src]
                    assert_bitwise_equal(rows, world.xs[src][sent], name=f"rows of rank {src}")
                begin += count

    def check_combine(self, result):
        world, rank = self.world, self.rank
        idx, weights, y = world.topk_idxs[rank], world.topk_weights[rank], world.xs[rank]
        total = torch.zeros(y.shape)
        owners = world.placement.ranks_of_choices(idx)
        for k in range(idx.shape[1]):
            is_summed = (owners[:, k] >= 0) & ~result.missing_ranks[owners[:, k]]
            total[is_summed] += weights[is_summed, k, None] * y[is_summed].float()
        assert_bitwise_equal(result.x, total.bfloat16(), name="combine")

    def check_failed(self, error, culprit=VICTIM):
        assert isinstance(error, EPTimeoutError), repr(error)
        assert error.peer == culprit, str(error)
        assert error.rank == self.rank
        assert f"rank {culprit}" in str(error)
        for call in (self.round, self.buffer.barrier, self.buffer.query_mask):
            assert f"rank {culprit}" in str(error_of(call))
        self.buffer.destroy()


# Without masking


def on_rank_killed(rank, inside):
    group = Group(rank, timeout_s=LONG_S)
    assert group.round() == []
    if rank == VICTIM and not inside:
        die()
    if rank == VICTIM:
        die_after(0.2)
        group.round()
    if rank == 0 and inside:
        time.sleep(0.4)
    error, seconds = timed_error_of(group.round)
    assert seconds < SOON_S
    group.check_failed(error)


@KILLS
@pytest.mark.parametrize("inside", [False, True], ids=["before", "inside"])
def test_a_dead_rank_is_named_at_once(launch, inside):
    launch(on_rank_killed, inside, num_ranks=3, lost=[VICTIM])


def on_rank_killed_before_the_hook(rank, operation):
    group = Group(rank, timeout_s=LONG_S)
    world = group.world
    result = ll_cases.dispatch(group.buffer, world, return_recv_hook=operation == "dispatch")
    if rank == VICTIM:
        time.sleep(0.2)
        die()
    if operation == "combine":
        result = ll_cases.combine(group.buffer, world, result.handle, return_recv_hook=True)
        error, seconds = timed_error_of(result.hook)
        assert seconds < SOON_S
        group.check_failed(error)
    else:  # all rows were sent, so the hook still finds them
        time.sleep(0.4)
        result.hook()
        ll_cases.check_dispatch(result, world)
        group.check_failed(error_of(ll_cases.combine, group.buffer, world, result.handle))


@KILLS
@pytest.mark.parametrize("operation", ["dispatch", "combine"])
def test_a_hook_names_the_dead_rank(launch, operation):
    launch(on_rank_killed_before_the_hook, operation, num_ranks=3, lost=[VICTIM])


def stop(pids):
    os.kill(pids[VICTIM], signal.SIGSTOP)


def gather_pids():
    pids = [None] * dist.get_world_size()
    dist.all_gather_object(pids, os.getpid())
    return pids


def on_rank_stopped(rank):
    group = Group(rank, timeout_s=STOP_S)
    pids = gather_pids()
    assert group.round() == []
    dist.barrier()
    if rank == VICTIM:
        time.sleep(60)
    if rank == 0:
        stop(pids)
    error, seconds = timed_error_of(group.round)
    assert seconds > 0.9 * STOP_S or "gave up" in str(error)
    group.check_failed(error)


def test_a_stopped_rank_is_named_after_the_timeout(launch):
    launch(on_rank_stopped, num_ranks=3, lost=[VICTIM])


# With masking


def take_victim_back(group, rank):
    """Both sides un-mask, between calls."""
    dist.barrier()
    if rank == VICTIM:
        group.buffer.clear_masks()
    else:
        group.buffer.mask_rank(VICTIM, masked=False)
    dist.barrier()


def run_settled_rounds(group, rank, num_rounds=10):
    """Rounds until all survivors know of the victim, and `num_rounds` after that.

    They may notice in different rounds, but have to make the same number of calls.
    """
    store, settled, last = dist.distributed_c10d._get_default_store(), None, None
    survivors = [other for other in range(dist.get_world_size()) if other != VICTIM]
    keys = [f"settled/{other}" for other in survivors]
    end = time.monotonic() + 20
    while last is None or group.num_rounds < last:
        missing = group.round()
        assert settled is None or missing == [VICTIM]
        assert time.monotonic() < end
        if settled is None and missing == [VICTIM]:
            settled = group.num_rounds
            store.set(f"settled/{rank}", str(settled))
        if last is None and store.check(keys):
            last = max(int(store.get(key)) for key in keys) + num_rounds


def on_rank_masks_the_dead(rank, case, delay_s):
    group = Group(rank, case, timeout_s=LONG_S, mask_silent_ranks=True)
    dist.barrier()
    if rank == VICTIM:
        die_after(delay_s)
    end, missing = time.monotonic() + 20, []
    while VICTIM not in missing:
        missing = group.round()
        assert time.monotonic() < end
    run_settled_rounds(group, rank)
    assert group.buffer.query_mask().nonzero().flatten().tolist() == [VICTIM]
    group.buffer.barrier()
    away = World(replace(case, away=(VICTIM,)), rank)
    for _ in range(3):
        ll_cases.check_round(group.buffer, away)
    group.buffer.destroy()


@KILLS
@pytest.mark.parametrize("number", range(6))
def test_a_rank_that_dies_at_any_moment_is_masked(launch, number, is_exhaustive):
    """In the odd tests with large rows: it dies while it copies."""
    rng = random.Random(number)
    case = LARGE if number & 1 else CASE
    if number == 4:
        case = replace(case, num_ranks=4, num_tokens=(9, 30, 64, 20), num_experts=8)
    for _ in range(10 if is_exhaustive else 1):
        arguments = (case, rng.uniform(0.001, 0.1))
        launch(on_rank_masks_the_dead, *arguments, num_ranks=case.num_ranks, lost=[VICTIM])


def on_rank_stops_and_returns(rank, case, seed):
    """The victim is stopped at some moment, resumed while the others go on, and taken back."""
    rng = random.Random(seed)
    group = Group(rank, case, timeout_s=STOP_S, mask_silent_ranks=True)
    pids = gather_pids()
    delay_s, num_rounds = rng.uniform(0.001, 0.05), 60
    dist.barrier()
    if rank == 0:
        threading.Timer(delay_s, stop, [pids]).start()
    missing, end = [], time.monotonic() + 20
    while VICTIM not in missing and not (rank == VICTIM and missing):
        missing = group.round()
        assert time.monotonic() < end
    if rank != VICTIM:
        for i in range(num_rounds):
            if rank == 0 and i == num_rounds // 2:
                os.kill(pids[VICTIM], signal.SIGCONT)
            assert VICTIM in group.round()
    else:
        assert group.buffer.query_mask().any()
    take_victim_back(group, rank)
    assert not group.buffer.query_mask().any()
    for _ in range(10):
        assert group.round() == []
    for _ in range(4):
        ll_cases.check_round(group.buffer, group.world, zero_copy=True)
    group.buffer.destroy()


@pytest.mark.parametrize("number", range(4))
def test_a_rank_that_stops_is_masked_and_can_come_back(launch, number, is_exhaustive):
    for seed in range(10 * number, 10 * number + (10 if is_exhaustive else 1)):
        case = LARGE if number & 1 else CASE
        launch(on_rank_stops_and_returns, case, seed, num_ranks=3)


def on_rank_stops_while_it_copies(rank):
    """The victim has many rows to write when it is stopped; it writes the rest when it is resumed,
    while the others receive in the same halves. Every element of a row is its rank + 1."""
    num_tokens, most, hidden = (20, 1024, 400), 1024, 7168
    sizes = dict(num_max_tokens_per_rank=most, num_experts=6)
    buffer = cases.make_buffer(
        ll_cases.backend(),
        num_experts=6,
        low_latency_bytes=Buffer.low_latency_size_hint(hidden=hidden, num_ranks=3, **sizes),
        timeout_s=STOP_S,
        mask_silent_ranks=True,
        pool_bytes=1 << 30,
    )
    topk_idx = torch.arange(6).repeat(num_tokens[rank], 1)
    x = torch.full((num_tokens[rank], hidden), rank + 1, dtype=torch.bfloat16)
    pids = gather_pids()
    dist.barrier()
    if rank == 0:
        threading.Timer(0.005, stop, [pids]).start()
    result = buffer.low_latency_dispatch(x, topk_idx, **sizes)
    for i in range(0 if rank == VICTIM else 40):
        if rank == 0 and i == 5:
            os.kill(pids[VICTIM], signal.SIGCONT)
        result = buffer.low_latency_dispatch(x, topk_idx, **sizes)
        time.sleep(0.002)
        assert result.recv_rank_counts.tolist() == [[20, 0, 400]] * 2
        assert (result.recv_x[:, :20] == 1).all()
        assert (result.recv_x[:, 20:420] == 3).all()
    dist.barrier()
    buffer.destroy()


@COPIES
def test_what_a_stopped_rank_still_writes_harms_nobody(launch):
    launch(on_rank_stops_while_it_copies, num_ranks=3)


def on_rank_masked_by_call(rank, silent):
    """All but the victim leave it out; it finds out by itself."""
    group = Group(rank, timeout_s=LONG_S if silent else 5.0, mask_silent_ranks=silent)
    old = ll_cases.dispatch(group.buffer, group.world)
    for cycle in range(3):
        dist.barrier()
        if rank != VICTIM:
            group.buffer.mask_rank(VICTIM)
            assert group.buffer.query_mask().tolist() == [r == VICTIM for r in range(3)]
        dist.barrier()
        others = [r for r in range(3) if r != VICTIM]
        if rank != VICTIM or silent:
            for _ in range(5):
                assert group.round() == (others if rank == VICTIM else [VICTIM])
            group.buffer.barrier()
        dist.barrier()
        if rank == VICTIM or cycle == 1:
            group.buffer.clear_masks()
        else:
            group.buffer.mask_rank(VICTIM, masked=False)
        dist.barrier()
        assert not group.buffer.query_mask().any()
        if cycle == 0:  # a handle from before: what it shares with the victim is gone
            combined = ll_cases.combine(group.buffer, group.world, old.handle)
            want = others if rank == VICTIM else [VICTIM]
            assert combined.missing_ranks.nonzero().flatten().tolist() == want
        assert group.round() == []
    ll_cases.check_round(group.buffer, group.world)
    group.buffer.destroy()


@pytest.mark.parametrize("silent", [True, False], ids=["mask_silent_ranks", "by call only"])
def test_a_rank_can_be_masked_and_taken_back_by_call(launch, silent):
    launch(on_rank_masked_by_call, silent, num_ranks=3)


def on_rank_does_not_answer(rank):
    group = Group(rank, timeout_s=0.5)
    group.round()
    dist.barrier()
    if rank != VICTIM:
        group.buffer.mask_rank(VICTIM)
        error = error_of(group.buffer.mask_rank, VICTIM, masked=False)
        assert isinstance(error, EPTimeoutError)
        assert error.peer == VICTIM
        assert error.phase == "return"
        assert group.buffer.query_mask()[VICTIM]
        assert group.round() == [VICTIM]
    dist.barrier()
    group.buffer.destroy()


def on_rank_not_masked_by_it(rank):
    """A rank that knows nothing of the masks raises what the others did."""
    group = Group(rank, timeout_s=LONG_S)
    dist.barrier()
    if rank != VICTIM:
        group.buffer.mask_rank(VICTIM)
    dist.barrier()
    if rank == VICTIM:
        error, seconds = timed_error_of(group.round)
        assert isinstance(error, EPTimeoutError)
        assert f"has masked rank {VICTIM}" in str(error)
        assert seconds < SOON_S
    else:
        for _ in range(20):
            assert group.round() == [VICTIM]
    dist.barrier()
    group.buffer.destroy()


def test_a_masked_rank_learns_who_left_it_out(launch):
    launch(on_rank_not_masked_by_it, num_ranks=3)


def test_without_an_answer_a_rank_stays_masked(launch):
    launch(on_rank_does_not_answer, num_ranks=3)


def on_rank_stops_while_it_returns(rank):
    """The victim is stopped when it has said that it wants to come back. The other rank takes it
    back, misses it, masks it again; then the victim is resumed."""
    case = replace(CASE, num_ranks=2)
    group = Group(rank, case, timeout_s=STOP_S, mask_silent_ranks=True)
    pids = gather_pids()
    assert group.round() == []
    dist.barrier()
    group.buffer.mask_rank(1 - rank)
    dist.barrier()
    if rank == VICTIM:
        error = error_of(group.buffer.clear_masks)
        assert isinstance(error, EPTimeoutError), repr(error)
        assert error.phase == "return"
    else:
        time.sleep(0.3)
        stop(pids)
        group.buffer.mask_rank(VICTIM, masked=False)
        for _ in range(3):
            assert group.round() == [VICTIM]
        os.kill(pids[VICTIM], signal.SIGCONT)
    dist.barrier()
    assert group.buffer.query_mask().tolist() == [r != rank for r in range(2)]
    assert group.round() == [1 - rank]
    dist.barrier()
    group.buffer.clear_masks()
    dist.barrier()
    for _ in range(5):
        assert group.round() == []
    dist.barrier()
    group.buffer.destroy()


@COPIES
def test_a_rank_that_stops_while_it_returns_stays_masked(launch):
    launch(on_rank_stops_while_it_returns, num_ranks=2)


def fill_pool(buffer):
    """Tensors that leave no room for a window."""
    tensors = []
    for shift in range(28, 15, -1):
        with contextlib.suppress(EPDeviceError):
            while True:
                tensors.append(buffer.empty(1 << shift, dtype=torch.uint8))
    return tensors


def on_rank_full_pool(rank):
    group = Group(rank, timeout_s=LONG_S)
    assert group.round() == []
    dist.barrier()
    if rank != VICTIM:
        group.buffer.mask_rank(VICTIM)
    for _ in range(0 if rank == VICTIM else 2):
        tensors = fill_pool(group.buffer) if rank == 0 else []
        error, seconds = timed_error_of(ll_cases.dispatch, group.buffer, group.world)
        assert isinstance(error, EPDeviceError if rank == 0 else EPConfigError), repr(error)
        assert "(pool_bytes) has no free range" in str(error)
        assert rank == 0 or "rank 0 refused this call" in str(error)
        assert seconds < SOON_S
        del tensors
    for _ in range(0 if rank == VICTIM else 5):
        assert group.round() == [VICTIM]
    take_victim_back(group, rank)
    for _ in range(5):  # windows that were quarantined are given back
        assert group.round() == []
    group.buffer.destroy()


@WINDOWS
def test_a_rank_whose_pool_is_full_refuses_the_call_and_works_on(launch):
    launch(on_rank_full_pool, num_ranks=3)


def on_rank_two_dead(rank, victims):
    case = replace(CASE, num_ranks=4, num_tokens=(9, 30, 64, 20), num_experts=8)
    group = Group(rank, case, timeout_s=LONG_S, mask_silent_ranks=True)
    group.round()
    if rank in victims:
        time.sleep(0.05 * rank)
        die()
    end, missing = time.monotonic() + 20, []
    while missing != list(victims):
        missing = group.round()
        assert time.monotonic() < end
    for _ in range(10):
        assert group.round() == list(victims)
    group.buffer.destroy()


def on_rank_two_stopped(rank, victims):
    case = replace(CASE, num_ranks=4, num_tokens=(9, 30, 64, 20), num_experts=8)
    group = Group(rank, case, timeout_s=STOP_S, mask_silent_ranks=True)
    pids = gather_pids()
    group.round()
    dist.barrier()
    if rank in victims:
        time.sleep(60)
    time.sleep(0.3)  # all have left the barrier
    for victim in victims:
        os.kill(pids[victim], signal.SIGSTOP)
    begin = time.monotonic()
    assert group.round() == list(victims)
    assert time.monotonic() - begin < 1.7 * STOP_S
    for _ in range(10):
        assert group.round() == list(victims)
    group.buffer.destroy()


def test_silent_ranks_are_waited_for_together(launch):
    """A rank that waited for them in turn would be silent itself to a peer that waits for it."""
    launch(on_rank_two_stopped, (1, 2), num_ranks=4, lost=(1, 2))


@KILLS
@pytest.mark.parametrize("victims", [(0, 3), (1, 2, 3)], ids=str)
def test_several_ranks_may_be_masked(launch, victims):
    launch(on_rank_two_dead, victims, num_ranks=4, lost=victims)

"""Buffers of some ranks of a group: the others are not needed, so a buffer can be made anew when a
rank was lost.
"""

import itertools
import os
import signal
import threading
import time

import cases
import pytest
import torch.distributed as dist
from backends import backends
from cases import Case, World
from test_faults import LOSS, VICTIM, Group, error_of

from ep_kernels import EPConfigError, EPTimeoutError, remaining_ranks

DEVICES = backends("cpu", "cuda")
FOUR_RANKS = pytest.mark.parametrize("num_ranks", [4])
FOUR = Case(num_ranks=4, num_tokens=(40, 30, 50, 20), num_topk=3, num_experts=12)


def check_buffer(backend, ranks, **options):
    """A round trip among `ranks`, of which this rank is one."""
    case = Case(num_ranks=len(ranks), num_experts=12)
    with cases.make_buffer(backend, case=case, ranks=ranks, **options) as buffer:
        rank = ranks.index(dist.get_rank())
        assert (buffer.rank, buffer.num_ranks) == (rank, len(ranks))
        cases.check_round_trip(buffer, World(case, rank))
        buffer.barrier()


def on_rank_subset(rank, backend, subsets):
    for subset in subsets:
        if rank in subset:
            check_buffer(backend, subset)


@DEVICES
@FOUR_RANKS
def test_the_other_ranks_need_not_take_part(ranks, backend, num_ranks):
    ranks.run(on_rank_subset, backend, [[1, 3], [0, 2, 3], [2], [1, 3], [0, 1, 2, 3], [1, 3]])


def call_for_ever(group, operation):
    while True:
        group.call(operation)


def lose_after(delay_s, how):
    """This process is killed or stopped, from another thread; calls do not hold Python's lock."""
    number = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}[how]
    timer = threading.Timer(delay_s, os.kill, (os.getpid(), number))
    timer.daemon = True
    timer.start()


def on_rank_lost(rank, backend, operation, how):
    group = Group(rank, backend, FOUR, timeout_s=timeout_of(backend, how))
    if rank == VICTIM:
        lose_after(0.05, how)
    lost = error_of(call_for_ever, group, operation)
    assert isinstance(lost, EPTimeoutError)
    assert lost.peer == VICTIM, str(lost)
    group.destroy()
    remaining = remaining_ranks(lost)
    check_buffer(backend, remaining)
    return remaining


def timeout_of(backend, how):
    return 2.0 if how == "stopped" else 30.0 if backend == "nodes" else LOSS[backend][0]


@pytest.mark.without_mps
@DEVICES
@pytest.mark.parametrize(
    ("operation", "how"),
    [
        *((name, "killed") for name in ("dispatch", "cached dispatch", "combine", "barrier")),
        *((name, "stopped") for name in ("dispatch", "combine")),
    ],
)
def test_the_remaining_ranks_go_on_with_a_new_buffer(launch, backend, operation, how):
    result = launch(on_rank_lost, backend, operation, how, num_ranks=4, lost=[VICTIM])
    assert result.values == [None if rank == VICTIM else [0, 1, 3] for rank in range(4)]


class Training:
    """Steps of dispatch and combine among the remaining ranks of four, with results that are
    checked in each: what a program does that outlives its ranks.

    Attributes:
        first_step: from which the next run goes on. When one is lost, a rank may have finished the
            step that another has not, so all go back to a step that they agree on.
    """

    def __init__(self, rank, backend):
        self.rank, self.backend, self.remaining = rank, backend, [0, 1, 2, 3]
        self.first_step = 0

    def run(self, num_steps=None, *, timeout_s, how=None):
        """Until a rank is lost, or for some steps. `how`: this rank is, soon."""
        case = Case(num_ranks=len(self.remaining), num_experts=12)
        options = dict(ranks=self.remaining, timeout_s=timeout_s)
        if self.backend == "nodes":  # of the same size; one of two ranks has lost one
            options["num_local_ranks"] = 2 if len(self.remaining) == 4 else 1
        world = World(case, self.remaining.index(self.rank))
        with cases.make_buffer(self.backend, case=case, **options) as buffer:
            if how is not None:
                lose_after(0.05, how)
            for i in itertools.count() if num_steps is None else range(num_steps):
                cases.check_round_trip(buffer, world, seed=self.first_step + i)
        self.first_step += num_steps


def on_rank_loses_two(rank, backend, losses):
    training = Training(rank, backend)
    training.run(2, timeout_s=30.0)
    for victim, how in losses:
        timeout_s = timeout_of(backend, how)
        lost = error_of(training.run, timeout_s=timeout_s, how=how if rank == victim else None)
        assert isinstance(lost, EPTimeoutError), repr(lost)
        assert training.remaining[lost.peer] == victim, str(lost)
        training.remaining = remaining_ranks(lost, ranks=training.remaining)
        training.run(2, timeout_s=30.0)
    return training.remaining


@pytest.mark.without_mps
@backends("cpu", "nodes", "cuda")
def test_a_program_outlives_one_rank_after_the_other(launch, backend):
    """In the same processes: a step raises, naming the rank, and the others go on without it."""
    losses = [(1, "stopped"), (2, "killed")]
    lost = [victim for victim, _ in losses]
    result = launch(on_rank_loses_two, backend, losses, num_ranks=4, lost=lost)
    remaining = [rank for rank in range(4) if rank not in lost]
    assert result.values == [remaining if rank in remaining else None for rank in range(4)]


def on_rank_loses_several(rank, backend, victims):
    group = Group(rank, backend, FOUR, timeout_s=timeout_of(backend, "killed"))
    if rank in victims:
        os.kill(os.getpid(), signal.SIGKILL)
    lost = error_of(call_for_ever, group, "dispatch")
    group.destroy()
    remaining = remaining_ranks(lost, timeout_s=2.0)
    check_buffer(backend, remaining)
    return remaining


@pytest.mark.without_mps
@DEVICES
def test_ranks_that_lose_several_at_once_agree_on_who_remains(launch, backend):
    result = launch(on_rank_loses_several, backend, [1, 3], num_ranks=4, lost=[1, 3])
    assert result.values == [[0, 2], None, [0, 2], None]


def gave_up_on(peer, phase="done"):
    return EPTimeoutError("lost", rank=0, phase=phase, peer=peer)


def on_rank_agrees(rank):
    """1 and 3 gave up on each other, but both are there when 0, whom nobody gave up on, comes."""
    time.sleep(0.3 if rank == 0 else 0.0)
    if rank != 2:
        assert remaining_ranks(gave_up_on({0: 2, 1: 3, 3: 1}[rank])) == [0, 1, 3]
    dist.barrier()
    if rank == 2:
        with pytest.raises(EPTimeoutError, match=r"came too late: .*\[0, 1, 3\] go on") as info:
            remaining_ranks(gave_up_on(2))
        assert info.value.peer == 2


def on_rank_lost_meanwhile(rank, backend):
    """1 is lost before a buffer of 1, 2 and 3 is made: the others go on from there."""
    ranks = [1, 2, 3]
    if rank in (0, 1):
        return None
    lost = error_of(cases.make_buffer, backend, num_experts=12, ranks=ranks, timeout_s=0.5)
    assert lost.peer == 1
    remaining = remaining_ranks(lost, ranks=ranks)
    check_buffer(backend, remaining)
    return remaining


@DEVICES
@FOUR_RANKS
def test_a_rank_that_is_lost_before_the_new_buffer_is_made_is_left_out_too(
    launch, backend, num_ranks
):
    result = launch(on_rank_lost_meanwhile, backend, num_ranks=num_ranks)
    assert result.values == [None, None, [2, 3], [2, 3]]


def on_rank_in_vain(rank):
    """1 waits for 0, which nobody gave up on, and then goes on alone."""
    if rank == 1:
        assert remaining_ranks(gave_up_on(2), ranks=[0, 1, 3], timeout_s=0.05) == [1]
    dist.barrier()
    if rank == 0:
        with pytest.raises(EPTimeoutError, match=r"of ranks \[0, 1, 3\], \[1\] go on"):
            remaining_ranks(gave_up_on(2), ranks=[0, 1, 3], timeout_s=0.05)


@FOUR_RANKS
def test_who_remains_is_the_same_list_for_all_in_it(launch, num_ranks):
    launch(on_rank_agrees, num_ranks=num_ranks)


@FOUR_RANKS
def test_a_rank_that_does_not_ask_in_time_is_left_out_and_told_so(launch, num_ranks):
    launch(on_rank_in_vain, num_ranks=num_ranks)


def on_rank_asks_wrongly(rank):
    for peer, phase in ((-1, "done"), (2, "done"), (None, "done"), (2, "bootstrap")):
        with pytest.raises(EPConfigError, match=rf"error\.peer={peer} .* of ranks \[0, 1\]"):
            remaining_ranks(gave_up_on(peer, phase))
    for wrong in (0, "soon"):
        with pytest.raises(EPConfigError, match=f"timeout_s={wrong!r} is not a positive number"):
            remaining_ranks(gave_up_on(0), timeout_s=wrong)
    with pytest.raises(EPConfigError, match="error=1 is no EPTimeoutError"):
        remaining_ranks(1)
    with pytest.raises(EPConfigError, match="are not ascending ranks of the group, 0 to 1"):
        remaining_ranks(gave_up_on(0), ranks=[1, 0])


def test_a_lost_rank_that_is_none_is_refused(ranks):
    ranks.run(on_rank_asks_wrongly)


def on_rank_absent(rank, backend, absent):
    if rank != absent:
        with pytest.raises(EPTimeoutError, match=f"waited 0.5 s for rank {absent} to make") as info:
            cases.make_buffer(backend, num_experts=4, ranks=[0, 1], timeout_s=0.5)
        assert info.value.peer == absent
    dist.barrier()
    time.sleep(0.2 * (1 - rank))  # the first rank is late: nobody may join what it gave up
    check_buffer(backend, [0, 1])


@DEVICES
@pytest.mark.parametrize("absent", [0, 1])
def test_a_rank_that_does_not_come_is_named_and_all_may_try_again(launch, backend, absent):
    launch(on_rank_absent, backend, absent, num_ranks=2)


def on_rank_errors(rank, backend):
    for wrong in ([1, 0], [0, 0], [0, 7], [-1, 0]):
        with pytest.raises(EPConfigError, match="are not ascending ranks of the group, 0 to 1"):
            cases.make_buffer(backend, num_experts=4, ranks=wrong)
    with pytest.raises(EPConfigError, match="lacks this rank"):
        cases.make_buffer(backend, num_experts=4, ranks=[1 - rank])
    with pytest.raises(EPConfigError, match=r"timeout_s|refused"):
        cases.make_buffer(backend, num_experts=4, ranks=[0, 1], timeout_s=-1.0 if rank else None)
    check_buffer(backend, [0, 1])


@DEVICES
def test_ranks_that_are_none_are_refused(ranks, backend):
    ranks.run(on_rank_errors, backend)

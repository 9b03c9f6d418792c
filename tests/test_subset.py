"""Buffers of some ranks of a group: the others are not needed, so a buffer can be made anew when a
rank was lost.
"""

import time

import cases
import pytest
import torch.distributed as dist
from cases import Case, World
from test_faults import VICTIM, Group, die_after, error_of

from ep_kernels import EPConfigError, EPTimeoutError

FOUR_RANKS = pytest.mark.parametrize("num_ranks", [4])


def check_buffer(ranks, **options):
    """A round trip among `ranks`, of which this rank is one."""
    case = Case(num_ranks=len(ranks), num_experts=12)
    with cases.make_buffer("cpu", case=case, ranks=ranks, **options) as buffer:
        rank = ranks.index(dist.get_rank())
        assert (buffer.rank, buffer.num_ranks) == (rank, len(ranks))
        cases.check_round_trip(buffer, World(case, rank))
        buffer.barrier()


def on_rank_subset(rank, subsets):
    for subset in subsets:
        if rank in subset:
            check_buffer(subset)


@FOUR_RANKS
def test_the_other_ranks_need_not_take_part(ranks, num_ranks):
    ranks.run(on_rank_subset, [[1, 3], [0, 2, 3], [2], [1, 3], [0, 1, 2, 3], [1, 3]])


def dispatch_for_ever(group):
    while True:
        group.call("dispatch")


def on_rank_lost(rank):
    group = Group(rank, timeout_s=20.0)
    if rank == VICTIM:
        die_after(0.05)
    lost = error_of(dispatch_for_ever, group)
    assert isinstance(lost, EPTimeoutError)
    assert lost.peer == VICTIM
    group.destroy()
    check_buffer([rank for rank in range(3) if rank != lost.peer])
    return True


def test_the_remaining_ranks_go_on_with_a_new_buffer(launch):
    assert launch(on_rank_lost, num_ranks=3, lost=[VICTIM]).values == [True, True, None]


def on_rank_absent(rank, absent):
    if rank != absent:
        with pytest.raises(EPTimeoutError, match=f"waited 0.5 s for rank {absent} to make") as info:
            cases.make_buffer("cpu", num_experts=4, ranks=[0, 1], timeout_s=0.5)
        assert info.value.peer == absent
    dist.barrier()
    time.sleep(0.2 * (1 - rank))  # the first rank is late: nobody may join what it gave up
    check_buffer([0, 1])


@pytest.mark.parametrize("absent", [0, 1])
def test_a_rank_that_does_not_come_is_named_and_all_may_try_again(launch, absent):
    launch(on_rank_absent, absent, num_ranks=2)


def on_rank_errors(rank):
    for wrong in ([1, 0], [0, 0], [0, 7], [-1, 0]):
        with pytest.raises(EPConfigError, match="are not ascending ranks of the group, 0 to 1"):
            cases.make_buffer("cpu", num_experts=4, ranks=wrong)
    with pytest.raises(EPConfigError, match="lacks this rank"):
        cases.make_buffer("cpu", num_experts=4, ranks=[1 - rank])
    with pytest.raises(EPConfigError, match=r"timeout_s|refused"):
        cases.make_buffer("cpu", num_experts=4, ranks=[0, 1], timeout_s=-1.0 if rank else None)
    check_buffer([0, 1])


def test_ranks_that_are_none_are_refused(ranks):
    ranks.run(on_rank_errors)

"""Buffers of some ranks of a group: the others are not needed, so a buffer can be made anew when a
rank was lost.
"""

import time

import cases
import pytest
import torch.distributed as dist
from backends import backends
from cases import Case, World
from test_faults import LOSS, OPERATIONS, VICTIM, Group, die_after, error_of

from ep_kernels import EPConfigError, EPTimeoutError

DEVICES = backends("cpu", "cuda")
FOUR_RANKS = pytest.mark.parametrize("num_ranks", [4])


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


def on_rank_lost(rank, backend, operation):
    group = Group(rank, backend, timeout_s=LOSS[backend][0])
    if rank == VICTIM:
        die_after(0.05)
    lost = error_of(call_for_ever, group, operation)
    assert isinstance(lost, EPTimeoutError)
    assert lost.peer == VICTIM
    group.destroy()
    check_buffer(backend, [rank for rank in range(3) if rank != lost.peer])
    return True


@pytest.mark.without_mps
@DEVICES
@OPERATIONS
def test_the_remaining_ranks_go_on_with_a_new_buffer(launch, backend, operation):
    result = launch(on_rank_lost, backend, operation, num_ranks=3, lost=[VICTIM])
    assert result.values == [True, True, None]


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

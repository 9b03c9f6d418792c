"""What a rank under mpirun checks: mpirun -n 4 python tests/mpi_ranks.py DIRECTORY.

Writes to DIRECTORY/<check>.<rank> "right", or the traceback of the first thing that was not.
"""

import gc
import sys
import traceback
from pathlib import Path

import cases
import deep_ep_cases
import ll_cases
import pytest
import torch
import torch.distributed as dist
from cases import Case, World
from mpi4py import MPI

import ep_kernels
from ep_kernels.config import Layout
from ep_kernels.errors import EPConfigError, EPTimeoutError
from ep_kernels.lanes import Message
from ep_kernels.mpi_lane import MpiLane
from ep_kernels.topology import Topology

NUM_RANKS = 4
SILENT = 2


def check_round_trips(comm, backend="cpu"):
    """Layouts, types, placements and awkward sizes, all compared with the specification."""
    for case in (
        Case(num_ranks=NUM_RANKS, num_experts=8),
        Case(num_ranks=NUM_RANKS, num_experts=8, layout=Layout.EXPERT_MAJOR, expert_alignment=8),
        Case(num_ranks=NUM_RANKS, num_experts=8, dtype="fp8", hidden=2880),
        Case(num_ranks=NUM_RANKS, num_experts=8, placement=(3, 0, 1, 2, 2, 1, 0, 3)),
        Case(num_ranks=NUM_RANKS, num_experts=8, routing="one_expert", num_biases=2),
    ):
        world = World(case, comm.Get_rank())
        with cases.make_buffer(backend, group=comm, case=case) as buffer:
            cases.check_round_trip(buffer, world)


def check_round_trips_over_nodes(comm):
    check_round_trips(comm, "nodes")


def check_low_latency_calls_over_nodes(comm):
    case = ll_cases.Case(num_ranks=NUM_RANKS, num_topk=3, format="fp8", wire="fp8")
    options = dict(group=comm, num_experts=case.num_experts, low_latency_bytes=case.hint)
    with cases.make_buffer("nodes", **options) as buffer:
        ll_cases.check_round(buffer, ll_cases.World(case, comm.Get_rank()))


def check_torch_distributed_is_not_needed(comm):
    check_round_trip_of(comm, num_ranks=NUM_RANKS)
    assert not dist.is_initialized()


def check_parts_of_a_communicator(comm):
    """Groups of their own rank numbers, used in turn with one of all ranks."""
    rank = comm.Get_rank()
    part = comm.Split(color=rank % 2, key=-rank)
    assert part.Get_rank() == (1 if rank < 2 else 0)
    case_of_all = Case(num_ranks=NUM_RANKS, num_experts=8)
    case_of_part = Case(num_ranks=2, seed=100 + rank % 2)
    with (
        cases.make_buffer("cpu", group=comm, case=case_of_all) as of_all,
        cases.make_buffer("cpu", group=part, case=case_of_part) as of_part,
    ):
        for seed in range(3):
            cases.check_round_trip(of_all, World(case_of_all, rank), seed=seed)
            cases.check_round_trip(of_part, World(case_of_part, part.Get_rank()), seed=seed)
    part.Free()


def check_a_communicator_of_one_rank(comm):
    check_round_trip_of(MPI.COMM_SELF, num_ranks=1)


def check_ranks_that_disagree_all_learn_it(comm):
    num_experts = 8 if comm.Get_rank() else 12
    with pytest.raises(EPConfigError, match="num_experts") as raised:
        ep_kernels.Buffer(comm, num_experts=num_experts, device="cpu")
    assert "12" in str(raised.value)
    assert "8" in str(raised.value)


def check_a_communicator_instead_of_a_group(comm):
    """In the interface of DeepEP: Buffer(comm=)."""
    deep_ep_cases.round_trip_over(comm)


def check_a_silent_rank_is_named(comm, backend="cpu"):
    case, rank = Case(num_ranks=NUM_RANKS, num_experts=8), comm.Get_rank()
    with cases.make_buffer(backend, group=comm, case=case, timeout_s=1.0) as buffer:
        world = World(case, rank)
        cases.check_round_trip(buffer, world)
        if rank != SILENT:
            with pytest.raises(EPTimeoutError) as raised:
                cases.dispatch(buffer, world, world.xs())
            assert raised.value.peer == SILENT
        comm.Barrier()


def check_a_silent_rank_of_another_node_is_named(comm):
    check_a_silent_rank_is_named(comm, "nodes")


def check_a_lower_thread_level_is_refused_on_all_ranks(comm):
    query = MPI.Query_thread
    if comm.Get_rank() == 1:
        MPI.Query_thread = lambda: MPI.THREAD_SERIALIZED
    try:
        with pytest.raises(EPConfigError, match="rank 1: .*with THREAD_SERIALIZED"):
            cases.make_buffer("nodes", group=comm, case=Case(num_ranks=NUM_RANKS, num_experts=8))
    finally:
        MPI.Query_thread = query


def check_messages_of_a_failed_call_keep_their_memory(comm):
    """They may still arrive."""
    rank, message = comm.Get_rank(), Message(seq=0, kind=0, phase=2)
    before = set(MpiLane._under_way)
    lane = MpiLane(Topology(rank=rank, num_ranks=NUM_RANKS, num_local_ranks=1), 0.2, comm)
    peers = [peer for peer in range(NUM_RANKS) if peer != rank]
    received = [lane.irecv(peer, torch.zeros(1, dtype=torch.uint8), message) for peer in peers]
    with pytest.raises(EPTimeoutError):
        lane.wait(received[0])
    del received
    gc.collect()
    kept = [pair for key, pair in MpiLane._under_way.items() if key not in before]
    assert len(kept) == len(peers)
    comm.Barrier()
    own = torch.full((1,), rank + 1, dtype=torch.uint8)
    for transfer in [lane.isend(peer, own, message) for peer in peers]:
        lane.wait(transfer)
    for peer, (request, tensor) in zip(peers, kept):
        request.Wait()
        assert tensor.item() == peer + 1
    assert len(set(MpiLane._under_way) - before) == len(peers)


def check_round_trip_of(comm, *, num_ranks):
    case = Case(num_ranks=num_ranks, num_experts=8)
    with cases.make_buffer("cpu", group=comm, case=case) as buffer:
        cases.check_round_trip(buffer, World(case, comm.Get_rank()))


CHECKS = {
    name.removeprefix("check_"): function
    for name, function in list(globals().items())
    if name.startswith("check_") and name != "check_round_trip_of"
}


def main(directory):
    torch.set_num_threads(1)
    comm = MPI.COMM_WORLD
    for name, check in CHECKS.items():
        try:
            check(comm)
            outcome = "right"
        except BaseException:
            outcome = traceback.format_exc()
        Path(directory, f"{name}.{comm.Get_rank()}").write_text(outcome)
        comm.Barrier()


if __name__ == "__main__":
    main(sys.argv[1])

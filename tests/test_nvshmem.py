"""Exchanges between GPUs over NVSHMEM. Without a network card its PEs reach each other through GPU
memory, so these tests know nothing of transports over a network.

Several ranks on one GPU need an MPS server: scripts/with_mps.sh pytest tests/test_nvshmem.py.
Functions named `on_rank_...` run on every rank; each belongs to the test below it.
"""

import os
import time

import nvshmem_cases
import pytest
import torch
import torch.distributed as dist
from nvshmem_cases import MIB, Case

from ep_kernels import env, nvshmem, nvshmem_world
from ep_kernels.bootstrap import make_bootstrap
from ep_kernels.errors import EPConfigError, EPDeviceError, EPTimeoutError
from ep_kernels.testing import RankPool, assert_bitwise_equal
from ep_kernels.topology import Topology

DEADLINE_S = 100.0


@pytest.fixture(scope="module")
def needs_nvshmem():
    if reason := nvshmem_world.why_not():
        pytest.skip(reason)


@pytest.fixture(scope="module")
def run_nodes(needs_nvshmem, rank_server):
    """Runs a function on ranks that begin NVSHMEM once for all tests. Each is a node."""
    used = set()
    with RankPool(rank_server) as pool:

        def run(num_nodes, function, *args):
            used.add(num_nodes)
            pool.get(num_nodes).run(function, *args, deadline_s=DEADLINE_S)

        yield run
        for num_nodes in used:
            run(num_nodes, on_rank_leave)


def on_rank_leave(rank):
    nvshmem_world.leave(20.0)


def on_rank_case(rank, case):
    lane = nvshmem_cases.make_lane(rank, case)
    try:
        nvshmem_cases.check_exchanges(lane, case)
    finally:
        lane.destroy()


@pytest.mark.gpu(1)
@pytest.mark.parametrize("case", nvshmem_cases.CASES, ids=str)
def test_what_is_sent_arrives(run_nodes, case):
    run_nodes(case.num_nodes, on_rank_case, case)


@pytest.mark.gpu(1)
@pytest.mark.parametrize("num_nodes", [2, 3, 8])
def test_lanes_of_other_lengths(run_nodes, num_nodes):
    case = Case(num_nodes=num_nodes, most=100)
    run_nodes(num_nodes, on_rank_case, case)


def on_rank_bytes(rank, case, size):
    """Ranges of different sizes, at odd places of one memory."""
    lane = nvshmem_cases.make_lane(rank, case)
    nodes = range(case.num_nodes)
    sizes = [[0 if src == dst else size + 3 * src + dst for dst in nodes] for src in nodes]
    stride = size + 100
    for step in range(3):
        random = [torch.Generator().manual_seed(10 * step + src) for src in nodes]
        inputs = [
            torch.randint(256, (stride * case.num_nodes,), generator=one, dtype=torch.uint8)
            for one in random
        ]
        memory = torch.cat([inputs[rank], torch.zeros_like(inputs[rank])]).to(lane.device)
        middle = stride * case.num_nodes
        peers = [node for node in nodes if node != rank]
        sends = {node: (stride * node + step, sizes[rank][node]) for node in peers}
        recvs = {node: (middle + stride * node + 2 * step, sizes[node][rank]) for node in peers}
        lane.exchange_bytes(
            {node: memory[first : first + count] for node, (first, count) in sends.items()},
            {node: memory[first : first + count] for node, (first, count) in recvs.items()},
        )
        lane.wait()
        want = torch.cat([inputs[rank], torch.zeros_like(inputs[rank])])
        for node, (first, count) in recvs.items():
            begin = stride * rank + step
            want[first : first + count] = inputs[node][begin : begin + count]
        assert_bitwise_equal(memory.cpu(), want, name=f"step {step}")
    lane.destroy()


@pytest.mark.gpu(1)
@pytest.mark.parametrize("size", [0, 1, 4096, 3 * MIB // 2])
def test_bytes_arrive_where_they_belong(run_nodes, size):
    run_nodes(4, on_rank_bytes, Case(), size)


def on_rank_several_lanes(rank, case):
    """Two lanes at once, and one after they are gone."""
    first, second = (nvshmem_cases.make_lane(rank, case) for _ in range(2))
    for _ in range(3):
        for lane in (first, second):
            nvshmem_cases.check_exchanges(lane, case)
    for lane in (first, second):
        lane.destroy()
        lane.destroy()
    with pytest.raises(EPDeviceError, match="destroyed"):
        first.wait()
    on_rank_case(rank, case)


@pytest.mark.gpu(1)
def test_a_process_may_have_several_lanes(run_nodes):
    run_nodes(4, on_rank_several_lanes, Case())


def on_rank_late(rank, case):
    """A rank runs ahead of one that is late, as far as its rings let it."""
    lane = nvshmem_cases.make_lane(rank, case)
    nvshmem_cases.check_exchanges(lane, case)
    for _ in range(4):
        if rank == 1:
            time.sleep(0.2)
        nvshmem_cases.check_exchanges(lane, case)
    lane.destroy()


@pytest.mark.gpu(1)
def test_a_late_rank_is_waited_for(run_nodes):
    case = Case(num_slots=1, most=300, staging_bytes=256 << 10)
    run_nodes(4, on_rank_late, case)


def on_rank_bad_arguments(rank):
    case = Case()
    lane = nvshmem_cases.make_lane(rank, case)
    rows = torch.zeros(8, 16, dtype=torch.uint8, device=lane.device)
    good = [0] * case.num_nodes
    own = [int(node == rank) for node in range(case.num_nodes)]
    for arguments, message in [
        (([], good, good), "0 sections"),
        (([(rows, rows)], own, good), f"num_sent=.*own node {rank}"),
        (([(rows, rows)], good, [0, 1]), "num_received=.*4 counts"),
        (([(rows, rows[:, :8].contiguous())], good, good), "16 bytes.* 8"),
        (([(rows.cpu(), rows)], good, good), "source 0 is on cpu"),
        (([(rows, rows.T)], good, good), "destination 0.*not contiguous"),
    ]:
        with pytest.raises(EPConfigError, match=message):
            lane.exchange(*arguments)
    large = torch.zeros(1, 4 << 20, dtype=torch.uint8, device=lane.device)
    with pytest.raises(EPConfigError, match=r"staging_bytes=\d+ make slots of \d+ bytes"):
        lane.exchange([(large, large)], good, good)
    nvshmem_cases.check_exchanges(lane, case)
    lane.destroy()


@pytest.mark.gpu(1)
def test_bad_arguments_send_nothing(run_nodes):
    run_nodes(4, on_rank_bad_arguments)


def on_rank_disagree(rank):
    with pytest.raises(EPConfigError, match="num_blocks: rank 0 has 2, rank 1 3"):
        nvshmem_cases.make_lane(rank, Case(num_blocks=2 if rank == 0 else 3))


@pytest.mark.gpu(1)
def test_ranks_that_disagree_say_so(run_nodes):
    run_nodes(4, on_rank_disagree)


def on_rank_lanes(rank, case):
    """Two ranks per node: two lanes."""
    lane = nvshmem_cases.make_lane(rank, case, num_local_ranks=2)
    nvshmem_cases.check_exchanges(lane, case)
    lane.destroy()


@pytest.mark.gpu(1)
def test_lanes_of_a_node_know_nothing_of_each_other(run_nodes):
    run_nodes(4, on_rank_lanes, Case(num_nodes=2))


def on_rank_silent(rank, case, silent):
    lane = nvshmem_cases.make_lane(rank, case, timeout_s=3.0)
    nvshmem_cases.check_exchanges(lane, case)
    dist.barrier()
    if rank == silent:
        time.sleep(5.0)
    else:
        begin = time.monotonic()
        nvshmem_cases.start_exchange(lane, case, 0)
        with pytest.raises(EPTimeoutError, match=f"rank {silent}") as raised:
            lane.wait()
        assert time.monotonic() - begin < 8.0
        assert (raised.value.rank, raised.value.peer) == (rank, silent)
        assert raised.value.phase == "transfer"
        with pytest.raises(EPTimeoutError, match=f"rank {silent}"):
            nvshmem_cases.start_exchange(lane, case, 0)
    dist.barrier()
    if rank == silent:  # comes back, and hears that it was given up on
        nvshmem_cases.start_exchange(lane, case, 0)
        with pytest.raises(EPTimeoutError, match=f"gave up on rank {silent}"):
            lane.wait()
    lane.destroy()
    nvshmem_world.leave(20.0)


@pytest.mark.gpu(1)
@pytest.mark.parametrize("is_direct", [False, True], ids=["staged", "direct"])
@pytest.mark.parametrize("silent", [0, 3])
def test_a_silent_rank_is_named(needs_nvshmem, launch, silent, is_direct):
    case = Case(is_direct=is_direct, pattern="even", num_exchanges=1, most=300)
    launch(on_rank_silent, case, silent, num_ranks=4, deadline_s=DEADLINE_S)


def on_rank_mismatch(rank):
    """Rank 0 sends five rows, rank 1 expects four."""
    lane = nvshmem_cases.make_lane(rank, Case(num_nodes=2), timeout_s=3.0)
    rows = torch.zeros(8, 16, dtype=torch.uint8, device=lane.device)
    sent, received = ([0, 5], [0, 0]) if rank == 0 else ([0, 0], [4, 0])
    lane.exchange([(rows, rows.clone())], sent, received)
    if rank == 0:
        with pytest.raises(EPTimeoutError, match="rank 1"):
            lane.wait()
    else:
        with pytest.raises(EPConfigError, match="rank 0 sent a piece of 96 bytes.*expected 80"):
            lane.wait()
    lane.destroy()
    nvshmem_world.leave(20.0)


@pytest.mark.gpu(1)
def test_other_sizes_than_expected_are_an_error(needs_nvshmem, launch):
    launch(on_rank_mismatch, num_ranks=2, deadline_s=DEADLINE_S)


# ---- without a GPU -------------------------------------------------------------------------------


def on_rank_missing(rank):
    topology = Topology(rank=rank, num_ranks=2, num_local_ranks=1)
    device = torch.device("cuda", 0)
    with pytest.raises(
        EPDeviceError, match=r"rank 0: .*(is not built|cannot be loaded|needs a GPU)"
    ):
        nvshmem.NvshmemLane(make_bootstrap(None), topology, device=device, timeout_s=5.0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_every_rank_says_what_is_missing(ranks):
    ranks.run(on_rank_missing)


def on_rank_one_node(rank):
    topology = Topology(rank=rank, num_ranks=2, num_local_ranks=2)
    with pytest.raises(EPConfigError, match="num_nodes=1"):
        nvshmem.NvshmemLane(
            make_bootstrap(None), topology, device=torch.device("cpu"), timeout_s=5.0
        )


def test_a_lane_needs_two_nodes(ranks):
    ranks.run(on_rank_one_node)


@pytest.mark.parametrize("name", ["staging_bytes", "num_blocks", "num_slots"])
def test_options_are_positive(name):
    with pytest.raises(EPConfigError, match=f"{name}=0"):
        nvshmem.NvshmemOptions(**{name: 0})


def test_settings_of_the_user_are_kept(monkeypatch):
    monkeypatch.setenv("NVSHMEM_DISABLE_NVLS", "0")
    monkeypatch.delenv("NVSHMEM_SYMMETRIC_SIZE", raising=False)
    monkeypatch.setenv("NVSHMEM_CUMEM_GRANULARITY", "4194304")
    env.set_nvshmem_defaults(100 << 20)
    assert os.environ["NVSHMEM_DISABLE_NVLS"] == "0"
    assert os.environ["NVSHMEM_SYMMETRIC_SIZE"] == str(100 << 20)
    assert os.environ["NVSHMEM_CUMEM_GRANULARITY"] == "4194304"

"""The rank launcher: what it promises when ranks raise, hang, die or leave things behind."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ep_kernels.testing import RankError, Ranks, RankServer


def on_rank_sum(rank, addend):
    total = torch.tensor([rank + addend])
    dist.all_reduce(total)
    return total.item(), os.environ["OMP_NUM_THREADS"], torch.get_num_threads()


def on_rank_pid(rank):
    return os.getpid()


def on_rank_raise(rank):
    if rank == 1:
        raise ValueError("no such luck")
    dist.barrier()


def on_rank_hang(rank):
    if rank == 1:
        time.sleep(1000)


def on_rank_die(rank):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return rank


def on_rank_leave_something(rank, what):
    if what == "process":
        subprocess.Popen(["sleep", "1000"])
    if what == "temporary file":
        tempfile.mkstemp()
    if what == "shared memory":
        Path(f"/dev/shm/ep_kernels_test_{os.getpid()}").touch()


def ends_soon(pid):
    """Whether a process that was sent SIGKILL is gone, or a zombie, within seconds."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        try:
            if "State:\tZ" in Path(f"/proc/{pid}/status").read_text():
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.01)
    return False


def test_a_function_runs_on_every_rank_with_a_process_group(ranks):
    assert ranks.run(on_rank_sum, 10) == [(21, "1", 1)] * 2


def test_ranks_of_the_pool_are_kept_until_they_fail(rank_pool):
    first = rank_pool.get(2).run(on_rank_pid)
    assert rank_pool.get(2).run(on_rank_pid) == first
    with pytest.raises(RankError):
        rank_pool.get(2).run(on_rank_raise)
    assert not set(rank_pool.get(2).run(on_rank_pid)) & set(first)
    for pid in first:
        assert not Path(f"/proc/{pid}").exists()


def test_the_first_exception_comes_back_with_its_traceback(launch):
    with pytest.raises(RankError, match=r"(?s)rank 1 failed.*on_rank_raise.*no such luck") as info:
        launch(on_rank_raise, num_ranks=2)
    assert info.value.rank == 1
    assert isinstance(info.value.__cause__, ValueError)


def test_a_rank_that_hangs_is_shown_with_its_stack(launch):
    start = time.monotonic()
    with pytest.raises(RankError, match=r"(?s)\[1\] did not answer within 0.5 s.*on_rank_hang"):
        launch(on_rank_hang, num_ranks=2, deadline_s=0.5)
    assert time.monotonic() - start < 5


def test_a_rank_that_dies_is_an_error_unless_it_is_expected(launch):
    with pytest.raises(RankError, match="rank 1 failed:\ndied: killed by SIGKILL"):
        launch(on_rank_die, num_ranks=2)
    result = launch(on_rank_die, num_ranks=2, lost=[1])
    assert result.values == [0, None]
    assert result.exit_codes == [0, -signal.SIGKILL]


@pytest.mark.parametrize("what", ["process", "temporary file", "shared memory"])
def test_what_a_rank_leaves_behind_is_an_error(launch, what):
    with pytest.raises(RankError, match=what) as info:
        launch(on_rank_leave_something, what, num_ranks=1)
    for word in str(info.value).split():
        if what == "shared memory" and word.startswith("/dev/shm/"):
            Path(word).unlink()
    if what == "process":
        pid = int(str(info.value).split("process ")[1].split()[0])
        assert ends_soon(pid)  # killed with its rank


def test_closures_are_refused(ranks):
    with pytest.raises((AttributeError, TypeError, ValueError), match="local object"):
        ranks.run(lambda rank: rank)


PARENT = """
import os, signal, sys
from ep_kernels.testing import Ranks, RankServer
ranks = Ranks(RankServer(), 2)
print(*ranks.pids, ranks.folder, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_when_the_parent_is_killed_ranks_and_files_go_too():
    parent = subprocess.run([sys.executable, "-c", PARENT], capture_output=True, text=True)
    assert parent.returncode == -signal.SIGKILL, parent.stderr
    *pids, folder = parent.stdout.split()
    end = time.monotonic() + 10
    left = [Path(folder), *(Path(f"/proc/{pid}") for pid in pids)]
    while any(path.exists() for path in left) and time.monotonic() < end:
        time.sleep(0.05)
    assert not [path for path in left if path.exists()]


def test_closing_the_server_ends_its_ranks():
    with RankServer() as server:
        pids = Ranks(server, 2).pids
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]

"""Starts the ranks of a benchmark on this machine, and ends them whatever happens."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ep_kernels.bench.worker import Job

POLL_S = 0.1
PATIENCE_S = 5.0
JOIN_TIMEOUT = timedelta(seconds=60)

# glibc gives large blocks back to the system and takes them anew, page by page, on every call.
# Keeping them makes the baselines faster, and is what a caching allocator does elsewhere.
MALLOC_SETTINGS = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}


class LaunchError(Exception):
    """The ranks did not finish; their output says why."""


def why_no_mpi() -> str:
    """What the MPI baseline lacks on this machine, or ""."""
    if shutil.which("mpirun") is None:
        return "mpirun was not found; on Debian and Ubuntu: apt-get install openmpi-bin"
    if importlib.util.find_spec("mpi4py") is None:
        return "mpi4py is not installed: pip install mpi4py"
    return ""


def run_ranks(job: Job, *, timeout_s: float) -> dict[str, Any]:
    """Runs the job on R new processes and returns what rank 0 wrote.

    Raises:
        LaunchError: a rank failed, or the time is over.
    """
    environment = MALLOC_SETTINGS | {"OMP_NUM_THREADS": str(job.workload.num_threads)}
    run_commands(_commands(job), environment=environment, timeout_s=timeout_s)
    results: dict[str, Any] = json.loads(job.results_file.read_text())
    return results


def spawn_ranks(
    run_rank: Callable[[int, Any, str], None], options: Any, num_ranks: int, *, deadline_s: float
) -> bool:
    """Runs `run_rank(rank, options, store)` in a process for each rank; `store` is for
    join_ranks(). Whether all were over before the deadline, after which those that were not are
    killed.

    Raises:
        torch.multiprocessing.ProcessRaisedException: a rank has raised.
    """
    end = time.monotonic() + deadline_s
    with tempfile.TemporaryDirectory() as folder:
        arguments = (options, os.path.join(folder, "store"))
        context = mp.spawn(run_rank, arguments, nprocs=num_ranks, join=False)
        assert context is not None
        while not context.join(timeout=1.0):
            if time.monotonic() > end:
                for process in context.processes:
                    process.kill()
                return False
    return True


def run_on_gpus(
    name: str, run_rank: Callable[[int, Any, str], None], options: argparse.Namespace
) -> int:
    """spawn_ranks() for a benchmark on GPUs with the options `ranks` and `deadline`. Its exit
    status; a problem is printed under its name."""
    if not torch.cuda.is_available():
        print(f"{name}: torch sees no CUDA device", file=sys.stderr)
        return 1
    if spawn_ranks(run_rank, options, options.ranks, deadline_s=options.deadline):
        return 0
    print(f"{name}: not over after {options.deadline} s", file=sys.stderr)
    return 1


def join_ranks(rank: int, num_ranks: int, store: str) -> None:
    """Makes the default process group of ranks that spawn_ranks() has started."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=num_ranks,
        timeout=JOIN_TIMEOUT,
    )


def run_commands(
    commands: Sequence[Sequence[str]], *, environment: Mapping[str, str], timeout_s: float
) -> None:
    """Runs commands at the same time, each in a session of its own, until all have succeeded.

    Args:
        commands: with their arguments.
        environment: added to that of this process.
        timeout_s: for all of them.

    Raises:
        LaunchError: one failed, or the time is over. The others are ended then.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the ranks are ended, too
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for command in commands:
            # start_new_session: one signal reaches mpirun and all that it started.
            processes.append(
                subprocess.Popen(command, env=os.environ | environment, start_new_session=True)
            )
        _wait(processes, timeout_s)
    finally:
        _end(processes)


def _commands(job: Job) -> list[list[str]]:
    """mpirun, or one command per rank."""
    worker = [sys.executable, "-m", "ep_kernels.bench.worker", job.to_json()]
    num_ranks = job.workload.num_ranks
    if "mpi" not in job.contenders:
        return [[*worker, str(rank)] for rank in range(num_ranks)]
    command = ["mpirun", "-n", str(num_ranks)]
    version = subprocess.run(["mpirun", "--version"], capture_output=True, text=True, check=False)
    if "Open MPI" in version.stdout:
        command += ["--bind-to", "none"]
        command += ["--allow-run-as-root"] if os.geteuid() == 0 else []
        # Also makes waiting ranks give way to others, so only where they share cores.
        command += ["--oversubscribe"] if num_ranks > len(os.sched_getaffinity(0)) else []
    return [[*command, *worker]]


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    """Asks first: mpirun then removes the shared memory of its ranks."""
    for process in processes:
        process.terminate()
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait(processes: list[subprocess.Popen[bytes]], timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    while any(codes := [process.poll() for process in processes]) or None in codes:
        if failed := [code for code in codes if code]:
            raise LaunchError(f"a rank ended with exit code {failed[0]}, see above")
        if time.monotonic() > end:
            raise LaunchError(f"not finished within {timeout_s:g} s (--timeout)")
        time.sleep(POLL_S)

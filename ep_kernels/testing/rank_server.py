"""The process that ranks are forked from: it has imported torch, so that a rank starts in
milliseconds instead of seconds.

    parent (pytest)  -- requests -->  server  -- fork -->  rank 0 .. R-1
          \\______________ jobs and answers, one socket per rank ______/

The server never starts a thread and never touches CUDA, so forking it is safe. When the parent
hangs up, even because it was killed, the server ends all ranks and removes their folders; ranks
die with the server (`ep_kernels/processes.py`).
"""

from __future__ import annotations

import atexit
import faulthandler
import gc
import importlib
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import reduction
from multiprocessing.connection import Connection
from pathlib import Path

from ep_kernels.processes import die_with_parent

LEAVE, END_PYTHON = b"leave", b"end python"
"""Instead of a job: run the exit handlers and go; or take the interpreter's whole way out, which
costs a quarter of a second, as every object that was forked is touched."""

REAP_ALL_S = 5.0


@dataclass(frozen=True, kw_only=True)
class RankSpec:
    """What a rank needs to know when it starts.

    Attributes:
        rank, num_ranks: its place in the group.
        folder: the launch's own folder: file store of the process group, logs, temporary files.
        process_group: whether to start the default process group (gloo).
        timeout_s: of that process group's collectives.
    """

    rank: int
    num_ranks: int
    folder: str
    process_group: bool
    timeout_s: float

    @property
    def log(self) -> Path:
        return Path(self.folder) / f"rank{self.rank}.log"

    @property
    def tmp(self) -> Path:
        return Path(self.folder) / "tmp"


def serve(requests: Connection) -> None:
    """Answers requests until the parent hangs up.

    ("fork", RankSpec), then the rank's end of its socket -> pid
    ("poll", pid) -> exit code, or None while it runs; a rank stays a zombie until it is polled
    """
    children: set[int] = set()
    folders: set[str] = set()
    while True:
        try:
            command, argument = requests.recv()
        except EOFError:
            break
        if command == "fork":
            jobs_fd = reduction.recv_handle(requests)
            parent_pid = os.getpid()
            pid = os.fork()
            if pid == 0:
                requests.close()
                die_with_parent(parent_pid)
                return run_rank(argument, Connection(jobs_fd))
            os.close(jobs_fd)
            children.add(pid)
            folders.add(argument.folder)
            requests.send(pid)
        else:
            exit_code = _poll(argument)
            if exit_code is not None:
                children.discard(argument)
            requests.send(exit_code)
    _kill_all(children)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    return None


def run_rank(spec: RankSpec, jobs: Connection) -> None:
    """Runs one job after the other until the parent hangs up or says how to end."""
    _redirect_output(spec)
    os.environ["TMPDIR"] = tempfile.tempdir = str(spec.tmp)
    if spec.process_group:
        _init_process_group(spec)
    while True:
        try:
            job = jobs.recv_bytes()
        except EOFError:
            os._exit(0)
        if job in (LEAVE, END_PYTHON):
            break
        jobs.send_bytes(_answer(spec.rank, job))
    if spec.process_group:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()
    if job == LEAVE:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _answer(rank: int, job: bytes) -> bytes:
    """Runs a job; the answer is (value, None) or (exception or None, its traceback)."""
    try:
        sys.path[:], call = pickle.loads(job)
        function, args = pickle.loads(call)
        return pickle.dumps((function(rank, *args), None))
    except Exception as error:
        text = traceback.format_exc()
        try:
            answer = pickle.dumps((error, text))
            pickle.loads(answer)
        except Exception:
            return pickle.dumps((None, text))
        return answer


def _redirect_output(spec: RankSpec) -> None:
    """Sends stdout and stderr to the rank's log; SIGUSR1 adds the stacks of all its threads."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    log_fd = os.open(spec.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log_fd, 1)
    os.dup2(log_fd, 2)
    os.close(log_fd)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)


def _init_process_group(spec: RankSpec) -> None:
    import torch.distributed as dist

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{spec.folder}/store",
        rank=spec.rank,
        world_size=spec.num_ranks,
        timeout=timedelta(seconds=spec.timeout_s),
    )


def _poll(pid: int) -> int | None:
    done, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def _kill_all(children: set[int]) -> None:
    for pid in children:
        os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + REAP_ALL_S
    while children and time.monotonic() < deadline:
        children = {pid for pid in children if _poll(pid) is None}
        time.sleep(0.01)


def main(args: list[str]) -> None:
    """Entry of the server process.

    Args:
        args: file number of its end of the request socket, then modules to import.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import torch
    import torch.distributed

    for module in args[1:]:
        importlib.import_module(module)
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    serve(Connection(int(args[0])))

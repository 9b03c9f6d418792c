"""Runs functions on R ranks of this machine: processes with a gloo process group among them.

    RankServer  the process that ranks are forked from (rank_server.py); one per test session
    Ranks       R rank processes; run() calls a function on each of them
    RankPool    Ranks kept between calls, by R; ranks that a failure has left in doubt are replaced
    launch()    fresh ranks for one call: for functions that kill, stop or leave processes

A function travels as module and name (that is how pickle does it), so it must be defined at the top
level of a module; it gets the rank first. Its result comes back pickled.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from multiprocessing import reduction
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from ep_kernels.testing.leaks import LeakCheck, processes_in
from ep_kernels.testing.rank_server import END_PYTHON, LEAVE, RankSpec

GRACE_S = 1.0
"""After a first failure the other ranks have this long to answer before they are killed."""

EXIT_S = 10.0
"""A rank that was told to stop has this long to leave."""

LOG_TAIL_CHARS = 3000


class RankError(RuntimeError):
    """A rank raised, died or did not answer; `rank` is the first one that did."""

    def __init__(self, message: str, rank: int) -> None:
        super().__init__(message)
        self.rank = rank


@dataclass(frozen=True)
class LaunchResult:
    """Of launch(): every rank's value (None for a lost one) and exit code (-9: SIGKILL)."""

    values: list[Any]
    exit_codes: list[int | None]


class RankServer:
    """Owner of the process that forks ranks. Closing it, or dying, ends all ranks.

    Args:
        preload: modules, besides torch, to import before forking.
    """

    def __init__(self, preload: Sequence[str] = ()) -> None:
        ours, theirs = socket.socketpair()
        environment = dict(os.environ, OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                "import sys; from ep_kernels.testing.rank_server import main; main(sys.argv[1:])",
                str(theirs.fileno()),
                *preload,
            ],
            pass_fds=[theirs.fileno()],
            env=environment,
        )
        theirs.close()
        self._requests = Connection(ours.detach())

    def __enter__(self) -> RankServer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def fork(self, spec: RankSpec) -> tuple[int, Connection]:
        """Starts a rank; returns its pid and the connection that takes jobs."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._requests.send(("fork", spec))
            reduction.send_handle(self._requests, theirs.fileno(), self._process.pid)
            pid = self._requests.recv()
        return pid, Connection(ours.detach())

    def poll(self, pid: int) -> int | None:
        """Exit code of a rank (negative: the signal that ended it), None while it runs."""
        self._requests.send(("poll", pid))
        exit_code: int | None = self._requests.recv()
        return exit_code

    def close(self) -> None:
        self._requests.close()
        try:
            self._process.wait(EXIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Ranks:
    """R rank processes with a gloo process group, and a folder for what they write."""

    def __init__(
        self,
        server: RankServer,
        num_ranks: int,
        *,
        process_group: bool = True,
        process_group_timeout_s: float = 60.0,
    ) -> None:
        self.num_ranks = num_ranks
        self.broken = False
        self._server = server
        self._leak_check = LeakCheck()
        self.folder = Path(tempfile.mkdtemp(prefix="ep_ranks_"))
        (self.folder / "tmp").mkdir()
        self._specs = [
            RankSpec(
                rank=rank,
                num_ranks=num_ranks,
                folder=str(self.folder),
                process_group=process_group,
                timeout_s=process_group_timeout_s,
            )
            for rank in range(num_ranks)
        ]
        started = [server.fork(spec) for spec in self._specs]
        self.pids = [pid for pid, _ in started]
        self._jobs = [jobs for _, jobs in started]
        self._exit_codes: list[int | None] = [None] * num_ranks

    def run(
        self,
        function: Callable[..., Any],
        *args: Any,
        deadline_s: float = 60.0,
        lost: Collection[int] = (),
    ) -> list[Any]:
        """Calls `function(rank, *args)` on every rank.

        Args:
            function: a top-level function of an importable module.
            *args: the same for all ranks, pickled.
            deadline_s: all ranks have to answer within this time.
            lost: ranks that are going to be killed or stopped: nobody waits for their answer.

        Returns:
            The value of each rank, None for the lost ones.

        Raises:
            RankError: with the traceback of the rank that failed first, and as its cause the
                rank's exception. All ranks are killed then.
        """
        __tracebackhide__ = True  # pytest: what the rank said is what matters
        job = pickle.dumps((sys.path, pickle.dumps((function, args))))
        for connection in self._jobs:
            connection.send_bytes(job)
        values: list[Any] = [None] * self.num_ranks
        try:
            self._collect(values, set(range(self.num_ranks)) - set(lost), deadline_s)
        except BaseException:
            self.kill()
            raise
        return values

    def _collect(self, values: list[Any], waiting: set[int], deadline_s: float) -> None:
        __tracebackhide__ = True
        end = time.monotonic() + deadline_s
        failure: RankError | None = None
        cause: BaseException | None = None
        while waiting:
            ready = wait([self._jobs[rank] for rank in waiting], max(0.0, end - time.monotonic()))
            if not ready:
                break
            for rank in sorted(waiting):
                if self._jobs[rank] not in ready:
                    continue
                waiting.discard(rank)
                value, text = self._receive(rank)
                if text is None:
                    values[rank] = value
                elif failure is None:
                    failure, cause = RankError(f"rank {rank} failed:\n{text}", rank), value
                    end = min(end, time.monotonic() + GRACE_S)
        if failure is None and waiting:
            failure = RankError(
                f"ranks {sorted(waiting)} did not answer within {deadline_s} s:\n"
                + self._stacks(waiting),
                min(waiting),
            )
        if failure is not None:
            raise failure from cause

    def _receive(self, rank: int) -> tuple[Any, str | None]:
        """A rank's answer: (value, None), or (exception, text)."""
        try:
            answer: tuple[Any, str | None] = pickle.loads(self._jobs[rank].recv_bytes())
            return answer
        except (EOFError, ConnectionResetError):
            exit_code = self._exit_code(rank, EXIT_S)
            return None, f"died: {_describe(exit_code)}\n{self._log_tail(rank)}"

    def _stacks(self, waiting: set[int]) -> str:
        """The logs of ranks that hang, with their stacks at this moment."""
        for rank in waiting:
            self._signal(rank, signal.SIGUSR1)
        time.sleep(0.3)
        return "\n".join(f"-- rank {rank}\n{self._log_tail(rank)}" for rank in sorted(waiting))

    def _log_tail(self, rank: int) -> str:
        log = self._specs[rank].log
        return log.read_text(errors="replace")[-LOG_TAIL_CHARS:] if log.exists() else ""

    def _exit_code(self, rank: int, patience_s: float) -> int | None:
        end = time.monotonic() + patience_s
        while self._exit_codes[rank] is None:
            self._exit_codes[rank] = self._server.poll(self.pids[rank])
            if self._exit_codes[rank] is None:
                if time.monotonic() > end:
                    break
                time.sleep(0.002)
        return self._exit_codes[rank]

    def _signal(self, rank: int, signum: int) -> None:
        """NOTE: a pid is ours until the server has polled its exit code; never signal it later."""
        if self._exit_codes[rank] is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pids[rank], signum)

    def kill(self) -> None:
        """Ends all ranks, and processes that they started, with SIGKILL and removes their folder.

        The object is of no use then.
        """
        if self.broken:
            return
        self.broken = True
        for rank in range(self.num_ranks):
            self._signal(rank, signal.SIGKILL)
        for rank in range(self.num_ranks):
            self._exit_code(rank, EXIT_S)
            self._jobs[rank].close()
        for pid, _ in processes_in(set(self.pids)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self, *, lost: Collection[int] = (), end_python: bool = False) -> list[int | None]:
        """Lets all ranks leave; kills the lost ones.

        Args:
            lost: ranks that cannot leave by themselves.
            end_python: leave through the end of the interpreter; otherwise straight after the
                exit handlers, which is faster.

        Returns:
            The exit codes.

        Raises:
            RankError: a rank did not leave, or left with an error, or something of it is left:
                a process, a shared-memory segment, a temporary file.
        """
        if self.broken:
            return self._exit_codes
        for rank, connection in enumerate(self._jobs):
            if rank in lost:
                self._signal(rank, signal.SIGKILL)
            else:
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    connection.send_bytes(END_PYTHON if end_python else LEAVE)
        for rank in range(self.num_ranks):
            self._exit_code(rank, EXIT_S)
        bad = [
            f"rank {rank}: {_describe(code)}\n{self._log_tail(rank)}"
            for rank, code in enumerate(self._exit_codes)
            if rank not in lost and code != 0
        ]
        leaks = self._leak_check.leaks(sessions=self.pids, folder=self.folder / "tmp")
        self.kill()
        if bad or leaks:
            raise RankError("after the ranks have left:\n" + "\n".join(bad + leaks), -1)
        return self._exit_codes


class RankPool:
    """Ranks that live as long as the pool, one set for each number of ranks. Leaving the `with`
    block closes the pool, and kills what is left of it.
    """

    def __init__(self, server: RankServer) -> None:
        self.server = server
        self._ranks: dict[int, Ranks] = {}

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, exc_type: object, *exc_info: object) -> None:
        try:
            if exc_type is None:
                self.close()
        finally:
            self.kill()

    def get(self, num_ranks: int) -> Ranks:
        """R working ranks: the ones of the last call, or new ones if a failure broke those."""
        ranks = self._ranks.get(num_ranks)
        if ranks is None or ranks.broken:
            ranks = self._ranks[num_ranks] = Ranks(self.server, num_ranks)
        return ranks

    def close(self) -> None:
        """Ends the ranks of all sizes; raises RankError if they leave anything behind."""
        for ranks in self._ranks.values():
            ranks.close()

    def kill(self) -> None:
        for ranks in self._ranks.values():
            ranks.kill()


def launch(
    server: RankServer,
    function: Callable[..., Any],
    *args: Any,
    num_ranks: int,
    deadline_s: float = 60.0,
    lost: Collection[int] = (),
    process_group: bool = True,
    end_python: bool = False,
) -> LaunchResult:
    """Runs `function(rank, *args)` on fresh ranks and checks that nothing of them is left.

    Args:
        server: where the ranks are forked from.
        function: a top-level function of an importable module.
        *args: the same for all ranks, pickled.
        num_ranks: how many.
        deadline_s: all ranks have to answer within this time.
        lost: ranks that the function kills or stops.
        process_group: False to start without a default process group.
        end_python: as in Ranks.close().

    Raises:
        RankError: a rank that is not lost failed, did not answer in time, or left with an error;
            or a process, a shared-memory segment or a temporary file was left behind.
    """
    ranks = Ranks(server, num_ranks, process_group=process_group)
    try:
        values = ranks.run(function, *args, deadline_s=deadline_s, lost=lost)
        return LaunchResult(values, ranks.close(lost=lost, end_python=end_python))
    finally:
        ranks.kill()


def _describe(exit_code: int | None) -> str:
    if exit_code is None:
        return "still running"
    if exit_code < 0:
        return f"killed by {signal.Signals(-exit_code).name}"
    return f"exit code {exit_code}"

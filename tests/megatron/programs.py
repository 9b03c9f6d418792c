"""Programs of this checkout in processes of their own, none of which outlives a test.

Every process of a program, however deep, has the folder of its `Programs` as TMPDIR. That is how
they are found: torchrun's ranks lead sessions of their own.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from ep_kernels.testing.leaks import KEPT_BY_TORCH, PROC, LeakCheck

ROOT = Path(__file__).resolve().parents[2]

TIMEOUT_S = 300.0
"""A multiple of what any program needs, for machines that are busy."""

EXIT_S = 5.0
"""After a program has ended, what it started has this long to go."""


@dataclass(frozen=True)
class Done:
    """How a program has ended, and all that it printed."""

    returncode: int
    output: str


class Programs:
    """Starts programs in a folder; leaving the `with` block ends them all.

    Args:
        folder: their working directory; it must not exist.

    Raises:
        AssertionError: on leaving, when a program that had ended by itself has left something
            behind: a process, a shared-memory segment, a temporary file.
    """

    def __init__(self, folder):
        self.tmp = folder / "tmp"
        self.tmp.mkdir(parents=True)
        self._folder = folder
        self._logs = {}
        self._leak_check = LeakCheck()

    def __enter__(self):
        return self

    def __exit__(self, exc_type, exc, traceback):
        leaks = self._leaks() if exc is None else []
        self.kill()
        assert not leaks, "left behind:\n" + "\n".join(leaks)

    def start(self, *command):
        """Starts `python <command>`."""
        log = self._folder / f"log{len(self._logs)}.txt"
        with log.open("w") as stream:
            process = subprocess.Popen(
                [sys.executable, *map(str, command)],
                cwd=self._folder,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._logs[process] = log
        return process

    def _environment(self):
        inherited = dict(os.environ)
        inherited.pop("TORCHINDUCTOR_CACHE_DIR", None)  # torch sets it to a folder of this process
        ours = {"TMPDIR": str(self.tmp), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        return inherited | ours

    def finish(self, process, *, timeout_s=TIMEOUT_S):
        """Waits for a program to end.

        Raises:
            AssertionError: it does not; all programs are killed then.
        """
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            log = self.log(process)
            raise AssertionError(f"still running after {timeout_s} s:\n{log}") from None
        return Done(process.returncode, self.log(process))

    def run(self, module, *arguments, num_ranks=None, timeout_s=TIMEOUT_S):
        """Runs `python -m <module> <arguments>`, under torchrun if a number of ranks is given."""
        process = self.start(*module_command(module, *arguments, num_ranks=num_ranks))
        return self.finish(process, timeout_s=timeout_s)

    def log(self, process):
        return self._logs[process].read_text(errors="replace")

    def living(self):
        """Process ids of everything that programs have started."""
        mark = f"TMPDIR={self.tmp}".encode()
        found = []
        for entry in PROC.iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    if mark in (entry / "environ").read_bytes().split(b"\0"):
                        found.append(int(entry.name))
        return found

    def kill(self):
        """Ends everything that programs have started."""
        while pids := self.living():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        for process in self._logs:
            process.wait()

    def _leaks(self):
        """What programs that have ended have left."""
        deadline = time.monotonic() + EXIT_S
        while (pids := self.living()) and time.monotonic() < deadline:
            time.sleep(0.05)
        files = [p for p in self.tmp.iterdir() if not p.name.startswith(KEPT_BY_TORCH)]
        found = [f"process {pid}" for pid in pids]
        found += [f"shared memory {path}" for path in self._leak_check.shm_leaks()]
        return found + [f"temporary file {path}" for path in files]


def module_command(module, *arguments, num_ranks=None):
    """What to give to python, in order to run a module."""
    if num_ranks is None:
        return ["-m", module, *arguments]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", num_ranks]
    return [*torchrun, "-m", module, *arguments]

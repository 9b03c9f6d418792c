"""What must not be left behind when ranks have gone: processes, shared memory, temporary files."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path

SHM = Path("/dev/shm")  # noqa: S108
PROC = Path("/proc")

KEPT_BY_TORCH = ("torchelastic_", "torchinductor_")
"""Folders that torch leaves among the temporary files of a process, for the next one."""


class LeakCheck:
    """Remembers what exists now; `leaks()` lists what ranks have added since.

    Other programs use /dev/shm at the same time. A new file counts as a leak when no living process
    maps it or holds it open: nobody is going to remove it.

    Example:
        >>> check = LeakCheck()
        >>> check.leaks(sessions=[], folder=None)
        []
    """

    def __init__(self) -> None:
        self._shm_before = _shm_files()

    def leaks(self, *, sessions: Iterable[int], folder: Path | None) -> list[str]:
        """Names everything that is left of the ranks, one line each.

        Args:
            sessions: session ids of the ranks (each rank leads a session of its own), to find
                processes that they started.
            folder: their folder for temporary files, which has to be empty by now, but for what
                torch keeps.
        """
        found = [f"process {pid} (session {sid})" for pid, sid in processes_in(set(sessions))]
        found += [f"shared memory {path}" for path in self.shm_leaks()]
        if folder is not None and folder.exists():
            found += [
                f"temporary file {path}"
                for path in sorted(folder.rglob("*"))
                if not path.relative_to(folder).parts[0].startswith(KEPT_BY_TORCH)
            ]
        return found

    def shm_leaks(self, *, patience_s: float = 1.0) -> list[Path]:
        """New files in /dev/shm that no process uses, and that stay for `patience_s`."""
        deadline = time.monotonic() + patience_s
        while True:
            new = _shm_files() - self._shm_before
            leaked = [SHM / name for name in sorted(new)] if new else []
            leaked = [path for path in leaked if path.exists() and not _is_in_use(path)]
            if not leaked or time.monotonic() > deadline:
                return leaked
            time.sleep(0.05)


def shm_mappings(pid: int | str = "self") -> list[str]:
    """Lines of /proc/PID/maps that show shared memory: POSIX segments, memfds, deleted ones too."""
    try:
        lines = (PROC / str(pid) / "maps").read_text().splitlines()
    except OSError:
        return []
    return [line for line in lines if "/dev/shm/" in line or "/memfd:" in line]


def _shm_files() -> set[str]:
    return set(os.listdir(SHM)) if SHM.is_dir() else set()


def processes_in(sessions: set[int]) -> list[tuple[int, int]]:
    """(pid, session) of the living processes of these sessions; zombies have ended."""
    found = []
    for entry in PROC.iterdir():
        if not sessions or not entry.name.isdigit():
            continue
        try:
            state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
        except (OSError, ValueError):
            continue
        if int(session) in sessions and state != "Z":
            found.append((int(entry.name), int(session)))
    return found


def _is_in_use(path: Path) -> bool:
    return any(_uses(entry, path) for entry in PROC.iterdir() if entry.name.isdigit())


def _uses(process: Path, path: Path) -> bool:
    if any(str(path) in line for line in shm_mappings(process.name)):
        return True
    try:
        return any(os.readlink(fd) == str(path) for fd in (process / "fd").iterdir())
    except OSError:
        return False

"""What processes of this package owe their parents."""

from __future__ import annotations

import ctypes
import os
import signal

PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int) -> None:
    """The kernel sends SIGKILL to this process when its parent dies, or the parent's thread that
    made it (Linux, prctl(2)). If the parent is dead already, this process ends here.

    Args:
        parent_pid: of the parent, as known before it could die.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(1)

"""The processes that NVSHMEM connects: how it begins and ends in this one.

The PEs of NVSHMEM are the ranks of the first group that needs it. It can be begun only once in a
process, so later groups are of the same processes; their order and their nodes may be others.

NVSHMEM reads its own settings from the environment; none of them is changed here if it is set:

    NVSHMEM_REMOTE_TRANSPORT     ibrc, ibdevx, ibgda, libfabric (EFA, Slingshot), ucx or none
    NVSHMEM_HCA_LIST, NVSHMEM_HCA_PE_MAPPING, NVSHMEM_ENABLE_NIC_PE_MAPPING   which network cards
    NVSHMEM_IB_GID_INDEX         of RoCE
    NVSHMEM_IB_SL                service level: the virtual lane of InfiniBand
    NVSHMEM_IB_TRAFFIC_CLASS     of RoCE
    NVSHMEM_DEBUG                WARN or INFO: what NVSHMEM says while it begins
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import threading
import uuid
from collections.abc import Callable
from typing import Any

import torch

from ep_kernels import env
from ep_kernels._native import call
from ep_kernels._native_nvshmem import UNIQUE_ID_BYTES, nvshmem_library, nvshmem_version
from ep_kernels.bootstrap import Bootstrap
from ep_kernels.errors import EPConfigError, EPDeviceError, EPError, EPTimeoutError

EXIT_S = 5.0
"""How long a process that ends waits for the others."""

_joined: list[str] | None = None
"""The processes that NVSHMEM connects with this one, by PE."""

_stuck = ""
"""Why nothing collective is possible in this process any more, or ""."""

_own_process = ("", -1)


def _process_id() -> str:
    """A name that no other process has, not even one that this one forks."""
    global _own_process
    if _own_process[1] != os.getpid():
        _own_process = (uuid.uuid4().hex, os.getpid())
    return _own_process[0]


def why_not() -> str:
    """What is missing to use NVSHMEM in this process, or ""."""
    try:
        nvshmem_library()
    except EPDeviceError as error:
        return str(error)
    return "" if torch.cuda.is_available() else "NVSHMEM needs a GPU, and torch sees none"


def leave(timeout_s: float) -> None:
    """Ends NVSHMEM in this process, for good. Collective over all processes that it connects, once
    they need no lane any more. Also done when Python ends, for EXIT_S at most. Nothing if there was
    no lane.

    Raises:
        EPTimeoutError: the other ranks did not do the same within the deadline.
    """
    global _joined
    processes, _joined = _joined, None
    if processes is None:
        return
    if problem := attempt(timeout_s, "end NVSHMEM", "ep_nvshmem_leave"):
        raise problem


def _leave_at_exit() -> None:
    """NVSHMEM has files in shared memory that it removes at its end. Buffers that are still open
    end before it, since they tell their peers through its memory."""
    from ep_kernels.buffer import destroy_open_buffers

    destroy_open_buffers()
    if _stuck:
        return
    with contextlib.suppress(EPError):
        leave(EXIT_S)


def is_usable() -> bool:
    """Whether kernels and collective calls of NVSHMEM can still end in this process."""
    return _joined is not None and not _stuck


def join_world(
    bootstrap: Bootstrap,
    *,
    device: torch.device,
    timeout_s: float,
    heap_bytes: int,
    problem: EPError | None,
    fields: dict[str, Any],
) -> list[int]:
    """The PEs of the ranks of a group; begins NVSHMEM if it has not begun. Collective.

    Args:
        bootstrap: of the group.
        device: this rank's GPU.
        timeout_s: how long a rank waits for the others.
        heap_bytes: what the symmetric heap is to have room for, if it is made now.
        problem: why this rank cannot take part, if it knows a reason.
        fields: what all ranks have to have the same.

    Raises:
        EPConfigError, EPDeviceError, EPTimeoutError: on all ranks, naming the rank at fault.
    """
    global _joined
    processes = bootstrap.all_gather(_process_id())
    has_begun = {"NVSHMEM has begun": _joined is not None}
    agree(bootstrap, problem or _problem(device, processes), fields | has_begun)
    if _joined is None:
        _begin(bootstrap, device, timeout_s, heap_bytes)
        _joined = processes
        atexit.register(_leave_at_exit)
    return [_joined.index(process) for process in processes]


def device_index(device: torch.device) -> int:
    """Of a GPU; that of the current one if the device has none."""
    return torch.cuda.current_device() if device.index is None else device.index


def _problem(device: torch.device, processes: list[str]) -> EPError | None:
    """Why this rank cannot take part."""
    if missing := why_not():
        return EPDeviceError(missing)
    if device.type != "cuda":
        return EPConfigError(f"device={str(device)!r} is not a GPU")
    if _stuck:
        return EPDeviceError(f"NVSHMEM is not usable in this process any more: {_stuck}")
    if _joined is not None and set(_joined) != set(processes):
        return EPConfigError(
            f"a group of {len(processes)} ranks: NVSHMEM has begun in this process for other "
            f"ones, {len(_joined)}, and cannot begin again"
        )
    return None


def _begin(bootstrap: Bootstrap, device: torch.device, timeout_s: float, heap_bytes: int) -> None:
    """With the unique id of rank 0. Collective."""
    env.set_nvshmem_defaults(heap_bytes)
    made = ctypes.create_string_buffer(UNIQUE_ID_BYTES)
    problem = None
    if bootstrap.rank == 0:
        problem = attempt(timeout_s, "begin NVSHMEM", "ep_nvshmem_unique_id", made)
    agree(bootstrap, problem, {"NVSHMEM": nvshmem_version()})
    unique_id = bootstrap.all_gather(made.raw)[0]
    where = (device_index(device), bootstrap.rank, bootstrap.num_ranks)
    problem = attempt(timeout_s, "begin NVSHMEM", "ep_nvshmem_join", *where, unique_id)
    agree(bootstrap, problem, {})


def agree(bootstrap: Bootstrap, problem: EPError | None, fields: dict[str, Any]) -> None:
    """Raises on all ranks what is wrong on one, or the first field on which they disagree."""
    answers = bootstrap.all_gather((problem, fields))
    for rank, (found, _) in enumerate(answers):
        if found is not None:
            raise type(found)(f"rank {rank}: {found}")
    for rank, (_, theirs) in enumerate(answers):
        for name, value in answers[0][1].items():
            if theirs[name] != value:
                raise EPConfigError(
                    f"ranks disagree on {name}: rank 0 has {value!r}, rank {rank} {theirs[name]!r}"
                )


def attempt(
    timeout_s: float,
    what: str,
    name: str,
    *arguments: Any,
    library: Callable[[], ctypes.CDLL] = nvshmem_library,
) -> EPError | None:
    """Calls a function of the C interface that other ranks call, too, and that may never return.
    Returns its error; after that of a deadline NVSHMEM is not used any more, as the ranks may be
    at different collective calls, and kernels of one may wait on the GPU for ever."""
    global _stuck
    try:
        _within(timeout_s, lambda: call(getattr(library(), name), *arguments))
    except TimeoutError:
        text = f"waited {timeout_s:g} s for the other ranks to {what}"
        _stuck = text
        return EPTimeoutError(text, phase="bootstrap")
    except EPError as error:
        return error.with_traceback(None)
    return None


def _within(timeout_s: float, function: Callable[[], None]) -> None:
    """Calls `function`, which may never return.

    Raises:
        TimeoutError: it has not returned; its thread is left alone.
        EPError: what the function raises.
    """
    problems: list[EPError] = []

    def run() -> None:
        try:
            function()
        except EPError as error:
            problems.append(error)

    thread = threading.Thread(target=run, daemon=True, name="ep_kernels NVSHMEM")
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        raise TimeoutError
    if problems:
        raise problems[0]

"""The only reader of environment variables in this package, and the defaults that depend on the
machine.

EP_KERNELS_TIMEOUT_S    default of `Buffer(timeout_s=)`, seconds
EP_KERNELS_NUM_THREADS  default of `Buffer(num_sms=)` on the CPU backend
EP_KERNELS_NUM_SMS      the same on a GPU
EP_KERNELS_POOL_BYTES   default of `Buffer(pool_bytes=)`
EP_KERNELS_SEND_ONCE    remote (default), all or none: the peers to which a GPU sends a row of an
                        EXPERT_MAJOR dispatch once, to be copied there for the other experts
EP_KERNELS_SCALEOUT     how rows of GPUs reach other nodes: "host" (through host memory), "nccl",
                        "nvshmem" or "auto", the default, which is host
EP_KERNELS_SIMD         scalar, avx2 or avx512: a slower path of the CPU core (read by the core)
NVSHMEM_HOME            folder of NVSHMEM, if not that of its package in this Python
EP_KERNELS_NVSHMEM_DIRECT  all (default), node or none: ranks whose memory low-latency calls over
                        NVSHMEM address, where it is mapped; others are reached by puts
NVSHMEM_...             read by NVSHMEM itself; set_nvshmem_defaults() fills in what is not set

What torchrun, Open MPI and SLURM say about the launch is read, too: ranks of a node.
"""

from __future__ import annotations

import math
import os
import re

from ep_kernels.errors import EPConfigError

DEFAULT_TIMEOUT_S = 60.0
MAX_NVSHMEM_CHUNK = 2 << 30
"""NVSHMEM takes no larger NVSHMEM_CUMEM_GRANULARITY."""

# Ranks of this node, ranks in all
LAUNCHERS = (
    ("LOCAL_WORLD_SIZE", "WORLD_SIZE"),
    ("OMPI_COMM_WORLD_LOCAL_SIZE", "OMPI_COMM_WORLD_SIZE"),
    ("SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_NUM_TASKS"),
)


def _number(name: str, default: float) -> float:
    text = os.environ.get(name, "")
    try:
        value = float(text) if text else default
    except ValueError:
        raise EPConfigError(f"environment variable {name}={text!r} is not a number") from None
    if not 0 < value < math.inf:
        raise EPConfigError(f"environment variable {name}={text!r} is not a positive number")
    return value


def default_timeout_s() -> float:
    """Seconds that a rank waits for a peer."""
    return _number("EP_KERNELS_TIMEOUT_S", DEFAULT_TIMEOUT_S)


def num_sms() -> int | None:
    """SMs per rank; None: to be chosen from measured rates."""
    return int(_number("EP_KERNELS_NUM_SMS", 1)) if os.environ.get("EP_KERNELS_NUM_SMS") else None


def send_once() -> str:
    """Peers to which a row for several experts crosses once: on other GPUs (remote), all, none."""
    choice = os.environ.get("EP_KERNELS_SEND_ONCE") or "remote"
    if choice not in ("remote", "all", "none"):
        raise EPConfigError(
            f"environment variable EP_KERNELS_SEND_ONCE={choice!r} is not remote, all or none"
        )
    return choice


def default_num_threads(num_local_ranks: int) -> int:
    """Worker threads per rank: the usable cores, shared by a node's ranks."""
    cores = len(os.sched_getaffinity(0))
    return int(_number("EP_KERNELS_NUM_THREADS", max(1, cores // num_local_ranks)))


def default_pool_bytes(device: str) -> int:
    """Size of a rank's pool: the machine's memory, whose pages cost nothing until touched; an
    eighth of a GPU's."""
    if device != "cpu":
        import torch

        return int(_number("EP_KERNELS_POOL_BYTES", torch.cuda.mem_get_info(device)[1] // 8))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(_number("EP_KERNELS_POOL_BYTES", memory))


def scaleout_transport() -> str:
    """ "host", "nccl" or "nvshmem"."""
    name = os.environ.get("EP_KERNELS_SCALEOUT") or "auto"
    if name not in ("auto", "host", "nccl", "nvshmem"):
        raise EPConfigError(
            f"environment variable EP_KERNELS_SCALEOUT={name!r} is not host, nccl, nvshmem or auto"
        )
    return "host" if name == "auto" else name


def nvshmem_direct() -> str:
    """ "all", "node" or "none"."""
    name = os.environ.get("EP_KERNELS_NVSHMEM_DIRECT") or "all"
    if name not in ("all", "node", "none"):
        raise EPConfigError(
            f"environment variable EP_KERNELS_NVSHMEM_DIRECT={name!r} is not all, node or none"
        )
    return name


def launched_local_ranks(num_ranks: int) -> tuple[str, int] | None:
    """(variable, ranks of this node) by the launcher that started exactly `num_ranks` ranks."""
    for local_name, total_name in LAUNCHERS:
        if os.environ.get(total_name) == str(num_ranks):
            first = re.match(r"\d+", os.environ.get(local_name, ""))  # SLURM: "2(x3)"
            if first:
                return local_name, int(first[0])
    return None


def nvshmem_home() -> str | None:
    """The folder with NVSHMEM's lib/, if it was named."""
    return os.environ.get("NVSHMEM_HOME") or None


def set_nvshmem_defaults(heap_bytes: int) -> None:
    """Settings of NVSHMEM for a symmetric heap of `heap_bytes`, where the user has none.

    Multicast over NVLink stays off: the groups of a switch are few, and rings have no use for them.
    The heap grows by chunks; one takes all that is known of now, see nvshmem_chunk_bytes().
    """
    granularity = min(MAX_NVSHMEM_CHUNK, 1 << max(21, (heap_bytes - 1).bit_length()))
    os.environ.setdefault("NVSHMEM_DISABLE_NVLS", "1")
    os.environ.setdefault("NVSHMEM_SYMMETRIC_SIZE", str(heap_bytes))
    os.environ.setdefault("NVSHMEM_CUMEM_GRANULARITY", str(granularity))


def nvshmem_chunk_bytes() -> int | None:
    """What NVSHMEM has made one piece of memory for; None: its heap does not grow, or the setting
    cannot be read here."""
    granularity = os.environ.get("NVSHMEM_CUMEM_GRANULARITY", "")
    if os.environ.get("NVSHMEM_DISABLE_CUDA_VMM", "0") not in ("", "0", "false"):
        return None
    return int(granularity) if granularity.isdecimal() else None

"""A common start for all ranks, and what is made of the durations."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

START_DELAY_NS = 500_000
SPIN_NS = 150_000


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Seconds over the iterations, each that of the slowest rank."""

    median: float
    p95: float
    minimum: float


def time_op(op: Callable[[], Any], *, agree: bool = False) -> float:
    """Seconds that `op` takes on this rank when all ranks start at the same time.

    Args:
        op: what to time; it may communicate.
        agree: return the time of the slowest rank, on all ranks.
    """
    start_together()
    begin = time.perf_counter_ns()
    op()
    duration = (time.perf_counter_ns() - begin) * 1e-9
    return max_over_ranks(duration) if agree else duration


def summarise(durations: Sequence[Sequence[float]]) -> Stats:
    """Stats of durations[rank][iteration]."""
    slowest = sorted(map(max, zip(*durations, strict=True)))
    middle = len(slowest) // 2
    median = slowest[middle] if len(slowest) % 2 else (slowest[middle - 1] + slowest[middle]) / 2
    p95 = slowest[max(0, math.ceil(0.95 * len(slowest)) - 1)]
    return Stats(median=median, p95=p95, minimum=slowest[0])


def start_together() -> None:
    """Returns at the same moment on all ranks of the machine, whose clock they share.

    NOTE: the last stretch is spun, since sleeping ends late; a barrier would let ranks go one by
    one.
    """
    start = int(max_over_ranks(time.monotonic_ns(), torch.int64)) + START_DELAY_NS
    if (remaining := start - time.monotonic_ns() - SPIN_NS) > 0:
        time.sleep(remaining * 1e-9)
    while time.monotonic_ns() < start:
        pass


def max_over_ranks(value: float, dtype: torch.dtype = torch.float64) -> float:
    """The largest value of all ranks, on all ranks."""
    largest = torch.tensor([value], dtype=dtype)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest.item()

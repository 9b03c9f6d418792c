"""What is timed: ep_kernels, a baseline over some transport, and plain copies."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from ep_kernels.bench.baseline import Baseline, Deduplicated, Expanded
from ep_kernels.bench.timing import time_op
from ep_kernels.bench.transports import Transport
from ep_kernels.bench.workload import COMBINE, DISPATCH, LAYER, MEMCPY, Inputs, Workload
from ep_kernels.buffer import Buffer
from ep_kernels.config import Layout

NUM_TRIALS = 5


class Contender:
    """Something that performs operations.

    Attributes:
        name: as in the report.
        ops: operation -> function without arguments; a combine uses what its dispatch left.
        details: operation -> how it is done.
        results: the tensors that the operations left, for the check.
    """

    name: str
    ops: dict[str, Callable[[], Any]]
    details: dict[str, str]
    results: dict[str, Any]


class EpKernels(Contender):
    """Buffer, with fresh routing in every call."""

    name = "ep_kernels"

    def __init__(self, buffer: Buffer, workload: Workload, inputs: Inputs) -> None:
        self._buffer, self._inputs = buffer, inputs
        self.results = {}
        self.details = dict.fromkeys(workload.ops, f"num_sms={buffer.num_sms}")
        self.ops = {LAYER: self._layer}
        for layout in workload.layouts:
            self.ops[DISPATCH[layout]] = functools.partial(self._dispatch, layout)
            self.ops[COMBINE[layout]] = functools.partial(self._combine, layout)

    def _dispatch(self, layout: str) -> None:
        # The rows of the last round go back to the pool first, as they do in a training step.
        self.results.pop(DISPATCH[layout], None)
        inputs = self._inputs
        self.results[DISPATCH[layout]] = self._buffer.dispatch(
            inputs.x, inputs.topk_idx, inputs.topk_weights, layout=Layout(layout)
        )

    def _combine(self, layout: str) -> None:
        self.results.pop(COMBINE[layout], None)
        rows = self.results[DISPATCH[layout]]
        self.results[COMBINE[layout]] = self._buffer.combine(rows.recv_x, rows.handle).x

    def _layer(self) -> None:
        self.results.pop(LAYER, None)
        inputs = self._inputs
        rows = self._buffer.dispatch(
            inputs.x, inputs.topk_idx, inputs.topk_weights, layout=Layout.EXPERT_MAJOR
        )
        self.results[LAYER] = self._buffer.combine(rows.recv_x, rows.handle).x


class PermuteAllToAll(Contender):
    """A baseline: `rows` names a way of baseline.py, or "auto" takes the faster one."""

    def __init__(
        self, transport: Transport, workload: Workload, inputs: Inputs, *, rows: str
    ) -> None:
        self.name = transport.name
        self.results = {}
        self._rank_major = Deduplicated(transport, workload, inputs)
        ways: dict[str, Baseline] = {
            "deduplicated": self._rank_major,
            "expanded": Expanded(transport, workload, inputs),
        }
        if rows == "auto":
            times = {name: _trial(way) for name, way in ways.items()}
            rows = min(times, key=lambda name: times[name])
        self._expert_major = ways[rows]
        functions: dict[str, Callable[[], Any]] = {
            DISPATCH["rank_major"]: self._rank_major.dispatch_rank_major,
            COMBINE["rank_major"]: self._combine_rank_major,
            DISPATCH["expert_major"]: self._expert_major.dispatch_expert_major,
            COMBINE["expert_major"]: self._combine_expert_major,
            LAYER: self._layer,
        }
        self.ops = {op: self._keeping(op, functions[op]) for op in workload.ops}
        self.details = dict.fromkeys(workload.ops, self._expert_major.name)
        for op in (DISPATCH["rank_major"], COMBINE["rank_major"]):
            self.details[op] = self._rank_major.name

    def _keeping(self, op: str, function: Callable[[], Any]) -> Callable[[], None]:
        def call() -> None:
            self.results[op] = function()

        return call

    def _combine_rank_major(self) -> torch.Tensor:
        return self._rank_major.combine_rank_major(self.results[DISPATCH["rank_major"]])

    def _combine_expert_major(self) -> torch.Tensor:
        return self._expert_major.combine_expert_major(self.results[DISPATCH["expert_major"]])

    def _layer(self) -> torch.Tensor:
        return self._expert_major.combine_expert_major(self._expert_major.dispatch_expert_major())


class Memcpy(Contender):
    """All ranks copy at once, with as many threads as the others have."""

    name = MEMCPY

    def __init__(self, num_bytes: int, num_threads: int) -> None:
        self._src = torch.full((num_bytes,), 1, dtype=torch.uint8)
        self._dst = torch.full((num_bytes,), 2, dtype=torch.uint8)
        self._bounds = [num_bytes * i // num_threads for i in range(num_threads + 1)]
        self._threads = ThreadPoolExecutor(num_threads) if num_threads > 1 else None
        self.results = {}
        self.ops = {MEMCPY: self._copy}
        self.details = {MEMCPY: f"{num_bytes >> 20} MiB per rank"}

    def _copy(self) -> None:
        if self._threads is None:
            self._copy_slice(0, self._bounds[-1])
        else:
            list(self._threads.map(self._copy_slice, self._bounds[:-1], self._bounds[1:]))

    def _copy_slice(self, begin: int, end: int) -> None:
        src, dst = self._src.data_ptr(), self._dst.data_ptr()
        ctypes.memmove(dst + begin, src + begin, end - begin)


def _trial(way: Baseline) -> float:
    """Seconds of the slowest rank for dispatch and combine, the best of a few; collective."""
    durations = [
        time_op(lambda: way.combine_expert_major(way.dispatch_expert_major()), agree=True)
        for _ in range(NUM_TRIALS)
    ]
    return min(durations)

"""Times the low-latency calls on GPUs by replays of CUDA graphs.

    python -m ep_kernels.bench.cuda_low_latency --ranks 8 --json low_latency.jsonl

Ranks are processes of this machine, rank r on GPU r modulo the GPUs; those that share one need MPS
(scripts/with_mps.sh). A time is that of the slowest rank in a repetition, microseconds.

    call    one graph of one call, between two events; the time to start a graph is in it
    row     one graph of many calls of the same kind, divided by their number
    send, receive   the halves apart, as "call"
    gemm    throughput of a GEMM between the halves, over that of the same GEMM alone
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ep_kernels.buffer import Buffer

TIMEOUT_S = 20.0
CALLS_PER_ROW = 20
WARM_UP = 5
FLUSH_BYTES = 128 << 20


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is timed: R ranks, T = M tokens each, K of E experts, hidden H."""

    num_ranks: int
    num_tokens: int
    num_experts: int
    num_topk: int
    hidden: int
    num_sms: int | None
    flush: bool
    repetitions: int


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One line of the report; times in microseconds, of the slowest rank in each repetition."""

    operation: str
    what: str
    p50: float
    p95: float
    setting: Setting

    def text(self) -> str:
        at = self.setting
        return (
            f"EP{at.num_ranks} T={at.num_tokens:<4} E={at.num_experts:<4} "
            f"{self.operation:<14} {self.what:<8} p50 {self.p50:9.2f}  p95 {self.p95:9.2f}"
        )


Graph = torch.cuda.CUDAGraph


class Timer:
    """Buffers, inputs and graphs of one setting on one rank."""

    def __init__(self, setting: Setting, device: torch.device) -> None:
        self.setting, self.device = setting, device
        self.sizes: dict[str, Any] = dict(
            num_max_tokens_per_rank=setting.num_tokens, num_experts=setting.num_experts
        )
        self.buffer = Buffer(
            num_experts=setting.num_experts,
            device=device,
            pool_bytes=1 << 20,
            timeout_s=TIMEOUT_S,
            num_sms=setting.num_sms,
            low_latency_bytes=Buffer.low_latency_size_hint(
                hidden=setting.hidden, num_ranks=setting.num_ranks, **self.sizes
            ),
        )
        generator = torch.Generator().manual_seed(dist.get_rank())
        scores = torch.rand(setting.num_tokens, setting.num_experts, generator=generator)
        self.idx = scores.topk(setting.num_topk, dim=1).indices.to(device)
        self.weights = torch.full(self.idx.shape, 1 / setting.num_topk, device=device)
        x = torch.randn(setting.num_tokens, setting.hidden, generator=generator)
        self.x = x.bfloat16().to(device)
        self.out = torch.empty_like(self.x)
        self.flushed = torch.empty(FLUSH_BYTES if setting.flush else 0, dtype=torch.uint8).to(
            device
        )
        self.stream = torch.cuda.Stream(device)

    def dispatch(self, *, hook: bool = False, **options: Any) -> Any:
        return self.buffer.low_latency_dispatch(
            self.x, self.idx, return_recv_hook=hook, **self.sizes, **options
        )

    def combine(self, handle: Any, *, hook: bool = False) -> Any:
        rows = self.buffer.next_low_latency_combine_buffer(handle)
        return self.buffer.low_latency_combine(
            rows,
            self.idx,
            self.weights,
            handle,
            zero_copy=True,
            out=self.out,
            return_recv_hook=hook,
        )

    def capture(self, function: Callable[[], Any]) -> tuple[Graph, Any]:
        """A graph of what the function enqueues, and what it returns."""
        graph = Graph()
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            result = function()
        return graph, result

    def warm_up(self) -> None:
        with torch.cuda.stream(self.stream):
            for options in ({}, {"use_fp8": True}):
                result = self.dispatch(**options)
                self.combine(result.handle).event.wait()
        torch.cuda.synchronize(self.device)

    def time_graphs(self, graphs: list[Graph]) -> list[list[float]]:
        """[repetition][graph] microseconds on this rank; the graphs are replayed in turn."""
        marks = []
        with torch.cuda.stream(self.stream):
            for _ in range(WARM_UP + self.setting.repetitions):
                events = [torch.cuda.Event(enable_timing=True) for _ in range(2 * len(graphs))]
                for i, graph in enumerate(graphs):
                    self.flushed.zero_()
                    events[2 * i].record()
                    graph.replay()
                    events[2 * i + 1].record()
                marks.append(events)
        self.stream.synchronize()
        return [
            [1e3 * events[2 * i].elapsed_time(events[2 * i + 1]) for i in range(len(graphs))]
            for events in marks[WARM_UP:]
        ]

    def measure(self, names: list[tuple[str, str]], graphs: list[Graph]) -> Iterator[Measurement]:
        dist.barrier()
        times = slowest(self.time_graphs(graphs))
        for (operation, what), column in zip(names, times.T):
            yield self.measurement(operation, what, column)

    def measurement(self, operation: str, what: str, values: torch.Tensor) -> Measurement:
        p50, p95 = values.quantile(torch.tensor([0.5, 0.95], dtype=values.dtype)).tolist()
        return Measurement(operation=operation, what=what, p50=p50, p95=p95, setting=self.setting)


def slowest(times: list[list[float]]) -> torch.Tensor:
    """[repetition, graph]: the slowest rank of each."""
    table = torch.tensor(times, dtype=torch.float64)
    dist.all_reduce(table, op=dist.ReduceOp.MAX)
    return table


def time_calls(timer: Timer) -> Iterator[Measurement]:
    """Dispatch and combine, both halves of each."""
    for name, options in (("fp8", {"use_fp8": True}), ("bf16", {})):
        dispatch, result = timer.capture(partial(timer.dispatch, **options))
        combine, _ = timer.capture(partial(timer.combine, result.handle))
        names = [(f"dispatch {name}", "call"), ("combine bf16", f"call/{name}")]
        yield from timer.measure(names, [dispatch, combine])


def time_halves(timer: Timer) -> Iterator[Measurement]:
    for name, options in (("fp8", {"use_fp8": True}), ("bf16", {})):
        send, result = timer.capture(partial(timer.dispatch, hook=True, **options))
        receive, _ = timer.capture(result.hook)
        send_back, back = timer.capture(partial(timer.combine, result.handle, hook=True))
        receive_back, _ = timer.capture(back.hook)
        names = [(f"dispatch {name}", "send"), (f"dispatch {name}", "receive")]
        names += [("combine bf16", "send"), ("combine bf16", "receive")]
        yield from timer.measure(names, [send, receive, send_back, receive_back])


def time_rows(timer: Timer) -> Iterator[Measurement]:
    """Many calls in one graph: without the time that a graph takes to start."""

    def dispatches(options: Any) -> None:
        for _ in range(CALLS_PER_ROW):
            timer.dispatch(**options)

    def pairs(options: Any) -> None:
        for _ in range(CALLS_PER_ROW):
            timer.combine(timer.dispatch(**options).handle)

    for name, options in (("fp8", {"use_fp8": True}), ("bf16", {})):
        for operation, function in ((f"dispatch {name}", dispatches), (f"pair {name}", pairs)):
            graph, _ = timer.capture(partial(function, options))
            dist.barrier()
            times = slowest(timer.time_graphs([graph]))[:, 0] / CALLS_PER_ROW
            yield timer.measurement(operation, "row", times)


def time_gemm(timer: Timer) -> Iterator[Measurement]:
    """A GEMM alone, and while rows are on their way: the ratio of its throughputs."""
    a = torch.randn(2048, 2048, device=timer.device, dtype=torch.bfloat16)
    c = torch.empty_like(a)

    def run_gemms(*, between: bool) -> float:
        dist.barrier()
        with torch.cuda.stream(timer.stream):
            result = timer.dispatch(hook=True, use_fp8=True)
            if not between:
                result.hook()
                result.event.wait()
            timer.stream.synchronize()
            dist.barrier()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(20):
                torch.mm(a, a, out=c)
            end.record()
            if between:
                result.hook()
            timer.stream.synchronize()
        return begin.elapsed_time(end)

    alone, overlapped = [], []
    for _ in range(15):
        alone.append(run_gemms(between=False))
        overlapped.append(run_gemms(between=True))
    table = slowest([[one, two] for one, two in zip(alone[3:], overlapped[3:])])
    yield timer.measurement("gemm", "ratio", table[:, 0] / table[:, 1])


def measure_setting(setting: Setting, device: torch.device) -> Iterator[Measurement]:
    """Measurements of one setting, as they are made. Collective over the default group."""
    timer = Timer(setting, device)
    try:
        timer.warm_up()
        for part in (time_calls, time_rows, time_halves, time_gemm):
            yield from part(timer)
    finally:
        torch.cuda.synchronize(device)
        timer.buffer.destroy()
        del timer
        gc.collect()  # the memory that graphs and results held


def run_rank(rank: int, options: argparse.Namespace, store: str) -> None:
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=options.ranks,
        timeout=timedelta(seconds=60),
    )
    for num_experts in options.experts:
        for num_tokens in options.tokens:
            setting = Setting(
                num_ranks=options.ranks,
                num_tokens=num_tokens,
                num_experts=num_experts,
                num_topk=options.topk,
                hidden=options.hidden,
                num_sms=options.num_sms,
                flush=options.flush,
                repetitions=options.repetitions,
            )
            for measurement in measure_setting(setting, device):
                if rank == 0:
                    tell(measurement, options.json)
    dist.destroy_process_group()


def tell(measurement: Measurement, path: str | None) -> None:
    print(measurement.text(), flush=True)
    if path:
        with Path(path).open("a") as file:
            print(json.dumps(asdict(measurement)), file=file, flush=True)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 128, 256, 512])
    parser.add_argument("--experts", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--num-sms", type=int, default=None, help="blocks of a rank (16)")
    parser.add_argument("--repetitions", type=int, default=100)
    parser.add_argument("--flush", action="store_true", help="overwrite the L2 cache before a call")
    parser.add_argument("--json", help="file to which a line per measurement is appended")
    parser.add_argument("--deadline", type=float, default=110.0, help="seconds, then all ends")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if not torch.cuda.is_available():
        print("cuda_low_latency: torch sees no CUDA device", file=sys.stderr)
        return 1
    end = time.monotonic() + options.deadline
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        context = mp.spawn(run_rank, (options, store), nprocs=options.ranks, join=False)
        assert context is not None
        while not context.join(timeout=1.0):
            if time.monotonic() > end:
                for process in context.processes:
                    process.kill()
                print(f"cuda_low_latency: not over after {options.deadline} s", file=sys.stderr)
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

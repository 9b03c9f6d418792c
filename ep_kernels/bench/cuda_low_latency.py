"""Times the low-latency calls on GPUs by replays of CUDA graphs.

    python -m ep_kernels.bench.cuda_low_latency --ranks 8 --json low_latency.jsonl

Ranks are processes of this machine, rank r on GPU r modulo the GPUs; those that share one need MPS
(scripts/with_mps.sh). A time is that of the slowest rank in a repetition, microseconds.

    call    one graph of one call, between two events; the time to start a graph is in it
    row     one graph of many calls of the same kind, divided by their number
    send, receive   the halves apart, as "call"
    gemm    throughput of a GEMM between the halves, over that of the same GEMM alone

With --ranks-per-node the ranks are as many nodes, which exchange rows over NVSHMEM
(EP_KERNELS_NVSHMEM_DIRECT says between which ranks by puts alone).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ep_kernels.bench.cuda_ll_timer import Measurement, Setting, Timer, slowest
from ep_kernels.bench.launcher import join_ranks, run_on_gpus

CALLS_PER_ROW = 20


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
    join_ranks(rank, options.ranks, store)
    if options.ranks_per_node is not None:
        os.environ["EP_KERNELS_SCALEOUT"] = "nvshmem"
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
                num_local_ranks=options.ranks_per_node,
            )
            for measurement in measure_setting(setting, device):
                if rank == 0:
                    tell(measurement, options.json)
    dist.destroy_process_group()


def tell(measurement: Measurement, path: str | None) -> None:
    print(measurement.text(), flush=True)
    if path:
        with Path(path).open("a") as file:
            print(json.dumps(measurement.record()), file=file, flush=True)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--ranks-per-node", type=int, help="all if not given")
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
    return run_on_gpus("cuda_low_latency", run_rank, parse(argv))


if __name__ == "__main__":
    sys.exit(main())

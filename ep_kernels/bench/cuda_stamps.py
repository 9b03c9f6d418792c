"""When high-throughput calls on GPUs come to which step.

    scripts/with_mps.sh python -m ep_kernels.bench.cuda_stamps --ranks 8

Ranks are processes of this machine, all on one GPU: only then do they read the same clock. Calls
are aligned as by the benchmark, and go along the routing of a handle. Of each step the medians over
the calls are printed, in microseconds (`stamps.describe`); "called" is when the device barrier
before the call ended on the rank. Steps are those of `Stamp` in csrc/cuda/group.h. Also the time
between the events around the call, and how many SMs a buffer takes that is not told.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from ep_kernels._native_cuda import STAMPS
from ep_kernels.bench.cuda_ops import as_fp8, device_barrier
from ep_kernels.bench.cuda_timing import CudaClock
from ep_kernels.bench.launcher import join_ranks, run_on_gpus
from ep_kernels.bench.stamps import describe, gather_stamps
from ep_kernels.bench.timing import start_together
from ep_kernels.bench.workload import Workload, make_inputs
from ep_kernels.buffer import Buffer
from ep_kernels.config import Layout
from ep_kernels.event import Event

NAMES = (*STAMPS, "called")
NUM_CALLS = 12
TIMEOUT_S = 30.0


def keep(op: Callable[[], Any], results: list[Any]) -> Callable[[], None]:
    """`op`, whose result goes to `results`."""
    return lambda: results.append(op())


def stamps_of(event: Event) -> list[int]:
    """The moments of a finished call, 0 for those that it does not have."""
    operation: Any = event.operation
    found = operation.backend.stamps(operation.number)
    return [found.get(name, 0) for name in STAMPS]


def time_calls(
    buffer: Buffer, op: Callable[[], Any], align: Callable[[], Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stamps [NUM_CALLS, len(NAMES)] of this rank's calls, and their events' microseconds."""
    clock = CudaClock()
    stamps, events = [], []
    for _ in range(NUM_CALLS):
        clock.settle()
        buffer.barrier()
        start_together()
        results: list[Any] = []
        seconds = clock.time_events(keep(op, results), keep(align, results))
        barrier, call = (stamps_of(result.event) for result in results)
        stamps.append([*call, barrier[STAMPS.index("done")]])
        events.append(seconds * 1e6)
    return torch.tensor(stamps), torch.tensor(events)


def operations(buffer: Buffer, workload: Workload, rank: int) -> Iterator[tuple[str, Any]]:
    """Names and calls. Collective, and to be used up by every rank alike."""
    inputs = make_inputs(workload, rank)
    x, topk_idx = inputs.x.to(buffer.device), inputs.topk_idx.to(buffer.device)
    for layout in workload.layouts:
        routed = buffer.dispatch(x, topk_idx, layout=Layout(layout))
        handle, rows, fp8 = routed.handle, routed.recv_x, as_fp8(x)
        yield f"dispatch {layout} bf16", partial(buffer.dispatch, x, handle=handle)
        yield f"dispatch {layout} fp8", partial(buffer.dispatch, fp8, handle=handle)
        yield f"combine {layout} bf16", partial(buffer.combine, rows, handle)


def run_rank(rank: int, options: argparse.Namespace, store: str) -> None:
    torch.cuda.set_device(0)
    join_ranks(rank, options.ranks, store)
    workload = Workload(
        num_ranks=options.ranks,
        num_tokens=options.tokens,
        hidden=options.hidden,
        num_topk=options.topk,
        num_experts=options.experts,
        dtype="bf16",
        routing="uniform",
        layouts=tuple(options.layouts),
        num_threads=1,
        seed=0,
    )
    common: dict[str, Any] = dict(num_experts=options.experts, timeout_s=TIMEOUT_S, device="cuda")
    with Buffer(**common, pool_bytes=1 << 30) as buffer:
        if rank == 0:
            print(f"a buffer that is not told takes {buffer.num_sms} SMs", flush=True)
    with Buffer(**common, pool_bytes=options.pool << 30, num_sms=options.num_sms) as buffer:
        align = device_barrier(buffer, options.experts)
        for name, op in operations(buffer, workload, rank):
            op()
            own, events = time_calls(buffer, op, align)
            stamps, all_events = gather_stamps(own), gather_stamps(events)
            if rank != 0:
                continue
            slowest = float(all_events.max(dim=0).values.median())
            print(f"EP{options.ranks} {name}: {slowest:.1f} us between events", flush=True)
            for line in describe(stamps, NAMES):
                print(line, flush=True)
    dist.destroy_process_group()


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--layouts", nargs="+", default=["rank_major"])
    parser.add_argument("--num-sms", type=int, default=16, help="of a rank (16)")
    parser.add_argument("--pool", type=int, default=3, help="GiB of a rank (3)")
    parser.add_argument("--deadline", type=float, default=110.0, help="seconds, then all ends")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    return run_on_gpus("cuda_stamps", run_rank, parse(argv))


if __name__ == "__main__":
    sys.exit(main())

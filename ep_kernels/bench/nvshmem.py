"""Times exchanges over an NVSHMEM lane against copies in the same run.

    python -m ep_kernels.bench.nvshmem --ranks 4 --blocks 2 4 8 --megabytes 16

Ranks are processes of this machine, each a node, rank r on GPU r modulo the GPUs; those that share
one need MPS (scripts/with_mps.sh). In an exchange every rank sends and receives `--megabytes`, in
equal parts for all peers. A time is the median of the slowest rank's, by CUDA events.

    staged   packed into own memory, then put
    direct   packed into the memory of the peer, where it can be addressed
    copy     every rank copies as many bytes in its own memory, by torch
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ep_kernels.bench.launcher import join_ranks, run_on_gpus
from ep_kernels.bootstrap import make_bootstrap
from ep_kernels.nvshmem import NvshmemLane, NvshmemOptions
from ep_kernels.nvshmem_world import leave
from ep_kernels.topology import Topology

TIMEOUT_S = 20.0
SLEEP_CYCLES = 2_000_000


def run_rank(rank: int, options: argparse.Namespace, store: str) -> None:
    gpu = rank % torch.cuda.device_count()
    torch.cuda.set_device(gpu)
    join_ranks(rank, options.ranks, store)
    num_tokens = (options.megabytes << 20) // (options.hidden * 2 * (options.ranks - 1))
    shape = (num_tokens * (options.ranks - 1), options.hidden)
    rows = torch.randn(shape, device="cuda").to(torch.bfloat16)
    received = torch.empty_like(rows)
    for is_direct in (False, True):
        for num_blocks in options.blocks:
            lane = NvshmemLane(
                make_bootstrap(None),
                Topology(rank=rank, num_ranks=options.ranks, num_local_ranks=1),
                device=torch.device("cuda", gpu),
                timeout_s=TIMEOUT_S,
                options=NvshmemOptions(
                    staging_bytes=options.staging_megabytes << 20,
                    num_blocks=num_blocks,
                    num_slots=options.slots,
                    is_direct=is_direct,
                ),
            )
            counts = [0 if node == rank else num_tokens for node in range(options.ranks)]

            def exchange(lane: NvshmemLane = lane, counts: list[int] = counts) -> None:
                lane.exchange([(rows, received)], counts, counts)

            times = time_repetitions(exchange, options.repetitions)
            lane.wait()
            name = "direct" if is_direct else "staged"
            tell(rank, options, name, num_blocks, times, rows.nbytes)
            lane.destroy()
    times = time_repetitions(lambda: received.copy_(rows), options.repetitions)
    tell(rank, options, "copy", 0, times, rows.nbytes)
    leave(TIMEOUT_S)
    dist.destroy_process_group()


def time_repetitions(operation: Callable[[], Any], repetitions: int) -> list[float]:
    """Microseconds of this rank."""
    times = []
    for repetition in range(repetitions + 2):
        torch.cuda.synchronize()
        dist.barrier()
        torch.cuda._sleep(SLEEP_CYCLES)  # until the operation is enqueued
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        operation()
        end.record()
        torch.cuda.synchronize()
        if repetition >= 2:
            times.append(begin.elapsed_time(end) * 1e3)
    return times


def tell(
    rank: int,
    options: argparse.Namespace,
    name: str,
    num_blocks: int,
    times: list[float],
    num_bytes: int,
) -> None:
    """Rank 0 prints the median of the slowest rank, and appends it to the file of `--json`."""
    table = torch.tensor(times, dtype=torch.float64)
    dist.all_reduce(table, op=dist.ReduceOp.MAX)
    if rank != 0:
        return
    median_us = table.median().item()
    rate = num_bytes / median_us / 1e3
    blocks = f"{num_blocks} blocks" if num_blocks else ""
    print(f"{name:8}{blocks:12}{median_us:10.1f} us {rate:8.1f} GB/s per rank", flush=True)
    if options.json:
        record = {
            "name": f"nvshmem {name}",
            "num_ranks": options.ranks,
            "num_blocks": num_blocks,
            "num_slots": options.slots,
            "num_bytes": num_bytes,
            "median_us": median_us,
        }
        with Path(options.json).open("a") as file:
            print(json.dumps(record), file=file, flush=True)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--megabytes", type=int, default=16, help="sent by each rank")
    parser.add_argument("--staging-megabytes", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=7168, help="bf16 elements of a row")
    parser.add_argument("--repetitions", type=int, default=30)
    parser.add_argument("--json", help="file to which a line per measurement is appended")
    parser.add_argument("--deadline", type=float, default=110.0, help="seconds, then all ends")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if options.ranks < 2:
        print(f"bench.nvshmem: --ranks={options.ranks} is less than 2", file=sys.stderr)
        return 2
    os.environ.setdefault("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", str(100 // options.ranks))
    return run_on_gpus("bench.nvshmem", run_rank, options)


if __name__ == "__main__":
    sys.exit(main())

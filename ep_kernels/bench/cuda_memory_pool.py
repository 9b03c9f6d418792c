"""What it costs combine on GPUs that its rows do not lie in the pool.

Times, in turn, combine of a tensor that torch allocated outside of Buffer.memory_pool(), which is
copied, and inside of it, which is not; of Buffer.empty(), as what the latter should cost; and, as
`mm` and `mm in block`, a GEMM whose result is allocated outside and inside. Microseconds between
events of the caller's stream, of the slowest rank in each repetition.

    scripts/with_mps.sh python -m ep_kernels.bench.cuda_memory_pool --ranks 8
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from ep_kernels.bench.cuda_ll_timer import slowest
from ep_kernels.bench.launcher import join_ranks, run_on_gpus
from ep_kernels.buffer import Buffer
from ep_kernels.config import Layout

WARM_UP = 5
GEMM_DEPTH = 256


def operations(buffer: Buffer, options: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """What is timed, by name."""
    device = buffer.device
    generator = torch.Generator().manual_seed(buffer.rank)
    scores = torch.rand(options.tokens, options.experts, generator=generator)
    topk_idx = scores.topk(options.topk, dim=1).indices.to(device)
    x = torch.randn(options.tokens, options.hidden, generator=generator).bfloat16().to(device)
    handle = buffer.dispatch(x, topk_idx, layout=Layout[options.layout]).handle
    a = torch.randn(handle.num_rows, GEMM_DEPTH, device=device, dtype=torch.bfloat16)
    b = torch.randn(GEMM_DEPTH, options.hidden, device=device, dtype=torch.bfloat16)
    ordinary = torch.mm(a, b)
    with buffer.memory_pool():
        in_block = torch.mm(a, b)
    explicit = buffer.empty(*ordinary.shape, dtype=ordinary.dtype).copy_(ordinary)
    if not torch.equal(buffer.combine(ordinary, handle).x, buffer.combine(in_block, handle).x):
        raise RuntimeError("combine of the pool's tensor differs from that of the ordinary one")

    def multiply_in_block() -> Any:
        with buffer.memory_pool():
            return torch.mm(a, b)

    return {
        "combine ordinary": lambda: buffer.combine(ordinary, handle),
        "combine in block": lambda: buffer.combine(in_block, handle),
        "combine of empty()": lambda: buffer.combine(explicit, handle),
        "mm": lambda: torch.mm(a, b),
        "mm in block": multiply_in_block,
    }


def time_once(operation: Callable[[], Any]) -> float:
    """Microseconds on this rank."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    dist.barrier()
    begin.record()
    operation()
    end.record()
    end.synchronize()
    return 1e3 * begin.elapsed_time(end)


def run_rank(rank: int, options: argparse.Namespace, store: str) -> None:
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    join_ranks(rank, options.ranks, store)
    row_bytes = 2 * options.hidden * options.tokens * options.topk
    with Buffer(
        num_experts=options.experts, device=device, pool_bytes=6 * row_bytes, timeout_s=20.0
    ) as buffer:
        timed = operations(buffer, options)
        rounds = [
            [time_once(one) for one in timed.values()] for _ in range(WARM_UP + options.repetitions)
        ][WARM_UP:]
        table = slowest(rounds)
        if rank == 0:
            for name, times in zip(timed, table.T):
                print(f"{name:<20} p50 {times.median():9.1f} us", flush=True)
        del timed
        torch.cuda.synchronize()
        dist.barrier()
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
    parser.add_argument("--layout", choices=[one.name for one in Layout], default="EXPERT_MAJOR")
    parser.add_argument("--repetitions", type=int, default=30)
    parser.add_argument("--deadline", type=float, default=110.0, help="seconds, then all ends")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    return run_on_gpus("cuda_memory_pool", run_rank, parse(argv))


if __name__ == "__main__":
    sys.exit(main())

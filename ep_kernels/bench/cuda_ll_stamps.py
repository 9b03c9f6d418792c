"""When low-latency calls on GPUs come to which step, from replays of CUDA graphs.

    scripts/with_mps.sh python -m ep_kernels.bench.cuda_ll_stamps --ranks 8 --tokens 1 128

Ranks are processes of this machine, all on one GPU: only then do they read the same clock. Of each
step the medians over the calls are printed, in microseconds: since the first rank began the call,
of the first, the middle and the last rank to come there; and since each rank's own begin. Steps are
those of `LlStamp` in csrc/cuda/ll_group.h.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from functools import partial

import torch
import torch.distributed as dist

from ep_kernels._native_ll import LL_STAMPS
from ep_kernels.bench.cuda_ll_timer import Setting, Timer
from ep_kernels.bench.launcher import join_ranks, run_on_gpus
from ep_kernels.bench.stamps import describe, gather_stamps

NUM_CALLS = 20
KINDS = {"fp8": {"use_fp8": True}, "bf16": {}}


def describe_calls(stamps: torch.Tensor) -> Iterator[str]:
    """The lines of stamps.describe(), and how long after each call the next one begins.

    Args:
        stamps: [R, N, len(LL_STAMPS)] nanoseconds of N calls of one kind, oldest first; 0: never.
    """
    yield from describe(stamps, LL_STAMPS)
    gaps = stamps[:, 1:, 0] - stamps[:, :-1, -1]
    yield f"  from a call's end to the next one's begin: {float(gaps.double().median()) / 1e3:.1f}"


def last_calls(stamps: torch.Tensor, num_calls: int) -> torch.Tensor:
    """[R, num_calls, len(LL_STAMPS)], oldest first, of [R, ...] as they are kept."""
    order = stamps[0, :, 0].argsort()
    return stamps[:, order[-num_calls:]]


def report(timer: Timer, kind: str) -> Iterator[str]:
    """Lines of text; collective."""

    def calls(*, is_pair: bool) -> None:
        for _ in range(NUM_CALLS):
            result = timer.dispatch(**KINDS[kind])
            if is_pair:
                timer.combine(result.handle)

    for is_pair in (False, True):
        graph, _ = timer.capture(partial(calls, is_pair=is_pair))
        dist.barrier()
        timer.time_graphs([graph])
        dist.barrier()
        stamps = gather_stamps(timer.stamps())
        if is_pair:  # every second call; those before the last dispatch of the graph
            yield f"combine bf16 after dispatch {kind}"
            yield from describe_calls(last_calls(stamps, 2 * NUM_CALLS)[:, 1::2])
        else:
            yield f"dispatch {kind}"
            yield from describe_calls(last_calls(stamps, NUM_CALLS))


def run_rank(rank: int, options: argparse.Namespace, store: str) -> None:
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    join_ranks(rank, options.ranks, store)
    for num_tokens in options.tokens:
        setting = Setting(
            num_ranks=options.ranks,
            num_tokens=num_tokens,
            num_experts=options.experts,
            num_topk=options.topk,
            hidden=options.hidden,
            num_sms=options.num_sms,
            flush=False,
            repetitions=10,
        )
        timer = Timer(setting, device)
        timer.warm_up()
        for kind in KINDS:
            for line in report(timer, kind):
                if rank == 0:
                    prefix = "" if line.startswith(" ") else f"EP{options.ranks} T={num_tokens} "
                    print(prefix + line, flush=True)
        torch.cuda.synchronize(device)
        timer.buffer.destroy()
    dist.destroy_process_group()


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 128])
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--num-sms", type=int, default=None, help="blocks of a rank (16)")
    parser.add_argument("--deadline", type=float, default=110.0, help="seconds, then all ends")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    return run_on_gpus("cuda_ll_stamps", run_rank, parse(argv))


if __name__ == "__main__":
    sys.exit(main())

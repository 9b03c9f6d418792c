"""A little of everything on a GPU, for a sanitizer to watch: layouts, dtypes, capacity, padding,
biases and weights, fresh and cached calls; low-latency calls in every format. It starts its ranks
itself, as new processes.

Usage: cuda_small.py NUM_RANKS
"""

import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
TIMEOUT_S = 600.0  # kernels are 10 to 100 times slower under a sanitizer


def small_cases(num_ranks):
    import torch
    from cases import Case

    from ep_kernels.config import Layout

    base = Case(num_ranks=num_ranks, num_tokens=(9, 5), num_topk=3, num_experts=6, hidden=136)
    for layout in Layout:
        case = replace(base, layout=layout)
        if layout is Layout.EXPERT_MAJOR:
            yield replace(case, expert_alignment=8, capacity=(40, 30), dtype="fp16")
            case = replace(case, expert_alignment=4)
        yield replace(case, num_biases=2)
        yield replace(case, dtype="fp8", hidden=272)
        yield replace(case, dtype="fp32", capacity=(7, 60), weights=torch.float64, num_biases=0)
        yield replace(case, routing="masked", weights=None, num_sms=1)
        yield replace(case, routing="empty")
        yield replace(case, num_tokens=(130, 0), hidden=8, num_topk=6)
    yield replace(base, hidden=7168, num_tokens=(3, 2))


def small_low_latency_cases(num_ranks):
    from ll_cases import FP8_OPTIONS, Case

    # More experts than half a block has threads, and enough pieces for a block that only leads.
    base = Case(
        num_ranks=num_ranks,
        num_tokens=(24, 9),
        most=32,
        num_topk=4,
        num_experts=600,
        hidden=1024,
        num_sms=10,
    )
    for format in FP8_OPTIONS:
        yield replace(base, format=format)
    yield replace(base, wire="fp8", num_sms=3)
    yield replace(base, num_tokens=(1, 0), hidden=136, num_experts=6)


def make_low_latency_calls(rank, cases):
    import ll_cases

    for case in cases:
        world = ll_cases.World(case, rank)
        with ll_cases.make_ll_buffer(case, timeout_s=TIMEOUT_S) as buffer:
            for zero_copy in (False, True) if case.wire == "bf16" else (False,):
                ll_cases.check_round(buffer, world, zero_copy=zero_copy)
            rows = ll_cases.dispatch(buffer, world, return_recv_hook=True)
            rows.hook()
            ll_cases.check_dispatch(rows, world)


def run_rank(rank, num_ranks, store):
    sys.path[:0] = [str(TESTS), str(TESTS.parent)]
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    import cases
    import ll_cases
    import torch.distributed as dist

    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=num_ranks,
        timeout=timedelta(seconds=TIMEOUT_S),
    )
    batch = list(small_cases(num_ranks))
    with cases.make_buffer(
        "cuda", case=batch[0], pool_bytes=8 << 20, timeout_s=TIMEOUT_S
    ) as buffer:
        for case in batch:
            world = cases.World(case, rank)
            buffer.get_dispatch_layout(world.topk_idxs[rank])
            cases.check_round_trip(buffer, world)
        buffer.barrier()
    ll_cases.run_on(rank, "cuda", make_low_latency_calls, list(small_low_latency_cases(num_ranks)))
    dist.destroy_process_group()


def main(num_ranks):
    with tempfile.TemporaryDirectory() as folder:
        store = f"{folder}/store"
        command = [sys.executable, __file__, str(num_ranks), store]
        ranks = [subprocess.Popen([*command, str(rank)]) for rank in range(num_ranks)]
        exit_codes = [process.wait() for process in ranks]
    sys.exit(max(abs(code) for code in exit_codes))


if __name__ == "__main__":
    if len(sys.argv) == 2:
        main(int(sys.argv[1]))
    else:
        run_rank(int(sys.argv[3]), int(sys.argv[1]), sys.argv[2])

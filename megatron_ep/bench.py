"""Times one MoE layer of Megatron-Core, forward and backward, under several dispatchers.

    torchrun --standalone --nproc-per-node 2 -m megatron_ep.bench

All layers run in turn, again and again; a time is that of the slowest rank, on GPUs by events on
the stream that calls the layer. Every layer is first compared with the first one. Ranks may share a
GPU, under MPS (scripts/with_mps.sh); the other dispatchers' collectives are gloo's then, through
the host's memory.

What a dispatcher's name may have behind it:

    /2              tokens in 2 chunks (overlap.py)
    +te, +torch, +sequential    experts: Transformer Engine's or torch's grouped GEMM, one by one;
                    for a fair comparison give every dispatcher those with which it is fastest
    +fused          of Megatron's dispatchers: permutation by Transformer Engine's kernels
    +fp8            fp8 rows
    +capacity1.5    room for 1.5 times the average of rows, and no host that waits; with +torch only
    +sms16          of chunks: transfers take 16 SMs, which the experts' GEMMs leave free
    +late           gradients of weights while those of tokens travel back; with +torch only
    +graph          forward and backward replayed as CUDA graphs (graphs.py); with a capacity only,
                    and not in the pass "forward"

--overlap, --profile and --trace look at each deepep more closely, after the times are taken (see
bench_overlap.py, bench_profile.py).
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ep_kernels.bench.timing import Stats, summarise, time_op
from megatron_ep.bench_layer import DTYPES, PASSES, Variant, make_variants, parse_variant
from megatron_ep.bench_overlap import balance, can_be_watched, report_overlap
from megatron_ep.bench_profile import per_chunk, profile_pass

MAX_ERROR, MAX_ERROR_FP8 = 0.02, 0.1
"""Of an output or gradient, relative to its norm."""


def check_agreement(variants: dict[str, Variant]) -> None:
    """Raises AssertionError unless all layers compute the same, up to rounding."""
    first, *others = variants
    for name in PASSES:
        want = variants[first].passes[name]().double()
        for other in others:
            got = variants[other].passes[name]().double()
            error = (got - want).norm() / want.norm()
            is_fp8 = any(parse_variant(one).options["fp8_dispatch"] for one in (first, other))
            bound = MAX_ERROR_FP8 if is_fp8 else MAX_ERROR
            assert error < bound, f"{name}: {other} differs from {first} by {error:.3g}"


def time_pass(op: Callable[[], Any], device: torch.device) -> float:
    """Seconds from a common start of all ranks until the work of `op` is done on this rank."""
    if device.type == "cpu":
        return time_op(op)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def between_events() -> None:
        begin.record()
        op()
        end.record()

    torch.cuda.synchronize()
    time_op(between_events)
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3


def measure(
    options: argparse.Namespace, variants: dict[str, Variant], device: torch.device
) -> dict[str, dict[str, Stats]]:
    """Stats of every pass of every variant."""
    durations: dict[tuple[str, str], list[float]] = {}
    for iteration in range(-options.warmup, options.iterations):
        for variant in variants:
            for name in PASSES:
                seconds = time_pass(variants[variant].passes[name], device)
                if iteration >= 0:
                    durations.setdefault((variant, name), []).append(seconds)
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, durations)
    return {
        variant: {name: summarise([each[variant, name] for each in gathered]) for name in PASSES}
        for variant in variants
    }


def profile(
    options: argparse.Namespace, variants: dict[str, Variant], device: torch.device
) -> None:
    """Prints where the host's time goes under deepep, and what a chunk more adds to the variant in
    one piece, if that comes before; of rank 0.
    """
    whole: dict[str, dict[str, Any]] = {}
    for name, variant in variants.items():
        if not can_be_watched(name):
            continue
        op, layer = variant.passes[PASSES[-1]], variant.layer
        found = profile_pass(op, layer, device, iterations=options.iterations)
        line = {"dispatcher": name, "profile": found}
        kind = name.partition("/")[0]
        if found["expert_calls"] == 1:
            whole.setdefault(kind, found)
        elif kind in whole:
            line["per_chunk"] = per_chunk(whole[kind], found)
        if dist.get_rank() == 0:
            sys.stdout.write(json.dumps(line, default=float) + "\n")


def report(results: dict[str, dict[str, Stats]], dropped_rows: dict[str, int | None]) -> None:
    """A table on standard output; ratios are to the first variant."""
    first = next(iter(results))
    width = max(14, *(len(name) + 1 for name in results))
    sys.stdout.write(
        f"{'pass':20}{'dispatcher':{width}}{'median ms':>10}{'p95 ms':>10}{'speed':>8}\n"
    )
    for name in PASSES:
        for variant, stats in results.items():
            median, p95 = stats[name].median, stats[name].p95
            ratio = results[first][name].median / median
            times = f"{median * 1e3:10.2f}{p95 * 1e3:10.2f}{ratio:7.2f}x"
            sys.stdout.write(f"{name:20}{variant:{width}}{times}\n")
    for variant, stats in results.items():
        line: dict[str, Any] = {name: vars(stats[name]) for name in PASSES}
        if dropped_rows[variant] is not None:
            line["dropped_rows"] = dropped_rows[variant]
        sys.stdout.write(json.dumps({"dispatcher": variant, **line}) + "\n")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_ep.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tokens", type=int, default=2048, help="per rank (2048)")
    parser.add_argument("--hidden", type=int, default=1024, help="(1024)")
    parser.add_argument("--ffn-hidden", type=int, default=128, help="of an expert (128)")
    parser.add_argument("--topk", type=int, default=8, help="(8)")
    parser.add_argument("--experts", type=int, default=64, help="in total (64)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="(bf16)")
    parser.add_argument(
        "--te", action="store_true", help="experts are +te where a dispatcher's name says nothing"
    )
    parser.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="(cuda if there is one)"
    )
    parser.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="afterwards also write a timeline of each deepep, FILE with its name in it",
    )
    parser.add_argument(
        "--overlap",
        action="store_true",
        help="afterwards also tell how long transfers and experts of each deepep are busy, and how "
        "much of the transfers is hidden",
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="afterwards also tell where the host's time goes in each deepep and what a chunk adds",
    )
    parser.add_argument(
        "--balance",
        action="store_true",
        help="first find the --ffn-hidden with which experts take as long as transfers",
    )
    parser.add_argument("--iterations", type=int, default=10, help="(10)")
    parser.add_argument("--warmup", type=int, default=2, help="(2)")
    parser.add_argument("--seed", type=int, default=1234, help="(1234)")
    parser.add_argument(
        "--dispatchers",
        nargs="+",
        metavar="TYPE[+WORD...][/CHUNKS]",
        default=["alltoall", "deepep", "deepep/2", "deepep/4"],
        help="see above; the first one is what the others are compared with",
    )
    return parser.parse_args(arguments)


def run(options: argparse.Namespace, device: torch.device) -> None:
    """Measures and reports all that is asked for."""
    if options.balance:
        options.ffn_hidden = balance(options, device)
        if dist.get_rank() == 0:
            sys.stdout.write(json.dumps({"ffn_hidden": options.ffn_hidden}) + "\n")
    variants = make_variants(options, options.dispatchers, device)
    check_agreement(variants)
    results = measure(options, variants, device)
    dropped_rows = {name: variant.dropped_rows() for name, variant in variants.items()}
    if dist.get_rank() == 0:
        report(results, dropped_rows)
    if options.profile:
        profile(options, variants, device)
    del variants
    gc.collect()  # layers in their own forwards, and with them what they hold of the pool
    if options.overlap or options.trace is not None:
        report_overlap(options, options.dispatchers, device)


def main(arguments: Sequence[str]) -> int:
    """Runs the command line on one rank; returns the exit status."""
    options = parse(arguments)
    import megatron_ep
    from megatron_ep.devices import choose_device, start_process_group

    try:
        device = choose_device(options.device)
    except ValueError as error:
        sys.stderr.write(f"error: --device {error}\n")
        return 2
    from megatron.core import parallel_state

    start_process_group(device)
    parallel_state.initialize_model_parallel(
        expert_model_parallel_size=dist.get_world_size(), create_gloo_process_groups=False
    )
    megatron_ep.register()
    try:
        run(options, device)
    finally:
        megatron_ep.reset_buffers()
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

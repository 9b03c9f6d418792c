"""The command line."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from ep_kernels import bench
from ep_kernels.bench.launcher import LaunchError, run_ranks, why_no_mpi
from ep_kernels.bench.report import format_table, json_lines, make_lines
from ep_kernels.bench.worker import Job
from ep_kernels.bench.workload import DTYPES, Workload
from ep_kernels.testing.routing import ROUTING_KINDS

CONTENDERS = ("ep_kernels", "gloo", "mpi")
CUDA_CONTENDERS = ("ep_kernels", "nccl")
LAYOUTS = {
    "both": ("rank_major", "expert_major"),
    "rank_major": ("rank_major",),
    "expert_major": ("expert_major",),
}


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    options = parser.parse_args(argv)
    _fill_in(options)
    if problem := _problem(options):
        parser.error(problem)
    if options.device == "cuda":
        return _main_cuda(parser, options)
    contenders = list(options.contenders)
    if "mpi" in contenders and (reason := why_no_mpi()):
        print(f"\n*** SKIPPED the MPI baseline: {reason}\n", file=sys.stderr)
        contenders.remove("mpi")
    with tempfile.TemporaryDirectory(prefix="ep_kernels_bench_") as folder:
        job = Job(
            workload=_workload(options),
            contenders=tuple(contenders),
            baseline_rows=options.baseline_rows,
            num_iterations=options.iterations,
            num_warmup=options.warmup,
            is_checked=not options.no_check,
            folder=folder,
        )
        try:
            results = run_ranks(job, timeout_s=options.timeout)
        except LaunchError as error:
            print(f"ep_kernels.bench: {error}", file=sys.stderr)
            return 1
    lines = make_lines(results)
    print(f"{job.workload.describe()}; {options.iterations} interleaved iterations\n")
    print(format_table(lines))
    if options.json is not None:
        text = "".join(f"{line}\n" for line in json_lines(results, lines))
        if options.json == "-":
            print(f"\n{text}", end="")
        else:
            Path(options.json).write_text(text)
            print(f"\nJSON lines: {options.json}")
    return 0


def _main_cuda(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    import torch

    from ep_kernels.bench import cuda_cli

    if problem := cuda_cli.problem_of(options, torch.cuda.device_count()):
        parser.error(problem)
    return cuda_cli.run_cuda(options, _workload(options))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ep_kernels.bench",
        description=bench.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sizes = parser.add_argument_group("workload")
    sizes.add_argument("--ranks", type=int, default=2, help="processes (default 2)")
    sizes.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu",
        help="where rows live; several ranks on one GPU need scripts/with_mps.sh",
    )  # fmt: skip
    sizes.add_argument(
        "--low-latency", action="store_true",
        help="time low-latency calls against bare all-to-alls of the same rows",
    )  # fmt: skip
    sizes.add_argument("--zero-copy", action="store_true", help="of low-latency combine")
    sizes.add_argument("--tokens", type=int, help="per rank (default 4096; low latency 128)")
    sizes.add_argument(
        "--hidden", type=int, help="elements per token (2048; low latency, cuda 7168)"
    )
    sizes.add_argument("--topk", type=int, default=8, help="experts per token (8)")
    sizes.add_argument("--experts", type=int, help="in total (64; cuda 256)")
    sizes.add_argument("--dtype", choices=DTYPES, default="bf16")
    sizes.add_argument("--routing", choices=ROUTING_KINDS, default="uniform")
    sizes.add_argument("--zipf-exponent", type=float, default=1.0, help="of routing zipf (1.0)")
    sizes.add_argument("--layout", choices=LAYOUTS, default="both", help="of dispatch and combine")
    sizes.add_argument("--threads", type=int, help="per rank (default: cores / ranks)")
    sizes.add_argument(
        "--num-sms", type=int, nargs="+", metavar="N", help="cuda: SMs per rank, each timed (16)"
    )
    sizes.add_argument("--seed", type=int, default=0)
    runs = parser.add_argument_group("runs")
    runs.add_argument("--iterations", type=int, default=20)
    runs.add_argument("--warmup", type=int, default=3)
    runs.add_argument(
        "--contenders", nargs="+", choices=(*CONTENDERS, "nccl"), metavar="NAME",
        help=f"out of {', '.join(CONTENDERS)}; cuda: ep_kernels, nccl (default: all)",
    )  # fmt: skip
    runs.add_argument(
        "--baseline-rows", choices=("auto", "deduplicated", "expanded"), default="auto",
        help="one row per (token, rank) or per (token, expert); auto takes the faster",
    )  # fmt: skip
    runs.add_argument("--no-check", action="store_true", help="skip the check of all results")
    runs.add_argument("--timeout", type=float, default=900.0, help="seconds for everything (900)")
    runs.add_argument("--json", metavar="FILE", help="write JSON lines there, - for the output")
    return parser


def _fill_in(options: argparse.Namespace) -> None:
    """Defaults that depend on other options."""
    is_cuda = options.device == "cuda"
    defaults = {
        "tokens": 128 if options.low_latency else 4096,
        "hidden": 7168 if options.low_latency or is_cuda else 2048,
        "experts": 256 if is_cuda else 64,
        "contenders": CUDA_CONTENDERS if is_cuda else CONTENDERS,
    }
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)


def _problem(options: argparse.Namespace) -> str:
    """What is wrong with the options, or ""."""
    for name in ("ranks", "tokens", "hidden", "topk", "experts", "iterations"):
        if getattr(options, name) < 1:
            return f"--{name}={getattr(options, name)} is not positive"
    if options.threads is not None and options.threads < 1:
        return f"--threads={options.threads} is not positive"
    if options.experts % options.ranks:
        return f"--experts={options.experts} is not divisible by --ranks={options.ranks}"
    if options.topk > options.experts:
        return f"--topk={options.topk} exceeds --experts={options.experts}"
    if options.low_latency and options.dtype != "bf16":
        return f"--dtype={options.dtype}: low-latency rows are bf16"
    if options.device == "cpu" and options.num_sms is not None:
        return "--num-sms is for --device cuda; on the CPU it is --threads"
    if options.device == "cpu" and "nccl" in options.contenders:
        return "--contenders: nccl runs on GPUs only"
    return ""


def _workload(options: argparse.Namespace) -> Workload:
    num_cores = len(os.sched_getaffinity(0))
    return Workload(
        num_ranks=options.ranks,
        num_tokens=options.tokens,
        hidden=options.hidden,
        num_topk=options.topk,
        num_experts=options.experts,
        dtype=options.dtype,
        routing=options.routing,
        layouts=LAYOUTS[options.layout],
        num_threads=options.threads or max(1, num_cores // options.ranks),
        seed=options.seed,
        zipf_exponent=options.zipf_exponent,
        low_latency=options.low_latency,
        zero_copy=options.zero_copy,
    )

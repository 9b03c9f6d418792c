"""`--device cuda`: checks the options, starts a rank per process and ends them."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import torch

from ep_kernels.bench.cuda_worker import CudaJob
from ep_kernels.bench.launcher import PATIENCE_S, LaunchError, run_commands
from ep_kernels.bench.workload import Workload

DEFAULT_NUM_SMS = (16,)

DEFAULT_MPS_FOLDER = "/tmp/nvidia-mps"  # noqa: S108  the one of CUDA
MULTICAST_OFF = {"NCCL_NVLS_ENABLE": "0"}
"""A switch has few multicast groups; on a shared machine they are not ours to take."""


def problem_of(options: argparse.Namespace, num_gpus: int) -> str:
    """What is wrong with the options, or ""."""
    if options.low_latency:
        return "--low-latency: on GPUs by python -m ep_kernels.bench.cuda_low_latency"
    if unknown := set(options.contenders) - {"ep_kernels", "nccl"}:
        return f"--contenders: {sorted(unknown)[0]} does not run on GPUs"
    if any(num_sms < 1 for num_sms in options.num_sms or ()):
        return f"--num-sms={options.num_sms} are not all positive"
    if num_gpus == 0:
        return "--device=cuda: this machine has no usable CUDA device"
    used = min(options.ranks, num_gpus)
    if options.ranks % used:
        return f"--ranks={options.ranks} is not divisible by the {used} GPUs"
    return ""


def why_no_mps(environment: dict[str, str]) -> str:
    """Why ranks that share a GPU will take turns, or ""."""
    folder = environment.get("CUDA_MPS_PIPE_DIRECTORY") or DEFAULT_MPS_FOLDER
    if any(Path(folder).glob("*control*")):  # its pipe, its lock, its process id
        return ""
    variable = "set" if "CUDA_MPS_PIPE_DIRECTORY" in environment else "not set"
    return f"no MPS daemon in {folder} (CUDA_MPS_PIPE_DIRECTORY is {variable})"


def run_cuda(options: argparse.Namespace, workload: Workload) -> int:
    """Runs the benchmark; results appear as they come. Returns the exit status."""
    num_gpus = min(options.ranks, torch.cuda.device_count())
    if workload.num_ranks > num_gpus and (reason := why_no_mps(dict(os.environ))):
        print(
            f"\n*** WARNING: {workload.num_ranks} ranks share {num_gpus} GPU(s), and there is "
            f"{reason}.\n*** The ranks take turns and the times mean nothing. Instead:\n"
            "***     scripts/with_mps.sh python -m ep_kernels.bench --device cuda ...\n",
            file=sys.stderr,
        )
    if options.json not in (None, "-"):
        Path(options.json).write_text("")
    print(f"{workload.describe()}; {num_gpus} GPU(s)", flush=True)
    with tempfile.TemporaryDirectory(prefix="ep_kernels_bench_") as folder:
        job = CudaJob(
            workload=workload,
            num_gpus=num_gpus,
            num_sms=tuple(options.num_sms or DEFAULT_NUM_SMS),
            contenders=tuple(options.contenders),
            num_iterations=options.iterations,
            num_warmup=options.warmup,
            is_checked=not options.no_check,
            timeout_s=options.timeout,
            json_path=options.json,
            folder=folder,
        )
        worker = [sys.executable, "-m", "ep_kernels.bench.cuda_worker", job.to_json()]
        environment = {"OMP_NUM_THREADS": str(workload.num_threads)}
        try:
            run_commands(
                [[*worker, str(rank)] for rank in range(workload.num_ranks)],
                environment=environment
                | {name: os.environ.get(name, off) for name, off in MULTICAST_OFF.items()},
                timeout_s=options.timeout + PATIENCE_S,  # ranks that are late say where first
            )
        except LaunchError as error:
            print(f"ep_kernels.bench: {error}", file=sys.stderr)
            return 1
    return 0

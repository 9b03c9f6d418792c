"""One rank of a benchmark on GPUs; rank 0 reports.

    python -m ep_kernels.bench.cuda_worker JOB RANK

JOB is a CudaJob as JSON. Rank r uses GPU r mod num_gpus.
"""

from __future__ import annotations

import dataclasses
import datetime
import faulthandler
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ep_kernels.bench.cuda_baseline import nccl_ops, why_no_nccl
from ep_kernels.bench.cuda_copies import link_rate, memory_rate
from ep_kernels.bench.cuda_floors import Rates, count_rows
from ep_kernels.bench.cuda_ops import BufferCalls, check, device_barrier, pool_bytes
from ep_kernels.bench.cuda_report import Report
from ep_kernels.bench.cuda_timing import Clock, CudaClock, Stopwatch
from ep_kernels.bench.workload import Inputs, Workload, make_inputs
from ep_kernels.buffer import Buffer
from ep_kernels.version import __version__

PEER_TIMEOUT_S = 30.0
"""A rank waits this long for a peer, on the device and on the host."""


@dataclass(frozen=True, kw_only=True)
class CudaJob:
    """What the ranks are told.

    Attributes:
        workload: sizes, see there.
        num_gpus: that the ranks use.
        num_sms: of each rank, one measurement for each.
        contenders: names out of "ep_kernels", "nccl".
        num_iterations, num_warmup: calls of an operation by either clock, timed and not.
        is_checked: compare a small workload with ep_kernels.reference first.
        timeout_s: for everything.
        json_path: of the JSON lines; None for none.
        folder: for the rendezvous.
    """

    workload: Workload
    num_gpus: int
    num_sms: tuple[int, ...]
    contenders: tuple[str, ...]
    num_iterations: int
    num_warmup: int
    is_checked: bool
    timeout_s: float
    json_path: str | None
    folder: str

    @property
    def ranks_per_gpu(self) -> int:
        return self.workload.num_ranks // self.num_gpus

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str) -> CudaJob:
        fields = json.loads(text)
        workload = Workload(**_with_tuples(fields.pop("workload"), "layouts"))
        return CudaJob(workload=workload, **_with_tuples(fields, "num_sms", "contenders"))


def _with_tuples(fields: dict[str, Any], *names: str) -> dict[str, Any]:
    return fields | {name: tuple(fields[name]) for name in names}


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """What a rank runs on. num_sms: those that there are."""

    device: torch.device
    clock: Clock
    name: str
    num_sms: int

    @staticmethod
    def current() -> Gpu:
        """The current CUDA device."""
        device = torch.device("cuda", torch.cuda.current_device())
        properties = torch.cuda.get_device_properties(device)
        return Gpu(
            device=device,
            clock=CudaClock(),
            name=properties.name,
            num_sms=properties.multi_processor_count,
        )


def main(argv: list[str]) -> int:
    job, rank = CudaJob.from_json(argv[0]), int(argv[1])
    # Whatever this rank waits for: at the end of the time it says where, and leaves.
    faulthandler.dump_traceback_later(job.timeout_s, exit=True)
    torch.set_num_threads(job.workload.num_threads)
    torch.cuda.set_device(rank % job.num_gpus)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{job.folder}/rendezvous",
        rank=rank,
        world_size=job.workload.num_ranks,
        timeout=datetime.timedelta(seconds=2 * PEER_TIMEOUT_S),
    )
    with torch.no_grad():
        measure(job, rank, Gpu.current())
    dist.destroy_process_group()
    return 0


def measure(job: CudaJob, rank: int, gpu: Gpu) -> None:
    """Everything that a rank does. Collective."""
    begin = time.monotonic()
    workload = job.workload
    counts = count_rows(workload)
    inputs = make_inputs(workload, rank)
    inputs = Inputs(**{name: tensor.to(gpu.device) for name, tensor in vars(inputs).items()})
    with Buffer(
        num_experts=workload.num_experts,
        device=gpu.device,
        pool_bytes=pool_bytes(workload, counts),
        timeout_s=PEER_TIMEOUT_S,
        num_sms=min(job.num_sms),
    ) as buffer:
        stopwatch = Stopwatch(
            clock=gpu.clock,
            barrier=buffer.barrier,
            align=device_barrier(buffer, workload.num_experts),
            num_iterations=job.num_iterations,
            num_warmup=job.num_warmup,
        )
        rates, link_way = _measure_rates(job, rank, gpu, stopwatch)
        report = Report(
            is_writer=rank == 0,
            path=job.json_path,
            common={"device": gpu.name, **_common(job)},
            counts=counts,
            num_gpus=job.num_gpus,
            rates=rates,
        )
        report.start(link_way)
        if job.is_checked:
            check(buffer, workload, rank)
            report.note("results agree with the reference to the byte")
        if "ep_kernels" in job.contenders:
            for num_sms in _possible_num_sms(job, gpu, report):
                calls = BufferCalls(
                    buffer=buffer, workload=workload, inputs=inputs, counts=counts, num_sms=num_sms
                )
                for op in calls.ops():
                    report.add(op, stopwatch.time(op.call))
        if "nccl" in job.contenders:
            _measure_nccl(job, inputs, rank, stopwatch, report)
        report.finish()
        report.note(f"{time.monotonic() - begin:.0f} s")


def _measure_rates(job: CudaJob, rank: int, gpu: Gpu, stopwatch: Stopwatch) -> tuple[Rates, str]:
    """The rates, and which copies between GPUs were the fastest."""
    memory = memory_rate(stopwatch, gpu.device, job.ranks_per_gpu)
    link, link_way = None, ""
    if job.num_gpus > 1:
        index = rank % job.num_gpus
        link, link_way = link_rate(stopwatch, index, job.num_gpus, job.ranks_per_gpu)
    torch.cuda.empty_cache()
    return Rates(memory=memory, link=link), link_way


def _possible_num_sms(job: CudaJob, gpu: Gpu, report: Report) -> Iterator[int]:
    """NOTE: blocks wait for those of other ranks, so all of them have to run at once."""
    for num_sms in job.num_sms:
        if num_sms * job.ranks_per_gpu <= gpu.num_sms:
            yield num_sms
        else:
            report.note(
                f"*** SKIPPED num_sms={num_sms}: {job.ranks_per_gpu} ranks x {num_sms} exceed "
                f"the {gpu.num_sms} SMs of their GPU"
            )


def _measure_nccl(
    job: CudaJob, inputs: Inputs, rank: int, stopwatch: Stopwatch, report: Report
) -> None:
    if reason := why_no_nccl(job.workload.num_ranks, job.num_gpus):
        report.note(f"*** SKIPPED NCCL: {reason}")
        return
    ops = nccl_ops(job.workload, inputs, report.counts, rank=rank, timeout_s=2 * PEER_TIMEOUT_S)
    for op in ops:
        report.add(op, stopwatch.time(op.call))


def _common(job: CudaJob) -> dict[str, Any]:
    workload = job.workload.as_dict()
    del workload["low_latency"], workload["zero_copy"], workload["num_threads"]
    workload["token_routing"] = workload.pop("routing")  # "routing" tells calls apart
    return {
        "num_gpus": job.num_gpus,
        "num_iterations": job.num_iterations,
        "version": __version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if dist.is_nccl_available() else "",
        **workload,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

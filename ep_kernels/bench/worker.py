"""One rank: started by launcher.py, writes the report's data into a file on rank 0.

    python -m ep_kernels.bench.worker JOB [RANK]

JOB is a Job as JSON. Without RANK the rank is that of MPI.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ep_kernels import reference
from ep_kernels.bench.contenders import Contender, EpKernels, Memcpy, PermuteAllToAll
from ep_kernels.bench.low_latency import low_latency_contenders, region_bytes
from ep_kernels.bench.timing import summarise, time_op
from ep_kernels.bench.transports import GroupTransport, MpiTransport
from ep_kernels.bench.workload import (
    COMBINE,
    DISPATCH,
    DTYPES,
    LAYER,
    MEMCPY,
    Inputs,
    Workload,
    bytes_to_move,
    make_inputs,
)
from ep_kernels.buffer import Buffer
from ep_kernels.config import Layout
from ep_kernels.version import __version__


@dataclass(frozen=True, kw_only=True)
class Job:
    """What launcher.py tells the ranks.

    Attributes:
        workload: sizes, see there.
        contenders: names out of "ep_kernels", "gloo", "mpi".
        baseline_rows: "auto", "deduplicated" or "expanded".
        num_iterations, num_warmup: rounds over all contenders, timed and not.
        is_checked: compare all results with ep_kernels.reference first.
        folder: for the rendezvous and the results.
    """

    workload: Workload
    contenders: tuple[str, ...]
    baseline_rows: str
    num_iterations: int
    num_warmup: int
    is_checked: bool
    folder: str

    @property
    def results_file(self) -> Path:
        return Path(self.folder) / "results.json"

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str) -> Job:
        fields = json.loads(text)
        sizes = fields.pop("workload")
        sizes["layouts"] = tuple(sizes["layouts"])
        return Job(workload=Workload(**sizes), **fields)


def main(argv: list[str]) -> int:
    job = Job.from_json(argv[0])
    comm = None if len(argv) > 1 else _mpi_comm()
    rank = int(argv[1]) if comm is None else comm.Get_rank()
    workload = job.workload
    torch.set_num_threads(workload.num_threads)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{job.folder}/rendezvous",
        rank=rank,
        world_size=workload.num_ranks,
        timeout=datetime.timedelta(minutes=5),
    )
    with torch.inference_mode():
        results = _run(job, rank, comm)
    if rank == 0:
        job.results_file.write_text(json.dumps(results))
    dist.destroy_process_group()
    return 0


def _run(job: Job, rank: int, comm: Any) -> dict[str, Any]:
    workload = job.workload
    inputs = make_inputs(workload, rank)
    num_bytes = bytes_to_move(workload, inputs.topk_idx)
    buffer = None
    if "ep_kernels" in job.contenders:
        buffer = Buffer(
            num_experts=workload.num_experts,
            num_sms=workload.num_threads,
            low_latency_bytes=region_bytes(workload) if workload.low_latency else 0,
        )
    contenders = _make_contenders(job, inputs, buffer, comm)
    contenders.append(Memcpy(num_bytes[MEMCPY] // 2, workload.num_threads))
    durations = _time_rounds(job, contenders)
    gathered: list[Any] = [None] * workload.num_ranks
    dist.all_gather_object(gathered, (durations, num_bytes))
    if buffer is not None:
        contenders.clear()
        buffer.destroy()
    return {
        "version": __version__,
        "torch": torch.__version__,
        "machine": platform.platform(),
        "workload": workload.as_dict(),
        "num_iterations": job.num_iterations,
        "num_bytes": {op: sum(each[1][op] for each in gathered) for op in num_bytes},
        "rows": [
            {
                "contender": name,
                "detail": detail,
                "op": op,
                **dataclasses.asdict(summarise([each[0][name, detail, op] for each in gathered])),
            }
            for name, detail, op in durations
        ],
    }


def _make_contenders(job: Job, inputs: Inputs, buffer: Buffer | None, comm: Any) -> list[Contender]:
    if job.workload.low_latency:
        return low_latency_contenders(job.contenders, buffer, job.workload, inputs, comm)
    contenders: list[Contender] = []
    for name in job.contenders:
        if name == "ep_kernels":
            assert buffer is not None
            contenders.append(EpKernels(buffer, job.workload, inputs))
        else:
            transport = GroupTransport("gloo") if name == "gloo" else MpiTransport(comm)
            contenders.append(
                PermuteAllToAll(transport, job.workload, inputs, rows=job.baseline_rows)
            )
    if job.is_checked:
        _check(job.workload, inputs, contenders)
    return contenders


def _time_rounds(job: Job, contenders: list[Contender]) -> dict[tuple[str, str, str], list[float]]:
    """Seconds of each iteration on this rank, by (contender, detail, operation)."""
    durations: dict[tuple[str, str, str], list[float]] = {}
    for iteration in range(-job.num_warmup, job.num_iterations):
        for contender in contenders:
            for op in (*job.workload.ops, MEMCPY):
                if op not in contender.ops:
                    continue
                seconds = time_op(contender.ops[op])
                if iteration >= 0:
                    key = (contender.name, contender.details[op], op)
                    durations.setdefault(key, []).append(seconds)
    return durations


# ---- results ---------------------------------------------------------------------------------


def _check(workload: Workload, inputs: Inputs, contenders: list[Contender]) -> None:
    """Runs every operation once and compares with the reference.

    Dispatch must agree in every byte; ep_kernels' combine in every bit; a baseline's combine may
    differ by its other order and by one more rounding.

    Raises:
        ValueError: naming the contender and the operation.
    """
    expected = _expected(workload, inputs)
    tolerance = 4 * torch.finfo(DTYPES[workload.dtype]).eps
    for contender in contenders:
        for op in workload.ops:
            contender.ops[op]()
            result = contender.results[op]
            rows = result if isinstance(result, torch.Tensor) else result.recv_x
            is_exact = contender.name == "ep_kernels" or op in DISPATCH.values()
            if rows.shape != expected[op].shape or not (
                torch.equal(rows, expected[op])
                if is_exact
                else _relative_error(rows, expected[op]) < tolerance
            ):
                raise ValueError(f"{contender.name}: {op} differs from the reference")


def _expected(workload: Workload, inputs: Inputs) -> dict[str, torch.Tensor]:
    expected = {}
    with reference.Buffer(num_experts=workload.num_experts) as buffer:
        for layout in DISPATCH:
            rows = buffer.dispatch(inputs.x, inputs.topk_idx, layout=Layout(layout))
            handle: Any = rows.handle
            expected[DISPATCH[layout]] = rows.recv_x
            expected[COMBINE[layout]] = buffer.combine(rows.recv_x, handle).x
    return expected | {LAYER: expected[COMBINE["expert_major"]]}


def _relative_error(rows: torch.Tensor, expected: torch.Tensor) -> float:
    difference = (rows.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp(min=1e-30))


def _mpi_comm() -> Any:
    import mpi4py

    # Only this thread talks to MPI, and MPI is faster if it knows.
    mpi4py.rc.thread_level = "single"
    from mpi4py import MPI

    return MPI.COMM_WORLD


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

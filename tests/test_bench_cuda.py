"""`python -m ep_kernels.bench --device cuda`: without a GPU where that is possible."""

import functools
import json
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from ep_kernels._native_ll import LL_STAMPS
from ep_kernels.bench import (
    cli,
    cuda_baseline,
    cuda_cli,
    cuda_copies,
    cuda_ll_stamps,
    cuda_worker,
    plot,
)
from ep_kernels.bench.cuda_floors import Rates, _count_rows, floor_of
from ep_kernels.bench.cuda_ll_timer import Measurement, Setting
from ep_kernels.bench.cuda_ops import Op, fp8_row_bytes
from ep_kernels.bench.cuda_report import Report
from ep_kernels.bench.cuda_timing import Timing
from ep_kernels.bench.cuda_worker import CudaJob, Gpu
from ep_kernels.bench.timing import Stats
from ep_kernels.bench.workload import Workload, make_topk

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--tokens", "33", "--hidden", "128", "--topk", "2", "--experts", "8", "--iterations", "2"]

# Rank 0 has one token for experts 0, 1 and 2, rank 1 one for expert 3 and one for none.
TWO_RANKS = _count_rows([torch.tensor([[0, 1, 2]]), torch.tensor([[3, -1, -1], [-1] * 3])], 2)


def make_workload(**changes):
    sizes = dict(num_ranks=2, num_tokens=33, hidden=128, num_topk=2, num_experts=8, dtype="bf16")
    sizes |= dict(routing="uniform", layouts=("rank_major", "expert_major"), num_threads=1, seed=0)
    return Workload(**sizes | changes)


def make_job(folder, **changes):
    fields = dict(num_gpus=1, num_sms=(1, 2), contenders=("ep_kernels",), num_iterations=2)
    fields |= dict(num_warmup=1, is_checked=True, timeout_s=60.0, folder=str(folder))
    fields |= dict(workload=make_workload(), json_path=str(folder / "results.jsonl"))
    return CudaJob(**fields | changes)


# Floors


def test_rows_are_counted_by_source_and_destination():
    assert TWO_RANKS.rows["rank_major"] == [[1, 1], [0, 1]]
    assert TWO_RANKS.rows["expert_major"] == [[2, 1], [0, 1]]
    assert TWO_RANKS.num_shared == [[1, 0], [0, 0]]
    assert (TWO_RANKS.num_tokens, TWO_RANKS.num_sent_tokens) == ([1, 2], [1, 1])
    assert TWO_RANKS.max_recv_rows("rank_major") == 2


@pytest.mark.parametrize(
    ("op", "layout", "num_rows"),
    [
        ("dispatch", "rank_major", 2 + 3),
        ("dispatch", "expert_major", 2 + 4),
        ("combine", "rank_major", 3 + 3),
        ("combine", "expert_major", 4 + 3),
    ],
)
def test_the_floor_on_one_gpu_is_what_all_ranks_read_and_write(op, layout, num_rows):
    rates = Rates(memory=10.0, link=None)
    floor = floor_of(op, layout, TWO_RANKS, num_gpus=1, row_bytes=4, rates=rates)
    assert floor.seconds == num_rows * 4 / 10.0
    assert (floor.limit, floor.link_bytes) == ("memory", 0)


def test_the_floor_on_two_gpus_is_that_of_the_busier_link_if_that_is_slower():
    floor = floor_of(
        "dispatch",
        "rank_major",
        TWO_RANKS,
        num_gpus=2,
        row_bytes=4,
        rates=Rates(memory=10.0, link=1.0),
    )
    assert (floor.memory_s, floor.link_s) == (3 * 4 / 10.0, 4.0)  # GPU 1: 1 read, 2 written
    assert (floor.limit, floor.seconds, floor.link_bytes) == ("link", 4.0, 4)


def test_rows_of_one_token_cross_once_in_dispatch_and_all_of_them_in_combine():
    counts = _count_rows([torch.tensor([[2, 3]]), torch.tensor([[-1, -1]])], 2)
    dispatch, combine = (
        floor_of(
            op,
            "expert_major",
            counts,
            num_gpus=2,
            row_bytes=4,
            rates=Rates(memory=1.0, link=1.0),
        )
        for op in ("dispatch", "combine")
    )
    assert (dispatch.link_bytes, combine.link_bytes) == (4, 8)
    # GPU 1: two rows are written, and one of them is read to be copied.
    assert dispatch.memory_s == 3 * 4


def test_an_fp8_row_has_a_scale_for_every_128_elements():
    assert fp8_row_bytes(7168) == 7168 + 4 * 56
    assert fp8_row_bytes(130) == 130 + 4 * 2


def test_a_larger_exponent_makes_routing_more_skewed():
    shares = [
        (make_topk(make_workload(routing="zipf", zipf_exponent=exponent), 0)[0] < 2).sum()
        for exponent in (0.5, 2.0)
    ]
    assert shares[0] < shares[1]


# Options


def parse(*arguments):
    options = cli.make_parser().parse_args(["--device", "cuda", *arguments])
    cli._fill_in(options)
    return options


def test_defaults_on_gpus_are_those_of_a_large_model():
    options = parse("--ranks", "8")
    assert (options.tokens, options.hidden, options.topk, options.experts) == (4096, 7168, 8, 256)
    assert options.contenders == ("ep_kernels", "nccl")
    assert cuda_cli.problem_of(options, num_gpus=1) == ""


@pytest.mark.parametrize(
    ("arguments", "num_gpus", "problem"),
    [
        ([], 0, "no usable CUDA device"),
        (["--ranks", "3"], 2, "--ranks=3 is not divisible by the 2 GPUs"),
        (["--num-sms", "4", "0"], 1, "--num-sms=[4, 0]"),
        (["--contenders", "gloo"], 1, "gloo"),
        (["--low-latency"], 1, "cuda_low_latency"),
    ],
)
def test_what_cannot_run_on_these_gpus_is_refused_by_name(arguments, num_gpus, problem):
    assert problem in cuda_cli.problem_of(parse(*arguments), num_gpus)


@pytest.mark.parametrize("arguments", [["--num-sms", "4"], ["--contenders", "nccl"]], ids=str)
def test_options_of_gpus_are_refused_on_the_cpu(arguments, capsys):
    with pytest.raises(SystemExit):
        cli.main(arguments)
    assert arguments[0] in capsys.readouterr().err


def test_ranks_that_share_a_gpu_are_told_if_no_mps_daemon_is_there(tmp_path):
    environment = {"CUDA_MPS_PIPE_DIRECTORY": str(tmp_path)}
    assert str(tmp_path) in cuda_cli.why_no_mps(environment)
    (tmp_path / "control").touch()
    assert cuda_cli.why_no_mps(environment) == ""


def test_a_job_survives_its_way_to_the_ranks(tmp_path):
    job = make_job(tmp_path)
    assert CudaJob.from_json(job.to_json()) == job


# The report


def make_timing(median):
    stats = Stats(median=median, p95=2 * median, minimum=median)
    return Timing(events=stats, host=stats)


def make_op(**changes):
    fields = dict(op="dispatch", layout="rank_major", rows="bf16", routing="cached", num_sms=8)
    fields |= dict(by="ep_kernels", clock="events", row_bytes=4, call=lambda: None)
    return Op(**fields | changes)


def test_stamps_are_told_from_the_first_rank_and_from_each_ranks_own_begin():
    """Two ranks, the second 3 us behind; three calls of 10 us, kept in slots that begin anew."""
    stamps = torch.zeros((2, 5, len(LL_STAMPS)), dtype=torch.int64)
    for call in range(3):
        for rank in range(2):
            begin = 1000 * (1000 + 20 * call + 3 * rank)
            slot = stamps[rank, (call + 4) % 5]
            slot[LL_STAMPS.index("begin")] = begin
            slot[LL_STAMPS.index("posted")] = begin + 4000
            slot[-1] = begin + 10_000
    lines = list(cuda_ll_stamps.describe_calls(cuda_ll_stamps.last_calls(stamps, 3)))
    assert [line.split() for line in lines[:-1]] == [
        ["begin", "0.0", "0.0", "3.0", "own", "0.0"],
        ["posted", "4.0", "4.0", "7.0", "own", "4.0"],
        ["end", "10.0", "10.0", "13.0", "own", "10.0"],
    ]
    assert lines[-1].endswith("begin: 10.0")


def test_a_report_does_not_keep_what_an_operation_holds():
    rows = torch.zeros(8)
    op = replace(make_op(), call=functools.partial(torch.clone, rows))
    report = Report(
        is_writer=False,
        path=None,
        common={},
        counts=TWO_RANKS,
        num_gpus=1,
        rates=Rates(memory=10.0, link=None),
    )
    report.add(op, make_timing(3.0))
    is_alive = weakref.ref(rows)
    del op, rows
    assert is_alive() is None


def test_results_are_written_as_they_come(tmp_path, capsys):
    path = tmp_path / "results.jsonl"
    report = Report(
        is_writer=True,
        path=str(path),
        common={"device": "a GPU"},
        counts=TWO_RANKS,
        num_gpus=1,
        rates=Rates(memory=10.0, link=None),
    )
    report.start("")
    report.add(make_op(), make_timing(3.0))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["op"] for line in lines] == ["copy", "dispatch"]
    assert lines[1]["p50_us"] == 3e6
    assert lines[1]["floor_us"] == 2e6
    assert lines[1]["ratio"] == 1.5
    assert lines[1]["device"] == "a GPU"
    assert "1.50" in capsys.readouterr().out
    report.add(make_op(by="nccl", num_sms=None), make_timing(6.0))
    report.finish()
    assert "2.00 times as fast as nccl" in capsys.readouterr().out


# Everything but the device: a rank's work on CPU tensors


class HostClock:
    def settle(self):
        pass

    def time_events(self, op, align):
        return self.time_host(op, align)

    def time_host(self, op, align):
        align()
        begin = time.perf_counter()
        op()
        return time.perf_counter() - begin


def measure_on_cpu(rank, job):
    gpu = Gpu(device=torch.device("cpu"), clock=HostClock(), name="none", num_sms=4)
    with (
        mock.patch.object(cuda_copies, "COPY_BYTES", 1 << 16),
        mock.patch.object(cuda_worker, "link_rate", return_value=(1e9, "to nowhere")),
        mock.patch.object(cuda_worker, "why_no_nccl", return_value=""),
        mock.patch.object(cuda_baseline.torch.cuda, "synchronize"),
        mock.patch.object(dist, "new_group", return_value=None),
        mock.patch.object(dist, "destroy_process_group"),
        torch.no_grad(),
    ):
        cuda_worker.measure(job, rank, gpu)


@pytest.mark.parametrize("num_gpus", [1, 2])
def test_every_operation_is_timed_and_checked(ranks, tmp_path, num_gpus):
    job = make_job(tmp_path, num_gpus=num_gpus, contenders=("ep_kernels", "nccl"))
    ranks.run(measure_on_cpu, job)
    lines = [json.loads(line) for line in Path(job.json_path).read_text().splitlines()][1:]
    ours = [line for line in lines if line["by"] == "ep_kernels"]
    assert len(ours) == 2 * 2 * 5  # num_sms, layouts, operations
    assert {line["routing"] for line in ours} == {"cached", "fresh", "fresh, capacity"}
    assert {line["token_routing"] for line in ours} == {job.workload.routing}
    assert {line["floor_limit"] for line in ours} <= {"memory", "link"}
    assert all((line["link_floor_us"] > 0) == (num_gpus > 1) for line in ours)
    assert {line["by"] for line in lines} == {
        "ep_kernels",
        "nccl, all-to-all alone",
        "nccl, deduplicated rows",
        "nccl, expanded rows",
    }


def test_too_many_sms_are_skipped_aloud(ranks, tmp_path):
    job = make_job(tmp_path, num_sms=(3, 2), workload=make_workload(layouts=("rank_major",)))
    ranks.run(measure_on_cpu, job)
    lines = [json.loads(line) for line in Path(job.json_path).read_text().splitlines()][1:]
    assert {line["num_sms"] for line in lines} == {2}
    pytest.importorskip("matplotlib")
    assert plot.main([job.json_path, str(tmp_path / "times.png")]) == 0


# The plot


def test_a_plot_shows_what_varies(tmp_path):
    by_sms = [{"num_sms": 8, "num_tokens": 64}, {"num_sms": 16, "num_tokens": 64}]
    by_tokens = [{"num_sms": 8, "num_tokens": 64}, {"num_sms": 8, "num_tokens": 128}]
    assert (plot.x_name(by_sms), plot.x_name(by_tokens)) == ("num_sms", "num_tokens")


def test_a_plot_leaves_out_a_line_that_was_cut_off_and_refuses_nothing(tmp_path, capsys):
    file = tmp_path / "results.jsonl"
    line = '{"op": "dispatch", "by": "ep_kernels", "p50_us": 1.0, "num_sms": 8}'
    file.write_text(f'{{"op": "copy"}}\n{line}\n{line[:9]}')
    assert [record["op"] for record in plot.read_records([file])] == ["dispatch"]
    pytest.importorskip("matplotlib")
    assert plot.main([str(file), str(tmp_path / "a.svg")]) == 0
    file.write_text("")
    assert plot.main([str(file), str(tmp_path / "b.svg")]) == 1
    assert "no times" in capsys.readouterr().err


# On a GPU


@pytest.mark.gpu(1)
def test_it_runs_on_a_gpu(tmp_path):
    file = tmp_path / "results.jsonl"
    command = [sys.executable, "-m", "ep_kernels.bench", "--device", "cuda", *SMALL]
    command += ["--num-sms", "2", "4", "--timeout", "100", "--json", str(file)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, timeout=150, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert {line["op"] for line in lines} == {"copy", "dispatch", "combine"}
    assert all(line["p50_us"] > 0 for line in lines[1:])


def test_lines_of_low_latency_can_be_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    setting = Setting(
        num_ranks=2, num_tokens=1, num_experts=8, num_topk=2, hidden=64, num_sms=None, flush=False,
        repetitions=1,
    )  # fmt: skip
    made = [
        Measurement(operation=operation, what=what, p50=2.0, p95=3.0, setting=one)
        for operation, what in (("dispatch fp8", "row"), ("gemm", "ratio"))
        for one in (setting, replace(setting, num_tokens=64))
    ]
    lines = [measurement.record() for measurement in made]
    assert lines[0]["op"] == "dispatch"
    assert (lines[0]["p50_us"], lines[2]["p50"]) == (2.0, 2.0)
    (tmp_path / "ll.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert plot.main([str(tmp_path / "ll.jsonl"), str(tmp_path / "times.png")]) == 0

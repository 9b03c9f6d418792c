"""`python -m ep_kernels.bench` runs, checks what it times, and reports it."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ep_kernels.bench.baseline import Workspace, _by_expert
from ep_kernels.bench.launcher import join_ranks, spawn_ranks
from ep_kernels.bench.report import format_table, make_lines
from ep_kernels.bench.workload import Workload, bytes_to_move

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--tokens", "33", "--hidden", "64", "--topk", "2", "--experts", "8", "--iterations", "2"]


def run_bench(*options):
    command = [sys.executable, "-m", "ep_kernels.bench", *SMALL, *options]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False
    )


@pytest.mark.parametrize(
    ("routing", "rows"), [("masked", "deduplicated"), ("zipf", "expanded"), ("empty", "auto")]
)
def test_results_of_all_contenders_agree_with_the_reference_before_they_are_timed(
    tmp_path, routing, rows
):
    file = tmp_path / "bench.jsonl"
    options = ["--routing", routing, "--baseline-rows", rows, "--json", str(file)]
    done = run_bench("--ranks", "2", *options)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    contenders = {line["contender"] for line in lines}
    assert {"ep_kernels", "gloo", "memcpy"} <= contenders
    # A baseline that cannot run is said to be skipped, not left out silently.
    assert ("mpi" in contenders) != ("SKIPPED the MPI baseline" in done.stderr)
    ours = [line for line in lines if line["contender"] == "ep_kernels"]
    assert {line["op"] for line in ours} == {
        "dispatch rank-major",
        "dispatch expert-major",
        "combine rank-major",
        "combine expert-major",
        "layer",
    }
    assert all(line["median_us"] > 0 and line["p95_us"] >= line["median_us"] for line in lines)


def test_a_run_that_takes_too_long_is_ended():
    done = run_bench("--ranks", "2", "--contenders", "gloo", "--timeout", "0.001")
    assert done.returncode == 1
    assert "--timeout" in done.stderr


def wait_as_told(rank, seconds, store):
    time.sleep(seconds[rank])


@pytest.mark.parametrize(("seconds", "are_over"), [((0, 0), True), ((0, 60), False)])
def test_spawned_ranks_end_in_time_or_are_killed(seconds, are_over):
    begin = time.monotonic()
    assert spawn_ranks(wait_as_told, seconds, 2, deadline_s=20 if are_over else 1) is are_over
    assert time.monotonic() - begin < 40


def count_ranks(rank, path, store):
    join_ranks(rank, 2, store)
    ranks = torch.ones(1)
    dist.all_reduce(ranks)
    (path / str(rank)).write_text(str(int(ranks)))
    dist.destroy_process_group()


def test_spawned_ranks_can_join(tmp_path):
    assert spawn_ranks(count_ranks, tmp_path, 2, deadline_s=40)
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["2", "2"]


def test_impossible_sizes_are_refused_by_name():
    done = run_bench("--ranks", "3")
    assert done.returncode == 2
    assert "--experts=8 is not divisible by --ranks=3" in done.stderr


def make_workload(**changes):
    sizes = {
        "num_ranks": 2,
        "num_tokens": 1,
        "hidden": 2,
        "num_topk": 3,
        "num_experts": 4,
        "dtype": "bf16",
        "routing": "uniform",
        "layouts": ("rank_major", "expert_major"),
        "num_threads": 1,
        "seed": 0,
    }
    return Workload(**sizes | changes)


def test_bytes_count_rows_read_and_written():
    num_bytes = bytes_to_move(make_workload(), torch.tensor([[0, 1, 2]]))
    assert num_bytes["dispatch rank-major"] == 4 * (1 + 2)
    assert num_bytes["dispatch expert-major"] == 4 * (1 + 3)
    assert num_bytes["combine rank-major"] == 4 * (2 + 1)
    assert num_bytes["layer"] == 4 * (1 + 3 + 3 + 1)


def test_a_token_without_experts_is_not_read_but_its_sum_is_written():
    num_bytes = bytes_to_move(make_workload(), torch.tensor([[-1, -1, -1]]))
    assert num_bytes["dispatch rank-major"] == 0
    assert num_bytes["combine rank-major"] == 4


def test_the_floor_is_the_bytes_at_the_memcpy_rate():
    rows = [
        {"op": "layer", "contender": "ep_kernels", "detail": "", "median": 2.0, "p95": 3.0},
        {"op": "layer", "contender": "gloo", "detail": "", "median": 8.0, "p95": 9.0},
        {"op": "memcpy", "contender": "memcpy", "detail": "", "median": 1.0, "p95": 1.0},
    ]
    lines = make_lines({"rows": rows, "num_bytes": {"layer": 150, "memcpy": 100}})
    assert [line.floor_ratio for line in lines] == [0.75, 1.5 / 8, 1.0]
    assert lines[1].speedup == 4.0
    assert "4.00x faster" in format_table(lines)


def test_rows_by_source_are_found_by_expert():
    assert _by_expert(torch.tensor([[1, 2], [1, 0]])).tolist() == [0, 3, 1, 2]


def test_a_workspace_keeps_its_memory():
    workspace = Workspace()
    first = workspace.get("rows", (4, 2), torch.float32)
    assert workspace.get("rows", (3, 2), torch.float32).data_ptr() == first.data_ptr()


@pytest.mark.parametrize("options", [[], ["--zero-copy"]], ids=str)
def test_low_latency_calls_are_timed_against_bare_all_to_alls(tmp_path, options):
    file = tmp_path / "bench.jsonl"
    done = run_bench("--ranks", "2", "--low-latency", *options, "--json", str(file))
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for contender in ("ep_kernels", "gloo"):
        ops = {line["op"] for line in lines if line["contender"] == contender}
        assert ops == {"dispatch", "combine", "dispatch + combine"}


def test_low_latency_bytes_are_those_of_the_rows_by_expert():
    topk_idx = torch.tensor([[0, 1, 2]])
    num_bytes = bytes_to_move(make_workload(low_latency=True), topk_idx)
    assert num_bytes["dispatch"] == 4 * (1 + 3)
    assert num_bytes["combine"] == 4 * (3 + 1)
    assert num_bytes["dispatch + combine"] == 4 * (1 + 3 + 3 + 1)

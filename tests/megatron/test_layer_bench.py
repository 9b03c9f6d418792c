"""The benchmark of a layer runs and its layers agree; nothing is timed here."""

import json
import os
import subprocess
import sys

import pytest

from megatron_ep.bench_layer import parse_variant


def run_bench(tmp_path, *flags):
    """The JSON lines that it prints."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "megatron_ep.bench", "--tokens", "40"]
    command += ["--hidden", "128", "--ffn-hidden", "16", "--experts", "8", "--topk", "2"]
    command += ["--iterations", "1", "--warmup", "0", *flags]
    done = subprocess.run(
        command,
        env=dict(os.environ, TMPDIR=str(tmp_path), OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_all_dispatchers_are_compared(tmp_path):
    dispatchers = ["alltoall", "deepep", "deepep/2", "deepep/auto", "deepep+fp8/2"]
    lines = run_bench(tmp_path, "--dispatchers", *dispatchers)
    assert [line["dispatcher"] for line in lines] == dispatchers
    assert all(line["forward + backward"]["median"] > 0 for line in lines)


def test_experts_and_capacity_are_part_of_a_name(tmp_path):
    names = ["alltoall", "alltoall+torch", "deepep+torch", "deepep+torch+capacity2.5/2"]
    names.append("deepep+torch+fp8+capacity0.99")
    lines = run_bench(tmp_path, "--overlap", "--dispatchers", *names[:4])
    timed = [line for line in lines if "forward" in line]
    assert [line["dispatcher"] for line in timed] == names[:4]
    assert [line.get("dropped_rows") for line in timed] == [None, None, None, 0]
    watched = [line["dispatcher"] for line in lines if "hidden_of_communication" in line]
    assert watched == names[2:4]
    kind = parse_variant(names[-1])
    assert kind.options == {
        "num_chunks": 1,
        "fp8_dispatch": True,
        "capacity_factor": 0.99,
        "overlap_num_sms": None,
        "overlap_weight_gradients": False,
    }
    late = parse_variant("deepep+torch+sms12+late/2").options
    assert (late["overlap_num_sms"], late["overlap_weight_gradients"]) == (12, True)
    for name in ("deepep+fast", "deepep+", "deepep+capacity"):
        with pytest.raises(ValueError, match=r"after \+ there is"):
            parse_variant(name)


def test_a_closer_look_tells_where_time_goes(tmp_path):
    flags = ["--balance", "--profile", "--overlap", "--dispatchers", "deepep", "deepep/2"]
    lines = run_bench(tmp_path, *flags)
    assert lines[0]["ffn_hidden"] % 64 == 0
    whole, chunked = (line for line in lines if "profile" in line)
    assert chunked["profile"]["expert_calls"] == 2 * whole["profile"]["expert_calls"] == 2
    parts = ("fresh_dispatch", "transfers", "events", "experts_forward", "experts_backward", "rest")
    for line in (whole, chunked):
        profile = line["profile"]
        assert sum(profile[f"{part}_ms"] for part in parts) == pytest.approx(profile["host_ms"])
        assert profile["host_ms"] <= profile["pass_ms"]
    added = chunked["profile"]["ops"] - whole["profile"]["ops"]
    assert chunked["per_chunk"]["ops"] == added > 0
    overlaps = [line for line in lines if "hidden_of_communication" in line]
    assert [line["dispatcher"] for line in overlaps] == ["deepep", "deepep/2"]
    assert all(ms > 0 for line in overlaps for ms in line["transfers_ms"] + line["experts_ms"])

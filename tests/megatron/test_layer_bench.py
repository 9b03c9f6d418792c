"""The benchmark of a layer runs and its layers agree; nothing is timed here."""

import json
import os
import subprocess
import sys


def test_all_dispatchers_are_compared(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "megatron_ep.bench", "--tokens", "40"]
    command += ["--hidden", "32", "--ffn-hidden", "16", "--experts", "8", "--topk", "2"]
    command += ["--iterations", "1", "--warmup", "0", "--dispatchers"]
    command += ["alltoall", "deepep", "deepep/2", "deepep/auto"]
    done = subprocess.run(
        command,
        env=dict(os.environ, TMPDIR=str(tmp_path), OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [line["dispatcher"] for line in lines] == [
        "alltoall",
        "deepep",
        "deepep/2",
        "deepep/auto",
    ]
    assert all(line["forward + backward"]["median"] > 0 for line in lines)

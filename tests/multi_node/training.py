"""Small training runs: their command lines, data, and the losses that they leave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"


def environment() -> dict[str, str]:
    """Of a run: this checkout and this Python, one thread for each rank."""
    paths = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return dict(os.environ, PATH=paths, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")


def make_data(directory: Path) -> Path:
    """Tokens of this package's own sources; returns the prefix of the files."""
    prefix = directory / "sources"
    command = [sys.executable, "-m", "megatron_ep.preprocess", "--input", ROOT / "megatron_ep"]
    command += ["--suffix", ".py", "--output", prefix]
    subprocess.run(command, check=True, capture_output=True, env=environment(), timeout=60)
    return prefix


def run_here(num_ranks: int, flags: list[str]) -> None:
    """Trains with ranks on this machine; raises CalledProcessError if that fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(num_ranks), "-m", "megatron_ep.pretrain", *flags]
    subprocess.run(command, check=True, env=environment(), timeout=120)


def losses(run: Path) -> dict[int, float]:
    """Loss of each step, from the metrics file beside the checkpoints; one line for each step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {line["iteration"]: line["loss"] for line in lines if line["kind"] == "train"}
    assert len(found) == len(lines), "a step is reported twice"
    return found


def last_step(run: Path) -> int:
    """The last step in the metrics file; 0 without one."""
    try:
        text = (run / "metrics.jsonl").read_text()
    except FileNotFoundError:
        return 0
    complete = text[: text.rfind("\n") + 1].splitlines()
    return json.loads(complete[-1])["iteration"] if complete else 0

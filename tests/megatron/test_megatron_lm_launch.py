"""python -m megatron_ep.launch runs a program of Megatron-LM on CPU ranks, unmodified.

The program is a stand-in with the same assumptions; docs/megatron-lm.md tells how to repeat this
with Megatron-LM itself.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "tests" / "programs" / "megatron_lm" / "pretrain_gpt.py"


def run(*command):
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        timeout=180,
        check=False,
    )


def losses(dispatcher):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = ["--moe-token-dispatcher-type", dispatcher, "--train-iters", "10"]
    done = run(*torchrun, "-m", "megatron_ep.launch", str(PROGRAM), *arguments)
    assert done.returncode == 0, done.stderr
    return re.findall(r"lm loss: (\S+)", done.stdout)


def test_a_program_trains_with_the_losses_of_alltoall():
    deepep = losses("deepep")
    assert len(deepep) == 10
    assert float(deepep[-1]) < float(deepep[0])
    assert deepep == losses("alltoall")


@pytest.mark.parametrize("arguments", [["--help"], ["-h"]])
def test_help_is_printed(arguments):
    done = run("-m", "megatron_ep.launch", *arguments)
    assert done.returncode == 0
    assert "pretrain_gpt.py" in done.stdout


def test_mistakes_are_named():
    assert "usage" in run("-m", "megatron_ep.launch").stderr
    done = run("-m", "megatron_ep.launch", "nowhere/pretrain_gpt.py", "--train-iters", "1")
    assert done.returncode == 2
    assert "nowhere/pretrain_gpt.py is not a file" in done.stderr

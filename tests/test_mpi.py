"""A Buffer built from a real mpi4py communicator, under mpirun."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent

PROGRAM = """
import cases
from mpi4py import MPI

import ep_kernels

case = cases.Case(num_ranks=MPI.COMM_WORLD.Get_size())
world = cases.World(case, MPI.COMM_WORLD.Get_rank())
with cases.make_buffer("cpu", group=MPI.COMM_WORLD, case=case) as buffer:
    cases.check_round_trip(buffer, world)
print("right", flush=True)
"""


@pytest.mark.skipif(
    not (shutil.which("mpirun") and importlib.util.find_spec("mpi4py")),
    reason="needs mpirun and mpi4py",
)
def test_a_buffer_is_built_from_an_mpi4py_communicator():
    options = ["--oversubscribe"]
    if os.geteuid() == 0:
        options.append("--allow-run-as-root")
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(TESTS.parent), str(TESTS)]))
    result = subprocess.run(
        ["mpirun", *options, "-n", "2", sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("right") == 2

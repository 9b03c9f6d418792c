"""Buffers of mpi4py communicators, under mpirun; what the ranks do is in mpi_ranks.py."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent

NUM_RANKS = 4
CHECKS = [
    "round_trips",
    "round_trips_over_nodes",
    "low_latency_calls_over_nodes",
    "torch_distributed_is_not_needed",
    "parts_of_a_communicator",
    "a_communicator_of_one_rank",
    "ranks_that_disagree_all_learn_it",
    "a_communicator_instead_of_a_group",
    "a_silent_rank_is_named",
    "a_silent_rank_of_another_node_is_named",
    "a_lower_thread_level_is_refused_on_all_ranks",
    "messages_of_a_failed_call_keep_their_memory",
]

needs_mpi = pytest.mark.skipif(
    not (shutil.which("mpirun") and importlib.util.find_spec("mpi4py")),
    reason="needs mpirun and mpi4py",
)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What every rank found in every check: all of them run under one mpirun."""
    directory = tmp_path_factory.mktemp("mpi")
    command = ["mpirun", "-n", str(NUM_RANKS)]
    if _is_open_mpi():
        command += ["--oversubscribe", "--bind-to", "none"]
        command += ["--allow-run-as-root"] if os.geteuid() == 0 else []
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(TESTS.parent), str(TESTS)]))
    result = subprocess.run(
        [*command, sys.executable, str(TESTS / "mpi_ranks.py"), str(directory)],
        capture_output=True,
        text=True,
        env=environment | {"OMP_NUM_THREADS": "1"},
        timeout=180,
    )
    assert result.returncode == 0, result.stderr
    return {path.name: path.read_text() for path in directory.iterdir()}


def _is_open_mpi():
    version = subprocess.run(["mpirun", "--version"], capture_output=True, text=True, check=True)
    return "Open MPI" in version.stdout


@needs_mpi
@pytest.mark.parametrize("check", CHECKS)
def test_a_buffer_of_an_mpi_communicator(outcomes, check):
    for rank in range(NUM_RANKS):
        assert outcomes.get(f"{check}.{rank}") == "right"


@needs_mpi
def test_every_check_of_the_ranks_is_looked_at(outcomes):
    assert {name.partition(".")[0] for name in outcomes} == set(CHECKS)

"""The exchange of an NVSHMEM lane without a GPU: its device code (csrc/nvshmem/exchange.cuh) runs
on the CPU, over a network that delivers puts late and in any order; tests/programs/gpu_stand_in/ is
its CUDA and NVSHMEM. Memory order on a GPU is not tested here; see test_nvshmem.py."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "ep_kernels" / "csrc"
PROGRAMS = ROOT / "tests" / "programs"
CXX = os.environ.get("CXX", "g++")

pytestmark = pytest.mark.skipif(shutil.which(CXX) is None, reason=f"needs a C++ compiler ({CXX})")


def compile_program(folder, csrc=CSRC):
    program = folder / "lane_exchange"
    flags = ["-std=c++17", "-O0", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-pthread"]
    includes = [f"-I{PROGRAMS / 'gpu_stand_in'}", f"-I{csrc}"]
    source = str(PROGRAMS / "lane_exchange.cpp")
    subprocess.run([CXX, *flags, *includes, source, "-o", str(program)], check=True)
    return program


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return compile_program(tmp_path_factory.mktemp("lane_exchange"))


def run(program, *arguments):
    command = [str(program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


@pytest.mark.parametrize("mode", ["rows staged", "rows direct", "bytes staged"])
@pytest.mark.parametrize(
    ("num_pes", "num_channels", "num_slots", "staging_bytes"),
    [(2, 1, 1, 1024), (3, 2, 2, 20000), (4, 2, 3, 40000), (5, 1, 4, 30000)],
)
def test_rows_arrive(program, num_pes, num_channels, num_slots, staging_bytes, mode):
    settings = (num_pes, num_channels, num_slots, staging_bytes, *mode.split())
    done = run(program, *settings, num_pes)
    assert (done.returncode, done.stdout) == (0, "ok\n")


@pytest.mark.parametrize("silent", [0, 2])
def test_a_silent_pe_is_named_by_all(program, silent):
    done = run(program, 4, 2, 2, 20000, "rows", "staged", 1, silent)
    assert (done.returncode, done.stdout) == (0, "ok\n")


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        # A credit is given before all threads have read.
        ("the barrier, a fence; then the credit.\n  __syncthreads();", "the credit.\n"),
        # The next exchange begins anew.
        ("= stream.first + stream.done;", "= 0 * (stream.first + stream.done);"),
    ],
    ids=["credit", "numbers"],
)
def test_the_program_notices_a_mistake(tmp_path, right, wrong):
    csrc = tmp_path / "csrc"
    shutil.copytree(CSRC, csrc)
    paths = [csrc / "nvshmem" / name for name in ("exchange.cuh", "streams.cuh")]
    (path,) = (path for path in paths if right in path.read_text())
    path.write_text(path.read_text().replace(right, wrong))
    program = compile_program(tmp_path, csrc=csrc)

    def is_noticed(seed):
        try:
            return run(program, 3, 1, 2, 6000, "rows", "direct", seed).returncode != 0
        except subprocess.TimeoutExpired:
            return True

    assert any(is_noticed(seed) for seed in range(8))

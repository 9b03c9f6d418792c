"""The exchange of an NVSHMEM lane without a GPU: its device code (csrc/nvshmem/exchange.cuh) runs
on the CPU, over a network that delivers puts late and in any order; tests/programs/gpu_stand_in/ is
its CUDA and NVSHMEM. Memory order on a GPU is not tested here; see test_nvshmem.py."""

import functools
import shutil
import subprocess

import pytest
from programs_in_cpp import CSRC, PROGRAMS, compile_program, needs_compiler, run_program

pytestmark = needs_compiler
run = functools.partial(run_program, timeout_s=30)


def compile_exchange(folder, csrc=CSRC):
    flags = ["-O0", "-Wno-unknown-pragmas", f"-I{PROGRAMS / 'gpu_stand_in'}", f"-I{csrc}"]
    return compile_program("lane_exchange", folder, *flags)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return compile_exchange(tmp_path_factory.mktemp("lane_exchange"))


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
    program = compile_exchange(tmp_path, csrc=csrc)

    def is_noticed(seed):
        try:
            return run(program, 3, 1, 2, 6000, "rows", "direct", seed).returncode != 0
        except subprocess.TimeoutExpired:
            return True

    assert any(is_noticed(seed) for seed in range(100))

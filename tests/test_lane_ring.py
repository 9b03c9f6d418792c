"""Flow control of the rings of a lane (csrc/core/lane_ring.h, lane_stream.h): no piece is lost,
overwritten or out of place, and nobody waits for ever. A C++ program; threads play the GPUs."""

import functools
import shutil

import pytest
from programs_in_cpp import CSRC, compile_program, needs_compiler, run_program

pytestmark = needs_compiler
run = functools.partial(run_program, timeout_s=20)


def compile_ring(folder, csrc=CSRC):
    return compile_program("lane_ring", folder, "-O1", f"-I{csrc}")


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return compile_ring(tmp_path_factory.mktemp("lane_ring"))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("num_pes", "num_channels", "num_slots", "staging_bytes"),
    [
        (2, 1, 1, 512),
        (2, 1, 3, 3000),
        (2, 4, 2, 8192),
        (3, 1, 2, 2048),
        (3, 2, 3, 20000),
        (5, 2, 1, 4096),
        (8, 1, 4, 30000),
    ],
)
def test_every_byte_arrives_once(program, num_pes, num_channels, num_slots, staging_bytes, seed):
    done = run(program, num_pes, num_channels, num_slots, staging_bytes, seed)
    assert (done.returncode, done.stdout) == (0, "ok\n")


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        # A slot is written again one piece too early.
        ("told_of(n - window)", "told_of(n - window) - 1"),
        # What is read is not what has arrived.
        ("load(stream.next()) >= told_of(stream.next())", "load(stream.next()) > 0"),
        # The last piece is taken to be full.
        ("end < num_tokens ? end : num_tokens", "num_tokens < 0 ? 0 : end"),
    ],
)
def test_the_program_notices_a_mistake(tmp_path, right, wrong):
    core = tmp_path / "core"
    shutil.copytree(CSRC / "core", core)
    for path in (core / "lane_ring.h", core / "lane_stream.h"):
        text = path.read_text()
        if right in text:
            path.write_text(text.replace(right, wrong))
            break
    else:
        pytest.fail(f"{right!r} is not in the sources")
    program = compile_ring(tmp_path, csrc=tmp_path)
    results = [run(program, 2, 1, 3, 3000, seed) for seed in range(20)]
    assert any(done.returncode != 0 for done in results)

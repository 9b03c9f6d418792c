"""build_native.py: what is rebuilt when, and what the libraries let others see."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ep_kernels._native import CPU_LIBRARY, load_library
from ep_kernels.errors import EPDeviceError

ROOT = Path(__file__).resolve().parents[1]
LIB_DIR = ROOT / "ep_kernels" / "lib"

HEADER = "inline int answer() { return 41; }\n"
SOURCES = {
    "core/answer.h": HEADER,
    "core/answer.cpp": '#include "core/answer.h"\nint answer_plus_one() { return answer() + 1; }\n',
    "bindings/c_api.cpp": (
        "int answer_plus_one();\n"
        'extern "C" __attribute__((visibility("default"))) int ep_answer() '
        "{ return answer_plus_one(); }\n"
    ),
}
ASK = "import ctypes; print(ctypes.CDLL('ep_kernels/lib/libep_cpu.so').ep_answer())"


@pytest.fixture
def project(tmp_path):
    """A project with a header, two sources and the real build script."""
    shutil.copy(ROOT / "build_native.py", tmp_path)
    for name, text in SOURCES.items():
        path = tmp_path / "ep_kernels" / "csrc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def build(project, **environment):
    settings = {"EP_KERNELS_CUDA": "0", "EP_KERNELS_WERROR": "0"} | environment
    return subprocess.run(
        [sys.executable, "build_native.py"],
        cwd=project,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        check=False,
    )


def answer(project):
    done = subprocess.run(
        [sys.executable, "-c", ASK], cwd=project, capture_output=True, text=True, check=True
    )
    return int(done.stdout)


def test_a_changed_header_rebuilds_what_includes_it_and_nothing_else(project):
    assert build(project).returncode == 0
    assert answer(project) == 42
    (project / "ep_kernels/csrc/core/answer.h").write_text(HEADER.replace("41", "51"))
    done = build(project)
    assert answer(project) == 52
    assert "answer.cpp.o" in done.stdout
    assert "c_api.cpp.o" not in done.stdout


def test_nothing_is_done_when_nothing_changed(project):
    build(project)
    library = project / "ep_kernels/lib/libep_cpu.so"
    before = library.stat().st_mtime_ns
    assert "no work to do" in build(project).stdout
    assert library.stat().st_mtime_ns == before


def test_a_library_that_is_no_longer_built_goes_away(project):
    build(project)
    stale = project / "ep_kernels/lib/libep_cuda.so"
    stale.write_bytes(b"old")
    build(project)
    assert not stale.exists()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"EP_KERNELS_CUDA": "1"}, "no sources"),
        ({"EP_KERNELS_CUDA": "maybe"}, "EP_KERNELS_CUDA='maybe'"),
        ({"EP_KERNELS_NVSHMEM": "1"}, "ep_kernels/csrc/nvshmem holds no sources"),
        ({"EP_KERNELS_NVSHMEM": "yes"}, "EP_KERNELS_NVSHMEM='yes'"),
        ({"CXX": "no-such-compiler"}, "no-such-compiler"),
    ],
)
def test_a_build_that_cannot_be_says_why(project, environment, message):
    done = build(project, **environment)
    assert done.returncode == 1
    assert message in done.stderr


def test_warnings_are_errors_on_request(project):
    source = project / "ep_kernels/csrc/core/answer.cpp"
    source.write_text(source.read_text() + "static int unused() { return 0; }\n")
    assert build(project).returncode == 0
    assert build(project, EP_KERNELS_WERROR="1").returncode == 1


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm of binutils")
@pytest.mark.parametrize("name", ["libep_cpu.so", "libep_cuda.so", "libep_nvshmem.so"])
def test_a_library_shows_nothing_but_its_c_interface(name):
    """Other libraries of the process could replace anything else that it shows."""
    if not (LIB_DIR / name).exists():
        pytest.skip(f"{name} is not built")
    symbols = subprocess.run(
        ["nm", "-D", "--defined-only", str(LIB_DIR / name)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    names = [line.split()[-1] for line in symbols]
    assert names
    assert [name for name in names if not name.startswith("ep_")] == []


def test_a_library_without_a_function_is_of_another_version():
    with pytest.raises(EPDeviceError, match="libep_cpu.so does not belong.*lacks ep_new.*rebuild"):
        load_library(CPU_LIBRARY, {"ep_new": (None, [])}, "ep_abi_sizes", ())

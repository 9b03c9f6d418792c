"""Programs in tests/programs that tests compile and run."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "ep_kernels" / "csrc"
PROGRAMS = ROOT / "tests" / "programs"
CXX = os.environ.get("CXX", "g++")

needs_compiler = pytest.mark.skipif(
    shutil.which(CXX) is None, reason=f"needs a C++ compiler ({CXX})"
)


def compile_program(name, folder, *flags):
    """tests/programs/<name>.cpp; returns the path of the program."""
    program = folder / name
    options = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-pthread", *flags]
    source = str(PROGRAMS / f"{name}.cpp")
    subprocess.run([CXX, *options, source, "-o", str(program)], check=True)
    return program


def run_program(program, *arguments, timeout_s):
    command = [str(program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)

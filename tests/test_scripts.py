"""The commands that people start: they explain themselves, refuse what they do not know."""

import subprocess
from pathlib import Path

import pytest

from ep_kernels import _native, doctor

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [
    "scripts/bench_node.sh",
    "scripts/check_gpu_training.sh",
    "scripts/quickstart.sh",
    "scripts/test.sh",
    "scripts/lint.sh",
    "scripts/setup_env.sh",
    "scripts/sanitize_cuda.sh",
    "scripts/slurm/submit.sh",
]


def run(*command):
    return subprocess.run(
        ["bash", *command], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_explains_itself_and_does_nothing_else(script):
    done = run(script, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith(f"Usage: {script}")


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_unknown_option_is_refused_by_name(script):
    done = run(script, "--no-such-option")
    assert done.returncode != 0
    assert "--no-such-option" in done.stderr


def test_the_doctor_finds_the_core_of_this_checkout(capsys):
    assert doctor.main([]) == 0
    report = capsys.readouterr().out
    assert "CPU core" in report
    assert "SIMD path" in report


def test_the_doctor_says_how_to_get_a_missing_core(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(_native, "CPU_LIBRARY", tmp_path / "libep_cpu.so")
    _native.cpu_library.cache_clear()
    assert doctor.main([]) == 1
    report = capsys.readouterr().out
    _native.cpu_library.cache_clear()
    assert "pip install -e ." in report
    assert "NOT USABLE" in report

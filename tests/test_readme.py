"""What README.md prints is true: its example runs, and the files that it names exist."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def code_blocks(language, text=README):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def run_example(example, folder):
    """Runs it with the command that README.md gives for its own."""
    (command,) = [text for text in code_blocks("bash") if "example.py" in text]
    (folder / "example.py").write_text(example)
    words = command.split()
    assert words[0] == "torchrun"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *words[1:]],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_example_runs_under_torchrun_as_printed(tmp_path):
    (example,) = code_blocks("python")
    output = run_example(example, tmp_path)
    assert len(re.findall(r"rank [01]: \d+ rows for experts", output)) == 2


def test_the_example_of_low_latency_mode_runs_as_printed(tmp_path):
    (example,) = code_blocks("python", (ROOT / "docs" / "low-latency.md").read_text())
    run_example(example, tmp_path)


def test_the_example_has_about_20_lines():
    (example,) = code_blocks("python")
    assert len([line for line in example.splitlines() if line.strip()]) <= 22


def named_paths():
    in_code = re.findall(r"`((?:[\w.-]+/)*[\w.-]+(?:/|\.(?:py|sh|txt|yaml|md)))`", README)
    in_commands = re.findall(r"\b(?:scripts|configs)/[\w./-]+", README)
    links = re.findall(r"\]\(([\w./-]+)\)", README)
    return sorted({*in_code, *in_commands, *links} - {"example.py"})


@pytest.mark.parametrize("path", named_paths())
def test_a_path_named_in_the_readme_exists(path):
    places = [ROOT, ROOT / "ep_kernels", ROOT / "scripts"]
    assert any((place / path).exists() for place in places)


def test_modules_named_in_the_readme_have_a_help():
    modules = sorted(set(re.findall(r"-m ((?:ep_kernels|megatron_ep)[\w.]*)", README)))
    assert modules
    for module in modules:
        command = [sys.executable, "-m", module, "--help"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        assert done.returncode == 0, f"{module}: {done.stderr}"

"""Who may import or include whom. An arrow that is not listed here is a mistake.

megatron_ep -> ep_kernels (public names)      ep_kernels never imports megatron
bindings -> cuda, cpu -> runtime -> core      core: C++17 alone, no torch, no CUDA, no OS
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "ep_kernels" / "csrc"

# folder of csrc/ -> folders that it may include
INCLUDES = {
    "core": {"core"},
    "runtime": {"runtime", "core"},
    "cpu": {"cpu", "runtime", "core"},
    "cuda": {"cuda", "runtime", "core"},
    "nvshmem": {"nvshmem", "cuda", "runtime", "core"},
    "bindings": {"bindings", "nvshmem", "cuda", "cpu", "runtime", "core"},
}

FRAMEWORK_HEADER = re.compile(r"<(torch|ATen|c10|pybind11|Python\.h|nanobind)")
CUDA_HEADER = re.compile(r"<(cuda|nv|cooperative_groups)")
OS_HEADER = re.compile(r"<(sys/|unistd|fcntl|pthread|linux/|signal|sched|dirent|poll|semaphore)")

# package -> (modules that it must not import, why)
FORBIDDEN_IMPORTS = {
    "ep_kernels": (r"megatron|megatron_ep|tests", "the kernels know nothing of their users"),
    "megatron_ep": (r"tests|ep_kernels\.(\w+\.)*_\w+", "public names of ep_kernels only"),
}

# Megatron's words; they belong to megatron_ep.
MEGATRON_WORDS = re.compile(r"\b(routing_map|hidden_states|probs)\b")


def sources(folder, *suffixes):
    return [path for path in sorted(folder.rglob("*")) if path.suffix in suffixes]


def matching_lines(path, pattern):
    lines = path.read_text().splitlines()
    return [
        f"{path.relative_to(ROOT)}:{number}: {line}"
        for number, line in enumerate(lines, 1)
        if re.search(pattern, line)
    ]


def cpp_sources(folder):
    return sources(folder, ".h", ".cuh", ".cpp", ".cu")


@pytest.mark.parametrize("folder", list(INCLUDES))
def test_a_folder_includes_only_itself_and_the_folders_below(folder):
    allowed = "|".join(sorted(INCLUDES[folder]))
    not_allowed = rf'^\s*#\s*include\s+"(?!({allowed})/)'
    found = [
        line for path in cpp_sources(CSRC / folder) for line in matching_lines(path, not_allowed)
    ]
    assert not found, "\n".join(found)


def test_every_source_belongs_to_a_known_folder():
    unknown = {path.relative_to(CSRC).parts[0] for path in cpp_sources(CSRC)} - set(INCLUDES)
    assert not unknown


@pytest.mark.parametrize("folder", ["core", "runtime", "cpu", "cuda", "nvshmem"])
def test_only_bindings_know_the_framework(folder):
    found = [
        line
        for path in cpp_sources(CSRC / folder)
        for line in matching_lines(path, rf"^\s*#\s*include\s+{FRAMEWORK_HEADER.pattern}")
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("folder", ["core", "cpu"])
def test_the_host_code_knows_no_cuda(folder):
    found = [
        line
        for path in cpp_sources(CSRC / folder)
        for line in matching_lines(path, rf"^\s*#\s*include\s+{CUDA_HEADER.pattern}")
    ]
    assert not found, "\n".join(found)


def test_core_knows_no_operating_system():
    found = [
        line
        for path in cpp_sources(CSRC / "core")
        for line in matching_lines(path, rf"^\s*#\s*include\s+{OS_HEADER.pattern}")
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("package", list(FORBIDDEN_IMPORTS))
def test_a_package_does_not_import_upwards(package):
    modules, why = FORBIDDEN_IMPORTS[package]
    pattern = rf"^\s*(from|import)\s+({modules})\b"
    found = [
        line for path in sources(ROOT / package, ".py") for line in matching_lines(path, pattern)
    ]
    assert not found, "\n".join([why, *found])


def test_megatron_ep_imports_public_names_only():
    """`from ep_kernels import _name` is as private as `import ep_kernels._name`."""
    pattern = r"^\s*from\s+ep_kernels[\w.]*\s+import\s+(.*\b_\w+)|\bep_kernels\._\w+"
    found = [
        line
        for path in sources(ROOT / "megatron_ep", ".py")
        for line in matching_lines(path, pattern)
    ]
    assert not found, "\n".join(found)


def test_words_of_megatron_stay_in_megatron_ep():
    found = [
        line
        for path in [*sources(ROOT / "ep_kernels", ".py"), *cpp_sources(CSRC)]
        for line in matching_lines(path, MEGATRON_WORDS)
    ]
    assert not found, "\n".join(found)


def test_the_environment_is_read_in_one_file():
    reads_env = r"\bos\.(environ\b(?!.*setdefault)|getenv)"
    allowed = {ROOT / "ep_kernels" / "env.py"}
    found = [
        line
        for path in sources(ROOT / "ep_kernels", ".py")
        if path not in allowed and "testing" not in path.parts and "bench" not in path.parts
        for line in matching_lines(path, reads_env)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("pattern", "line"),
    [
        (FORBIDDEN_IMPORTS["ep_kernels"][0], "megatron.core"),
        (FORBIDDEN_IMPORTS["megatron_ep"][0], "ep_kernels._native"),
        (FORBIDDEN_IMPORTS["megatron_ep"][0], "ep_kernels.testing._x"),
    ],
)
def test_the_rules_match_what_they_forbid(pattern, line):
    assert re.match(rf"({pattern})\b", line)

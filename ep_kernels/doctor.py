"""Says what of this package works on this machine, what does not, and how to get it.

    python -m ep_kernels.doctor

The exit status is 0 when dispatch and combine can run on this machine, on some device.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from ep_kernels import _native, _native_cuda, _native_nvshmem
from ep_kernels.errors import EPError
from ep_kernels.version import __version__

PACKAGE_DIR = Path(__file__).resolve().parent

OK, NOTE, MISSING = "ok", "note", "missing"
OPTIONAL_PACKAGES = {
    "megatron-core": "training with megatron_ep: pip install 'ep-kernels[megatron]'",
    "pydantic": "training with megatron_ep: pip install 'ep-kernels[megatron]'",
    "mpi4py": "buffers over MPI communicators, MPI in the benchmark: pip install mpi4py",
    "transformer-engine": "grouped GEMM on GPUs: pip install 'ep-kernels[te]'",
}
GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report.

    Attributes:
        status: OK, NOTE (works, but read it) or MISSING.
        name: what was looked at.
        text: what was found.
        hint: what to do about it, or "".
    """

    status: str
    name: str
    text: str
    hint: str = ""


def main(argv: list[str] | None = None) -> int:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args(argv)
    is_usable = True
    for title, findings in sections().items():
        print(f"\n{title}")
        for finding in findings():
            print(f"  {finding.status:8}{finding.name:20}{finding.text}")
            if finding.hint:
                print(f"  {'':28}-> {finding.hint}")
            is_usable &= not (finding.name == "CPU core" and finding.status == MISSING)
    print("\nready" if is_usable else "\nNOT USABLE: the CPU core is missing")
    return 0 if is_usable else 1


def sections() -> dict[str, Callable[[], Iterator[Finding]]]:
    """Titles of the report, and the functions that look."""
    return {
        "Versions": versions,
        "Compiled parts": compiled_parts,
        "Memory shared between ranks": shared_memory,
        "GPUs": gpus,
        "MPI": mpi,
        "Optional packages": optional_packages,
    }


def versions() -> Iterator[Finding]:
    yield Finding(status=OK, name="ep_kernels", text=f"{__version__} in {PACKAGE_DIR}")
    yield Finding(status=OK, name="Python", text=f"{platform.python_version()} {sys.executable}")
    yield Finding(status=OK, name="system", text=f"{platform.platform()}, {_num_cores()} cores")
    yield Finding(status=OK, name="torch", text=torch.__version__)


def compiled_parts() -> Iterator[Finding]:
    yield _cpu_core()
    yield _cuda_core()
    yield _nvshmem_part()


def shared_memory() -> Iterator[Finding]:
    yield _memory_file()
    total, available = _meminfo("MemTotal"), _meminfo("MemAvailable")
    yield Finding(
        status=OK, name="memory", text=f"{available / GIB:.1f} of {total / GIB:.1f} GiB available"
    )
    if (limit := _cgroup_limit()) is not None and limit < total:
        yield Finding(
            status=NOTE,
            name="container limit",
            text=f"{limit / GIB:.1f} GiB for all ranks together, pools included",
        )
    address_space = resource.getrlimit(resource.RLIMIT_AS)[0]
    if address_space != resource.RLIM_INFINITY:
        yield Finding(
            status=NOTE,
            name="address space",
            text=f"limited to {address_space / GIB:.1f} GiB (ulimit -v)",
            hint="raise it, or set a smaller Buffer(pool_bytes=) or EP_KERNELS_POOL_BYTES",
        )
    if _read("/proc/sys/vm/overcommit_memory") == "2":
        yield Finding(
            status=NOTE,
            name="overcommit",
            text="off (vm.overcommit_memory=2): pools count in full when they are mapped",
            hint="set a smaller Buffer(pool_bytes=) or EP_KERNELS_POOL_BYTES",
        )
    huge_pages = _chosen(_read("/sys/kernel/mm/transparent_hugepage/shmem_enabled"))
    yield Finding(
        status=OK if huge_pages in {"advise", "always", "within_size"} else NOTE,
        name="huge pages",
        text=f"shmem_enabled = {huge_pages or 'unknown'}",
        hint=""
        if huge_pages in {"advise", "always", "within_size"}
        else "for speed, as root: echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled",
    )


def gpus() -> Iterator[Finding]:
    query = "--query-gpu=name,memory.total,compute_cap"
    lines = _output("nvidia-smi", query, "--format=csv,noheader")
    if not lines:
        yield Finding(status=NOTE, name="NVIDIA GPUs", text="none seen by nvidia-smi")
    for index, line in enumerate(lines):
        yield Finding(status=OK, name=f"GPU {index}", text=line)
    if (nvcc := _find_nvcc()) is None:
        yield Finding(status=NOTE, name="nvcc", text="not found (needed only to build for GPUs)")
    else:
        release = re.search(r"release ([\d.]+)", " ".join(_output(nvcc, "--version")))
        yield Finding(status=OK, name="nvcc", text=f"{release[1] if release else '?'} {nvcc}")


def mpi() -> Iterator[Finding]:
    mpirun = shutil.which("mpirun")
    if mpirun is None:
        yield Finding(
            status=NOTE,
            name="mpirun",
            text="not found (optional)",
            hint="install an MPI, on Debian and Ubuntu: apt-get install openmpi-bin libopenmpi-dev",
        )
    else:
        version = next(iter(_output(mpirun, "--version")), "?")
        yield Finding(status=OK, name="mpirun", text=f"{mpirun}, {version}")


def optional_packages() -> Iterator[Finding]:
    for name, purpose in OPTIONAL_PACKAGES.items():
        if (version := _version(name)) is not None:
            yield Finding(status=OK, name=name, text=version)
        else:
            yield Finding(status=NOTE, name=name, text="not installed", hint=purpose)


# ---- single findings -----------------------------------------------------------------------------


def _cpu_core() -> Finding:
    """Loads the library as Buffer does; that also compares its interface with the package's."""
    try:
        library = _native.cpu_library()
    except (EPError, OSError) as error:
        hint = "pip install -e . in the sources; it needs g++ and ninja"
        return Finding(status=MISSING, name="CPU core", text=str(error), hint=hint)
    simd = library.ep_simd_name().decode()
    return Finding(status=OK, name="CPU core", text=f"{_native.CPU_LIBRARY}, SIMD path {simd}")


def _cuda_core() -> Finding:
    name = "CUDA core"
    if not _native_cuda.CUDA_LIBRARY.exists():
        hint = "to use GPUs, install the CUDA toolkit (nvcc), then pip install -e . in the sources"
        return Finding(status=NOTE, name=name, text="not built", hint=hint)
    try:
        _native_cuda.cuda_library()
    except (EPError, OSError) as error:
        hint = "pip install -e . in the sources"
        return Finding(status=MISSING, name=name, text=str(error), hint=hint)
    text = str(_native_cuda.CUDA_LIBRARY)
    if torch.cuda.is_available():
        return Finding(status=OK, name=name, text=text)
    reason = (
        "this torch is built without CUDA" if torch.version.cuda is None else "no GPU is usable"
    )
    return Finding(status=NOTE, name=name, text=f"{text}, but {reason}")


def _nvshmem_part() -> Finding:
    """Loads it, and NVSHMEM; does not begin NVSHMEM, which ends a process without a GPU."""
    name, library = "NVSHMEM part", _native_nvshmem.NVSHMEM_LIBRARY
    if not library.exists():
        hint = (
            f"for exchanges between nodes begun by GPUs: pip install {_native_nvshmem.PACKAGES}, "
            "then EP_KERNELS_NVSHMEM=1 pip install -e . in the sources"
        )
        return Finding(status=NOTE, name=name, text="not built", hint=hint)
    try:
        version = _native_nvshmem.nvshmem_version()
    except (EPError, OSError) as error:
        hint = f"pip install {_native_nvshmem.PACKAGES}, or set NVSHMEM_HOME"
        return Finding(status=MISSING, name=name, text=str(error), hint=hint)
    text = f"{library}, NVSHMEM {version}"
    if torch.cuda.is_available():
        return Finding(status=OK, name=name, text=text)
    return Finding(status=NOTE, name=name, text=f"{text}, but no GPU is usable")


def _memory_file() -> Finding:
    """Does what ranks do: a process opens another one's memory file through /proc."""
    name = "between processes"
    try:
        fd = os.memfd_create("ep_kernels_doctor")
    except (AttributeError, OSError) as error:
        return Finding(status=MISSING, name=name, text=f"memfd_create: {error}")
    try:
        script = f"open('/proc/{os.getpid()}/fd/{fd}', 'r+b').write(b'x')"
        child = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=False
        )
        if child.returncode == 0 and os.pread(fd, 1, 0) == b"x":
            return Finding(status=OK, name=name, text="a process can map the memory of another")
        error_text = child.stderr.strip().rpartition("\n")[2]
        hint = "run all ranks as one user, in one container, with /proc mounted"
        return Finding(status=MISSING, name=name, text=error_text, hint=hint)
    finally:
        os.close(fd)


# ---- helpers -------------------------------------------------------------------------------------


def _num_cores() -> int:
    return len(os.sched_getaffinity(0))


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _find_nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def _output(*command: str) -> list[str]:
    """Lines that a command prints; none if it cannot run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.strip().splitlines() if done.returncode == 0 else []


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _chosen(text: str) -> str:
    """The bracketed word of a kernel setting such as "always [never]"."""
    found = re.search(r"\[(\w+)\]", text)
    return found[1] if found else ""


def _meminfo(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def _cgroup_limit() -> int | None:
    paths = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
    return next((int(text) for path in paths if (text := _read(path)).isdigit()), None)


if __name__ == "__main__":
    sys.exit(main())

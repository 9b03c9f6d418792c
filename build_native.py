"""Builds the compiled core as plain shared libraries with ninja. Standard library only.

    python build_native.py            # into ep_kernels/lib/ of this checkout, as setup.py does
    python build_native.py --list     # only say what would be built

No library links Python or torch, so one build serves every version of both:

    libep_cpu.so      csrc/{core,runtime,cpu} and the C interface: always
    libep_cuda.so     csrc/{core,runtime,cuda} and its C interface: when nvcc and sources exist
    libep_nvshmem.so  csrc/{core,nvshmem}, the host's part of low-latency calls, and the C
                      interface: when NVSHMEM is found besides. It needs libnvshmem_host.so.3 of
                      the same package when it runs

Environment:
    CXX, CXXFLAGS, LDFLAGS   host compiler (g++) and flags appended to ours
    NVCC, CUDA_HOME          the CUDA compiler; otherwise nvcc is looked for on PATH
    EP_KERNELS_CUDA          0: no CUDA library; 1: fail without it; default: if possible
    EP_KERNELS_CUDA_ARCHS    such as "80;90a;100"; default: those of 80, 90, 100 that nvcc knows
    EP_KERNELS_NVSHMEM_ARCHS the same of the NVSHMEM library; default: those of the CUDA library
    EP_KERNELS_NVSHMEM       0: no NVSHMEM library; 1: fail without it; default: if possible
    NVSHMEM_HOME             its folder, with include/ and lib/; otherwise that of the package
                             nvidia-nvshmem-cu12 or -cu13 of this Python, if it is of nvcc's CUDA
    EP_KERNELS_WERROR        1: warnings are errors
    MAX_JOBS                 compile jobs at once (default: one per core)
"""

from __future__ import annotations

import argparse
import filecmp
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "ep_kernels" / "csrc"
LIB_DIR = ROOT / "ep_kernels" / "lib"
BUILD_DIR = ROOT / "build" / "native"
LIBRARY_NAMES = ("libep_cpu.so", "libep_cuda.so", "libep_nvshmem.so")

CXX_FLAGS = [
    *("-std=c++17", "-O3", "-g1", "-fPIC", "-fvisibility=hidden", "-pthread"),
    # NOTE: without this g++ fuses a * b + c where the CPU can, and SIMD paths differ in their bits.
    "-ffp-contract=off",
    # Nobody looks at floating-point exceptions; otherwise g++ keeps branches for their sake.
    "-fno-trapping-math",
    *("-Wall", "-Wextra"),
]
# NOTE: CUDA builds of torch load libraries that export parts of the C++ standard library, and those
# would replace ours. Hence nothing but the C interface is visible, and libstdc++ comes along.
EXPORTS = "{ global: ep_*; local: *; };\n"
EXPORTS_FILE = "exports.map"
LINK_FLAGS = ["--no-undefined", "--as-needed", "--exclude-libs", "ALL", "--version-script"]
SIMD_FLAGS = {
    "_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "_avx512.cpp": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mf16c"],
}
NVCC_FLAGS = [
    *("-std=c++17", "-O3", "-lineinfo", "--expt-relaxed-constexpr", "-cudart", "static"),
    *("-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-pthread"),
]
DEFAULT_CUDA_ARCHS = "80;90;100"
NVSHMEM_PACKAGES = ("nvidia-nvshmem-cu12", "nvidia-nvshmem-cu13")
NVSHMEM_HOST_LIBRARY = "libnvshmem_host.so.3"
NVSHMEM_FILES = ("include/nvshmem.h", f"lib/{NVSHMEM_HOST_LIBRARY}", "lib/libnvshmem_device.a")


class BuildError(Exception):
    """The build cannot go on; the message says what to do."""


@dataclass(frozen=True)
class Edge:
    """One build step: `rule` turns `inputs` into `output`."""

    output: str
    rule: str
    inputs: list[str]
    flags: str = ""


@dataclass(frozen=True)
class Library:
    """A shared library, linked by `linker` from the objects of `sources`."""

    name: str
    linker: str
    sources: list[Path]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="print what would be built, and stop")
    parser.add_argument("--verbose", action="store_true", help="print the commands")
    options = parser.parse_args(argv)
    try:
        if options.list:
            for library in plan_libraries():
                _say(library.name, *(f"  {_relative(source)}" for source in library.sources))
            return 0
        build(LIB_DIR, verbose=options.verbose)
    except BuildError as error:
        print(f"build_native: error: {error}", file=sys.stderr)
        return 1
    return 0


def build(lib_dir: Path, *, verbose: bool = False) -> list[Path]:
    """Brings the libraries up to date and puts them into `lib_dir`.

    Returns:
        The paths of the libraries there. Libraries that are no longer built are removed.

    Raises:
        BuildError: a tool is missing or a step failed.
    """
    libraries = plan_libraries()
    BUILD_DIR.mkdir(parents=True, exist_ok=True)
    _write_if_changed(BUILD_DIR / EXPORTS_FILE, EXPORTS)
    _write_if_changed(BUILD_DIR / "build.ninja", "".join(_ninja_lines(libraries)))
    command = [*_find_ninja(), "-C", str(BUILD_DIR)]
    command += ["-v"] if verbose else []
    command += ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    if subprocess.run(command, check=False).returncode != 0:
        raise BuildError("compilation failed, see above")
    return _install(libraries, lib_dir)


def plan_libraries() -> list[Library]:
    """The libraries that this checkout and machine can build, from the sources that exist."""
    shared = [*_sources("core"), *_sources("runtime")]
    bindings = _sources("bindings")
    cuda_bindings = [path for path in bindings if "cuda" in path.name]
    nvshmem_bindings = [path for path in bindings if "nvshmem" in path.name]
    cpu_bindings = [path for path in bindings if path not in [*cuda_bindings, *nvshmem_bindings]]
    libraries = []
    if shared or cpu_bindings:
        cpu_sources = [*shared, *_sources("cpu"), *cpu_bindings]
        libraries.append(Library("libep_cpu.so", "link", cpu_sources))
    cuda_sources = _sources("cuda", (".cu", ".cpp"))
    if _want_cuda(has_sources=bool(cuda_sources)):
        sources = [*shared, *cuda_sources, *cuda_bindings]
        libraries.append(Library("libep_cuda.so", "link_cuda", sources))
    nvshmem_sources = _sources("nvshmem", (".cu", ".cpp"))
    if _want_nvshmem(has_sources=bool(nvshmem_sources)):
        sources = [*_sources("core"), *nvshmem_sources, *nvshmem_bindings, *_low_latency_hosts()]
        libraries.append(Library("libep_nvshmem.so", "link_nvshmem", sources))
    return libraries


def _low_latency_hosts() -> list[Path]:
    """The host's part of low-latency calls on GPUs, whose kernels the NVSHMEM library has anew."""
    names = ("cuda/low_latency.cpp", "cuda/low_latency_state.cpp", "cuda/device_guard.cpp")
    return [CSRC / name for name in (*names, "bindings/ll_cuda_api.cpp")]


def find_nvcc() -> str | None:
    """Path of the CUDA compiler, or None."""
    candidates = [os.environ.get("NVCC")]
    candidates += [
        str(Path(home) / "bin" / "nvcc")
        for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"))
        if home
    ]
    candidates += ["nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((found for name in candidates if name and (found := shutil.which(name))), None)


def find_nvshmem() -> Path | None:
    """The folder with NVSHMEM's include/ and lib/, or None."""
    folders = []
    if home := os.environ.get("NVSHMEM_HOME"):
        folders = [Path(home)]
    elif any(_fits_nvcc(package) for package in NVSHMEM_PACKAGES):
        package = importlib.util.find_spec("nvidia")
        places = [] if package is None else package.submodule_search_locations or []
        folders = [Path(place) / "nvshmem" for place in places]
    return next((folder for folder in folders if not _missing_of_nvshmem(folder)), None)


def _fits_nvcc(package: str) -> bool:
    """Whether a package such as nvidia-nvshmem-cu13 is installed and of nvcc's CUDA."""
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    nvcc = find_nvcc()
    text = "" if nvcc is None else _output(nvcc, "--version")
    found = re.search(r"release (\d+)", text)
    return found is not None and package.endswith(f"-cu{found[1]}")


def _missing_of_nvshmem(folder: Path) -> list[str]:
    return [name for name in NVSHMEM_FILES if not (folder / name).exists()]


def _why_no_nvshmem() -> str:
    if home := os.environ.get("NVSHMEM_HOME"):
        return f"NVSHMEM_HOME={home!r} lacks {', '.join(_missing_of_nvshmem(Path(home)))}"
    packages = "nvidia-nvshmem-cu13 (nvidia-nvshmem-cu12 if nvcc is of CUDA 12)"
    return f"NVSHMEM was not found: pip install {packages}, or set NVSHMEM_HOME"


def _want_nvshmem(*, has_sources: bool) -> bool:
    choice = _choice("EP_KERNELS_NVSHMEM")
    if choice != "1":
        can_be = has_sources and find_nvcc() is not None and find_nvshmem() is not None
        return choice != "0" and os.environ.get("EP_KERNELS_CUDA", "auto") != "0" and can_be
    if not has_sources:
        raise BuildError("EP_KERNELS_NVSHMEM=1, but ep_kernels/csrc/nvshmem holds no sources")
    if find_nvcc() is None:
        raise BuildError("EP_KERNELS_NVSHMEM=1, but nvcc was not found: set NVCC or CUDA_HOME")
    if find_nvshmem() is None:
        raise BuildError(f"EP_KERNELS_NVSHMEM=1, but {_why_no_nvshmem()}")
    return True


def _choice(name: str) -> str:
    choice = os.environ.get(name, "auto").lower()
    if choice not in {"0", "1", "auto"}:
        raise BuildError(f"{name}={choice!r} is not one of 0, 1, auto")
    return choice


def _want_cuda(*, has_sources: bool) -> bool:
    choice = _choice("EP_KERNELS_CUDA")
    if choice == "1" and not has_sources:
        raise BuildError("EP_KERNELS_CUDA=1, but ep_kernels/csrc/cuda holds no sources")
    if choice == "1" and find_nvcc() is None:
        raise BuildError("EP_KERNELS_CUDA=1, but nvcc was not found: set NVCC or CUDA_HOME")
    return choice != "0" and has_sources and find_nvcc() is not None


def _sources(folder: str, suffixes: tuple[str, ...] = (".cpp",)) -> list[Path]:
    paths = sorted(path for path in (CSRC / folder).rglob("*") if path.suffix in suffixes)
    if platform.machine() not in {"x86_64", "AMD64"}:
        paths = [path for path in paths if not path.name.endswith(tuple(SIMD_FLAGS))]
    return paths


# ---- build.ninja ---------------------------------------------------------------------------------


def _ninja_lines(libraries: list[Library]) -> Iterator[str]:
    """The text of build.ninja; ninja itself notices changed commands, headers and sources."""
    yield "ninja_required_version = 1.8\n"
    for rule, command in _rules({library.linker for library in libraries}):
        yield f"\nrule {rule}\n  command = {command}\n  description = {rule} $out\n"
        if not rule.startswith("link"):
            yield "  depfile = $out.d\n  deps = gcc\n"
    yield "\n"
    for edge in _edges(libraries):
        inputs = " ".join(_escape(path) for path in edge.inputs)
        yield f"build {_escape(edge.output)}: {edge.rule} {inputs}\n"
        if edge.flags:
            yield f"  flags = {edge.flags}\n"
    if libraries:
        yield f"\ndefault {' '.join(library.name for library in libraries)}\n"


def _rules(linkers: set[str]) -> Iterator[tuple[str, str]]:
    """Pairs of rule name and command, as far as `linkers` need them."""
    cxx = os.environ.get("CXX", "g++")
    werror = os.environ.get("EP_KERNELS_WERROR", "0") not in {"", "0"}
    flags = _join([*CXX_FLAGS, *(["-Werror"] if werror else []), f"-I{CSRC}"])
    cxx_flags = f"{flags} {_env_text('CXXFLAGS')}"
    yield "cxx", f"{cxx} {cxx_flags} $flags -MMD -MF $out.d -c $in -o $out"
    static_flags = _static_flags(cxx)
    linker_flags = ",".join([*LINK_FLAGS, EXPORTS_FILE])
    ld_flags = f"-Wl,{linker_flags} {' '.join(static_flags)} {_env_text('LDFLAGS')}"
    yield "link", f"{cxx} -shared -pthread $in {ld_flags} -lrt -ldl -o $out"
    if linkers & {"link_cuda", "link_nvshmem"}:
        nvcc = f"{find_nvcc()} -ccbin {cxx}"
        gencode = _gencode(str(find_nvcc()), os.environ.get("EP_KERNELS_CUDA_ARCHS", ""))
        werror_flags = ["-Werror", "all-warnings"] if werror else []
        nvcc_flags = _join([*NVCC_FLAGS, *werror_flags, f"-I{CSRC}"])
        compile_flags = f"{nvcc_flags} $flags -MMD -MF $out.d -c $in -o $out"
        yield "nvcc", f"{nvcc} {_join(gencode)} {compile_flags}"
        ld_flags = f"-Xlinker {linker_flags} -Xcompiler {','.join(['-pthread', *static_flags])}"
        link = f"{nvcc} -shared -cudart static"
        yield "link_cuda", f"{link} $in {ld_flags} -lrt -ldl -o $out"
    if "link_nvshmem" in linkers:
        home = find_nvshmem()
        if archs := os.environ.get("EP_KERNELS_NVSHMEM_ARCHS"):
            gencode = _gencode(str(find_nvcc()), archs)
        flags = _join([*gencode, "-rdc=true", f"-isystem={home}/include"])
        yield "nvcc_nvshmem", f"{nvcc} {compile_flags} {flags}"
        libraries = _join([f"-L{home}/lib", "-lnvshmem_device", f"-l:{NVSHMEM_HOST_LIBRARY}"])
        link += f" -rdc=true {_join(gencode)}"
        yield "link_nvshmem", f"{link} $in {ld_flags} {libraries} -lrt -ldl -o $out"


def _edges(libraries: list[Library]) -> Iterator[Edge]:
    """Compile steps, each source once even when two libraries hold it, then the link steps."""
    objects: dict[Path, str] = {}
    for library in libraries:
        for source in library.sources:
            if source in objects:
                continue
            objects[source] = f"obj/{source.relative_to(CSRC)}.o"
            flags = next((f for end, f in SIMD_FLAGS.items() if source.name.endswith(end)), [])
            yield Edge(objects[source], _compile_rule(source), [str(source)], _join(flags))
        yield Edge(library.name, library.linker, [objects[source] for source in library.sources])


def _compile_rule(source: Path) -> str:
    name = source.relative_to(CSRC).as_posix()
    if "nvshmem" in name:
        return "nvcc_nvshmem"
    return "nvcc" if source.suffix == ".cu" or "cuda" in name else "cxx"


def _static_flags(cxx: str) -> list[str]:
    """Takes libstdc++ into the library where the compiler has it as an archive."""
    command = [*shlex.split(cxx), "-print-file-name=libstdc++.a"]
    try:
        printed = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except OSError as error:
        raise BuildError(f"the C++ compiler {cxx!r} (CXX) cannot run: {error}") from None
    has_archive = Path(printed.strip()).is_absolute()
    return ["-static-libstdc++", "-static-libgcc"] if has_archive else []


def _gencode(nvcc: str, archs: str) -> list[str]:
    """-gencode flags for `archs` such as "80;90a"; the default keeps what this nvcc supports."""
    wanted = [arch for arch in re.split(r"[;, ]+", archs or DEFAULT_CUDA_ARCHS) if arch]
    if not archs:
        known = set(re.findall(r"sm_(\w+)", _output(nvcc, "--list-gpu-code")))
        wanted = [arch for arch in wanted if not known or arch in known]
    if not wanted:
        raise BuildError(f"{nvcc} supports none of the architectures {DEFAULT_CUDA_ARCHS!r}")
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in wanted]
    # PTX of the newest one, for GPUs that come later; an "a" architecture has no such successors.
    newest = wanted[-1]
    if newest.isdigit():
        flags.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
    return flags


def _find_ninja() -> list[str]:
    if found := shutil.which("ninja") or shutil.which("ninja-build"):
        return [found]
    if importlib.util.find_spec("ninja") is not None:
        return [sys.executable, "-m", "ninja"]
    raise BuildError("ninja was not found: pip install ninja, or install it from your system")


# ---- helpers -------------------------------------------------------------------------------------


def _install(libraries: list[Library], lib_dir: Path) -> list[Path]:
    """Copies what changed by rename, so that processes which run the old file keep it intact."""
    lib_dir.mkdir(parents=True, exist_ok=True)
    built = {library.name for library in libraries}
    for name in set(LIBRARY_NAMES) - built:
        (lib_dir / name).unlink(missing_ok=True)
    for name in built:
        source, target = BUILD_DIR / name, lib_dir / name
        if target.exists() and filecmp.cmp(source, target, shallow=False):
            continue
        partial = target.with_suffix(f".{os.getpid()}.tmp")
        shutil.copy2(source, partial)
        partial.replace(target)
    return [lib_dir / name for name in LIBRARY_NAMES if name in built]


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def _write_if_changed(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def _join(arguments: Iterable[str]) -> str:
    return _ninja_text(shlex.join(arguments))


def _env_text(name: str) -> str:
    return _ninja_text(os.environ.get(name, ""))


def _ninja_text(text: str) -> str:
    return text.replace("$", "$$")


def _escape(path: str) -> str:
    return re.sub(r"([$: ])", r"$\1", path)


def _relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _say(*lines: str) -> None:
    print(*lines, sep="\n")


if __name__ == "__main__":
    sys.exit(main())

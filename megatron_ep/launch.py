"""Runs a training program of Megatron-LM, unmodified, with the dispatcher deepep available.

torchrun --nproc-per-node 2 -m megatron_ep.launch PATH/pretrain_gpt.py ARGS...

ARGS are the program's own; --moe-token-dispatcher-type accepts deepep. The Megatron-Core beside
it is used, if there is one. Without a GPU the program runs on the CPU, see docs/megatron-lm.md.
Its `import deep_ep`, which --moe-token-dispatcher-type flex needs, finds ep_kernels.deep_ep, unless
DeepEP itself is installed.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

USAGE = "usage: python -m megatron_ep.launch PATH/pretrain_gpt.py ARGS..."


def launch(script: Path, arguments: Sequence[str]) -> None:
    """Runs the script in this process, as `python SCRIPT ARGUMENTS...` does.

    Raises:
        ImportError: Megatron-Core is neither beside the script nor installed.
    """
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.resolve().parent))
    from ep_kernels import deep_ep

    deep_ep.install_if_missing()
    from megatron_ep.cpu_training import enable_cpu_training

    enable_cpu_training()  # before anything of Megatron is imported
    from megatron_ep.install import register

    register()
    _use_compiled_helpers()
    runpy.run_path(str(script), run_name="__main__")


def _use_compiled_helpers() -> None:
    """Megatron-LM compiles its dataset helpers inside of its checkout, with make and pybind11,
    whenever it starts. If they are there it need not, and the installed megatron-core has them.
    """
    name = "megatron.core.datasets.helpers_cpp"
    if importlib.util.find_spec(name) is None:
        folders = [str(Path(entry, "megatron/core/datasets")) for entry in sys.path]
        found = importlib.machinery.PathFinder.find_spec("helpers_cpp", folders)
        if found is None or found.origin is None:
            return
        spec = importlib.util.spec_from_file_location(name, found.origin)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    utils: Any = importlib.import_module("megatron.core.datasets.utils")
    utils.compile_helpers = lambda: None


def main() -> int:
    """Runs the command line; returns the exit status."""
    wants_help = sys.argv[1:2] in (["-h"], ["--help"])
    if wants_help or len(sys.argv) < 2:
        stream = sys.stdout if wants_help else sys.stderr
        stream.write(f"{__doc__ if wants_help else USAGE}\n")
        return 0 if wants_help else 2
    script = Path(sys.argv[1])
    if not script.is_file():
        sys.stderr.write(f"error: {script} is not a file\n{USAGE}\n")
        return 2
    launch(script, sys.argv[2:])
    return 0


if __name__ == "__main__":
    sys.exit(main())

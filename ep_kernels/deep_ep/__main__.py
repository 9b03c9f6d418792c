"""Runs a program written for DeepEP: python -m ep_kernels.deep_ep SCRIPT.py ARGS..."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from ep_kernels.deep_ep import install

USAGE = "usage: python -m ep_kernels.deep_ep SCRIPT.py [ARGS...]"


def main() -> int:
    """Returns the exit status; that of the script is its own."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(f"{USAGE}\n\n{__doc__}", file=sys.stdout if len(sys.argv) > 1 else sys.stderr)  # noqa: T201
        return 0 if len(sys.argv) > 1 else 2
    script = Path(sys.argv[1])
    if not script.is_file():
        print(f"error: {script} is not a file\n{USAGE}", file=sys.stderr)  # noqa: T201
        return 2
    install()
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(script.resolve().parent))  # as `python SCRIPT.py` has it
    runpy.run_path(str(script), run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main())

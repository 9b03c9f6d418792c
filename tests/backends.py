"""Which backends there are on this machine.

NOTE: not for what ranks are forked with (conftest.py, `preload`): asking for GPUs starts CUDA, and
that does not survive a fork.
"""

import pytest
import torch

BACKENDS = ("reference", "cpu", "nodes", *(["cuda"] if torch.cuda.is_available() else []))

BY_NAME = ("twin", "cuda_nodes")
"""GPUs over logical nodes, and their Python without a GPU; run only when --backend names them."""

OVER_NODES = ("nodes", *BY_NAME)


def backends(*names):
    """For tests that do not run on all backends: parametrizes `backend`. Those for "nodes" also run
    on BY_NAME."""
    names = [name for name in names if name in BACKENDS]
    by_name = BY_NAME if "nodes" in names else ()
    return pytest.mark.parametrize("backend", [param(name) for name in (*names, *by_name)])


def param(name):
    """A parameter; skipped where its device is not."""
    if name != "cuda_nodes" or torch.cuda.is_available():
        return name
    return pytest.param(name, marks=pytest.mark.skip(reason="cuda_nodes: there is no GPU"))

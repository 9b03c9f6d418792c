"""Which backends there are on this machine.

NOTE: not for what ranks are forked with (conftest.py, `preload`): asking for GPUs starts CUDA, and
that does not survive a fork.
"""

import pytest
import torch

BACKENDS = ("reference", "cpu", "nodes", *(["cuda"] if torch.cuda.is_available() else []))


def backends(*names):
    """For tests that do not run on all backends: parametrizes `backend`."""
    return pytest.mark.parametrize("backend", [name for name in names if name in BACKENDS])

"""Where a rank works: for the life of its process on the CPU, or on a GPU if use_device() says that
first.
"""

from __future__ import annotations

import os

import torch

_device: torch.device | None = None


def use_device(rank: int, kind: str) -> None:
    """Has this rank work on "cpu" or "cuda", from before anything of Megatron is imported."""
    from megatron_ep.devices import choose_device

    global _device
    if _device is None:
        os.environ["LOCAL_RANK"] = str(rank)
        _device = choose_device(kind)
    assert _device.type == kind


def rank_device() -> torch.device:
    """Where this rank works."""
    if _device is None:
        use_device(0, "cpu")
    assert _device is not None
    return _device

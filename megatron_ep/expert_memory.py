"""Experts whose results lie in the buffer's pool, so that combine has nothing to copy.

What allocates the result runs in a block of Buffer.memory_pool(): the second grouped GEMM of
experts that have one (`linear_fc2`, or that of torch's), or that of an only local expert. Other
modules allocate what the backward keeps, which is no business of the pool. Where experts do more to
the result (a bias, unpadding for FP8, joining the rows of several modules), that is ordinary
memory, and combine copies it as ever.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron_ep.experts import TorchGroupedMLP


def result_module(experts: torch.nn.Module) -> torch.nn.Module | None:
    """The module that allocates what the experts return; None if there is none of its own."""
    config: Any = getattr(experts, "config", None)
    if getattr(config, "fp8", None) or getattr(config, "fp4", None):
        return None  # its forward also makes what outlives the call, such as cast weights
    local_experts = getattr(experts, "local_experts", None)
    if local_experts is not None:
        return getattr(local_experts[0], "linear_fc2", None) if len(local_experts) == 1 else None
    return getattr(experts, "linear_fc2", None)


def allocate_results_in_pool(
    experts: torch.nn.Module, buffer: Callable[[torch.device], Any]
) -> None:
    """Has the result of the experts allocated in the pool, where it can be.

    Args:
        experts: of a layer.
        buffer: the buffer of the layer, by the device of the rows; asked at each forward.
    """
    if isinstance(experts, TorchGroupedMLP):
        experts.result_memory = lambda device: buffer(device).memory_pool()
        return
    module = result_module(experts)
    if module is None:
        return
    forward = module.forward

    def forward_in_pool(rows: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        with buffer(rows.device).memory_pool():
            return forward(rows, *args, **kwargs)

    module.forward = forward_in_pool

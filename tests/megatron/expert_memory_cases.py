"""Layers whose experts write into the pool. Functions run on ranks."""

from __future__ import annotations

import contextlib

import moe_layers as layers
import torch
from moe_layers import Case, Grid
from rank_devices import rank_device
from torch.utils._python_dispatch import TorchDispatchMode

GRID = Grid(ep=2)


class _MatricesInPool(TorchDispatchMode):
    """Products of matrices, and what they are to be written to, lie in the pool, as on a GPU all
    that is allocated would.
    """

    PRODUCTS = (
        torch.ops.aten.mm,
        torch.ops.aten.addmm,
        torch.ops.aten._grouped_mm,
        torch.ops.aten.new_empty,
    )

    def __init__(self, buffer):
        super().__init__()
        self._buffer = buffer

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket not in self.PRODUCTS or func is torch.ops.aten.mm.out:
            return out
        return self._buffer.empty(*out.shape, dtype=out.dtype).copy_(out)


def _in_pool(buffer, tensor):
    return buffer._usable_backend().pool_offset(tensor) is not None


@contextlib.contextmanager
def _watching(buffer, seen):
    """Notes for each combine whether its rows lie in the pool, which spares it their copy."""
    combine = buffer.combine

    def watched(x, *args, **options):
        if x.shape[0] > 0:
            seen.append(_in_pool(buffer, x))
        return combine(x, *args, **options)

    buffer.combine = watched
    if buffer.device.type == "cpu":
        buffer.memory_pool = lambda: _MatricesInPool(buffer)
    try:
        yield
    finally:
        for name in {"combine", "memory_pool"} & set(vars(buffer)):
            delattr(buffer, name)


def compare_results_in_pool(rank, num_experts, num_chunks, experts="auto"):
    """Differences to a layer with ordinary results, and where the rows of combines lay."""
    is_on_gpu = rank_device().type == "cuda"  # where torch's experts are for bf16 alone
    dtype = torch.bfloat16 if experts == "torch" and is_on_gpu else torch.float64
    case = Case(num_experts=num_experts, dtype=dtype)
    options = dict(num_chunks=num_chunks, experts=experts)
    with layers.megatron(GRID, **options):
        expected = layers.run_layer(rank, layers.make_layer(case, GRID, "deepep"), case)
    seen: list[bool] = []
    with layers.megatron(GRID, results_in_pool=True, **options):
        layer = layers.make_layer(case, GRID, "deepep")
        with _watching(layer.token_dispatcher.buffer(rank_device()), seen):
            actual = layers.run_layer(rank, layer, case)
    return layers.compare(rank, expected, actual), seen

"""Layers that are recomputed in the backward, and what they communicate. Functions run on ranks."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import moe_layers as layers
import torch
from moe_layers import Case, Grid
from rank_devices import rank_device

from megatron_ep.routing import ROUTING_BYTES

GRID = Grid(ep=2)

MOE = dict(recompute_granularity="selective", recompute_modules=["moe"])

SHARED = dict(moe_shared_expert_intermediate_size=32, moe_shared_expert_overlap=True)


def through_megatron(layer, hidden):
    """Megatron's checkpoint around the whole layer, as for the full recomputation of layers."""
    from megatron.core import tensor_parallel

    return tensor_parallel.checkpoint(lambda x: layer(x)[0], False, hidden)


def through_torch(*, use_reentrant):
    """torch's checkpoint, which is what Transformer Engine's is made of."""

    def run(layer, hidden):
        from torch.utils.checkpoint import checkpoint

        from megatron_ep.recompute import keep_transfers

        function = keep_transfers(lambda x: layer(x)[0])
        return checkpoint(function, hidden, use_reentrant=use_reentrant)

    return run


def within_megatron(layer, hidden):
    """A checkpoint inside of another one."""
    from megatron.core import tensor_parallel

    def inner(x):
        return through_megatron(layer, x) * 2

    return tensor_parallel.checkpoint(inner, False, hidden) / 2


def plainly(layer, hidden):
    return layer(hidden)[0]


WAYS: dict[str, tuple[dict[str, Any], Callable[..., torch.Tensor]]] = {
    "moe": (MOE, plainly),
    "full": ({}, through_megatron),
    "nested": ({}, within_megatron),
    "reentrant": ({}, through_torch(use_reentrant=True)),
}

NON_REENTRANT = {"non_reentrant": ({}, through_torch(use_reentrant=False))}


@contextlib.contextmanager
def counting(buffer, counts):
    """Counts the calls of the buffer."""

    def count(name, call):
        def counted(*args, **options):
            rows = args[0][0] if isinstance(args[0], tuple) else args[0]
            is_routing = rows.shape[1] * rows.element_size() == ROUTING_BYTES
            counts["routing" if is_routing else name] += 1
            return call(*args, **options)

        return counted

    names = ("dispatch", "combine")
    originals = [getattr(buffer, name) for name in names]
    try:
        for name, call in zip(names, originals):
            setattr(buffer, name, count(name, call))
        yield
    finally:
        for name in names:
            delattr(buffer, name)


def run_stack(rank, stack, case, run, order):
    """moe_layers.run_in_flight() with layers that are called by run(), and the calls by name."""
    counts = Counter()
    buffer = stack[0].token_dispatcher.buffer(rank_device())
    called = [_Called(layer, run) for layer in stack]
    with counting(buffer, counts):
        tensors = layers.run_in_flight(rank, called, case, order)
    return tensors, counts


class _Called:
    """A layer for run_in_flight()."""

    def __init__(self, layer, run):
        self._layer, self._run = layer, run
        self.named_parameters = layer.named_parameters

    def __call__(self, hidden):
        # NOTE: the clone adds up the layer's gradients of its input before the residual's is added,
        # which a checkpoint does in any case.
        return self._run(self._layer, hidden.clone()), None


def compare_ways(rank, options, num_chunks, again, *, is_reentrant=True, order="F0 F1 B0 F2 B2 B1"):
    """Recomputed layers against the same layers without recomputation.

    Returns:
        ([differences of each way], {way: calls}, calls without).
    """
    results, counts = [], {}
    plain = Case(options=options)
    with layers.megatron(GRID, num_chunks=num_chunks, recompute_transfers=again):
        expected, without = run_stack(rank, make_stack(plain), plain, plainly, order)
        for name, (more, run) in (WAYS if is_reentrant else NON_REENTRANT).items():
            case = Case(options=options | more)
            actual, counts[name] = run_stack(rank, make_stack(case), case, run, order)
            results.append(layers.compare(rank, expected, actual))
    return results, counts, without


def compare_non_reentrant(rank):
    return compare_ways(rank, {}, 1, False, is_reentrant=False)


def make_stack(case):
    return [layers.make_layer(case, GRID, "deepep", seed=layers.SEED + i) for i in range(2)]


def compare_sliced(rank):
    """With tensor parallelism of the experts, of one layer."""
    grid, tensors = Grid(tp=2, etp=2), []
    with layers.megatron(grid):
        for more in ({}, MOE):
            case = Case(options=more)
            layer = layers.make_layer(case, grid, "deepep")
            tensors.append(layers.run_layer(rank, layer, case))
    return [layers.compare(rank, *tensors)]


def used_bytes(buffer):
    """Of the pool, when all calls are over; a buffer lets go of what they used in the next one."""
    if rank_device().type == "cuda":
        torch.cuda.synchronize()
    buffer.barrier()
    nothing = torch.empty(0, 1, dtype=torch.int64, device=rank_device())
    buffer.dispatch(torch.empty(0, layers.HIDDEN, device=rank_device()), nothing)
    buffer.barrier()
    return buffer.pool_stats()["used_bytes"]


def bytes_in_pool(rank, num_chunks, name, again):
    """Of the buffer: before, after the forward, after the backward, after a forward whose graph is
    dropped.
    """
    more, run = WAYS[name]
    case, seen = Case(options=more), []
    with layers.megatron(GRID, num_chunks=num_chunks, recompute_transfers=again):
        layer = layers.make_layer(case, GRID, "deepep")
        buffer = layer.token_dispatcher.buffer(rank_device())

        def look():
            seen.append(used_bytes(buffer))

        look()
        hidden, grad = layers.make_input(rank, case)
        output = run(layer, hidden)
        look()
        output.backward(grad)
        del output
        look()
        dropped = run(layer, hidden)
        del dropped
        look()
    return seen


def counts_without_grad(rank):
    """Calls of a forward without gradients, and bytes in the pool before and after."""
    counts, case = Counter(), Case(options=MOE)
    with layers.megatron(GRID), torch.no_grad():
        layer = layers.make_layer(case, GRID, "deepep")
        buffer = layer.token_dispatcher.buffer(rank_device())
        before = used_bytes(buffer)
        with counting(buffer, counts):
            layer(layers.make_input(rank, case)[0])
        return counts, before, used_bytes(buffer)


def run_backward_twice(rank):
    """The second one finds nothing kept any more and communicates; both give the same."""
    case, counts, grads = Case(options=MOE), [], []
    with layers.megatron(GRID):
        layer = layers.make_layer(case, GRID, "deepep")
        buffer = layer.token_dispatcher.buffer(rank_device())
        hidden, grad = layers.make_input(rank, case)
        output = layer(hidden)[0]
        for retain_graph in (True, False):
            counts.append(Counter())
            hidden.grad = None
            with counting(buffer, counts[-1]):
                output.backward(grad, retain_graph=retain_graph)
            grads.append(hidden.grad)
    return counts, [layers.compare(rank, {"grad": grads[0]}, {"grad": grads[1]})]


def run_te_checkpoint(rank):
    """register() also reaches the checkpoint of Transformer Engine, here one that stands in."""
    import sys
    from types import ModuleType

    import megatron_ep

    name = "transformer_engine.pytorch.distributed"
    original = sys.modules.get(name)
    module = ModuleType(name)
    module.checkpoint = lambda function, *args: ("called", function(*args))
    sys.modules[name] = module
    before = module.checkpoint
    try:
        megatron_ep.register()
        assert module.checkpoint is not before
        assert module.checkpoint(lambda x: x + 1, 2) == ("called", 3)
        megatron_ep.unregister()
        assert module.checkpoint is before
    finally:
        sys.modules.pop(name)
        if original is not None:
            sys.modules[name] = original

"""Layers whose rows travel as fp8. Functions run on ranks."""

from __future__ import annotations

import moe_layers as layers
import recompute_cases
import torch
from moe_layers import Case, Grid

from ep_kernels import reference
from megatron_ep.fp8_rows import quantise

GRID = Grid(ep=2)

WIDE = dict(hidden_size=256)


def make_case(dtype=torch.float32, **options):
    return Case(dtype=dtype, options=WIDE | options)


def run(rank, case, *, rounds_input=False, alignment=1, **buffer_options):
    """All tensors of a layer. With `rounds_input` the tokens that dispatch is given are rounded to
    fp8 and back, which is what fp8 rows have to amount to.
    """
    with layers.megatron(GRID, **buffer_options):
        layer = layers.make_layer(case, GRID, "deepep")
        dispatcher = layer.token_dispatcher
        dispatcher.expert_alignment = alignment
        if rounds_input:
            preprocess = dispatcher.dispatch_preprocess

            def rounded(*arguments):
                tokens, probs = preprocess(*arguments)
                return _Rounded.apply(tokens), probs

            dispatcher.dispatch_preprocess = rounded
        return layers.run_layer(rank, layer, case)


class _Rounded(torch.autograd.Function):
    """To fp8 and back; gradients pass."""

    @staticmethod
    def forward(ctx, x):
        rows, scales = quantise(x)
        return (rows.float().unflatten(1, (-1, 128)) * scales[:, :, None]).flatten(1).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad


VARIANTS = {
    "one piece": {},
    "chunks": dict(num_chunks=3),
    "padded": dict(alignment=16),
    "chunks, padded": dict(num_chunks=3, alignment=16),
    "reference": dict(buffer_class=reference.Buffer),
    "nodes": dict(num_local_ranks=1),
}


def compare_variants(rank, dtype):
    """Each variant against rows that were rounded before they left, in GEMMs of as many rows: on
    some CPUs one of fewer rows adds in another order."""
    case = make_case(dtype)
    results = []
    for options in VARIANTS.values():
        of_gemms = {name: options[name] for name in ("num_chunks", "alignment") if name in options}
        expected = run(rank, case, rounds_input=True, **of_gemms)
        results.append(
            layers.compare(rank, expected, run(rank, case, fp8_dispatch=True, **options))
        )
    return results


def compare_options(rank):
    """Overlapped shared experts, and recomputation."""
    results = []
    for options in (recompute_cases.SHARED, recompute_cases.MOE):
        case = make_case(**options)
        expected = run(rank, case, rounds_input=True)
        results.append(layers.compare(rank, expected, run(rank, case, fp8_dispatch=True)))
    return results


def relative_errors(rank):
    """Of the output and of the gradients, from rows that were not rounded."""
    case = make_case()
    plain, other = (run(rank, case, fp8_dispatch=fp8) for fp8 in (False, True))
    return {
        name: ((plain[name] - other[name]).norm() / plain[name].norm()).item() for name in plain
    }


def dtypes_sent(rank):
    """Of the rows that the buffer is given in a forward and a backward."""
    from rank_devices import rank_device

    case, dtypes = make_case(torch.bfloat16), []
    with layers.megatron(GRID, fp8_dispatch=True):
        layer = layers.make_layer(case, GRID, "deepep")
        buffer = layer.token_dispatcher.buffer(rank_device())
        dispatch = buffer.dispatch

        def watched(x, *arguments, **options):
            dtypes.append(tuple(t.dtype for t in x) if isinstance(x, tuple) else x.dtype)
            return dispatch(x, *arguments, **options)

        buffer.dispatch = watched
        layers.run_layer(rank, layer, case)
    return dtypes


def make_narrow_layer(rank):
    """Raises, since 16 channels are no group."""
    with layers.megatron(GRID, fp8_dispatch=True):
        layers.make_layer(Case(), GRID, "deepep")

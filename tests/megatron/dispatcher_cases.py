"""Token dispatchers alone, fed with routing maps that no router makes. Functions run on ranks."""

from __future__ import annotations

from unittest import mock

import moe_layers as layers
import pytest
import torch
from moe_layers import HIDDEN, Case, Grid

CAPACITY = dict(moe_expert_capacity_factor=1.0)
"""With a capacity factor alltoall does not rely on the number of experts of a token."""


def make_dispatchers(case, grid):
    """Of two layers; the experts are the function below."""
    made = [layers.make_layer(case, grid, name) for name in ("alltoall", "deepep")]
    judge, dispatcher = (layer.token_dispatcher for layer in made)
    dispatcher.expect_topk(None)  # maps here are not of the layer's router
    return judge, dispatcher


def experts(rows, tokens_per_expert, probs):
    """Row by row, an own function for each local expert."""
    local = torch.arange(len(tokens_per_expert)).repeat_interleave(tokens_per_expert)
    return rows.sin() * (local + 1)[:, None] * probs[:, None]


def run_dispatcher(dispatcher, hidden, routing_map, probs, grad):
    """The hooks in Megatron's order; all results by name."""
    hidden = hidden.detach().clone().requires_grad_()
    probs = probs.detach().clone().requires_grad_()
    tokens, sent_probs = dispatcher.dispatch_preprocess(hidden, routing_map, probs)
    tokens, sent_probs = dispatcher.token_dispatch(tokens, sent_probs)
    rows, counts, row_probs = dispatcher.dispatch_postprocess(tokens, sent_probs)
    assert counts.dtype == torch.int64
    assert counts.device.type == "cpu"
    output = experts(rows, counts, row_probs)
    output = dispatcher.token_combine(dispatcher.combine_preprocess(output))
    output = dispatcher.combine_postprocess(output)
    output.backward(grad)
    return {
        "rows": rows.detach(),
        "counts": counts,
        "row_probs": row_probs.detach(),
        "output": output.detach(),
        "hidden.grad": hidden.grad,
        "probs.grad": probs.grad,
    }


def make_routing(rank, kind, num_tokens, num_experts):
    """[T, E] map and probabilities; those outside of the map are set too and must not matter."""
    generator = torch.Generator().manual_seed(100 * len(kind) + rank)
    probs = torch.rand(num_tokens, num_experts, generator=generator, dtype=torch.float64)
    density = {"none": 0.0, "all": 1.0, "sparse": 0.1, "dense": 0.8, "unequal": 0.15 + 0.6 * rank}
    routing_map = torch.rand(num_tokens, num_experts, generator=generator) < density[kind]
    if kind in ("dense", "unequal"):
        probs[torch.rand(num_tokens, num_experts, generator=generator) < 0.3] = 0.0
    return routing_map, probs


def compare_on_maps(rank, grid, kinds, num_tokens):
    """Any routing map gives the rows, counts, output and gradients of alltoall."""
    case = Case(num_experts=8, options=CAPACITY)
    with layers.megatron(grid):
        judge, dispatcher = make_dispatchers(case, grid)
        for kind in kinds:
            routing_map, probs = make_routing(rank, kind, num_tokens[rank], case.num_experts)
            hidden, grad = torch.randn(2, num_tokens[rank], 1, HIDDEN, dtype=torch.float64)
            expected = run_dispatcher(judge, hidden, routing_map, probs, grad)
            actual = run_dispatcher(dispatcher, hidden, routing_map, probs, grad)
            if grid.etp > 1:  # another order of the rows within an expert
                for results in (expected, actual):
                    results["rows"] = results["rows"].sort(dim=0).values
                    results["row_probs"] = results["row_probs"].sort(dim=0).values
            for name in expected:
                torch.testing.assert_close(
                    actual[name], expected[name], rtol=0, atol=1e-13 if grid.etp > 1 else 0
                )


def check_outputs_own_their_memory(rank, grid):
    """Freeing what dispatch_preprocess returns must not touch its input."""
    case = Case(num_experts=8)
    with layers.megatron(grid):
        _, dispatcher = make_dispatchers(case, grid)
        hidden = torch.randn(6, 2, HIDDEN, dtype=torch.float64)
        routing_map, probs = make_routing(rank, "dense", 12, case.num_experts)
        inputs = hidden, routing_map, probs
        before = [tensor.clone() for tensor in inputs]
        outputs = dispatcher.dispatch_preprocess(*inputs)
        dispatcher.token_dispatch(*outputs)
        for tensor in outputs:
            tensor.untyped_storage().resize_(0)
        assert all(torch.equal(now, then) for now, then in zip(inputs, before))


def check_padding(rank, grid, alignment):
    """Groups of rows are padded with zeros that are counted and have no influence."""
    case = Case(num_experts=8, options=CAPACITY)
    padded_case = Case(
        num_experts=8,
        options=CAPACITY,
        late_options=dict(moe_router_padding_for_quantization=True),
    )
    align = mock.patch(
        "megatron_ep.token_dispatcher.get_align_size_for_quantization", return_value=alignment
    )
    with layers.megatron(grid), align:
        judge, _ = make_dispatchers(case, grid)
        padded = layers.make_layer(padded_case, grid, "deepep").token_dispatcher
        routing_map, probs = make_routing(rank, "sparse", 12, case.num_experts)
        hidden, grad = torch.randn(2, 12, 1, HIDDEN, dtype=torch.float64)
        expected = run_dispatcher(judge, hidden, routing_map, probs, grad)
        actual = run_dispatcher(padded, hidden, routing_map, probs, grad)
        counts, real = actual["counts"], expected["counts"]
        assert torch.equal(counts, -(-real // alignment) * alignment)
        assert len(actual["rows"]) == counts.sum()
        is_padding = torch.cat(
            [torch.arange(count) >= n for count, n in zip(counts.tolist(), real.tolist())]
        )
        for name in ("rows", "row_probs"):
            assert not actual[name][is_padding].any()
            if grid.etp == 1:
                assert torch.equal(actual[name][~is_padding], expected[name])
        for name in ("output", "hidden.grad", "probs.grad"):
            torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=1e-13)


def check_dtypes_of_probs(rank, grid):
    """Experts get the probabilities in the router's dtype, with the same bits."""
    with layers.megatron(grid):
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            case = Case(num_experts=8, dtype=torch.bfloat16, options=CAPACITY)
            judge, dispatcher = make_dispatchers(case, grid)
            routing_map, probs = make_routing(rank, "sparse", 12, case.num_experts)
            hidden, grad = torch.randn(2, 12, 1, HIDDEN, dtype=torch.bfloat16)
            arguments = hidden, routing_map, probs.to(dtype), grad
            expected = run_dispatcher(judge, *arguments)
            actual = run_dispatcher(dispatcher, *arguments)
            assert actual["row_probs"].dtype == dtype
            for name in ("rows", "row_probs", "probs.grad"):
                assert torch.equal(actual[name], expected[name]), name


def check_one_buffer_for_all_layers(rank, grid):
    """Layers share the buffer of their group; a reset makes the next call make another one."""
    import megatron_ep
    from megatron_ep import buffers

    case = Case()
    with layers.megatron(grid, timeout_s=17.0):
        stack = [layers.make_layer(case, grid, "deepep", seed=seed) for seed in range(3)]
        assert not buffers._buffers
        layers.run_in_flight(rank, stack, case, "F0 B0")
        (first,) = buffers._buffers.values()
        assert first.timeout_s == 17.0
        assert first.num_experts == case.num_experts * grid.etp
        layers.run_in_flight(rank, stack, case, "F0 B0")
        assert list(buffers._buffers.values()) == [first]
        megatron_ep.reset_buffers()
        layers.run_in_flight(rank, stack, case, "F0 B0")
        (second,) = buffers._buffers.values()
        assert second is not first
    assert not buffers._buffers


def check_refused_placement(rank):
    """Experts and ranks in another order than Megatron's would be sent to the wrong place."""
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

    from megatron_ep import DeepEPTokenDispatcher

    grid = Grid(tp=2, ep=2, etp=2)
    with layers.megatron(grid):
        config = layers.make_config(Case(), grid, "deepep")
        groups = get_default_pg_collection()
        block = 2 * groups.ep.rank()
        DeepEPTokenDispatcher(2, [block, block + 1], config, groups)
        with pytest.raises(ValueError, match=rf"local_expert_indices=\[{block + 1}, {block}\]"):
            DeepEPTokenDispatcher(2, [block + 1, block], config, groups)
        groups.expt_tp, groups.ep = groups.ep, groups.expt_tp
        block = 2 * groups.ep.rank()
        if rank in (1, 2):  # the others are where they would be anyway
            with pytest.raises(ValueError, match="must be the outer dimension"):
                DeepEPTokenDispatcher(2, [block, block + 1], config, groups)


def check_cuda_graph_parts(rank):
    """A graph may contain dispatch_preprocess, which counts nothing then, but no dispatch."""
    from megatron.core.transformer.enums import CudaGraphScope

    grid = Grid()
    router, preprocess, attention, moe = (
        CudaGraphScope[name] for name in ("moe_router", "moe_preprocess", "attn", "moe")
    )

    def make(scope, **options):
        late = dict(cuda_graph_impl="transformer_engine", cuda_graph_scope=scope, **options)
        case = Case(num_experts=8, topk=3, late_options=late)
        return layers.make_layer(case, grid, "deepep").token_dispatcher

    with layers.megatron(grid):
        routing_map, probs = make_routing(0, "sparse", 12, 8)
        hidden = torch.randn(6, 2, HIDDEN, dtype=torch.float64)
        padded = dict(moe_pad_expert_input_to_capacity=True)
        for scope, options, width in (
            ([attention], {}, 3),
            ([attention], padded, int(routing_map.sum(1).max())),
            ([router, preprocess], {}, 3),
            ([router, preprocess], padded, 8),
        ):
            dispatcher = make(scope, **options)
            _, weights = dispatcher.dispatch_preprocess(hidden, routing_map, probs)
            assert dispatcher.topk_idx.shape == weights.shape == (12, width)
            assert "topk_idx" in dispatcher.cudagraph_attrs
        for scope in ([], [moe]):
            with pytest.raises(ValueError, match="CUDA graphs of"):
                make(scope)

"""Layers with torch's experts beside layers with Megatron's: what runs on ranks."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import moe_layers as layers
import pytest
import torch
import torch.distributed as dist
from moe_layers import Case, Grid
from rank_devices import rank_device
from torch.utils._python_dispatch import TorchDispatchMode

import megatron_ep
from megatron_ep import grouped_gemm
from megatron_ep.experts import GroupEnds, TorchGroupedMLP, weights_of


@contextlib.contextmanager
def configured(**options: Any) -> Iterator[None]:
    before = megatron_ep.configure(**options)
    try:
        yield
    finally:
        megatron_ep.configure(**vars(before))


def make_layer(case: Case, grid: Grid, dispatcher: str, experts: str, **options: Any) -> Any:
    with configured(experts=experts, **options):
        layer = layers.make_layer(case, grid, dispatcher)
    assert isinstance(layer.experts, TorchGroupedMLP) == (experts == "torch")
    return layer


def grads_by_expert(layer: Any) -> dict[str, torch.Tensor]:
    """Of all parameters; those of experts by expert, whatever tensors they lie in."""
    grads = {
        f"{name}.grad": parameter.grad
        for name, parameter in layer.named_parameters()
        if not name.startswith("experts.")
    }
    with torch.no_grad():
        for parameter in layer.experts.parameters():
            parameter.data = parameter.grad
        for index, pair in enumerate(weights_of(layer.experts)):
            for name, grad in zip(("fc1", "fc2"), pair):
                grads[f"expert {index} {name}.grad"] = grad.clone()
    return grads


def run(rank: int, layer: Any, case: Case) -> dict[str, torch.Tensor]:
    tensors = layers.run_layer(rank, layer, case)
    outside = {name: t for name, t in tensors.items() if not name.startswith("experts.")}
    return outside | grads_by_expert(layer)


def check_same_weights(one: Any, other: Any) -> None:
    for pair, same in zip(weights_of(one.experts), weights_of(other.experts), strict=True):
        for weight, equal in zip(pair, same):
            assert torch.equal(weight, equal)


def compare_experts(
    rank: int,
    grid: Grid,
    cases: list[Case],
    dispatchers: tuple[str, str],
    options: dict[str, Any],
    of_buffers: dict[str, Any],
) -> list[Any]:
    """For each case every tensor of SequentialMLP's layer and of torch's, which has the options."""
    differences = []
    with layers.megatron(grid, **of_buffers):
        for case in cases:
            judge = make_layer(case, grid, dispatchers[0], "auto")
            layer = make_layer(case, grid, dispatchers[1], "torch", **options)
            check_same_weights(judge, layer)
            expected, actual = run(rank, judge, case), run(rank, layer, case)
            differences.append(layers.compare(rank, expected, actual))
    return differences


# Rows that belong to nobody


@contextlib.contextmanager
def unfilled_rows_are_nan(buffer: Any) -> Iterator[None]:
    """Of dispatches and GEMMs, as any memory may hold."""
    dispatch, kernel = buffer.dispatch, grouped_gemm._rows_times

    def fill(rows: torch.Tensor | None, num_filled: Any) -> None:
        if rows is not None and rows.dtype.is_floating_point:
            rows[int(num_filled) :] = torch.nan

    def dispatched(*args: Any, **kwargs: Any) -> Any:
        sent = dispatch(*args, **kwargs)
        sent.event.wait()
        num_filled = min(int(sent.handle.expert_offsets[-1]), len(sent.recv_x))
        fill(sent.recv_x, num_filled)
        fill(sent.recv_topk_weights, num_filled)
        return sent

    def multiplied(x: Any, matrices: Any, ends: Any) -> Any:
        out = kernel(x, matrices, ends)
        fill(out, ends[-1])
        return out

    with (
        mock.patch.object(buffer, "dispatch", dispatched),
        mock.patch.object(grouped_gemm, "_rows_times", multiplied),
    ):
        yield


def compare_capacity(rank: int, grid: Grid, case: Case, factor: float, num_chunks: int) -> Any:
    """A layer with room for all rows beside one without a capacity, where rows past the last one
    are not numbers; differences, and rows dropped.
    """
    with layers.megatron(grid):
        options = dict(num_chunks=num_chunks)
        judge = make_layer(case, grid, "deepep", "torch", **options)
        layer = make_layer(case, grid, "deepep", "torch", capacity_factor=factor, **options)
        expected = run(rank, judge, case)
        with unfilled_rows_are_nan(layer.token_dispatcher.buffer(rank_device())):
            actual = run(rank, layer, case)
        num_dropped = int(layer.token_dispatcher.num_dropped)
    return [layers.compare(rank, expected, actual)], num_dropped


@contextlib.contextmanager
def groups_end_within_rows() -> Iterator[None]:
    """The loop of the CPU would not mind, a kernel would read past the end."""
    multiply, sum_up = grouped_gemm._rows_times, grouped_gemm._sums_of_products

    def checked(function: Any) -> Any:
        def call(x: torch.Tensor, other: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
            assert ends.max() <= len(x)
            return function(x, other, ends)

        return call

    with (
        mock.patch.object(grouped_gemm, "_rows_times", checked(multiply)),
        mock.patch.object(grouped_gemm, "_sums_of_products", checked(sum_up)),
    ):
        yield


def drop_rows(rank: int, case: Case, factor: float) -> tuple[int, list[int]]:
    """With too small a capacity the layer computes what it does if choices without room are none.

    Returns:
        Rows dropped here in the first and in the second forward.
    """
    grid = Grid(ep=dist.get_world_size())
    with layers.megatron(grid):
        layer = make_layer(case, grid, "deepep", "torch", capacity_factor=factor)
        buffer = layer.token_dispatcher.buffer(rank_device())
        served = []
        combine = buffer.combine

        def combined(x: Any, handle: Any, **kwargs: Any) -> Any:
            result = combine(x, handle, **kwargs)
            ones = torch.ones(len(x), device=x.device)
            served.append(combine(x, handle, topk_weights=ones).topk_weights)
            return result

        with mock.patch.object(buffer, "combine", combined), groups_end_within_rows():
            tensors = run(rank, layer, case)
        num_dropped = [int(layer.token_dispatcher.num_dropped)]
        is_served = served[0] > 0
        lost = torch.tensor(num_dropped[0])
        dist.all_reduce(lost)
        total = (~is_served).sum()
        dist.all_reduce(total)
        assert int(lost) == int(total) > 0
        # The same layer without a capacity, of which those choices are taken away.
        judge = make_layer(case, grid, "deepep", "torch")
        take_routing = judge.token_dispatcher.take_routing

        def with_room() -> Any:
            topk_idx, kept = take_routing()
            return topk_idx.where(is_served.to(topk_idx.device), -1), kept

        judge.token_dispatcher.take_routing = with_room
        expected = run(rank, judge, case)
        layers.assert_close([[layers.compare(rank, expected, tensors)]], [case], atol=1e-12)
        with torch.no_grad():
            layer(layers.make_input(rank, case)[0])
        num_dropped.append(int(layer.token_dispatcher.num_dropped))
    return num_dropped


def check_recomputation_counts_once(rank: int) -> None:
    recomputed = dict(recompute_granularity="selective", recompute_modules=["moe"])
    counts = []
    with layers.megatron(Grid(ep=2)):
        for options in ({}, recomputed):
            case = Case(options=options)
            layer = make_layer(case, Grid(ep=2), "deepep", "torch", capacity_factor=0.5)
            layers.run_layer(rank, layer, case)
            counts.append(int(layer.token_dispatcher.num_dropped))
    assert counts[0] == counts[1]


# What the host does


@contextlib.contextmanager
def host_reads_nothing() -> Iterator[None]:
    """Raises where a tensor's value is asked for."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("the host reads a tensor")

    names = ("tolist", "item", "cpu", "numpy", "__int__", "__bool__", "__float__", "__index__")
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch.object(torch.Tensor, name, refuse))
        yield


def forward_and_backward_without_reading(rank: int, num_chunks: int) -> None:
    """On the CPU, whose kernel reads ends below of what Python sees; on a GPU torch itself refuses
    to wait for the device.
    """
    case = Case(dtype=torch.float32)
    if rank_device().type == "cuda":
        case = replace(case, dtype=torch.bfloat16)
    with layers.megatron(Grid(ep=2)):
        layer = make_layer(
            case, Grid(ep=2), "deepep", "torch", capacity_factor=4.0, num_chunks=num_chunks
        )
        layers.run_layer(rank, layer, case)
        if rank_device().type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
            try:
                hidden, grad = _on_device(rank, case)
                output, _ = layer(hidden)
                output.backward(grad)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        else:
            hidden, grad = layers.make_input(rank, case)
            with host_reads_nothing():
                output, _ = layer(hidden)
                output.backward(grad)
        dist.barrier()


def _on_device(rank: int, case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """An input made where it is used, for which nothing waits."""
    shape = 12, 2, layers.HIDDEN
    hidden, grad = (torch.randn(shape, device=rank_device(), dtype=case.dtype) for _ in range(2))
    return hidden.requires_grad_(), grad


class Operators(TorchDispatchMode):
    """Counts the operators that torch is given."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        self.counts[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def count_operators(rank: int) -> list[Counter[str]]:
    """Of forward and backward of 4 and of 32 experts."""
    counts = []
    with layers.megatron(Grid()):
        for num_experts in (4, 32):
            case = Case(num_experts=num_experts, dtype=torch.float32)
            experts = make_layer(case, Grid(), "deepep", "torch").experts
            rows, probs = torch.randn(64, layers.HIDDEN, requires_grad=True), torch.ones(64)
            ends = torch.arange(1, num_experts + 1, dtype=torch.int32)
            output, _ = experts(rows, GroupEnds(ends), probs)
            with Operators() as operators:
                output, _ = experts(rows, GroupEnds(ends), probs)
                torch.autograd.grad(output.sum(), [rows, *experts.parameters()])
            counts.append(operators.counts)
    return counts


# What cannot be


def check_refusals(rank: int) -> None:
    for value in ("te", None, 3):
        with pytest.raises(ValueError, match=f"experts={value!r} is none of auto, torch"):
            megatron_ep.configure(experts=value)
    for value in (0, -1.0, True, "2", float("inf")):
        with pytest.raises(ValueError, match=f"capacity_factor={value!r} is neither"):
            megatron_ep.configure(capacity_factor=value)
    with layers.megatron(Grid(ep=2)):
        for late, word in (
            (dict(add_bias_linear=True), "add_bias_linear=True"),
            (dict(fp8="hybrid"), "fp8='hybrid'"),
        ):
            with pytest.raises(ValueError, match=word):
                make_layer(Case(late_options=late), Grid(ep=2), "alltoall", "torch")
        with pytest.raises(ValueError, match=r"capacity_factor=2.0 needs experts='torch'"):
            make_layer(Case(), Grid(ep=2), "deepep", "auto", capacity_factor=2.0)
        with pytest.raises(
            ValueError, match=r"overlap_weight_gradients=True needs experts='torch'"
        ):
            make_layer(Case(), Grid(ep=2), "deepep", "auto", overlap_weight_gradients=True)
    dist.barrier()


# Checkpoints


def check_checkpoints(rank: int, grid: Grid, folder: Any, is_gated: bool, singleton: bool) -> None:
    """Each kind loads what the other saved, with optimizer states in the same format."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.optimizer import (
        get_param_id_to_sharded_param_map,
        make_sharded_optimizer_tensor,
    )

    from megatron_ep.checkpoint import prepare_writers

    metadata = {"singleton_local_shards": singleton}
    case = Case(options=dict(gated_linear_unit=is_gated))

    def state_of(layer: Any, momenta: list[torch.Tensor]) -> dict[str, Any]:
        state = {"model": layer.sharded_state_dict(prefix="mlp.", metadata=metadata)}
        by_id = get_param_id_to_sharded_param_map(state["model"], layer.parameters())
        state["optimizer"] = [
            make_sharded_optimizer_tensor(by_id[i], momentum, prefix="exp_avg")
            for i, momentum in enumerate(momenta)
        ]
        return state

    with layers.megatron(grid):
        prepare_writers()
        kinds = [
            make_layer(case, grid, "deepep", experts, num_chunks=1) for experts in ("auto", "torch")
        ]
        for direction, (source, target) in enumerate((kinds, kinds[::-1])):
            with torch.no_grad():
                for parameter in source.parameters():
                    parameter.add_(1 + direction)
            path = folder / f"{direction}"
            if rank == 0:
                path.mkdir()
            dist.barrier()
            dist_checkpointing.save(
                state_of(source, [3 * p.detach() for p in source.parameters()]), str(path)
            )
            momenta = [torch.zeros_like(parameter) for parameter in target.parameters()]
            loaded = dist_checkpointing.load(state_of(target, momenta), str(path))
            found = {name.removeprefix("mlp."): t for name, t in loaded["model"].items()}
            target.load_state_dict(found)
            check_same_weights(source, target)
            for momentum, parameter in zip(loaded["optimizer"], target.parameters()):
                torch.testing.assert_close(momentum, 3 * parameter.detach(), rtol=0, atol=0)


# Gradients that are added where Megatron accumulates


def note_backward_steps(rank: int, num_chunks: int) -> list[str]:
    """Transfers of a backward, and when gradients of weights are computed."""
    case, steps = Case(), []
    with layers.megatron(Grid(ep=2)):
        options = dict(num_chunks=num_chunks, overlap_weight_gradients=True)
        layer = make_layer(case, Grid(ep=2), "deepep", "torch", **options)
        buffer = layer.token_dispatcher.buffer(torch.device("cpu"))
        hidden, grad = layers.make_input(rank, case)
        output = layer(hidden)[0]

        def noted(name: str, function: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                steps.append(name)
                return function(*args, **kwargs)

            return call

        late = grouped_gemm.LateWeightGradients
        with (
            mock.patch.object(buffer, "dispatch", noted("dispatch", buffer.dispatch)),
            mock.patch.object(buffer, "combine", noted("combine", buffer.combine)),
            mock.patch.object(late, "compute", noted("weights", late.compute)),
        ):
            output.backward(grad)
    return steps


def check_main_grads(rank: int, fused: bool, num_chunks: int, is_late: bool) -> None:
    """After two micro-batches main_grad is the sum of two gradients."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    case = Case(late_options=dict(gradient_accumulation_fusion=fused))
    with layers.megatron(Grid(ep=2)):
        make = dict(num_chunks=num_chunks)
        judge = make_layer(case, Grid(ep=2), "deepep", "torch", **make)
        make["overlap_weight_gradients"] = is_late
        layer = make_layer(case, Grid(ep=2), "deepep", "torch", **make)
        for parameter in judge.experts.parameters():
            parameter.grad = None
        wrapped = DistributedDataParallel(
            layer.config, DistributedDataParallelConfig(grad_reduce_in_fp32=False), layer
        )
        wrapped.zero_grad_buffer()
        for batch in range(2):
            for one in (judge, wrapped):
                hidden, grad = layers.make_input(rank, case, micro_batch=batch)
                one(hidden)[0].backward(grad)
        for want, got in zip(judge.experts.parameters(), layer.experts.parameters()):
            torch.testing.assert_close(got.main_grad, want.grad, rtol=1e-12, atol=1e-12)
            assert got.grad_added_to_main_grad == fused


# CUDA graphs


def replay_and_compare(rank: int, num_chunks: int) -> list[int]:
    """A captured layer beside an eager one, on new inputs each time; rows that they dropped."""
    from megatron_ep import capture_layer

    case = Case(num_experts=8, topk=2, dtype=torch.bfloat16, seq_length=(48,))
    options = dict(num_chunks=num_chunks, capacity_factor=1.02)
    with layers.megatron(Grid(ep=dist.get_world_size())):
        eager, replayed = (
            make_layer(case, Grid(ep=dist.get_world_size()), "deepep", "torch", **options)
            for _ in range(2)
        )
        capture_layer(replayed, layers.make_input(rank, case)[0])
        for layer in (eager, replayed):
            if layer.token_dispatcher.num_dropped is not None:
                layer.token_dispatcher.num_dropped.zero_()
        outputs = []
        for batch in range(6):
            results = []
            for layer in (eager, replayed):
                if batch % 3 == 0:  # otherwise gradients add up
                    layer.zero_grad()
                hidden, grad = layers.make_input(rank, case, micro_batch=batch)
                output, _ = layer(hidden)
                output.backward(grad)
                of_inputs = {"output": output.detach(), "input.grad": hidden.grad}
                outputs.append(output.detach())
                grads = layers.parameter_grads(layer)
                results.append(of_inputs | {name: one.clone() for name, one in grads.items()})
            for name, want in results[0].items():
                assert torch.equal(want, results[1][name]), f"batch {batch}: {name}"
        with torch.no_grad():
            hidden, _ = layers.make_input(rank, case, micro_batch=100)
            assert torch.equal(eager(hidden)[0], replayed(hidden)[0])
        for want, got in zip(outputs[::2], outputs[1::2]):
            assert torch.equal(want, got), "a later replay has written to an output"
        num_dropped = [int(one.token_dispatcher.num_dropped) for one in (eager, replayed)]
        first, _ = replayed(layers.make_input(rank, case)[0])
        second, grad = replayed(layers.make_input(rank, case)[0])[0], torch.ones_like(first)
        with pytest.raises(RuntimeError, match="after a later forward"):
            first.backward(grad)
        second.backward(grad)
        with pytest.raises(ValueError, match="the layer was captured for"):
            replayed(torch.ones(3, 2, layers.HIDDEN, dtype=case.dtype, device=rank_device()))
        if rank_device().type == "cuda":
            torch.cuda.synchronize()
    return num_dropped


class RunsAgain:
    """In place of a CUDA graph: a replay computes again what was captured, into the same memory."""

    def __init__(self) -> None:
        self.captured: list[Any] = []

    def replay(self) -> None:
        for function, memory in self.captured:
            results = function()
            for one, result in zip(memory, results):
                if result is not None:
                    one.detach().copy_(result.detach())


@contextlib.contextmanager
def graphs_run_again() -> Iterator[None]:
    """Has a capture on the CPU; what graphs.py asks of a GPU is answered."""
    from megatron_ep import graphs

    capture, state = graphs._capture, {}

    @contextlib.contextmanager
    def capturing(graph: RunsAgain, **_: Any) -> Iterator[None]:
        state["graph"] = graph
        yield
        state["graph"] = None

    def captured(function: Any, parameters: Any, hidden: Any) -> Any:
        def noted(inputs: torch.Tensor) -> Any:
            output, bias = function(inputs)
            if graph := state.get("graph"):

                def again() -> tuple[torch.Tensor]:
                    with torch.enable_grad():
                        state["output"], _ = function(inputs)
                    return (state["output"],)

                graph.captured.append((again, (output,)))
            return output, bias

        return capture(noted, parameters, hidden)

    differentiate = torch.autograd.grad

    def differentiated(output: Any, inputs: Any, grad: Any = None, **options: Any) -> Any:
        grads = differentiate(output, inputs, grad, **options)
        if graph := state.get("graph"):
            again = lambda: differentiate(state["output"], inputs, grad, **options)  # noqa: E731
            graph.captured.append((again, grads))
        return grads

    stand_in = mock.Mock(wraps=torch)
    stand_in.cuda = mock.Mock(
        CUDAGraph=RunsAgain, graph=capturing, stream=lambda _: contextlib.nullcontext()
    )
    stand_in.autograd.grad = differentiated
    with (
        mock.patch.object(graphs, "torch", stand_in),
        mock.patch.object(graphs, "_capture", captured),
        mock.patch.object(graphs, "_check"),
    ):
        yield


def replay_on_the_cpu(rank: int) -> list[int]:
    with graphs_run_again():
        return replay_and_compare(rank, 1)


def check_capture_refusals(rank: int) -> None:
    from megatron_ep import capture_layer

    with layers.megatron(Grid(ep=2)):
        layer = make_layer(Case(), Grid(ep=2), "deepep", "auto", num_chunks="auto").eval()
        with pytest.raises(ValueError, match="cannot be captured") as caught:
            capture_layer(layer, torch.zeros(1, 1, layers.HIDDEN))
    for word in ("on cpu", "eval mode", "no capacity_factor", "other than 'torch'", "'auto'"):
        assert word in str(caught.value)
    with layers.megatron(Grid(ep=2)):
        layer = make_layer(Case(), Grid(ep=2), "deepep", "torch", results_in_pool=True)
        with pytest.raises(ValueError, match="results_in_pool"):
            capture_layer(layer, torch.zeros(1, 1, layers.HIDDEN))
    dist.barrier()

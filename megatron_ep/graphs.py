"""A MoE layer as two CUDA graphs, which replay its forward and its backward.

    capture     router, dispatch, experts, combine, and their backward, once on each rank
    forward     input -> graph's memory, replay, output <- graph's memory
    backward    the same with gradients

The host launches a graph in place of some hundred kernels. That takes a layer in which it knows
everything beforehand and reads nothing: experts "torch" and a capacity_factor. Chunks are captured
with their streams.

The memory of a graph is the graph's for the life of the buffer, in the buffer's pool, too: there it
is that of a layer's rows and sums, forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

WARM_UP = 3
"""Forwards and backwards before the capture: libraries choose their kernels and take memory."""


def capture_layer(layer: Any, hidden: torch.Tensor) -> None:
    """Has a MoE layer's forwards with gradients, and their backwards, replayed from now on.

    Collective over the ranks of the layer, which all capture it, and then all replay it. Forwards
    without gradients, in eval mode or with other arguments than the hidden states run as before.
    Each backward has to come before the next forward of the layer.

    Hooks of modules inside of the layer run in the capture and never again; what they do on the
    device is replayed. Weights may change in place between replays, but not move.

    Args:
        layer: a MoELayer with the dispatcher deepep, on a GPU, in training mode.
        hidden: [S/TP, B, H] of the shape, dtype and device of all inputs; its values do not matter
            beyond that they are finite.

    Raises:
        ValueError: the layer does something in which the host takes part.
        RuntimeError: later, a backward that comes too late.

    Example:
        >>> megatron_ep.configure(experts="torch", capacity_factor=1.5)
        >>> model = build_model()
        >>> for layer in moe_layers_of(model):
        ...     capture_layer(layer, torch.randn(seq_length, batch_size, hidden_size, ...))
    """
    _check(layer, hidden)
    eager = layer.forward
    replay = _capture(eager, list(layer.parameters()), hidden)

    def forward(
        hidden_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        if not layer.training or not torch.is_grad_enabled() or args or any(_given(kwargs)):
            return eager(hidden_states, *args, **kwargs)
        return replay(hidden_states), None

    layer.forward = forward


def _given(kwargs: dict[str, Any]) -> list[bool]:
    return [value is not None for value in kwargs.values()]


def _check(layer: Any, hidden: torch.Tensor) -> None:
    from megatron_ep.experts import TorchGroupedMLP, any_memory
    from megatron_ep.token_dispatcher import DeepEPTokenDispatcher

    config, dispatcher = layer.config, layer.token_dispatcher
    is_ours = isinstance(dispatcher, DeepEPTokenDispatcher)
    problems = {
        f"an input on {hidden.device} instead of a GPU": hidden.device.type != "cuda",
        "a layer in eval mode": not layer.training,
        "another dispatcher than deepep": not is_ours,
        "no capacity_factor": is_ours and dispatcher.capacity_factor is None,
        "experts other than 'torch'": not isinstance(layer.experts, TorchGroupedMLP),
        "a number of experts per token that has to be counted": is_ours
        and not dispatcher.knows_topk,
        "num_chunks='auto'": getattr(layer, "num_chunks", 1) == "auto",
        "gradient_accumulation_fusion": config.gradient_accumulation_fusion,
        "results_in_pool": getattr(layer.experts, "result_memory", any_memory) is not any_memory,
        "recomputation": config.recompute_granularity is not None,
        "Megatron's own CUDA graphs": config.cuda_graph_impl != "none",
    }
    if found := [name for name, is_so in problems.items() if is_so]:
        raise ValueError(f"a layer cannot be captured as a CUDA graph with {', '.join(found)}")


@dataclass(frozen=True)
class _Graphs:
    """What a capture leaves.

    Attributes:
        inputs: that get gradients: the hidden states, then parameters.
        grads: of the inputs, None where the output does not depend on one.
        number: how many forwards there have been, [1].
    """

    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph
    inputs: list[torch.Tensor]
    output: torch.Tensor
    grad_output: torch.Tensor
    grads: tuple[torch.Tensor | None, ...]
    number: list[int]


def _capture(
    function: Callable[[torch.Tensor], tuple[torch.Tensor, None]],
    parameters: list[torch.Tensor],
    hidden: torch.Tensor,
) -> Callable[[torch.Tensor], torch.Tensor]:
    """`function` as a replay."""
    inputs = [hidden.detach().clone().requires_grad_()]
    inputs += [parameter for parameter in parameters if parameter.requires_grad]

    def backward(output: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return torch.autograd.grad(output, inputs, grad, allow_unused=True)

    stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.enable_grad():
        for _ in range(WARM_UP):
            output, _ = function(inputs[0])
            grad_output = torch.zeros_like(output)
            backward(output, grad_output)
        del output
    torch.cuda.synchronize()
    graphs = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    # Threads of others, as of process groups, may use the device meanwhile.
    options: dict[str, Any] = dict(pool=pool, stream=stream, capture_error_mode="thread_local")
    with torch.enable_grad(), torch.cuda.graph(graphs[0], **options):
        output, _ = function(inputs[0])
    with torch.cuda.graph(graphs[1], **options):
        grads = backward(output, grad_output)
    captured = _Graphs(*graphs, inputs, output.detach(), grad_output, grads, [0])

    def replay(hidden: torch.Tensor) -> torch.Tensor:
        if hidden.shape != inputs[0].shape or hidden.dtype != inputs[0].dtype:
            raise ValueError(
                f"hidden_states of shape {tuple(hidden.shape)} and {hidden.dtype}: the layer was "
                f"captured for {tuple(inputs[0].shape)} and {inputs[0].dtype}"
            )
        result: torch.Tensor = _Replay.apply(captured, hidden, *inputs[1:])
        return result

    return replay


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, graphs: _Graphs, hidden: torch.Tensor, *_parameters: torch.Tensor
    ) -> torch.Tensor:
        graphs.number[0] += 1
        ctx.graphs, ctx.number = graphs, graphs.number[0]
        with torch.no_grad():
            graphs.inputs[0].copy_(hidden)
        graphs.forward.replay()
        return graphs.output.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        graphs: _Graphs = ctx.graphs
        if ctx.number != graphs.number[0]:
            raise RuntimeError(
                "a backward of a captured layer after a later forward of it, which has written to "
                "the memory of the graph"
            )
        graphs.grad_output.copy_(grad)
        graphs.backward.replay()
        return None, *map(_own, graphs.inputs, graphs.grads)


def _own(one: Any, grad: torch.Tensor | None) -> torch.Tensor | None:
    """A gradient to hand out: the graph's memory itself only where Megatron adds it to main_grad
    before the next replay; autograd would keep it.
    """
    if grad is None:
        return None
    return grad.detach() if hasattr(one, "main_grad") else grad.clone()

"""Megatron's own flex dispatcher, which imports deep_ep, on our kernels. Functions of ranks."""

from __future__ import annotations

import moe_layers as layers
import torch
from moe_layers import Case, Difference, Grid

FLEX = dict(
    moe_token_dispatcher_type="flex",
    moe_flex_dispatcher_backend="deepep",
    moe_router_dtype="fp32",
)


def compare_with_alltoall(rank: int, grid: Grid, cases: list[Case]) -> list[list[Difference]]:
    """For each case, every tensor of the two layers. Of fresh ranks: Megatron-Core looks for
    deep_ep once, when it is imported.
    """
    from ep_kernels import deep_ep

    deep_ep.install()
    with layers.megatron(grid):
        return [compare_layers(rank, grid, case) for case in cases]


def compare_layers(rank: int, grid: Grid, case: Case) -> list[Difference]:
    from megatron.core.transformer.moe import fused_a2a

    from ep_kernels import deep_ep

    assert fused_a2a.Buffer is deep_ep.Buffer
    judge = layers.make_layer(with_options(case, moe_router_dtype="fp32"), grid, "alltoall")
    layer = layers.make_layer(with_options(case, **FLEX), grid, "flex")
    assert type(layer.token_dispatcher).__name__ == "MoEFlexTokenDispatcher"
    layers.check_weights(judge, layer)
    expected, actual = layers.run_layer(rank, judge, case), layers.run_layer(rank, layer, case)
    assert isinstance(fused_a2a._buffer, deep_ep.Buffer)
    return layers.compare(rank, expected, actual)


def with_options(case: Case, **options: object) -> Case:
    return Case(**{**vars(case), "options": {**case.options, **options}})


def train_losses(rank: int, dispatcher: str, num_steps: int) -> list[float]:
    """Losses of a small model of MoE layers that learns to give its input back."""
    from ep_kernels import deep_ep

    deep_ep.install()
    grid, losses = Grid(ep=2), []
    case = Case(dtype=torch.float32, options=FLEX if dispatcher == "flex" else {})
    case = with_options(case, moe_router_dtype="fp32", init_method_std=0.1)
    with layers.megatron(grid):
        stack = [layers.make_layer(case, grid, dispatcher, seed=seed) for seed in (1, 2)]
        parameters = [p for layer in stack for p in layer.parameters()]
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        for step in range(num_steps):
            hidden, target = layers.make_input(rank, case, micro_batch=step % 4)
            output = hidden.detach()
            for layer in stack:
                output = output + layer(output)[0]
            loss = (output - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses

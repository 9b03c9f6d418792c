"""MoE layers of Megatron-Core on rank processes: how to build two that must agree, run both, and
compare everything they compute. The functions that take `rank` first run on ranks.

`alltoall` is the judge. Each rank has inputs and experts of its own, so that a row that goes
astray cannot go unnoticed.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from differences import Difference, compare
from differences import assert_close as assert_close
from rank_devices import rank_device

HIDDEN = 16
SEED = 1234

GPU_POOL_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Sizes of tensor, expert and expert tensor parallelism."""

    tp: int = 1
    ep: int = 1
    etp: int = 1

    def __str__(self) -> str:
        return "".join(f"{name}{size}" for name, size in vars(self).items() if size > 1)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A layer and its input.

    Attributes:
        seq_length: of each rank (after the split over tensor parallel ranks); one number is for
            all ranks, and the list is repeated.
        options: of TransformerConfig.
        late_options: set after the config has checked itself, which refuses them without a GPU.
    """

    num_experts: int = 4
    topk: int = 2
    dtype: torch.dtype = torch.float64
    seq_length: tuple[int, ...] = (12,)
    options: dict[str, Any] = field(default_factory=dict)
    late_options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"E={self.num_experts},K={self.topk},{self.dtype},{self.options}"


@contextlib.contextmanager
def megatron(grid: Grid, **buffer_options: Any) -> Iterator[None]:
    """Megatron's process groups, with "deepep" registered and buffers made with the options."""
    import megatron_ep

    import_megatron()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    if rank_device().type == "cuda":
        buffer_options.setdefault("pool_bytes", GPU_POOL_BYTES)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=grid.tp,
        expert_model_parallel_size=grid.ep,
        expert_tensor_parallel_size=grid.etp,
        create_gloo_process_groups=False,
    )
    megatron_ep.register()
    before = megatron_ep.configure(**buffer_options)
    model_parallel_cuda_manual_seed(SEED)
    try:
        with _uneven_collectives():
            yield
    finally:
        megatron_ep.configure(**vars(before))
        megatron_ep.reset_buffers()
        megatron_ep.unregister()
        parallel_state.destroy_model_parallel()
        _destroy_groups()


def import_megatron() -> None:
    """Without an empty folder among temporary files, see remove_compiler_folder()."""
    rank_device()
    remove_compiler_folder()


def remove_compiler_folder() -> None:
    """Removes the folder for compiled code that torch makes when its compiler is imported, which an
    optimizer does; it is empty.
    """
    if "torch._inductor" in sys.modules:
        from torch._inductor.runtime.cache_dir_utils import cache_dir

        with contextlib.suppress(OSError):
            os.rmdir(cache_dir())


def _destroy_groups() -> None:
    """Megatron forgets its process groups but leaves them open."""
    world = dist.distributed_c10d._world
    for group in list(world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


@contextlib.contextmanager
def _uneven_collectives() -> Iterator[None]:
    """alltoall with expert tensor parallelism needs two collectives that gloo lacks: all-gather and
    reduce-scatter of pieces of different sizes.
    """
    from megatron.core.tensor_parallel import mappings

    gather, scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def uneven_gather(piece, group, sizes=None, use_global_buffer=False):
        if sizes is None or group.size() == 1:
            return gather(piece, group, sizes, use_global_buffer)
        padded = piece.new_zeros(max(sizes), *piece.shape[1:])
        padded[: len(piece)] = piece
        pieces = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(pieces, padded, group=group)
        return torch.cat([other[:size] for other, size in zip(pieces, sizes)])

    def uneven_scatter(whole, group, sizes=None, use_global_buffer=False):
        if sizes is None or group.size() == 1:
            return scatter(whole, group, sizes, use_global_buffer)
        total = whole.clone()
        dist.all_reduce(total, group=group)
        return total.split(sizes)[group.rank()].clone()

    with (
        mock.patch.object(mappings, "_gather_along_first_dim", uneven_gather),
        mock.patch.object(mappings, "_reduce_scatter_along_first_dim", uneven_scatter),
    ):
        yield


def make_config(case: Case, grid: Grid, dispatcher: str) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    options = dict(
        num_layers=1,
        hidden_size=HIDDEN,
        ffn_hidden_size=32,
        moe_ffn_hidden_size=32,
        num_attention_heads=4,
        num_moe_experts=case.num_experts,
        moe_router_topk=case.topk,
        moe_token_dispatcher_type=dispatcher,
        moe_router_pre_softmax=case.topk == 1,
        moe_router_load_balancing_type="none",
        moe_aux_loss_coeff=0.0,
        tensor_model_parallel_size=grid.tp,
        expert_model_parallel_size=grid.ep,
        expert_tensor_parallel_size=grid.etp,
        sequence_parallel=grid.tp > 1,
        use_cpu_initialization=False,
        add_bias_linear=False,
        gated_linear_unit=True,
        bias_activation_fusion=False,
        params_dtype=case.dtype,
        init_method_std=0.5,
    )
    config = TransformerConfig(**{**options, **case.options})
    for name, value in case.late_options.items():
        setattr(config, name, value)
    return config


def make_layer(case: Case, grid: Grid, dispatcher: str, *, seed: int = SEED) -> Any:
    """The same weights for every dispatcher, other ones for every expert and every rank's slice."""
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.transformer.spec_utils import build_module

    torch.manual_seed(seed)  # the router's weights are drawn on the CPU
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    spec = get_moe_module_spec(use_te=False, num_experts=case.num_experts)
    layer = build_module(spec, config=make_config(case, grid, dispatcher))
    layer.set_layer_number(1)
    return layer.to(rank_device(), case.dtype).train()  # a shared expert's gate is made on the CPU


def make_input(rank: int, case: Case, *, micro_batch: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states [S, 2, HIDDEN] and the gradient of the output, a rank's own."""
    generator = torch.Generator().manual_seed(SEED + 1000 * micro_batch + rank)
    width = case.options.get("hidden_size", HIDDEN)
    shape = (case.seq_length[rank % len(case.seq_length)], 2, width)
    hidden, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    device = rank_device()
    return hidden.to(device, case.dtype).requires_grad_(), grad.to(device, case.dtype)


def run_layer(rank: int, layer: Any, case: Case) -> dict[str, torch.Tensor]:
    """One forward and backward: output and every gradient, by name."""
    hidden, grad = make_input(rank, case)
    output, _ = layer(hidden)
    output.backward(grad)
    return {"output": output.detach(), "input.grad": hidden.grad, **parameter_grads(layer)}


def run_in_flight(rank: int, layers: list[Any], case: Case, order: str) -> dict[str, torch.Tensor]:
    """Micro-batches through a stack of layers; "F0 F1 B1 B0": forwards and backwards in this order.

    Gradients of parameters add up over the micro-batches.
    """
    tensors: dict[str, torch.Tensor] = {}
    batches: dict[str, Any] = {}
    for step in order.split():
        kind, batch = step[0], step[1:]
        if kind == "F":
            hidden, grad = make_input(rank, case, micro_batch=int(batch))
            output = hidden
            for layer in layers:
                output = output + layer(output)[0]
            batches[batch] = hidden, output, grad
        else:
            hidden, output, grad = batches.pop(batch)
            output.backward(grad)
            tensors |= {f"output {batch}": output.detach(), f"input.grad {batch}": hidden.grad}
    for index, layer in enumerate(layers):
        for name, grad in parameter_grads(layer).items():
            tensors[f"layer {index} {name}"] = grad
    return tensors


def parameter_grads(layer: Any) -> dict[str, torch.Tensor]:
    return {f"{name}.grad": parameter.grad for name, parameter in layer.named_parameters()}


def compare_dispatchers(
    rank: int, grid: Grid, cases: list[Case], buffer_options: dict[str, Any] | None = None
) -> list[list[Difference]]:
    """For each case, every tensor of the two layers."""
    with megatron(grid, **(buffer_options or {})):
        return [compare_layers(rank, grid, case) for case in cases]


def compare_layers(rank: int, grid: Grid, case: Case) -> list[Difference]:
    judge, layer = (make_layer(case, grid, name) for name in ("alltoall", "deepep"))
    assert type(layer) is type(judge)
    assert type(layer.token_dispatcher).__name__ == "DeepEPTokenDispatcher"
    assert layer.config.moe_token_dispatcher_type == "deepep"
    check_weights(judge, layer)
    expected, actual = run_layer(rank, judge, case), run_layer(rank, layer, case)
    return compare(rank, expected, actual)


def compare_in_flight(
    rank: int, grid: Grid, case: Case, orders: list[str]
) -> list[list[Difference]]:
    """For each order, every tensor of two stacks of two layers."""
    results = []
    with megatron(grid):
        for order in orders:
            stacks = [
                [make_layer(case, grid, name, seed=SEED + index) for index in range(2)]
                for name in ("alltoall", "deepep")
            ]
            expected, actual = (run_in_flight(rank, stack, case, order) for stack in stacks)
            results.append(compare(rank, expected, actual))
    return results


def check_weights(judge: Any, layer: Any) -> None:
    """Same weights in both layers, and no two experts or slices alike in the whole group."""
    for (name, one), (_, other) in zip(judge.named_parameters(), layer.named_parameters()):
        assert torch.equal(one, other), name
    mine = [expert.linear_fc1.weight.detach().cpu() for expert in layer.experts.local_experts]
    group = layer.token_dispatcher.tp_ep_group
    everyones: list[Any] = [None] * group.size()
    dist.all_gather_object(everyones, mine, group=group)
    experts = [weight for rank_experts in everyones for weight in rank_experts]
    for index, weight in enumerate(experts):
        assert not any(torch.equal(weight, other) for other in experts[:index]), (
            "no two experts may have the same weights"
        )

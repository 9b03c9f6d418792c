"""The layers that megatron_ep.bench times: the same MoE layer under several dispatchers."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

PASSES = ("forward", "forward + backward")

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def make_layer(options: argparse.Namespace, variant: str) -> Any:
    """A MoE layer of a variant. Without --te its weights depend on the seed and on nothing else."""
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.transformer.spec_utils import build_module
    from megatron.core.transformer.transformer_config import TransformerConfig

    import megatron_ep

    dispatcher, of_layer = parse_variant(variant)
    megatron_ep.configure(**of_layer)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=options.hidden,
        num_attention_heads=1,
        num_moe_experts=options.experts,
        moe_router_topk=options.topk,
        moe_ffn_hidden_size=options.ffn_hidden,
        moe_token_dispatcher_type=dispatcher,
        moe_router_load_balancing_type="none",
        expert_model_parallel_size=dist.get_world_size(),
        add_bias_linear=False,
        gated_linear_unit=True,
        bias_activation_fusion=False,
        moe_grouped_gemm=options.te,
        params_dtype=DTYPES[options.dtype],
    )
    model_parallel_cuda_manual_seed(options.seed, force_reset_rng=True)
    spec = get_moe_module_spec(
        use_te=options.te, num_experts=options.experts, moe_grouped_gemm=options.te
    )
    layer = build_module(spec, config=config)
    layer.set_layer_number(1)
    return layer.to(DTYPES[options.dtype]).train()


@dataclass(frozen=True)
class Variant:
    """A layer, and what is timed of it by name."""

    layer: Any
    passes: dict[str, Callable[[], Any]]


def make_passes(
    layer: Any, hidden: torch.Tensor, grad: torch.Tensor
) -> dict[str, Callable[[], Any]]:
    """What is timed, by name."""

    def forward() -> torch.Tensor:
        with torch.no_grad():
            output: torch.Tensor = layer(hidden)[0]
        return output

    def both() -> torch.Tensor:
        layer.zero_grad()
        x = hidden.detach().requires_grad_()
        layer(x)[0].backward(grad)
        assert x.grad is not None
        return x.grad

    return dict(zip(PASSES, (forward, both), strict=True))


def make_variants(
    options: argparse.Namespace, names: Sequence[str], device: torch.device
) -> dict[str, Variant]:
    """A layer with its passes for every name, with the same weights and on the same input."""
    generator = torch.Generator().manual_seed(options.seed + dist.get_rank())
    hidden, grad = (
        torch.randn(options.tokens, 1, options.hidden, generator=generator).to(
            device, DTYPES[options.dtype]
        )
        for _ in range(2)
    )
    layers = [make_layer(options, name) for name in names]
    with torch.no_grad():  # a grouped GEMM of Transformer Engine draws its weights from elsewhere
        for layer in layers[1:]:
            for parameter, same in zip(layer.parameters(), layers[0].parameters(), strict=True):
                parameter.copy_(same)
    return {
        name: Variant(layer, make_passes(layer, hidden, grad)) for name, layer in zip(names, layers)
    }


def parse_variant(text: str) -> tuple[str, dict[str, Any]]:
    """The dispatcher, and options of megatron_ep.configure().

    Example: "deepep+fp8/2" -> ("deepep", {"num_chunks": 2, "fp8_dispatch": True}).

    Raises:
        ValueError: there is no such variant.
    """
    name, _, chunks = text.partition("/")
    dispatcher, _, rows = name.partition("+")
    if rows not in ("", "fp8"):
        raise ValueError(f"{text!r}: after + there is fp8 or nothing, not {rows!r}")
    num_chunks = int(chunks) if chunks.isdecimal() else chunks or 1
    return dispatcher, {"num_chunks": num_chunks, "fp8_dispatch": rows == "fp8"}

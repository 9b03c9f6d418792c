"""The layers that megatron_ep.bench times: the same MoE layer under several dispatchers."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

PASSES = ("forward", "forward + backward")

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


EXPERTS = ("sequential", "te", "torch")


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What a variant is.

    Attributes:
        experts: one of EXPERTS; None: the benchmark's default.
        options: of megatron_ep.configure().
        permutes_fused: Megatron's own dispatchers permute with Transformer Engine's kernels.
        is_replayed: as CUDA graphs, see graphs.py.
    """

    dispatcher: str
    experts: str | None = None
    options: dict[str, Any]
    permutes_fused: bool = False
    is_replayed: bool = False


def parse_variant(text: str) -> Kind:
    """The kind that TYPE[+WORD...][/CHUNKS] stands for.

    Example: "deepep+torch+fp8/2" is deepep with torch's experts, fp8 rows and 2 chunks.

    Raises:
        ValueError: there is no such variant.
    """
    name, _, chunks = text.partition("/")
    dispatcher, *words = name.split("+")
    options: dict[str, Any] = {
        "num_chunks": int(chunks) if chunks.isdecimal() else chunks or 1,
        "fp8_dispatch": "fp8" in words,
        "capacity_factor": None,
        "overlap_num_sms": None,
        "overlap_weight_gradients": "late" in words,
    }
    experts = None
    for word in words:
        if word in EXPERTS:
            experts = word
        elif number := re.fullmatch(r"capacity(\d+\.?\d*)", word):
            options["capacity_factor"] = float(number[1])
        elif number := re.fullmatch(r"sms([1-9]\d*)", word):
            options["overlap_num_sms"] = int(number[1])
        elif word not in ("fp8", "fused", "graph", "late"):
            raise ValueError(
                f"{text!r}: after + there is one of {', '.join(EXPERTS)}, fp8, fused, graph, late, "
                f"or capacity or sms and a number as in capacity1.5 and sms16, not {word!r}"
            )
    return Kind(
        dispatcher=dispatcher,
        experts=experts,
        options=options,
        permutes_fused="fused" in words,
        is_replayed="graph" in words,
    )


def make_layer(options: argparse.Namespace, variant: str) -> Any:
    """A MoE layer of a variant. Unless the experts are Transformer Engine's, its weights depend on
    the seed and on nothing else.
    """
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.transformer.spec_utils import build_module
    from megatron.core.transformer.transformer_config import TransformerConfig

    import megatron_ep

    kind = parse_variant(variant)
    experts = kind.experts or default_experts(options)
    megatron_ep.configure(**kind.options, experts="torch" if experts == "torch" else "auto")
    uses_te = experts == "te"
    config = TransformerConfig(
        num_layers=1,
        hidden_size=options.hidden,
        num_attention_heads=1,
        num_moe_experts=options.experts,
        moe_router_topk=options.topk,
        moe_ffn_hidden_size=options.ffn_hidden,
        moe_token_dispatcher_type=kind.dispatcher,
        moe_router_load_balancing_type="none",
        expert_model_parallel_size=dist.get_world_size(),
        add_bias_linear=False,
        gated_linear_unit=True,
        bias_activation_fusion=False,
        moe_grouped_gemm=uses_te,
        moe_permute_fusion=kind.permutes_fused,
        params_dtype=DTYPES[options.dtype],
    )
    model_parallel_cuda_manual_seed(options.seed, force_reset_rng=True)
    spec = get_moe_module_spec(
        use_te=uses_te, num_experts=options.experts, moe_grouped_gemm=uses_te
    )
    layer = build_module(spec, config=config)
    megatron_ep.configure(experts="auto", capacity_factor=None)
    layer.set_layer_number(1)
    return layer.to(DTYPES[options.dtype]).train()


def default_experts(options: argparse.Namespace) -> str:
    """Of variants that name none."""
    return "te" if options.te else "sequential"


@dataclass(frozen=True)
class Variant:
    """A layer, and what is timed of it by name."""

    layer: Any
    passes: dict[str, Callable[[], Any]]

    def dropped_rows(self) -> int | None:
        """Rows of all ranks that find no room in a forward; None without a capacity. Collective."""
        dispatcher = self.layer.token_dispatcher
        if getattr(dispatcher, "capacity_factor", None) is None:
            return None
        before = dispatcher.num_dropped.clone()
        self.passes[PASSES[0]]()
        dropped = (dispatcher.num_dropped - before).cpu()
        counts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(counts, int(dropped))
        return sum(counts)


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
    from megatron_ep.experts import weights_of
    from megatron_ep.graphs import capture_layer

    generator = torch.Generator().manual_seed(options.seed + dist.get_rank())
    hidden, grad = (
        torch.randn(options.tokens, 1, options.hidden, generator=generator).to(
            device, DTYPES[options.dtype]
        )
        for _ in range(2)
    )
    layers = [make_layer(options, name) for name in names]
    with torch.no_grad():  # Transformer Engine draws weights from elsewhere
        for layer in layers[1:]:
            layer.router.weight.copy_(layers[0].router.weight)
            pairs = zip(weights_of(layer.experts), weights_of(layers[0].experts), strict=True)
            for weights, same in pairs:
                for weight, other in zip(weights, same):
                    weight.copy_(other)
    for name, layer in zip(names, layers):
        if parse_variant(name).is_replayed:
            capture_layer(layer, hidden)
    return {
        name: Variant(layer, make_passes(layer, hidden, grad)) for name, layer in zip(names, layers)
    }

"""Makes Megatron-Core accept moe_token_dispatcher_type="deepep".

Megatron-Core has no registry of token dispatchers: the layer chooses by name, and other places test
for the names they know. register() wraps each of these places; for any other name a wrapper does
what the original does.

    place                             with "deepep"
    TransformerConfig, annotation     one more choice of --moe-token-dispatcher-type
    TransformerConfig.__post_init__   checked as "alltoall", with which it shares all features
    MoELayer.__init__                 built as "alltoall", with our class in place of Megatron's;
                                      with any dispatcher, experts "torch" if configured
    TransformerLayer.__init__         layernorm recompute beside a CUDA graph of dispatch_preprocess
    should_free_input                 1F1B overlap keeps the rows that the experts save
    checkpoint (Megatron's and        a layer that is recomputed in the backward takes the transfers
      Transformer Engine's)           of its forward, see recompute.py

Written for Megatron-Core 0.16.1 and its successors up to 0.20.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from megatron_ep.buffers import current_options
from megatron_ep.expert_memory import allocate_results_in_pool
from megatron_ep.experts import TorchGroupedMLP
from megatron_ep.overlap import ChunkedExperts
from megatron_ep.recompute import wrap_checkpoint
from megatron_ep.token_dispatcher import DeepEPTokenDispatcher, graphed_parts
from megatron_ep.trace import active_tracer

NAME = "deepep"

_STAND_IN = "alltoall"

_SCHEDULE_MODULES = (
    "megatron.core.models.common.utils",  # 0.20
    "megatron.core.models.gpt.fine_grained_callables",  # 0.16.1
)


@dataclass(frozen=True)
class _Patch:
    """One attribute that register() has replaced."""

    owner: Any
    attribute: str
    original: Any
    replacement: Any

    def apply(self) -> None:
        setattr(self.owner, self.attribute, self.replacement)

    def check(self) -> None:
        if getattr(self.owner, self.attribute) is not self.replacement:
            raise RuntimeError(
                f"{self.owner!r}.{self.attribute} was replaced after megatron_ep.register(); "
                "undo that first"
            )

    def undo(self) -> None:
        setattr(self.owner, self.attribute, self.original)


_applied: list[_Patch] = []


def register() -> None:
    """Makes the name "deepep" known to Megatron-Core in this process; idempotent.

    To be called before a TransformerConfig with that name is made, and before Megatron-LM parses
    its command line.

    Raises:
        ImportError: megatron-core is not installed.
        RuntimeError: this version of Megatron-Core has no should_free_input where it is known.

    Example:
        >>> import megatron_ep
        >>> megatron_ep.register()
        >>> config = TransformerConfig(..., moe_token_dispatcher_type="deepep")
    """
    if _applied:
        return
    patches = _find_patches()
    for patch in patches:
        patch.apply()
    _applied.extend(patches)


def unregister() -> None:
    """Undoes register(); models that exist keep their dispatcher. Idempotent.

    Raises:
        RuntimeError: somebody has replaced one of the same attributes since; nothing is undone.
    """
    for patch in _applied:
        patch.check()
    while _applied:
        _applied.pop().undo()


def _find_patches() -> list[_Patch]:
    from megatron.core import tensor_parallel
    from megatron.core.transformer.moe.moe_layer import MoELayer
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import TransformerLayer

    field = TransformerConfig.__dataclass_fields__["moe_token_dispatcher_type"]
    return [
        _Patch(field, "type", field.type, Literal.__getitem__((*get_args(field.type), NAME))),
        _wrap(TransformerConfig, "__post_init__", _check_config),
        _wrap(MoELayer, "__init__", _build_moe_layer),
        _wrap(TransformerLayer, "__init__", _build_transformer_layer),
        _wrap(_schedule_module(), "should_free_input", _should_free_input),
        _wrap_checkpoint(tensor_parallel),
        *map(_wrap_checkpoint, _checkpoint_modules_of_te()),
    ]


def _schedule_module() -> Any:
    """Where the 1F1B schedule asks which inputs of its nodes it may free."""
    for name in _SCHEDULE_MODULES:
        with contextlib.suppress(ModuleNotFoundError):
            module = importlib.import_module(name)
            if hasattr(module, "should_free_input"):
                return module
    raise RuntimeError(f"megatron-core: no should_free_input in {' or '.join(_SCHEDULE_MODULES)}")


def _checkpoint_modules_of_te() -> list[Any]:
    """Where Megatron-Core, whenever it recomputes in FP8, finds Transformer Engine's checkpoint."""
    module = sys.modules.get("transformer_engine.pytorch.distributed")
    return [module] if hasattr(module, "checkpoint") else []


def _wrap_checkpoint(module: Any) -> _Patch:
    original = module.checkpoint
    return _Patch(module, "checkpoint", original, wrap_checkpoint(original))


def _wrap(owner: Any, attribute: str, wrapper: Callable[..., Any]) -> _Patch:
    """A patch that calls `wrapper(original, *args)` instead of `original(*args)`."""
    original = getattr(owner, attribute)

    @functools.wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    return _Patch(owner, attribute, original, replacement)


@contextlib.contextmanager
def _standing_in(config: Any) -> Iterator[None]:
    """The config names the stand-in inside of the block."""
    config.moe_token_dispatcher_type = _STAND_IN
    try:
        yield
    finally:
        config.moe_token_dispatcher_type = NAME


def _check_config(original: Callable[..., None], config: Any) -> None:
    """Of TransformerConfig.__post_init__: shared-expert overlap, 1F1B overlap, padding for
    quantisation and variable sequence lengths are accepted for names that Megatron knows.
    """
    if config.moe_token_dispatcher_type != NAME:
        return original(config)
    with _standing_in(config):
        return original(config)


def _build_moe_layer(
    original: Callable[..., None], layer: Any, config: Any, *args: Any, **kwargs: Any
) -> None:
    """Of MoELayer.__init__: builds the stand-in's layer, with our dispatcher and, if the options
    ask for chunks, our way through its steps. Experts are torch's, if the options ask for those.
    """
    options = current_options()
    if options.experts == "torch":
        args, kwargs = _with_torch_experts(*args, **kwargs)
    if config.moe_token_dispatcher_type != NAME:
        original(layer, config, *args, **kwargs)
        return
    from megatron.core.transformer.moe import moe_layer

    stand_in = moe_layer.MoEAlltoAllTokenDispatcher
    moe_layer.MoEAlltoAllTokenDispatcher = DeepEPTokenDispatcher
    try:
        with _standing_in(config):
            original(layer, config, *args, **kwargs)
    finally:
        moe_layer.MoEAlltoAllTokenDispatcher = stand_in
    if (num_topk := _topk_of_router(layer)) is not None:
        layer.token_dispatcher.expect_topk(num_topk)
    if isinstance(layer.experts, TorchGroupedMLP):
        layer.token_dispatcher.hand_out_ends()
    elif options.capacity_factor is not None:
        raise ValueError(
            f"capacity_factor={options.capacity_factor} needs experts='torch': "
            f"{type(layer.experts).__name__} has the host know how many rows an expert gets"
        )
    if options.results_in_pool:
        allocate_results_in_pool(layer.experts, layer.token_dispatcher.buffer)
    if options.overlap_weight_gradients and not isinstance(layer.experts, TorchGroupedMLP):
        raise ValueError(
            "overlap_weight_gradients=True needs experts='torch': "
            f"{type(layer.experts).__name__} computes all gradients at once"
        )
    if options.num_chunks != 1 or options.overlap_weight_gradients:
        ChunkedExperts(layer, options.num_chunks).install()
    if tracer := active_tracer():
        tracer.watch_experts(layer.experts)


def _with_torch_experts(
    submodules: Any = None, *args: Any, **kwargs: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of MoELayer.__init__ after the config, with other experts."""
    from megatron.core.transformer.spec_utils import ModuleSpec

    experts = ModuleSpec(module=TorchGroupedMLP)
    return (replace(submodules, experts=experts), *args), kwargs


def _topk_of_router(layer: Any) -> int | None:
    """The most experts that the layer's router gives a token; None if that depends on tokens."""
    from megatron.core.transformer.moe.router import TopKRouter

    config = layer.config
    is_known = type(layer.router) is TopKRouter and not config.moe_pad_expert_input_to_capacity
    return min(config.moe_router_topk, config.num_moe_experts) if is_known else None


def _build_transformer_layer(
    original: Callable[..., None], layer: Any, config: Any, *args: Any, **kwargs: Any
) -> None:
    """Of TransformerLayer.__init__: the layernorm before the MoE layer can be recomputed although
    a CUDA graph covers router and dispatch_preprocess, if that returns no view of its input.
    """
    original(layer, config, *args, **kwargs)
    if config.moe_token_dispatcher_type == NAME and _can_recompute_layernorm(layer):
        layer.recompute_pre_mlp_layernorm = True
        if config.fp8 or config.fp4:
            layer.mlp.set_for_recompute_pre_mlp_layernorm()


def _can_recompute_layernorm(layer: Any) -> bool:
    """Whether the layer was refused layernorm recompute for the name of its dispatcher only."""
    from megatron.core.transformer.identity_op import IdentityOp

    config = layer.config
    return (
        layer.is_moe_layer
        and not layer.recompute_pre_mlp_layernorm
        and config.recompute_granularity == "selective"
        and "layernorm" in config.recompute_modules
        and not isinstance(layer.pre_mlp_layernorm, IdentityOp)
        and {"moe_router", "moe_preprocess"} <= set(graphed_parts(config))
        and not (
            config.moe_shared_expert_intermediate_size is not None
            and config.moe_shared_expert_overlap
        )
    )


def _should_free_input(
    original: Callable[..., bool], name: str, is_moe: bool, config: Any, *args: Any, **kwargs: Any
) -> bool:
    """Of the 1F1B schedule: the rows that dispatch delivers go to the experts as they are, and
    experts save them for their backward.
    """
    if config.moe_token_dispatcher_type == NAME and name == "mlp":
        return False
    return original(name, is_moe, config, *args, **kwargs)

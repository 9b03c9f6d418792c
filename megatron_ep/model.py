"""The GPT model: layer specification, construction of the chunks of this rank, wrappers."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from megatron_ep.config import Config, ConfigError
from megatron_ep.config.build import ddp_config, transformer_config
from megatron_ep.tokenizer import padded_vocab_size

logger = logging.getLogger("megatron_ep")


@functools.cache
def has_transformer_engine() -> bool:
    """Whether Transformer Engine can be used: it is installed, loads, and there is a GPU."""
    if not torch.cuda.is_available():
        return False
    try:
        import transformer_engine.pytorch  # noqa: F401
    except Exception as error:  # a build that does not fit torch fails in many ways
        logger.info("Transformer Engine is not used: %s", error)
        return False
    return True


def uses_transformer_engine(config: Config) -> bool:
    """Whether layers are Transformer Engine's.

    Raises:
        ConfigError: the settings need Transformer Engine and it is not there.
    """
    wanted = config.model.transformer_impl
    available = has_transformer_engine()
    needs = [
        name
        for name, value in (
            ("model.transformer_impl = 'transformer_engine'", wanted == "transformer_engine"),
            (
                "parallelism.context_parallel_size > 1",
                config.parallelism.context_parallel_size > 1,
            ),
            ("multi_latent_attention", config.transformer.get("multi_latent_attention", False)),
            ("moe.moe_grouped_gemm", config.moe.moe_grouped_gemm),
            ("moe.moe_experts = 'te'", config.moe.moe_experts == "te"),
            ("moe.moe_permute_fusion", config.moe.moe_permute_fusion),
        )
        if value
    ]
    if needs and not available:
        raise ConfigError(
            f"{', '.join(needs)}: needs a GPU and the package transformer-engine, not found here"
        )
    return available and wanted != "local"


def build_model(
    config: Config, *, vocab_size: int, device: torch.device, for_training: bool = True
) -> list[nn.Module]:
    """The model chunks of this rank.

    Makes the dispatcher `deepep` known to Megatron-Core first.

    Args:
        config: the settings.
        vocab_size: of the tokenizer, not padded.
        device: where weights go.
        for_training: wrap for data parallelism, with buffers for gradients.

    Returns:
        One chunk, or one for each virtual pipeline stage.
    """
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.transformer.module import Float16Module

    register_dispatcher(config)
    use_te = uses_transformer_engine(config)
    if not use_te and config.moe.moe_experts == "te":
        raise ConfigError("moe.moe_experts = 'te' needs model.transformer_impl other than 'local'")
    if use_te and config.data.reset_attention_mask:
        raise ConfigError(
            "data.reset_attention_mask = True: Transformer Engine's causal attention takes no "
            "mask; model.transformer_impl = 'local' does"
        )
    core_config = transformer_config(config, use_te=use_te)
    num_chunks = config.parallelism.virtual_pipeline_model_parallel_size
    stages = range(num_chunks) if num_chunks else [None]
    padded = padded_vocab_size(
        vocab_size,
        divisible_by=config.model.make_vocab_size_divisible_by,
        tensor_parallel_size=config.parallelism.tensor_model_parallel_size,
    )
    chunks: list[nn.Module] = []
    for vp_stage in stages:
        chunk: Any = _build_chunk(config, core_config, padded, use_te=use_te, vp_stage=vp_stage)
        chunk.to(device)
        if config.model.precision != "fp32":
            chunk = Float16Module(core_config, chunk)
        chunks.append(chunk)
    if not for_training:
        return chunks
    wrapped: list[nn.Module] = [
        DistributedDataParallel(core_config, ddp_config(config), chunk, disable_bucketing=i > 0)
        for i, chunk in enumerate(chunks)
    ]
    for chunk in wrapped:
        chunk.broadcast_params()
    return wrapped


def register_dispatcher(config: Config) -> None:
    """Makes `deepep` known to Megatron-Core, with the options of the section ep."""
    if config.moe.moe_token_dispatcher_type != "deepep" or config.moe.num_experts is None:
        return
    import megatron_ep

    options: dict[str, Any] = {
        name: getattr(config.ep, name)
        for name in (
            "num_chunks",
            "overlap_num_sms",
            "recompute_transfers",
            "fp8_dispatch",
            "results_in_pool",
            "num_sms",
            "timeout_s",
            "pool_bytes",
            "capacity_factor",
        )
    }
    uses_torch = config.moe.moe_experts == "torch" or config.ep.capacity_factor is not None
    options["experts"] = "torch" if uses_torch else "auto"
    options["buffer_class"] = None
    if config.ep.reference:
        from ep_kernels.reference import Buffer

        options["buffer_class"] = Buffer
    megatron_ep.configure(**options)
    megatron_ep.register()


def _build_chunk(
    config: Config, core_config: Any, vocab_size: int, *, use_te: bool, vp_stage: int | None
) -> nn.Module:
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    spec = get_gpt_decoder_block_spec(
        core_config,
        use_transformer_engine=use_te,
        normalization=config.model.normalization,
        qk_l2_norm=core_config.qk_l2_norm,
        vp_stage=vp_stage,
    )
    mtp_spec = _mtp_spec(config, core_config, use_te=use_te, vp_stage=vp_stage)
    if not use_te:
        _use_sequence_parallel_norms(spec)
        _use_sequence_parallel_norms(mtp_spec)
    stage = {"ignore_virtual": False, "vp_stage": vp_stage}
    gpt = _make(
        GPTModel,
        config=core_config,
        transformer_layer_spec=spec,
        vocab_size=vocab_size,
        max_sequence_length=config.model.max_position_embeddings or config.model.seq_length,
        pre_process=parallel_state.is_pipeline_first_stage(**stage),
        post_process=parallel_state.is_pipeline_last_stage(**stage),
        share_embeddings_and_output_weights=not config.model.untie_embeddings_and_output_weights,
        position_embedding_type=config.model.position_embedding_type,
        rotary_percent=config.model.rotary_percent,
        rotary_base=config.model.rotary_base,
        mtp_block_spec=mtp_spec,
        vp_stage=vp_stage,
    )
    if gpt.share_embeddings_and_output_weights and gpt.mtp_process and gpt.post_process:
        # NOTE: the output is computed with the embedding that multi-token prediction needs here.
        # Megatron-Core makes another weight after the first stage, and cannot save it.
        gpt.output_layer.weight = None
    return gpt


def _make(model: Any, **settings: Any) -> Any:
    """Calls the class of the model.

    Raises:
        ConfigError: a layer refuses the settings.
    """
    try:
        return model(**settings)
    except ValueError as error:
        raise ConfigError(f"a layer refuses these settings: {error}") from error


def _mtp_spec(config: Config, core_config: Any, *, use_te: bool, vp_stage: int | None) -> Any:
    """Of multi-token prediction, whose layers are like the last one of the model; None where this
    chunk has none of them.
    """
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_decoder_layer_specs,
        get_gpt_mtp_block_spec,
    )

    if not core_config.mtp_num_layers:
        return None
    # NOTE: not taken from the chunk's decoder, which a pipeline layout may leave without layers.
    last_layer = get_gpt_decoder_layer_specs(
        core_config,
        use_transformer_engine=use_te,
        normalization=config.model.normalization,
        qk_l2_norm=core_config.qk_l2_norm,
    )[-1]
    return get_gpt_mtp_block_spec(core_config, last_layer, use_te, vp_stage=vp_stage)


class TorchNorm:
    """torch's LayerNorm or RMSNorm for any layer, also with sequence parallelism.

    Megatron-Core's own wrapper refuses sequence parallelism. What it takes is that gradients of the
    weights are summed over tensor-parallel ranks, which a mark on the weights asks for.
    """

    def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> nn.Module:  # type: ignore[misc]
        kinds = {"LayerNorm": nn.LayerNorm, "RMSNorm": nn.RMSNorm}
        norm: nn.Module = kinds[config.normalization](hidden_size, eps=eps)
        for weight in norm.parameters():
            weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm


def _use_sequence_parallel_norms(spec: Any) -> None:
    """Replaces Megatron-Core's torch norms in a layer specification, at any depth."""
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    for owner, name, value in _attributes(spec):
        if value is WrappedTorchNorm:
            setattr(owner, name, TorchNorm)


def _attributes(spec: Any) -> Iterator[tuple[Any, str, Any]]:
    """(owner, name, value) of all attributes of a specification and its parts."""
    if isinstance(spec, (list, tuple)):
        for item in spec:
            yield from _attributes(item)
    elif type(spec).__module__.startswith("megatron.") and hasattr(spec, "__dict__"):
        for name, value in vars(spec).items():
            yield spec, name, value
            yield from _attributes(value)


def unwrap(module: nn.Module) -> Any:
    """The GPTModel inside its wrappers."""
    inner: Any = module
    while not hasattr(inner, "pre_process"):
        inner = inner.module
    return inner


def count_parameters(chunks: list[nn.Module]) -> tuple[int, int]:
    """Parameters of this rank: all, and those of experts."""
    parameters = [p for chunk in chunks for p in chunk.parameters()]
    experts = [p for p in parameters if not getattr(p, "allreduce", True)]
    return sum(p.numel() for p in parameters), sum(p.numel() for p in experts)

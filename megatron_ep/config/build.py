"""From a Config to the dataclasses of Megatron-Core."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from megatron_ep.config.errors import ConfigError
from megatron_ep.config.fields import DTYPES
from megatron_ep.config.schema import Config


def transformer_config(config: Config, *, use_te: bool) -> Any:
    """Megatron-Core's TransformerConfig, or MLATransformerConfig with multi_latent_attention.

    Settings go to the fields of the same name; those that are None are left to Megatron-Core.

    Args:
        config: the settings.
        use_te: whether the layers are Transformer Engine's.

    Raises:
        ConfigError: Megatron-Core refuses the combination of settings.
    """
    from megatron.core.transformer.transformer_config import (
        MLATransformerConfig,
        TransformerConfig,
    )

    has_mla = config.transformer.get("multi_latent_attention", False)
    target = MLATransformerConfig if has_mla else TransformerConfig
    fields = {field.name for field in dataclasses.fields(target) if field.init}
    dtype = DTYPES[config.model.precision]
    activation, is_gated = _activation(config.model.activation)
    settings: dict[str, Any] = {}
    for section in (config.model, config.parallelism, config.moe):
        if section is config.moe and config.moe.num_experts is None:
            continue
        given = {name: value for name, value in section if value is not None}
        settings |= {name: given[name] for name in given.keys() & fields}
    settings |= {
        "num_moe_experts": config.moe.num_experts,
        "moe_grouped_gemm": config.moe.moe_grouped_gemm or config.moe.moe_experts == "te",
        "sequence_parallel": uses_sequence_parallel(config),
        "activation_func": activation,
        "gated_linear_unit": is_gated,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "fp16": dtype is torch.float16,
        "transformer_impl": "transformer_engine" if use_te else "local",
    }
    if config.data.reset_attention_mask:
        settings["masked_softmax_fusion"] = False  # its kernel looks at no mask
    if config.parallelism.virtual_pipeline_model_parallel_size:
        settings |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    try:
        return target(**settings | config.transformer)
    except (AssertionError, ValueError) as error:
        raise ConfigError(f"Megatron-Core refuses these settings: {error}") from error


def uses_sequence_parallel(config: Config) -> bool:
    """Whether activations between layers are split over tensor-parallel ranks."""
    sizes = config.parallelism
    if sizes.sequence_parallel is None:
        return sizes.tensor_model_parallel_size > 1
    return sizes.sequence_parallel


def ddp_config(config: Config) -> Any:
    """Megatron-Core's DistributedDataParallelConfig."""
    from megatron.core.distributed import DistributedDataParallelConfig

    sizes = config.parallelism
    # With fp16 an overflow is normal: the loss scale is lowered and the step skipped.
    checks_nan = config.training.check_for_nan_in_grad and config.model.precision != "fp16"
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=sizes.overlap_grad_reduce,
        overlap_param_gather=sizes.overlap_param_gather,
        use_distributed_optimizer=sizes.use_distributed_optimizer,
        check_for_nan_in_grad=checks_nan,
    )


def optimizer_config(config: Config) -> Any:
    """Megatron-Core's OptimizerConfig."""
    from megatron.core.optimizer import OptimizerConfig

    precision = config.model.precision
    names = {field.name for field in dataclasses.fields(OptimizerConfig)}
    same_name = {name: value for name, value in config.optimizer if name in names}
    return OptimizerConfig(
        **same_name,
        params_dtype=DTYPES[precision],
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        use_distributed_optimizer=config.parallelism.use_distributed_optimizer,
        overlap_param_gather=config.parallelism.overlap_param_gather,
    )


def _activation(name: str) -> tuple[Callable[..., Any], bool]:
    """The function and whether it gates a second half."""
    from megatron.core.activations import squared_relu

    return {
        "gelu": (F.gelu, False),
        "silu": (F.silu, False),
        "relu": (F.relu, False),
        "squared_relu": (squared_relu, False),
        "swiglu": (F.silu, True),
        "geglu": (F.gelu, True),
    }[name]

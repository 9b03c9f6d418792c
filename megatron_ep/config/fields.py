"""The fields of Megatron-Core's TransformerConfig that the schema does not name.

They may be set in a configuration file (sections model, parallelism, moe, transformer) and by flag,
and are checked against the annotations of Megatron-Core's dataclasses.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import typing
from collections.abc import Callable
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from megatron_ep.config.schema import refuse_bool, sections

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}

# Set from other settings.
_DERIVED = {
    "activation_func",
    "autocast_dtype",
    "bf16",
    "fp16",
    "gated_linear_unit",
    "multi_latent_attention",
    "num_moe_experts",
    "params_dtype",
    "perform_initialization",
    "pipeline_dtype",
    "use_cpu_initialization",
}


@functools.cache
def megatron_fields() -> dict[str, Any]:
    """Names and annotations of the fields that can be set, MLA's among them.

    multi_latent_attention can be set as well; it selects the dataclass.
    """
    from megatron_ep.cpu_compat import enable_cpu

    enable_cpu()
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    named = {name for section in sections().values() for name in section.model_fields}
    hints = typing.get_type_hints(MLATransformerConfig)
    fields: dict[str, Any] = {"multi_latent_attention": bool}
    for field in dataclasses.fields(MLATransformerConfig):
        settable = field.init and not field.name.startswith("_")
        if settable and field.name not in named | _DERIVED and not _has_callable(hints[field.name]):
            fields[field.name] = hints[field.name]
    return fields


@functools.cache
def latent_attention_fields() -> set[str]:
    """Those that only multi_latent_attention has."""
    known = megatron_fields()
    from megatron.core.transformer.transformer_config import TransformerConfig

    return known.keys() - {field.name for field in dataclasses.fields(TransformerConfig)}


def _has_callable(annotation: Any) -> bool:
    if annotation in (Callable, typing.Callable, typing.ContextManager):
        return True
    origin = typing.get_origin(annotation)
    if origin in (Callable, typing.Callable) or "ContextManager" in str(annotation):
        return True
    return any(_has_callable(part) for part in typing.get_args(annotation))


def check_megatron_field(name: str, value: Any) -> Any:
    """Converts the value to the type of the field.

    Raises:
        ValueError: the value has another type; the message says what was expected.
    """
    annotation = megatron_fields()[name]
    refuse_bool(value, annotation)
    if annotation is torch.dtype or torch.dtype in typing.get_args(annotation):
        if value in DTYPES:
            return DTYPES[value]
        raise ValueError(f"expected one of {', '.join(DTYPES)}, got {value!r}")
    for part in (annotation, *typing.get_args(annotation)):
        if isinstance(part, enum.EnumMeta) and value in part.__members__:
            return part[value]
    try:
        adapter = TypeAdapter(annotation, config={"arbitrary_types_allowed": True})
        return adapter.validate_python(value)
    except ValidationError as error:
        messages = dict.fromkeys(part["msg"] for part in error.errors())
        raise ValueError(f"{'; or '.join(messages)}, got {value!r}") from None

"""The layout of a pipeline: which chunk of which stage holds which layers."""

from __future__ import annotations

from typing import Any

from megatron_ep.config.errors import ConfigError
from megatron_ep.config.schema import Config

NAME = "pipeline_model_parallel_layout"


def pipeline_layout(config: Config) -> Any:
    """Megatron-Core's PipelineParallelLayerLayout of the settings; None if they name no layout.

    Raises:
        ConfigError: it cannot be read, or does not fit the layers, the stages or their chunks.

    Example:
        >>> config = make_config({"model": {"num_layers": 2, NAME: "Et|tL"},
        ...                       "parallelism": {"pipeline_model_parallel_size": 2}})
        >>> pipeline_layout(config).layout[0][0]  # of stage 0, chunk 0
        [<LayerType.embedding: 4>, <LayerType.decoder: 6>]
    """
    given = config.transformer.get(NAME)
    if given is None:
        return None
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.pipeline_parallel_layer_layout import (
        PipelineParallelLayerLayout,
    )

    sizes = config.parallelism
    try:
        layout = PipelineParallelLayerLayout(given, sizes.pipeline_model_parallel_size)
        layout.validate_layer_layout(
            config.model.num_layers, config.transformer.get("mtp_num_layers")
        )
    except (AssertionError, ValueError, NotImplementedError) as error:
        raise ConfigError(f"transformer.{NAME} = {given!r}: {error}") from None
    num_chunks = layout.virtual_pipeline_model_parallel_size
    if num_chunks != (sizes.virtual_pipeline_model_parallel_size or 1):
        raise ConfigError(
            f"transformer.{NAME} = {given!r} has {num_chunks} chunks for each of "
            f"{sizes.pipeline_model_parallel_size} stages, "
            "parallelism.virtual_pipeline_model_parallel_size = "
            f"{sizes.virtual_pipeline_model_parallel_size}"
        )
    if sizes.pipeline_model_parallel_size > 1 and LayerType.mtp in sum(layout.layout[0], []):
        raise ConfigError(
            f"transformer.{NAME} = {given!r}: layers of multi-token prediction (m) cannot be in "
            "the first stage, which has the embedding itself"
        )
    return layout

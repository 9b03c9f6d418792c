"""The ranks of a run: device, process groups and random seeds."""

from __future__ import annotations

import functools
import gc
import logging
import os
import random
import sys
import warnings
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn

import numpy as np
import torch

from megatron_ep.config import Config, ConfigError, check_world_size
from megatron_ep.config.layout import pipeline_layout
from megatron_ep.devices import choose_device, start_process_group
from megatron_ep.parameters import num_mtp_layers

logger = logging.getLogger("megatron_ep")


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among the ranks.

    Attributes:
        rank: global rank.
        world_size: number of ranks.
        device: where the model is.
        data_rank: index among the data-parallel ranks.
        data_size: number of data-parallel ranks.
    """

    rank: int
    world_size: int
    device: torch.device
    data_rank: int
    data_size: int


def start_ranks(config: Config) -> Ranks:
    """Makes process groups and sets seeds; torchrun sets the environment, one rank needs none.

    Raises:
        ConfigError: the device is not there, or the parallel sizes do not fit the number of ranks.
    """
    from megatron.core import parallel_state

    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if problems := check_world_size(config, world_size):
        raise ConfigError("\n".join(problems))
    sizes = config.parallelism
    try:
        device = choose_device(config.training.device)
    except ValueError as error:
        raise ConfigError(f"training.device = {error}") from None
    start_process_group(
        device,
        backend=sizes.distributed_backend,
        timeout=timedelta(minutes=sizes.distributed_timeout_minutes),
    )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=sizes.tensor_model_parallel_size,
        pipeline_model_parallel_size=sizes.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=sizes.virtual_pipeline_model_parallel_size,
        context_parallel_size=sizes.context_parallel_size,
        expert_model_parallel_size=sizes.expert_model_parallel_size,
        expert_tensor_parallel_size=sizes.expert_tensor_parallel_size,
        distributed_timeout_minutes=sizes.distributed_timeout_minutes,
        get_embedding_ranks=functools.partial(embedding_ranks, config),
        create_gloo_process_groups=False,
    )
    _set_seeds(config.training.seed)
    return Ranks(
        rank=torch.distributed.get_rank(),
        world_size=world_size,
        device=device,
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
    )


def embedding_ranks(config: Config, pipeline: list[int]) -> list[int]:
    """Those ranks of a pipeline that hold the word embedding and sum its gradients: the first, the
    one that predicts further tokens, and the last if its output layer shares the weights.

    Example:
        >>> config = make_config({"transformer": {"mtp_num_layers": 1}})
        >>> embedding_ranks(config, [0, 2, 4])
        [0, 4]
    """
    from megatron.core.transformer.enums import LayerType

    holders, layout = {pipeline[0]}, pipeline_layout(config)
    has_mtp_in_last = layout is None and num_mtp_layers(config) > 0
    if has_mtp_in_last or not config.model.untie_embeddings_and_output_weights:
        holders.add(pipeline[-1])
    if layout is not None:
        for rank, chunks in zip(pipeline, layout.layout):
            if any(LayerType.mtp in chunk for chunk in chunks):
                holders.add(rank)
    return sorted(holders)


def stop_ranks() -> None:
    """Ends the buffers of the dispatchers, then the process groups."""
    import megatron_ep

    megatron_ep.reset_buffers()
    if torch.distributed.is_initialized():
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def leave(status: int) -> NoReturn:
    """Ends the program.

    Python would first look for cycles among the million objects of torch and Megatron-Core, which
    takes seconds.
    """
    gc.freeze()
    sys.exit(status)


def data_parallel_size(config: Config, world_size: int) -> int:
    """Number of ranks, or groups of ranks, that see different sequences."""
    sizes = config.parallelism
    return world_size // (
        sizes.tensor_model_parallel_size
        * sizes.pipeline_model_parallel_size
        * sizes.context_parallel_size
    )


def set_up_logging(level: int = logging.INFO) -> None:
    """Messages of rank 0 on the standard error stream; errors of every rank."""
    rank = int(os.environ.get("RANK", "0"))
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"[{rank}] %(message)s"))
    logger.handlers[:] = [handler]
    logger.setLevel(level if rank == 0 else logging.ERROR)
    logger.propagate = False


def ignore_known_warnings() -> None:
    """Silences what Megatron-Core and torch say about each other and about absent GPU packages."""
    warnings.filterwarnings("ignore", module=r"megatron\.core|torch\.distributed")
    for name in ("megatron.core", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _set_seeds(seed: int) -> None:
    """Pipeline stages differ; tensor and expert ranks differ by Megatron's tracker of states."""
    from megatron.core import parallel_state, tensor_parallel

    stage_seed = seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(stage_seed)
    np.random.seed(stage_seed)  # noqa: NPY002
    torch.manual_seed(stage_seed)
    tensor_parallel.model_parallel_cuda_manual_seed(stage_seed)

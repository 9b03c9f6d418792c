"""Trains a GPT model with experts.

torchrun --nproc-per-node 2 -m megatron_ep.pretrain --config configs/quickstart.yaml
... --moe-token-dispatcher-type alltoall --num-layers 2      flags override the file
... --help                                                   all of them
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from megatron_ep.config import Config, ConfigError, config_from_arguments
from megatron_ep.ranks import (
    Ranks,
    ignore_known_warnings,
    leave,
    set_up_logging,
    start_ranks,
    stop_ranks,
)

logger = logging.getLogger("megatron_ep")


def pretrain(config: Config, ranks: Ranks) -> bool:
    """Trains as the settings say, in process groups that start_ranks() has made.

    Returns:
        Whether the training is complete; False when it was asked to stop.
    """
    from megatron_ep.data import build_datasets
    from megatron_ep.model import build_model
    from megatron_ep.tokenizer import make_tokenizer, model_vocab_size
    from megatron_ep.trace import start_tracing
    from megatron_ep.training import Trainer, global_batch_size

    tokenizer = make_tokenizer(config.tokenizer)
    datasets = build_datasets(
        config, tokenizer, global_batch_size=global_batch_size(config, ranks.world_size)
    )
    if config.logging.trace is not None:
        start_tracing()
    vocab_size = model_vocab_size(config.tokenizer, tokenizer)
    chunks = build_model(config, vocab_size=vocab_size, device=ranks.device)
    trainer = Trainer(config, ranks, chunks, datasets)
    _describe(config, ranks, trainer)
    return trainer.train()


def _describe(config: Config, ranks: Ranks, trainer: object) -> None:
    from megatron_ep.model import count_parameters
    from megatron_ep.training import Trainer

    assert isinstance(trainer, Trainer)
    total, experts = count_parameters(trainer.chunks)
    sizes, moe = config.parallelism, config.moe
    logger.info(
        "%d ranks on %s: TP %d, PP %d, EP %d, CP %d, DP %d",
        ranks.world_size,
        ranks.device.type,
        sizes.tensor_model_parallel_size,
        sizes.pipeline_model_parallel_size,
        sizes.expert_model_parallel_size,
        sizes.context_parallel_size,
        ranks.data_size,
    )
    if moe.num_experts:
        logger.info(
            "%d experts, top-%d, dispatcher %s",
            moe.num_experts,
            moe.moe_router_topk,
            moe.moe_token_dispatcher_type,
        )
    logger.info(
        "%.2f M parameters on rank 0, %.2f M of them in experts; %d sequences of %d tokens a step",
        total / 1e6,
        experts / 1e6,
        trainer.global_batch_size,
        config.model.seq_length,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    from ep_kernels import deep_ep

    set_up_logging()
    ignore_known_warnings()
    deep_ep.install_if_missing()  # Megatron-Core's dispatcher flex looks for it when it is imported
    try:
        config = config_from_arguments(
            sys.argv[1:] if arguments is None else arguments,
            program="python -m megatron_ep.pretrain",
        )
        ranks = start_ranks(config)
        try:
            pretrain(config, ranks)
        finally:
            stop_ranks()
    except (ConfigError, ImportError) as error:
        logger.error("error: %s", error)
        return 2
    return 0


if __name__ == "__main__":
    leave(main())

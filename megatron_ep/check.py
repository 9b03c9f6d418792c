"""Says before a run whether it can start, how large it is, and how far it got.

python -m megatron_ep.check --config configs/mixtral_8x7b.yaml
... --num-nodes 8        flags override the file, as those of megatron_ep.pretrain do
... --shell              prints assignments for a shell script in place of a report

Exit status 2, and every reason on the standard error stream, if it cannot start.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_ep.checkpoint import find_checkpoint, latest_iteration
from megatron_ep.config import Config, ConfigError, check_world_size, config_from_arguments
from megatron_ep.data import parse_blend
from megatron_ep.parameters import count_parameters
from megatron_ep.ranks import data_parallel_size, ignore_known_warnings, set_up_logging
from megatron_ep.tokenizer import ByteTokenizer

logger = logging.getLogger("megatron_ep")


def problems(config: Config) -> list[str]:
    """Why a run with these settings cannot start here; empty if it can.

    Looks at the number of ranks, the data, the checkpoint to start from, and whether new ones can
    be written. GPUs and packages of the compute nodes are not looked at.
    """
    return [*_launch_problems(config), *_file_problems(config)]


def world_size(config: Config) -> int:
    """Number of ranks that section launch asks for; one node has one rank if it does not say."""
    return config.launch.num_nodes * (config.launch.ranks_per_node or 1)


def saved_iteration(config: Config) -> int:
    """Steps done in the newest checkpoint of the run; 0 without one."""
    directory = config.checkpoint.save
    return (latest_iteration(directory) if directory else None) or 0


def vocab_size(config: Config) -> int | None:
    """Of the model, where that is known without opening the tokenizer."""
    section = config.tokenizer
    if section.vocab_size is None and section.tokenizer_type == "byte":
        return ByteTokenizer.vocab_size
    return section.vocab_size


def _launch_problems(config: Config) -> Iterator[str]:
    if config.launch.ranks_per_node is None:
        yield "launch.ranks_per_node is not given: name the ranks (GPUs) of a node"
    else:
        yield from check_world_size(config, world_size(config))


def _file_problems(config: Config) -> Iterator[str]:
    try:
        parse_blend(config.data.data_path)
        find_checkpoint(config)
        saved_iteration(config)
    except ConfigError as error:
        yield str(error)
    if config.checkpoint.save is not None:
        existing = Path(config.checkpoint.save).absolute()
        while not existing.exists():
            existing = existing.parent
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            yield f"checkpoint.save = {config.checkpoint.save!r}: cannot write to {existing}"


def _assignments(config: Config) -> dict[str, Any]:
    """What scripts/slurm needs to know."""
    return {
        "num_nodes": config.launch.num_nodes,
        "ranks_per_node": config.launch.ranks_per_node,
        "uses_gpus": "no" if config.training.device == "cpu" else "yes",
        "train_iters": config.training.train_iters,
        "saved_iteration": saved_iteration(config),
        "save_directory": config.checkpoint.save or "",
    }


def _report(config: Config) -> dict[str, str]:
    sizes, launch, ranks = config.parallelism, config.launch, world_size(config)
    report = {"model": f"{config.model.num_layers} layers"}
    vocabulary = vocab_size(config)
    if vocabulary is not None:
        count = count_parameters(config, vocab_size=vocabulary)
        report["model"] += f", {_short(count.total)} parameters, {_short(count.active)} active"
    if config.moe.num_experts:
        report["experts"] = (
            f"{config.moe.num_experts}, top-{config.moe.moe_router_topk}, dispatcher "
            f"{config.moe.moe_token_dispatcher_type}"
        )
    report["ranks"] = (
        f"{ranks} = {launch.num_nodes} nodes x {launch.ranks_per_node}: "
        f"TP {sizes.tensor_model_parallel_size}, PP {sizes.pipeline_model_parallel_size}, "
        f"EP {sizes.expert_model_parallel_size}, CP {sizes.context_parallel_size}, "
        f"DP {data_parallel_size(config, ranks)}"
    )
    report["data"] = " ".join(config.data.data_path)
    report["checkpoints"] = (
        f"{config.checkpoint.save or 'none'}, step {saved_iteration(config)} of "
        f"{config.training.train_iters}"
    )
    start = find_checkpoint(config)
    if start is not None and not start.is_own and config.checkpoint.loads_from_elsewhere:
        report["checkpoints"] += f", starts from {start.path}"
    return report


def _short(count: int) -> str:
    return f"{count / 1e9:.1f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    set_up_logging()
    ignore_known_warnings()
    words = list(sys.argv[1:] if arguments is None else arguments)
    for_shell = "--shell" in words
    try:
        config = config_from_arguments(
            [word for word in words if word != "--shell"], program="python -m megatron_ep.check"
        )
        if found := problems(config):
            raise ConfigError("\n".join(found))
    except ConfigError as error:
        logger.error("%s", error)
        return 2
    if for_shell:
        lines = [f"{name}={shlex.quote(str(v))}" for name, v in _assignments(config).items()]
    else:
        lines = [f"{name:12} {text}" for name, text in _report(config).items()]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

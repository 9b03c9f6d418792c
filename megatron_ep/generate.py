"""Lets a trained model continue a text.

    python -m megatron_ep.generate --load runs/quickstart --prompt "def "
    torchrun --nproc-per-node 2 -m megatron_ep.generate --load runs/quickstart --prompt "def "

The settings come from the checkpoint; the number of ranks may differ from that of the training.
Flags of megatron_ep.pretrain override settings.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from megatron_ep.config import Config, ConfigError, check_world_size, load_config
from megatron_ep.config.build import uses_sequence_parallel
from megatron_ep.config.cli import parse_flags
from megatron_ep.model import unwrap
from megatron_ep.ranks import ignore_known_warnings, leave, set_up_logging, start_ranks, stop_ranks
from megatron_ep.tokenizer import Tokenizer

logger = logging.getLogger("megatron_ep")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        num_tokens: most tokens to add.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: choose among this many; 0 is all.
        top_p: choose among the likeliest tokens that have this probability together.
        seed: of the choice.

    Raises:
        ConfigError: a value out of range.
    """

    num_tokens: int = 200
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        for name, is_allowed, allowed in (
            ("num_tokens", self.num_tokens >= 0, "at least 0"),
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1"),
        ):
            if not is_allowed:
                raise ConfigError(f"{name}={getattr(self, name)} must be {allowed}")


@torch.no_grad()
def generate(
    config: Config,
    chunks: list[nn.Module],
    tokenizer: Tokenizer,
    prompt: str,
    sampling: Sampling,
    *,
    device: torch.device,
) -> str:
    """Continues the prompt; all ranks take part and get the same text.

    Args:
        config: the settings of the model.
        chunks: the model.
        tokenizer: that of its data.
        prompt: the beginning; empty begins a document.
        sampling: how to choose.
        device: of the model.

    Returns:
        The continuation, without the prompt.
    """
    for chunk in chunks:
        chunk.eval()
    tokens = tokenizer.tokenize(prompt) or [tokenizer.eod]
    num_given = len(tokens)
    generator = torch.Generator().manual_seed(sampling.seed)
    window = config.model.max_position_embeddings or config.model.seq_length
    last_rank = torch.distributed.get_world_size() - 1  # of the last pipeline stage
    for _ in range(sampling.num_tokens):
        logits = next_logits(config, chunks, tokens[-window:], device=device)
        choice = torch.zeros((), dtype=torch.int64, device=device)
        if logits is not None:
            choice.fill_(choose(logits[: tokenizer.vocab_size], sampling, generator))
        torch.distributed.broadcast(choice, src=last_rank)
        if int(choice) == tokenizer.eod:
            break
        tokens.append(int(choice))
    return tokenizer.detokenize(tokens[num_given:])


def next_logits(
    config: Config, chunks: list[nn.Module], tokens: list[int], *, device: torch.device
) -> torch.Tensor | None:
    """Logits [vocabulary] fp32 on the CPU of the token after `tokens`; None before the last stage.

    The sequence is padded to a multiple of the tensor parallel size; attention is causal, so that
    padding does not matter.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func

    multiple = (
        config.parallelism.tensor_model_parallel_size if uses_sequence_parallel(config) else 1
    )
    length = -(-len(tokens) // multiple) * multiple
    ids = torch.zeros(1, length, dtype=torch.int64, device=device)
    ids[0, : len(tokens)] = torch.tensor(tokens)
    positions = torch.arange(length, device=device)[None]

    def forward_step(data: Any, model: nn.Module) -> tuple[torch.Tensor, Any]:
        output = model(ids, positions, None, runtime_gather_output=True)
        return output, lambda logits, non_loss_data: logits[0, len(tokens) - 1].float().cpu()

    results = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=None,
        model=chunks,
        num_microbatches=1,
        seq_length=length,
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )
    return results[0] if unwrap(chunks[-1]).post_process else None


def choose(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One token by its logits [vocabulary]."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    probs = torch.softmax(logits / sampling.temperature, dim=-1)
    sorted_probs, order = probs.sort(descending=True)
    is_kept = sorted_probs.cumsum(0) - sorted_probs < sampling.top_p
    if sampling.top_k:
        is_kept[sampling.top_k :] = False
    picked = torch.multinomial(sorted_probs * is_kept, 1, generator=generator)
    return int(order[picked])


def config_of_checkpoint(load: str, step: int | None, overrides: dict[str, Any]) -> Config:
    """The settings under which a checkpoint was made, fitted to the number of ranks.

    Raises:
        ConfigError: no checkpoint there.
    """
    from megatron_ep.checkpoint import checkpoint_path, latest_iteration

    iteration = step if step is not None else latest_iteration(load)
    path = checkpoint_path(load, iteration or 0) / "config.yaml"
    if iteration is None or not path.is_file():
        of_step = f" of step {step}" if step is not None else ""
        raise ConfigError(f"no checkpoint{of_step} in {load}")
    fixed = {
        "checkpoint": {"load": load, "save": None, "save_interval": None, "ckpt_step": iteration},
        "parallelism": {
            "virtual_pipeline_model_parallel_size": None,
            "overlap_grad_reduce": False,
            "overlap_param_gather": False,
        },
        # Multi-token prediction is for training: with it the model gives a loss, and no logits.
        "transformer": {"mtp_num_layers": None, "pipeline_model_parallel_layout": None},
    }
    with contextlib.suppress(ConfigError):  # the stages are no longer those of the layout
        config = load_config(path, _merge(overrides, fixed))
        if not check_world_size(config, _world_size()):
            return config
    return load_config(path, _merge(_fit_ranks(load_config(path)), overrides, fixed))


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _fit_ranks(config: Config) -> dict[str, Any]:
    """Experts over all ranks where they can be divided, and nothing else."""
    num_experts, num_ranks = config.moe.num_experts, _world_size()
    can_divide = num_experts is not None and num_experts % num_ranks == 0
    return {
        "parallelism": {
            "tensor_model_parallel_size": 1,
            "pipeline_model_parallel_size": 1,
            "context_parallel_size": 1,
            "expert_model_parallel_size": num_ranks if can_divide else 1,
            "expert_tensor_parallel_size": 1,
            "sequence_parallel": None,
        },
        "transformer": {
            "num_layers_in_first_pipeline_stage": None,
            "num_layers_in_last_pipeline_stage": None,
            "account_for_embedding_in_pipeline_split": False,
            "account_for_loss_in_pipeline_split": False,
        },
    }


def _merge(*layers: dict[str, Any]) -> dict[str, Any]:
    """{section: {key: value}} of all layers; later ones win."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for section, values in layer.items():
            merged[section] = {**merged.get(section, {}), **values}
    return merged


def make_parser() -> argparse.ArgumentParser:
    """The flags of generation."""
    default = Sampling()
    parser = argparse.ArgumentParser(
        prog="python -m megatron_ep.generate",
        description="Lets a trained model continue a text.",
        epilog="Flags of megatron_ep.pretrain override the settings of the checkpoint.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--load", required=True, metavar="DIR", help="directory of the checkpoints")
    add("--ckpt-step", type=int, help="take the checkpoint of this step, not the latest")
    add("--prompt", default="", help="the beginning of the text")
    add("--num-tokens", type=int, default=default.num_tokens, help="most tokens to add")
    add("--temperature", type=float, default=default.temperature, help="0 takes the likeliest")
    add("--top-k", type=int, default=default.top_k, help="choose among so many tokens; 0: all")
    add("--top-p", type=float, default=default.top_p, help="choose among so much probability")
    add("--sample-seed", type=int, default=default.seed)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    from megatron_ep.checkpoint import load_checkpoint
    from megatron_ep.model import build_model
    from megatron_ep.tokenizer import make_tokenizer, model_vocab_size

    set_up_logging(logging.WARNING)
    ignore_known_warnings()
    options, rest = make_parser().parse_known_args(arguments)
    try:
        sampling = Sampling(
            num_tokens=options.num_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            seed=options.sample_seed,
        )
        _, overrides = parse_flags(rest, program="python -m megatron_ep.generate")
        config = config_of_checkpoint(options.load, options.ckpt_step, overrides)
        ranks = start_ranks(config)
        try:
            tokenizer = make_tokenizer(config.tokenizer)
            vocab_size = model_vocab_size(config.tokenizer, tokenizer)
            chunks = build_model(
                config, vocab_size=vocab_size, device=ranks.device, for_training=False
            )
            load_checkpoint(config, chunks)
            text = generate(
                config, chunks, tokenizer, options.prompt, sampling, device=ranks.device
            )
        finally:
            stop_ranks()
    except (ConfigError, ImportError) as error:
        logger.error("error: %s", error)
        return 2
    if ranks.rank == 0:
        print(options.prompt + text)  # noqa: T201
    return 0


if __name__ == "__main__":
    leave(main())

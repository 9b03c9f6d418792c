"""Training entry and generation called as functions, several times in one process: rank 0 of 1.

These functions run on a rank without a process group, see `on_one_rank`; main() makes its own.
"""

import contextlib
import io
import logging
import os

import training_runs as runs
from moe_layers import import_megatron, remove_compiler_folder

from megatron_ep import generate, pretrain

ONE_RANK = ["--expert-model-parallel-size", "1"]


def call(main, *arguments, environment=None):
    """Calls a main(); returns its exit status and all that it prints and logs.

    The environment is what torchrun would set; nothing for one rank.
    """
    import_megatron()
    from megatron.core.transformer.moe import moe_utils

    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        os.environ.pop(name, None)
    os.environ.update({name: str(value) for name, value in (environment or {}).items()})
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        status = main([str(argument) for argument in arguments])
    logging.getLogger("megatron_ep").handlers.clear()
    moe_utils.get_moe_layer_wise_logging_tracker().clear()  # of so many layers
    remove_compiler_folder()
    return status, printed.getvalue()


def train(corpus, output, *flags):
    """Trains the small model; returns exit status and output."""
    _, *arguments = runs.command(corpus, output, *ONE_RANK, *flags)
    return call(pretrain.main, *arguments)


def compare_resumed(rank, corpus, folder, variants):
    """Trains each variant whole, and again from its checkpoint in the middle.

    Returns:
        {name: what went wrong}, empty when all pairs are equal.
    """
    wrong = {}
    for name, flags in variants.items():
        whole, end = folder / name / "whole", folder / name / "end"
        first = train(corpus, whole, "--save-interval", 4, "--no-save-at-end", *flags)
        resume = ["--load", whole, "--ckpt-step", 4, "--no-save-at-end"]
        second = train(corpus, end, *resume, *flags)
        expected = {key: line for key, line in runs.numbers(whole).items() if key[0] > 4}
        if first[0] or second[0]:
            wrong[name] = first[1] + second[1]
        elif runs.numbers(end) != expected:
            wrong[name] = f"{runs.numbers(end)}\nis not\n{expected}"
    return wrong


def try_to_train(rank, corpus, folder, cases):
    """Exit statuses and outputs of trainings with the given flags."""
    return [train(corpus, folder / str(i), *flags) for i, flags in enumerate(cases)]


def generate_texts(rank, cases):
    """Exit statuses and outputs of generation with the given arguments."""
    return [call(generate.main, *arguments) for arguments in cases]

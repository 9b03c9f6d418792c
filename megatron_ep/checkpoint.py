"""Checkpoints through megatron.core.dist_checkpointing.

    <save>/iter_0000100/                      one checkpoint, with its config.yaml
    <save>/latest_checkpointed_iteration.txt  the newest complete one

A checkpoint is written under another name first and renamed when it is complete, and the pointer is
replaced after that: an interrupted save leaves the previous checkpoint in force.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import multiprocessing
import os
import queue
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ep_kernels.processes import die_with_parent
from megatron_ep.config import Config, ConfigError, dump_config
from megatron_ep.model import unwrap
from megatron_ep.optim import (
    check_schedule,
    load_optimizer,
    load_scheduler,
    prepare_for_loading,
)

logger = logging.getLogger("megatron_ep")

_POINTER = "latest_checkpointed_iteration.txt"


@dataclass(kw_only=True)
class Progress:
    """How far a training is.

    Attributes:
        iteration: steps done.
        consumed_samples: training samples read by all ranks.
    """

    iteration: int = 0
    consumed_samples: int = 0


@dataclass(frozen=True, kw_only=True)
class Start:
    """The checkpoint that a run starts from.

    Attributes:
        path: its directory.
        is_own: the run itself has saved it, so all of it is restored; otherwise finetune,
            no_load_optim and no_load_rng say how much.
    """

    path: Path
    is_own: bool = False


def latest_iteration(directory: str | Path) -> int | None:
    """The iteration of the newest complete checkpoint, or None.

    Raises:
        ConfigError: the pointer is not a number, or its checkpoint is missing.
    """
    pointer = Path(directory, _POINTER)
    if not pointer.is_file():
        return None
    text = pointer.read_text().strip()
    if not text.isdigit():
        raise ConfigError(f"{pointer}: expected an iteration, got {text!r}")
    if not checkpoint_path(directory, int(text)).is_dir():
        raise ConfigError(f"{pointer} names {checkpoint_path(directory, int(text))}: missing")
    return int(text)


def checkpoint_path(directory: str | Path, iteration: int) -> Path:
    """Where the checkpoint of an iteration is."""
    return Path(directory, f"iter_{iteration:07d}")


def save_checkpoint(
    config: Config, chunks: list[nn.Module], optimizer: Any, scheduler: Any, progress: Progress
) -> Path:
    """Saves a checkpoint to config.checkpoint.save; collective.

    Returns:
        The directory of the checkpoint.
    """
    from megatron.core import dist_checkpointing

    if config.parallelism.overlap_param_gather:
        _gather_weights(chunks)
    root = Path(config.checkpoint.save or ".")
    path = checkpoint_path(root, progress.iteration)
    partial = root / f"{path.name}.partial"
    _on_rank_0(lambda: _make_empty(partial))
    state = _model_state(chunks, config)
    state["optimizer"] = optimizer.sharded_state_dict(state, metadata=_metadata(config))
    state["scheduler"] = scheduler.state_dict()
    state["progress"] = dataclasses.asdict(progress)
    state["rng"] = _sharded_rng_state()
    state["num_ranks"] = torch.distributed.get_world_size()
    prepare_writers()
    dist_checkpointing.save(state, str(partial), content_metadata=_metadata(config))
    _on_rank_0(lambda: _publish(config, partial, path, progress.iteration))
    return path


def _gather_weights(chunks: list[nn.Module]) -> None:
    """Brings to all ranks the weights that the distributed optimizer updated on one of them.

    NOTE: with overlap_param_gather a rank has weights of other ranks from before the last update
    until the next forward pass.
    """
    for chunk in chunks:
        chunk.start_param_sync(force_sync=True)  # type: ignore[operator]


def load_checkpoint(
    config: Config, chunks: list[nn.Module], optimizer: Any = None, scheduler: Any = None
) -> Progress | None:
    """Loads what the settings ask for; collective.

    Args:
        config: the settings; section checkpoint says from where and what.
        chunks: the model.
        optimizer: None loads the model only.
        scheduler: as above.

    Returns:
        Where the training goes on; None when there is no checkpoint to load.

    Raises:
        ConfigError: an explicitly named checkpoint is missing, or it was made with other sizes or
            another learning-rate schedule.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from torch.distributed.checkpoint.api import CheckpointException

    start = find_checkpoint(config)
    if start is None:
        return None
    path, section = start.path, config.checkpoint
    is_finetune = section.finetune and not start.is_own
    is_training = optimizer is not None and not is_finetune
    with_optimizer = is_training and (start.is_own or not section.no_load_optim)
    with_rng = is_training and (start.is_own or not section.no_load_rng) and _fits_ranks(path)
    metadata = dist_checkpointing.load_content_metadata(str(path)) or _metadata(config)
    state = _model_state(chunks, config)
    if with_optimizer:
        prepare_for_loading(optimizer)
        state["optimizer"] = optimizer.sharded_state_dict(state, is_loading=True, metadata=metadata)
    if with_rng:
        state["rng"] = _sharded_rng_state()
    try:
        loaded = dist_checkpointing.load(state, str(path))
    except (CheckpointingException, CheckpointException) as error:
        raise ConfigError(
            f"{path} does not fit this model or number of ranks: {_shorten(error)}"
        ) from error
    if with_optimizer:
        check_schedule(config, scheduler, loaded["scheduler"])
    for i, chunk in enumerate(chunks):
        # NOTE: of a chunk without weights, which a pipeline layout may ask for, nothing comes back.
        unwrap(chunk).load_state_dict(loaded.get(_chunk_name(i, chunks), {}))
    if with_optimizer:
        load_optimizer(optimizer, loaded["optimizer"])
        load_scheduler(config, optimizer, scheduler, loaded["scheduler"])
    elif optimizer is not None:
        optimizer.reload_model_params()
    if with_rng:
        _set_rng_state(loaded["rng"][0])
    logger.info("loaded %s", path)
    return Progress() if is_finetune else Progress(**loaded["progress"])


def _fits_ranks(path: Path) -> bool:
    """Whether the checkpoint has a random state for each rank; warns if not."""
    from megatron.core import dist_checkpointing

    own = torch.distributed.get_world_size()
    saved = dist_checkpointing.load_common_state_dict(str(path)).get("num_ranks", own)
    if saved != own:
        logger.warning(
            "%s has random states of %d ranks, not %d: dropout goes on from training.seed "
            "(checkpoint.no_load_rng = true says so without this warning)",
            path,
            saved,
            own,
        )
    return bool(saved == own)


def _shorten(error: BaseException) -> str:
    """What went wrong, without the list of all tensors."""
    for failure, _ in getattr(error, "failures", {}).values():
        error = failure
    text = str(error)
    return text if len(text) <= 300 else f"{text[:297]}..."


def find_checkpoint(config: Config) -> Start | None:
    """The checkpoint that the settings ask for, or None to start anew.

    With auto_resume the newest one in checkpoint.save comes first: a run that was restarted goes on
    where it was, not where checkpoint.load, ckpt_step and finetune had it begin.

    Raises:
        ConfigError: checkpoint.load or ckpt_step names one that is not there.
    """
    section = config.checkpoint
    if section.auto_resume and section.save is not None and section.loads_from_elsewhere:
        iteration = latest_iteration(section.save)
        if iteration is not None:
            logger.info("%s has checkpoints of this run: it goes on from there", section.save)
            return Start(path=checkpoint_path(section.save, iteration), is_own=True)
    directory = section.load or section.save
    is_asked_for = section.load is not None or section.ckpt_step is not None
    if directory is None or not (section.auto_resume or is_asked_for):
        return None
    if section.ckpt_step is not None:
        path = checkpoint_path(directory, section.ckpt_step)
        if not path.is_dir():
            raise ConfigError(f"checkpoint.ckpt_step = {section.ckpt_step}: no {path}")
        return Start(path=path)
    iteration = latest_iteration(directory)
    if iteration is not None:
        return Start(path=checkpoint_path(directory, iteration))
    if section.loads_from_elsewhere:
        raise ConfigError(f"checkpoint.load = {section.load!r}: no checkpoint there")
    return None


def _model_state(chunks: list[nn.Module], config: Config) -> dict[str, Any]:
    metadata = _metadata(config)
    return {
        _chunk_name(i, chunks): unwrap(chunk).sharded_state_dict(metadata=metadata)
        for i, chunk in enumerate(chunks)
    }


def _chunk_name(index: int, chunks: list[nn.Module]) -> str:
    return "model" if len(chunks) == 1 else f"model{index}"


def _metadata(config: Config) -> dict[str, Any]:
    """How Megatron-Core lays out what it saves."""
    if not config.parallelism.use_distributed_optimizer:
        return {"chained_optim_avoid_prefix": True}
    reshardable = config.checkpoint.dist_ckpt_optim_fully_reshardable
    return {
        "distrib_optim_sharding_type": "fully_reshardable" if reshardable else "dp_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "chained_optim_avoid_prefix": True,
    }


def _sharded_rng_state() -> Any:
    """Random states of this rank, as a list, since every rank has its own."""
    from megatron.core import tensor_parallel
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    state = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    world_size, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    return ShardedObject("rng_state", [state], (world_size,), (rank,), replica_id=0)


def _set_rng_state(state: dict[str, Any]) -> None:
    from megatron.core import tensor_parallel

    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["tracker"])


def prepare_writers() -> None:
    """Takes from Megatron-Core's writers what a save that is waited for does not need, and has them
    die with their rank.

    NOTE: they log their memory; without psutil they fail at that, and the main process waits for
    ever. Their results would go through a server process, which outlives a rank that is killed and
    cannot start where the path of TMPDIR is long. And they wait for words that a thread of the rank
    is about to send, which never come if the rank is killed before.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if not getattr(filesystem_async, "HAVE_PSUTIL", True):
        filesystem_async._process_memory = lambda: 0
    if getattr(filesystem_async, "_results_queue", None) is None:
        filesystem_async._results_queue = queue.SimpleQueue()
        writer = filesystem_async.FileSystemWriterAsync
        writer.write_preloaded_data = staticmethod(_dying_with_rank(writer.write_preloaded_data))


def _dying_with_rank(write: Callable[..., None]) -> Callable[..., None]:
    """What a process that a rank has forked is to run: `write`, as long as there is the rank."""

    @functools.wraps(write)
    def write_as_child(*args: Any, **kwargs: Any) -> None:
        rank = multiprocessing.parent_process()
        if rank is not None and rank.pid is not None:
            die_with_parent(rank.pid)
        write(*args, **kwargs)

    return write_as_child


def _on_rank_0(action: Any) -> None:
    if torch.distributed.get_rank() == 0:
        action()
    torch.distributed.barrier()


def _make_empty(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)


def _publish(config: Config, partial: Path, path: Path, iteration: int) -> None:
    """Makes a complete checkpoint the latest, and removes those that are too old."""
    (partial / "config.yaml").write_text(dump_config(config))
    if path.exists():
        shutil.rmtree(path)
    partial.rename(path)
    pointer = path.parent / _POINTER
    temporary = pointer.with_suffix(".tmp")
    temporary.write_text(f"{iteration}\n")
    os.replace(temporary, pointer)
    keep = config.checkpoint.keep_last
    if keep is not None:
        names = (p for p in path.parent.iterdir() if re.fullmatch(r"iter_\d{7,}", p.name))
        for old in sorted(names)[:-keep]:
            if old != path:
                shutil.rmtree(old, ignore_errors=True)

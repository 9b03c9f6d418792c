"""Training and validation data: Megatron's GPT data sets and the order in which ranks read them.

build_datasets()   the data sets that .bin/.idx files, their weights and the split give
BatchSampler       which samples this rank reads in each micro batch
make_iterator()    micro batches on the device, from a given number of consumed samples on
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from megatron_ep.config import Config, ConfigError
from megatron_ep.ranks import Ranks
from megatron_ep.tokenizer import Tokenizer

logger = logging.getLogger("megatron_ep")

Batch = dict[str, torch.Tensor]

_INDEX_HEADER = b"MMIDIDX\x00\x00"


@dataclass(frozen=True, kw_only=True)
class Datasets:
    """Data sets of samples {tokens, labels, loss_mask, position_ids}, each [seq_length].

    Attributes:
        train: at least train_iters * global batch size samples.
        valid: at least eval_iters * global batch size samples; None without evaluation.
    """

    train: Dataset[Batch]
    valid: Dataset[Batch] | None


def build_datasets(config: Config, tokenizer: Tokenizer, *, global_batch_size: int) -> Datasets:
    """Builds the data sets; collective, rank 0 writes the index files that are missing.

    Raises:
        ConfigError: no data path, a missing file, or no validation data where it is needed.
    """
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    section = config.data
    paths, weights = parse_blend(section.data_path)
    does_eval = config.training.eval_interval is not None
    core_config = GPTDatasetConfig(
        random_seed=config.training.seed,
        sequence_length=config.model.seq_length,
        blend=(paths, weights),
        split=section.split,
        path_to_cache=section.data_cache_path,
        num_dataset_builder_threads=section.num_dataset_builder_threads,
        tokenizer=tokenizer,
        reset_position_ids=section.reset_position_ids,
        reset_attention_mask=section.reset_attention_mask,
        eod_mask_loss=section.eod_mask_loss,
        create_attention_mask=section.reset_attention_mask,
    )
    sizes = [
        config.training.train_iters * global_batch_size,
        config.training.eval_iters * global_batch_size if does_eval else 0,
        0,
    ]
    builder = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, core_config)
    train, valid, _ = builder.build()
    if train is None:
        raise ConfigError(f"data.split = {section.split!r} leaves no training data")
    if does_eval and (valid is None or len(valid) < sizes[1]):
        raise ConfigError(
            f"data.split = {section.split!r} leaves {0 if valid is None else len(valid)} "
            f"validation samples; training.eval_iters needs {sizes[1]}"
        )
    return Datasets(train=train, valid=valid if does_eval else None)


def parse_blend(data_path: list[str]) -> tuple[list[str], list[float] | None]:
    """Prefixes and weights of a data path.

    Raises:
        ConfigError: empty, a weight without prefix or not above 0, or files that are missing or of
            another kind.

    Example:
        >>> parse_blend(["0.3", "data/a", "0.7", "data/b"])  # when the files exist
        (['data/a', 'data/b'], [0.3, 0.7])
    """
    if not data_path:
        raise ConfigError(
            "data.data_path is empty: name the prefix of .bin/.idx files "
            "(python -m megatron_ep.preprocess makes them)"
        )
    paths, weights = list(data_path), None
    if _is_number(data_path[0]):
        if len(data_path) % 2 or not all(map(_is_number, data_path[::2])):
            raise ConfigError(f"data.data_path: expected weight, prefix, ..., got {data_path}")
        paths, weights = data_path[1::2], [float(weight) for weight in data_path[::2]]
        for text, weight in zip(data_path[::2], weights):
            if not (math.isfinite(weight) and weight > 0):
                raise ConfigError(f"data.data_path: weight {text} is not a number above 0")
    for prefix in paths:
        for suffix in (".bin", ".idx"):
            if not Path(prefix + suffix).is_file():
                hint = f" (write {prefix[:-4]!r})" if prefix.endswith((".bin", ".idx")) else ""
                raise ConfigError(f"data.data_path: no file {prefix}{suffix}{hint}")
        with Path(prefix + ".idx").open("rb") as index:
            if index.read(len(_INDEX_HEADER)) != _INDEX_HEADER:
                raise ConfigError(f"data.data_path: {prefix}.idx is no index of Megatron's data")
    return paths, weights


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


class BatchSampler(Sampler[list[int]]):
    """Sample indices of each micro batch of one data-parallel rank, in order, without end marks.

    A global batch is `global_batch_size` consecutive samples. Micro batch m of rank r takes samples
    (m * data_size + r) * micro_batch_size + [0, micro_batch_size) of it.

    Args:
        num_samples: in the data set; a last incomplete global batch is left out.
        consumed_samples: where to start.
        micro_batch_size: samples in a micro batch.
        global_batch_size: samples of all ranks in a step.
        ranks: this rank.
    """

    def __init__(
        self,
        *,
        num_samples: int,
        consumed_samples: int,
        micro_batch_size: int,
        global_batch_size: int,
        ranks: Ranks,
    ) -> None:
        self._batches = range(
            consumed_samples, num_samples - global_batch_size + 1, global_batch_size
        )
        self._micro_batch_size = micro_batch_size
        first, stride = ranks.data_rank * micro_batch_size, ranks.data_size * micro_batch_size
        self._offsets = range(first, global_batch_size, stride)

    def __len__(self) -> int:
        return len(self._batches) * len(self._offsets)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self._batches:
            for offset in self._offsets:
                start = batch + offset
                yield list(range(start, start + self._micro_batch_size))


def make_iterator(
    dataset: Dataset[Batch],
    config: Config,
    ranks: Ranks,
    *,
    consumed_samples: int,
    global_batch_size: int,
) -> Iterator[Batch]:
    """Micro batches [micro_batch_size, seq_length] on the device."""
    sampler = BatchSampler(
        num_samples=len(dataset),  # type: ignore[arg-type]
        consumed_samples=consumed_samples,
        micro_batch_size=config.training.micro_batch_size,
        global_batch_size=global_batch_size,
        ranks=ranks,
    )
    on_gpu = ranks.device.type == "cuda"
    num_workers = config.data.num_workers
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        pin_memory=on_gpu,
        persistent_workers=num_workers > 0,
        multiprocessing_context="spawn" if num_workers > 0 else None,
        generator=torch.Generator(),  # or it would draw from the random state of dropout
    )
    for batch in loader:
        yield {name: value.to(ranks.device, non_blocking=on_gpu) for name, value in batch.items()}

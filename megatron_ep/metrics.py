"""Reports of a training run: metrics file, TensorBoard, progress bar; rank 0 only.

Each line of the metrics file is a JSON object with `kind` "train" or "eval" and `iteration`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from megatron_ep.config import Config
from megatron_ep.expert_load import ExpertLoad

logger = logging.getLogger("megatron_ep")


class Reporter:
    """Writes the metrics of a run; on ranks other than 0 it does nothing.

    Args:
        config: the settings.
        rank: global rank.
        iteration: steps that were done before; later lines of an existing metrics file, which a
            resumed run writes again, are removed.
    """

    def __init__(self, config: Config, *, rank: int, iteration: int) -> None:
        self._bar: Any = None
        self._file: TextIO | None = None
        self._writer: Any = None
        self._per_layer = config.logging.moe_per_layer_logging
        if rank != 0:
            return
        if path := metrics_path(config):
            path.parent.mkdir(parents=True, exist_ok=True)
            keep_lines_until(path, iteration)
            self._file = path.open("a", buffering=1)
        if config.logging.tensorboard_dir is not None:
            self._writer = _open_tensorboard(config.logging.tensorboard_dir, iteration)
        self._bar = tqdm(
            total=config.training.train_iters,
            initial=iteration,
            unit="step",
            desc="train",
            disable=not config.logging.progress_bar,
        )

    def advance(self, loss: float) -> None:
        """One step is done."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
            self._bar.update()

    def report(
        self, kind: str, iteration: int, values: dict[str, float], loads: Sequence[ExpertLoad] = ()
    ) -> None:
        """Writes scalars and expert loads.

        Args:
            kind: "train" or "eval".
            iteration: steps done.
            values: scalars by name.
            loads: one for each layer with experts.
        """
        if self._file is not None:
            record: dict[str, Any] = {"kind": kind, "iteration": iteration, **values}
            if loads:
                record["expert_load_max_over_mean"] = max(load.max_over_mean for load in loads)
                record["expert_load_min_over_mean"] = min(load.min_over_mean for load in loads)
            if loads and self._per_layer:
                record["tokens_per_expert"] = {
                    str(load.layer): load.tokens_per_expert for load in loads
                }
            self._file.write(json.dumps(record) + "\n")
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(f"{kind}/{name}", value, iteration)
            for load in loads:
                layer = f"layer_{load.layer}"
                self._writer.add_scalar(
                    f"experts/max_over_mean/{layer}", load.max_over_mean, iteration
                )
                self._writer.add_scalar(
                    f"experts/min_over_mean/{layer}", load.min_over_mean, iteration
                )

    def message(self, text: str) -> None:
        """Prints a line above the progress bar."""
        if self._bar is not None:
            with self._bar.external_write_mode():
                logger.info(text)

    def close(self) -> None:
        """Ends the files."""
        for part in (self._bar, self._writer, self._file):
            if part is not None:
                part.close()


def metrics_path(config: Config) -> Path | None:
    """Where the metrics file is, or None."""
    if config.logging.metrics_file is not None:
        return Path(config.logging.metrics_file)
    return Path(config.checkpoint.save, "metrics.jsonl") if config.checkpoint.save else None


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics file.

    Raises:
        ValueError: a line is no report; the message names it.
    """
    records = []
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not JSON: {error}") from None
        if not isinstance(record, dict) or not {"kind", "iteration"} <= record.keys():
            raise ValueError(f"{path}:{number}: no report of a training run: {line[:60]}")
        records.append(record)
    return records


def keep_lines_until(path: Path, iteration: int) -> None:
    """Removes lines of later iterations, and a last line that was cut off."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        try:
            if json.loads(line)["iteration"] <= iteration and line.endswith("\n"):
                kept.append(line)
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    path.write_text("".join(kept))


def _open_tensorboard(directory: str, iteration: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        logger.warning(
            "logging.tensorboard_dir: no TensorBoard log is written, since the package tensorboard "
            "cannot be imported (%s): pip install tensorboard. The metrics file has the same "
            "numbers.",
            error,
        )
        return None
    return SummaryWriter(directory, purge_step=iteration + 1 if iteration else None)

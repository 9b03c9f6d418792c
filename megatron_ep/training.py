"""The training loop: steps, evaluation, reports, checkpoints, and when to stop.

Trainer.train()
  step        forward and backward passes of all micro batches, optimizer, schedule
  agree       one reduction: loss over all ranks, and whether any rank wants to stop
  report      every log_interval steps
  evaluate    every eval_interval steps, always on the same samples
  save        every save_interval steps, at the end, and when stopping
"""

from __future__ import annotations

import contextlib
import functools
import logging
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from megatron_ep.checkpoint import Progress, load_checkpoint, save_checkpoint
from megatron_ep.config import Config
from megatron_ep.data import Batch, Datasets, make_iterator
from megatron_ep.expert_load import DroppedRows, ExpertLoadMeter, rank_imbalance
from megatron_ep.metrics import Reporter
from megatron_ep.model import unwrap
from megatron_ep.optim import build_optimizer, build_scheduler
from megatron_ep.parameters import layers_with_experts, num_mtp_layers
from megatron_ep.ranks import Ranks, data_parallel_size
from megatron_ep.trace import active_tracer, hidden_fraction, write_trace

logger = logging.getLogger("megatron_ep")

_AUX_LOSSES = {
    "aux_loss": "load_balancing_loss",
    "seq_aux_loss": "seq_load_balancing_loss",
    "global_aux_loss": "global_load_balancing_loss",
}


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step gave, equal on all ranks.

    Attributes:
        loss: mean over the tokens of the global batch.
        grad_norm: before clipping; None without clipping.
        was_skipped: the optimizer made no update, since a gradient overflowed (fp16).
        wants_stop: a rank was asked to stop.
    """

    loss: float
    grad_norm: float | None
    was_skipped: bool
    wants_stop: bool


@dataclass(kw_only=True)
class _Interval:
    """Sums since the last report."""

    losses: list[float] = field(default_factory=list)
    num_skipped: int = 0
    start: float = field(default_factory=time.perf_counter)


def global_batch_size(config: Config, world_size: int) -> int:
    """Sequences in one step."""
    if config.training.global_batch_size is not None:
        return config.training.global_batch_size
    return config.training.micro_batch_size * data_parallel_size(config, world_size)


class Trainer:
    """A training run on this rank.

    Args:
        config: the settings.
        ranks: this rank.
        chunks: the model.
        datasets: the data.
    """

    def __init__(
        self, config: Config, ranks: Ranks, chunks: list[nn.Module], datasets: Datasets
    ) -> None:
        self.config, self.ranks, self.chunks, self.datasets = config, ranks, chunks, datasets
        self.global_batch_size = global_batch_size(config, ranks.world_size)
        self.num_microbatches = self.global_batch_size // (
            config.training.micro_batch_size * ranks.data_size
        )
        self.optimizer = build_optimizer(config, chunks)
        self.scheduler = build_scheduler(
            config, self.optimizer, global_batch_size=self.global_batch_size
        )
        self._set_hooks()
        loaded = load_checkpoint(config, chunks, self.optimizer, self.scheduler)
        self.progress = loaded or Progress()
        self.load_meter = self._make_load_meter()
        self.dropped_rows: DroppedRows | None = None
        if config.ep.capacity_factor is not None and config.moe.num_experts is not None:
            self.dropped_rows = DroppedRows(chunks, device=ranks.device)
        self.reporter = Reporter(config, rank=ranks.rank, iteration=self.progress.iteration)
        self._signal_received = False
        self._saved_iteration = self.progress.iteration if loaded else -1

    def _set_hooks(self) -> None:
        """What Megatron-Core's schedules call on the way."""
        from megatron.core.distributed import finalize_model_grads

        core_config = unwrap(self.chunks[0]).config
        core_config.grad_scale_func = self.optimizer.scale_loss
        core_config.finalize_model_grads_func = finalize_model_grads
        if self.config.parallelism.overlap_grad_reduce:
            core_config.no_sync_func = _one_or_list([chunk.no_sync for chunk in self.chunks])
            core_config.grad_sync_func = None
        if self.config.parallelism.overlap_param_gather and len(self.chunks) > 1:
            core_config.param_sync_func = [chunk.start_param_sync for chunk in self.chunks]

    def _make_load_meter(self) -> ExpertLoadMeter | None:
        if self.config.moe.num_experts is None:
            return None
        return ExpertLoadMeter(
            self.chunks,
            num_layers=self.config.model.num_layers,
            num_mtp_layers=num_mtp_layers(self.config),
            num_experts=self.config.moe.num_experts,
            device=self.ranks.device,
        )

    def train(self) -> bool:
        """Trains until train_iters or a stop.

        Returns:
            Whether the training is complete.
        """
        settings, interval = self.config.training, _Interval()
        begin, data = time.monotonic(), self._data_iterators(self.datasets.train)
        previous = self._catch_signals()
        try:
            while self.progress.iteration < settings.train_iters:
                with self._tracing():
                    step = self.step(data)
                interval.losses.append(step.loss)
                interval.num_skipped += step.was_skipped
                self.reporter.advance(step.loss)
                iteration = self.progress.iteration
                if iteration % self.config.logging.log_interval == 0:
                    self._report(interval, step)
                    interval = _Interval()
                if settings.eval_interval and iteration % settings.eval_interval == 0:
                    interval.start += self._evaluate_and_report()
                if _due(iteration, self.config.checkpoint.save_interval):
                    interval.start += self._save()
                if step.wants_stop or _due(iteration, settings.exit_interval):
                    break
                if self._time_is_up(begin):
                    break
            is_complete = self.progress.iteration >= settings.train_iters
            self._write_trace()
            if self.config.checkpoint.save_at_end or not is_complete:
                self._save()
        finally:
            self.reporter.close()
            for name, handler in previous.items():
                signal.signal(name, handler)
        if not is_complete:
            logger.info("stopped after step %d", self.progress.iteration)
        return is_complete

    def _tracing(self) -> contextlib.AbstractContextManager[None]:
        """Around the next step: records its timeline if it is one of those asked for."""
        settings, tracer = self.config.logging, active_tracer()
        num_before = self.progress.iteration + 1 - settings.trace_first_step
        if tracer is None or not 0 <= num_before < settings.trace_num_steps:
            return contextlib.nullcontext()
        return tracer.recording()

    def _write_trace(self) -> None:
        path, tracer = self.config.logging.trace, active_tracer()
        if path is None or tracer is None:
            return
        spans_of_ranks: list[Any] = [None] * self.ranks.world_size
        torch.distributed.all_gather_object(spans_of_ranks, tracer.spans())
        if self.ranks.rank != 0:
            return
        write_trace(path, spans_of_ranks)
        hidden = [hidden_fraction(spans) or 0.0 for spans in spans_of_ranks]
        logger.info(
            "wrote %s; hidden communication / communication: %.2f (ranks: %.2f to %.2f)",
            path,
            sum(hidden) / len(hidden),
            min(hidden),
            max(hidden),
        )

    def step(self, data: list[Iterator[Batch]]) -> StepResult:
        """One update of the weights."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()  # type: ignore[operator]
        self.optimizer.zero_grad()
        losses = get_forward_backward_func()(
            forward_step_func=self._forward_step,
            data_iterator=_one_or_list(data),
            model=self.chunks,
            num_microbatches=self.num_microbatches,
            seq_length=self.config.model.seq_length,
            micro_batch_size=self.config.training.micro_batch_size,
            forward_only=False,
        )
        was_updated, grad_norm, _ = self.optimizer.step()
        if was_updated:
            self.scheduler.step(increment=self.global_batch_size)
        self.progress.iteration += 1
        self.progress.consumed_samples += self.global_batch_size
        loss, wants_stop = self._agree(losses)
        return StepResult(
            loss=loss,
            grad_norm=None if grad_norm is None else float(grad_norm),
            was_skipped=not was_updated,
            wants_stop=wants_stop,
        )

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean loss over eval_iters global batches of validation data."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        assert self.datasets.valid is not None
        for chunk in self.chunks:
            chunk.eval()
        data = self._data_iterators(self.datasets.valid, consumed_samples=0)
        losses: list[dict[str, torch.Tensor]] = []
        for _ in range(self.config.training.eval_iters):
            losses += get_forward_backward_func()(
                forward_step_func=self._forward_step,
                data_iterator=_one_or_list(data),
                model=self.chunks,
                num_microbatches=self.num_microbatches,
                seq_length=self.config.model.seq_length,
                micro_batch_size=self.config.training.micro_batch_size,
                forward_only=True,
            )
        return self._agree(losses)[0]

    def _forward_step(
        self, data: Iterator[Batch] | None, model: nn.Module, return_schedule_plan: bool = False
    ) -> tuple[Any, Any]:
        """A micro batch, in the form that Megatron-Core's schedules call.

        The one that overlaps transfers with other micro batches takes a plan in place of results.
        """
        gpt = unwrap(model)
        batch: Batch = {}
        reads = gpt.pre_process or gpt.mtp_process or gpt.post_process
        if data is not None and (reads or self.config.data.reset_attention_mask):
            batch = next(data)
            batch = _slice_for_context_parallel(batch)
        forward = gpt.build_schedule_plan if return_schedule_plan else model
        output = forward(
            batch.get("tokens"),
            batch.get("position_ids"),
            batch.get("attention_mask"),
            labels=batch.get("labels"),
            loss_mask=batch.get("loss_mask"),
        )
        return output, functools.partial(_sum_loss, batch.get("loss_mask"))

    def _agree(self, losses: list[dict[str, torch.Tensor]]) -> tuple[float, bool]:
        """Sums losses and tokens over micro batches and ranks, and wishes to stop over ranks."""
        totals = torch.zeros(3, dtype=torch.float64, device=self.ranks.device)
        for entry in losses:
            totals[:2] += entry["lm loss"].double()
        totals[2] = float(self._signal_received)
        torch.distributed.all_reduce(totals)
        loss_sum, num_tokens, num_signals = totals.tolist()
        return loss_sum / max(num_tokens, 1.0), num_signals > 0

    def _data_iterators(
        self, dataset: Any, *, consumed_samples: int | None = None
    ) -> list[Iterator[Batch]]:
        """One iterator for each chunk of the model; they give the same batches."""
        if consumed_samples is None:
            consumed_samples = self.progress.consumed_samples
        return [
            make_iterator(
                dataset,
                self.config,
                self.ranks,
                consumed_samples=consumed_samples,
                global_batch_size=self.global_batch_size,
            )
            for _ in self.chunks
        ]

    def _report(self, interval: _Interval, step: StepResult) -> None:
        seconds = (time.perf_counter() - interval.start) / len(interval.losses)
        tokens = self.global_batch_size * self.config.model.seq_length
        values = {
            "loss": sum(interval.losses) / len(interval.losses),
            "lr": self.scheduler.get_lr(self.optimizer.param_groups[0]),
            "step_time_ms": seconds * 1e3,
            "tokens_per_s": tokens / seconds,
            "consumed_samples": self.progress.consumed_samples,
        }
        if step.grad_norm is not None:
            values["grad_norm"] = step.grad_norm
        if self.config.model.precision == "fp16":
            values["loss_scale"] = float(self.optimizer.get_loss_scale())
            values["skipped_steps"] = interval.num_skipped
        values |= self._aux_losses(len(interval.losses))
        if self.dropped_rows is not None:
            values["dropped_rows"] = self.dropped_rows.report()
        loads = self.load_meter.report() if self.load_meter is not None else []
        num_ranks = self.config.parallelism.expert_model_parallel_size
        if self.ranks.rank == 0 and num_ranks > 1:
            values |= rank_imbalance(loads, num_ranks=num_ranks)
        self.reporter.report("train", self.progress.iteration, values, loads)

    def _aux_losses(self, num_steps: int) -> dict[str, float]:
        """Means of the router's losses over layers and micro batches; collective."""
        moe = self.config.moe
        if moe.num_experts is None:
            return {}
        from megatron.core.transformer.moe.moe_utils import track_moe_metrics

        kinds = moe.moe_router_load_balancing_type
        names = [
            _AUX_LOSSES[k]
            for k in ([kinds] if isinstance(kinds, str) else kinds)
            if k in _AUX_LOSSES
        ]
        if moe.moe_z_loss_coeff is not None:
            names.append("z_loss")
        if not names:
            return {}
        totals: dict[str, torch.Tensor] = {}
        has_experts = layers_with_experts(self.config)
        has_experts += has_experts[-1:] * num_mtp_layers(self.config)
        track_moe_metrics(
            loss_scale=1.0 / (self.num_microbatches * num_steps),
            iteration=self.progress.iteration,
            total_loss_dict=totals,
            force_initialize=True,
            track_names=names,
            num_layers=len(has_experts),
            moe_layer_freq=[int(has) for has in has_experts],
        )
        return {name: float(value) for name, value in totals.items()}

    def _evaluate_and_report(self) -> float:
        """Returns the seconds that it took."""
        start = time.perf_counter()
        loss = self.evaluate()
        self.reporter.report("eval", self.progress.iteration, {"loss": loss})
        self.reporter.message(f"step {self.progress.iteration}: validation loss {loss:.4f}")
        return time.perf_counter() - start

    def _save(self) -> float:
        """Saves unless this step is saved already; returns the seconds that it took."""
        start = time.perf_counter()
        if self.config.checkpoint.save and self._saved_iteration != self.progress.iteration:
            path = save_checkpoint(
                self.config, self.chunks, self.optimizer, self.scheduler, self.progress
            )
            self._saved_iteration = self.progress.iteration
            self.reporter.message(f"saved {path}")
        return time.perf_counter() - start

    def _catch_signals(self) -> dict[signal.Signals, Any]:
        """Takes note of requests to stop; returns the handlers before."""
        if not self.config.training.exit_signal_handler:
            return {}

        def note(number: int, frame: Any) -> None:
            self._signal_received = True

        # torchrun leaves SIGUSR1 to its ranks; at SIGTERM it ends them after a while.
        return {name: signal.signal(name, note) for name in (signal.SIGTERM, signal.SIGUSR1)}

    def _time_is_up(self, begin: float) -> bool:
        """Whether exit_duration_in_mins is over; rank 0 decides."""
        limit = self.config.training.exit_duration_in_mins
        if limit is None:
            return False
        is_up = torch.tensor(int(time.monotonic() - begin > limit * 60), device=self.ranks.device)
        torch.distributed.broadcast(is_up, src=0)
        return bool(is_up)


def _due(iteration: int, interval: int | None) -> bool:
    return interval is not None and iteration % interval == 0


def _one_or_list(items: list[Any]) -> Any:
    return items[0] if len(items) == 1 else items


def _sum_loss(
    loss_mask: torch.Tensor | None, losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Loss of a micro batch as Megatron-Core's schedules want it: sum, tokens, what to report."""
    assert loss_mask is not None
    mask = loss_mask.reshape(-1).float()
    loss_sum = (losses.reshape(-1).float() * mask).sum()
    num_tokens = mask.sum()
    report = torch.stack([loss_sum.detach(), num_tokens])
    return loss_sum, num_tokens.to(torch.int), {"lm loss": report}


def _slice_for_context_parallel(batch: Batch) -> Batch:
    from megatron.core import parallel_state
    from megatron.core.utils import get_batch_on_this_cp_rank

    if parallel_state.get_context_parallel_world_size() == 1:
        return batch
    return get_batch_on_this_cp_rank(batch)

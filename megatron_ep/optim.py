"""The optimizer and the learning-rate schedule."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from megatron_ep.config import Config
from megatron_ep.config.build import optimizer_config


def build_optimizer(config: Config, chunks: list[nn.Module]) -> Any:
    """Megatron-Core's optimizer: plain, mixed precision or distributed, as the settings say."""
    from megatron.core.optimizer import get_megatron_optimizer, get_standard_config_overrides

    core_config = optimizer_config(config)
    return get_megatron_optimizer(
        core_config,
        chunks,
        config_overrides=get_standard_config_overrides(core_config),
        use_gloo_process_groups=False,
    )


def build_scheduler(config: Config, optimizer: Any, *, global_batch_size: int) -> Any:
    """Megatron-Core's scheduler; it counts samples, so that the batch size may change."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    schedule = config.lr_schedule
    decay_iters = schedule.lr_decay_iters or config.training.train_iters
    wsd_iters = schedule.lr_wsd_decay_iters
    return OptimizerParamScheduler(
        optimizer,
        init_lr=schedule.lr_warmup_init,
        max_lr=config.optimizer.lr,
        min_lr=config.optimizer.min_lr,
        lr_warmup_steps=schedule.lr_warmup_iters * global_batch_size,
        lr_decay_steps=decay_iters * global_batch_size,
        lr_decay_style=schedule.lr_decay_style,
        start_wd=config.optimizer.weight_decay,
        end_wd=config.optimizer.weight_decay,
        wd_incr_steps=config.training.train_iters * global_batch_size,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=not schedule.override_opt_param_scheduler,
        override_opt_param_scheduler=schedule.override_opt_param_scheduler,
        wsd_decay_steps=None if wsd_iters is None else wsd_iters * global_batch_size,
        lr_wsd_decay_style=schedule.lr_wsd_decay_style,
    )


def prepare_for_loading(optimizer: Any) -> None:
    """Gives torch's optimizers the state that a checkpoint is loaded into.

    NOTE: without Transformer Engine, the distributed optimizer reads the step of every parameter
    before it loads one, and so fails on an optimizer that has made no step.
    """
    for inner in _torch_optimizers(optimizer):
        for group in inner.param_groups:
            for parameter in group["params"]:
                state = inner.state[parameter]
                if not state and "betas" in group:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"] = torch.zeros_like(parameter.data)
                    state["exp_avg_sq"] = torch.zeros_like(parameter.data)


def finish_loading(optimizer: Any) -> None:
    """Gives each parameter a step counter of its own.

    NOTE: after a load, the distributed optimizer has one tensor for all; every parameter's update
    would advance it.
    """
    for inner in _torch_optimizers(optimizer):
        for state in inner.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()


def _torch_optimizers(optimizer: Any) -> Iterator[torch.optim.Optimizer]:
    """The optimizers of torch inside of Megatron-Core's; none where it uses fused ones."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = getattr(part, "optimizer", None)
        if isinstance(inner, (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)):
            yield inner

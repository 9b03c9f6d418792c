"""The optimizer and the learning-rate schedule."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from megatron_ep.config import Config, ConfigError
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
    decay_iters = _decay_iters(config)
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


def _decay_iters(config: Config) -> int:
    return config.lr_schedule.lr_decay_iters or config.training.train_iters


def check_schedule(config: Config, scheduler: Any, saved: dict[str, Any]) -> None:
    """Whether the schedule of a checkpoint is that of the settings, or these are to override it.

    Args:
        config: the settings.
        scheduler: what build_scheduler() gave for them.
        saved: state of the one in the checkpoint.

    Raises:
        ConfigError: they differ; names every setting with both values.
    """
    if config.lr_schedule.override_opt_param_scheduler:
        return
    own, step_size = scheduler.state_dict(), scheduler.lr_decay_steps // _decay_iters(config)
    has_decay_iters = config.lr_schedule.lr_decay_iters is not None
    iters = "lr_schedule.lr_decay_iters" if has_decay_iters else "training.train_iters"
    names = {
        "lr_decay_style": "lr_schedule.lr_decay_style",
        "max_lr": "optimizer.lr",
        "min_lr": "optimizer.min_lr",
        "end_wd": "optimizer.weight_decay",
        "lr_warmup_steps": "lr_schedule.lr_warmup_iters",
    }
    if own["lr_decay_style"] != "constant":
        names["lr_decay_steps"] = iters
    units = {key: step_size if key.endswith("_steps") else None for key in names}
    different = [
        f"{name} = {_in_units(own[key], units[key])}, in the checkpoint "
        f"{_in_units(saved[key], units[key])}"
        for key, name in names.items()
        if own[key] != saved[key]
    ]
    if different:
        raise ConfigError(
            "the checkpoint has another learning-rate schedule:\n"
            + "\n".join(f"  {line}" for line in different)
            + "\nlr_schedule.override_opt_param_scheduler = true goes on with the new one"
        )


def _in_units(value: Any, unit: int | None) -> Any:
    """Samples as steps."""
    return value if unit is None else f"{value / unit:g}"


def load_scheduler(config: Config, optimizer: Any, scheduler: Any, saved: dict[str, Any]) -> None:
    """Has the schedule go on where it was saved; after load_optimizer().

    NOTE: groups of parameters bring their learning rates along, which come before the schedule's.
    """
    if config.lr_schedule.override_opt_param_scheduler:
        for group in optimizer.param_groups:
            group |= {"max_lr": config.optimizer.lr, "min_lr": config.optimizer.min_lr}
    scheduler.load_state_dict(saved)


def load_optimizer(optimizer: Any, state: dict[str, Any]) -> None:
    """Loads what optimizer.sharded_state_dict() described, with the right step counters.

    NOTE: with torch's Adam, Megatron-Core 0.16's distributed optimizer overwrites the counters by
    those from before the load (format dp_reshardable) or looks for one in vain (fully_reshardable),
    and gives all parameters the same tensor, which every parameter's update then advances. The
    right value is in the parameter groups.

    Raises:
        ConfigError: experts had an optimizer of their own, and now do not, or the other way round.
    """
    for part in _parts(optimizer):
        if hasattr(part, "_set_main_param_and_optimizer_states"):
            _tolerate_missing_step(part)
    try:
        with torch.no_grad():
            optimizer.load_state_dict(state)
    except KeyError as error:
        raise ConfigError(
            f"the optimizer's state has other groups of parameters (no {error}), as with another "
            "expert_model_parallel_size: checkpoint.no_load_optim = true starts a new one"
        ) from error
    for inner in _torch_optimizers(optimizer):
        for group in inner.param_groups:
            for parameter in group["params"]:
                own = inner.state[parameter]
                if "step" in own:
                    step = group.get("step")
                    own["step"] = own["step"].clone() if step is None else torch.tensor(float(step))


def prepare_for_loading(optimizer: Any) -> None:
    """Gives torch's optimizers the state that a checkpoint is loaded into.

    NOTE: without Transformer Engine, the distributed optimizer reads the step of every parameter
    before it loads one, and so fails on an optimizer that has made no step. For sgd Megatron-Core
    has no function that makes the state, and calls it all the same.
    """
    for part in _parts(optimizer):
        if getattr(part, "init_state_fn", _make_no_state) is None:
            part.init_state_fn = _make_no_state
    for inner in _torch_optimizers(optimizer):
        for group in inner.param_groups:
            for parameter in group["params"]:
                state = inner.state[parameter]
                if not state and "betas" in group:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"] = torch.zeros_like(parameter.data)
                    state["exp_avg_sq"] = torch.zeros_like(parameter.data)
                elif not state and group.get("momentum"):
                    state["momentum_buffer"] = torch.zeros_like(parameter.data)


def _make_no_state(optimizer: Any, config: Any = None) -> None:
    """The state is there."""


def _tolerate_missing_step(part: Any) -> None:
    """The step may be missing among the tensors that the distributed optimizer copies from."""
    original = part._set_main_param_and_optimizer_states

    def set_states(model_param: Any, tensors: dict[str, torch.Tensor]) -> None:
        own = part._get_main_param_and_optimizer_states(model_param)
        step = {name: own[name] for name in ("step",) if name in own}
        original(model_param, {**step, **tensors})

    part._set_main_param_and_optimizer_states = set_states


def _parts(optimizer: Any) -> list[Any]:
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _torch_optimizers(optimizer: Any) -> Iterator[torch.optim.Optimizer]:
    """The optimizers of torch inside of Megatron-Core's; none where it uses fused ones."""
    for part in _parts(optimizer):
        inner = getattr(part, "optimizer", None)
        if isinstance(inner, (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)):
            yield inner
